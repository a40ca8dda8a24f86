"""The fused scan against the readable recurrence: forward and backward of the memory's recurrence alone.

python benchmarks/scan.py --threads 2 --output scan.json
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import benchmark_parser, interleave, publish

from configuration_dnc_gpt2 import ADDRESSINGS, DNCGPT2Config
from memory_dnc_gpt2 import DNCMemory

SHAPES = ((4, 128, 64, 128, 4), (32, 128, 64, 64, 4), (4, 1024, 64, 128, 4))
TARGETS = {(4, 128, 64, 128, 4): 7.0, (4, 1024, 64, 128, 4): 12.0}
HIDDEN = 64


def scan_step(addressing: str, scan: str, shape: tuple[int, ...], device: str = "cpu") -> Callable[[], None]:
    """A function that runs the memory (with small projections) forward and backward at (B, T, N, W, R)."""
    batch, tokens, slots, width, heads = shape
    config = DNCGPT2Config(
        n_embd=HIDDEN,
        n_head=1,
        n_layer=1,
        mem_slots=slots,
        mem_width=width,
        num_reads=heads,
        addressing=addressing,
        scan=scan,
    )
    torch.manual_seed(0)
    memory = DNCMemory(config).to(device)
    memory.init_weights()
    hidden = torch.randn(batch, tokens, HIDDEN, device=device, requires_grad=True)
    embeddings = torch.randn(batch, tokens, HIDDEN, device=device)

    def step() -> None:
        memory(hidden, embeddings).hidden_states.square().mean().backward()

    return step


def shape(text: str) -> tuple[int, ...]:
    """The numbers of "4,128,64,128,4"."""
    numbers = tuple(map(int, text.split(",")))
    if len(numbers) != 5 or min(numbers) < 1:
        raise ValueError
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--addressings", nargs="+", choices=ADDRESSINGS, default=list(ADDRESSINGS))
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=SHAPES, help="batch,tokens,slots,width,heads of each row"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    for sizes in arguments.shapes:
        for addressing in arguments.addressings:
            times = interleave(
                {scan: scan_step(addressing, scan, sizes) for scan in ("numba", "eager")}, arguments.repeats
            )
            fused, eager = 1000 * times["numba"], 1000 * times["eager"]
            rows.append([", ".join(map(str, sizes)), addressing, fused, eager, eager / fused, TARGETS.get(sizes)])
    header = ["batch, tokens, slots, width, heads", "addressing", "fused ms", "eager ms", "eager / fused"]
    publish("Memory forward and backward", [*header, "target, at least"], rows, arguments.output)


if __name__ == "__main__":
    main()
