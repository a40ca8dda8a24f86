"""How the memory's forward and backward pass grows in tokens, slots, width, heads and batch, one varied at a time.

python benchmarks/scaling.py --threads 2 --output scaling.json
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scan import scan_step
from timing import benchmark_parser, interleave, publish

from configuration_dnc_gpt2 import ADDRESSINGS

BASE = {"batch": 4, "tokens": 128, "slots": 64, "width": 128, "heads": 4}
RANGES = {
    "tokens": (128, 512, 2048, 8192, 16384),
    "slots": (16, 64, 256, 1024),
    "width": (32, 64, 128, 256, 512),
    "heads": (1, 2, 4, 8),
    "batch": (1, 2, 4, 8, 16, 32),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--addressings", nargs="+", choices=ADDRESSINGS, default=["lru"])
    parser.add_argument("--scan", choices=["numba", "eager"], default="numba", help="default: the fused scan")
    parser.add_argument("--vary", nargs="+", choices=RANGES, default=list(RANGES), help="default: all")
    for name, size in BASE.items():
        help = f"sizes where it is varied; default {' '.join(map(str, RANGES[name]))} (elsewhere {size})"
        parser.add_argument(f"--{name}", nargs="+", type=int, default=RANGES[name], help=help)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    for addressing in arguments.addressings:
        for name in arguments.vary:
            shapes = {size: {**BASE, name: size} for size in getattr(arguments, name)}
            steps = {
                size: scan_step(addressing, arguments.scan, tuple(shape.values())) for size, shape in shapes.items()
            }
            times = interleave(steps, arguments.repeats)
            per_token = {size: 1e6 * times[size] / (shape["batch"] * shape["tokens"]) for size, shape in shapes.items()}
            first = next(iter(per_token.values()))
            rows += [[addressing, name, size, value, value / first] for size, value in per_token.items()]
    base = ", ".join(f"{name} {size}" for name, size in BASE.items())
    header = ["addressing", "varied", "size", "us a token", "ratio to the first"]
    publish(f"Memory forward and backward around {base}", header, rows, arguments.output)


if __name__ == "__main__":
    main()
