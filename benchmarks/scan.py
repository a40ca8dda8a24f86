"""The fused scan against the readable recurrence: forward and backward of the memory's recurrence alone.

python benchmarks/scan.py --threads 2 --output scan.json
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import interleave, publish

from configuration_dnc_gpt2 import DNCGPT2Config
from memory_dnc_gpt2 import DNCMemory

SHAPES = ((4, 128, 64, 128, 4), (32, 128, 64, 64, 4), (4, 1024, 64, 128, 4))
HIDDEN = 64


def scan_step(addressing: str, scan: str, shape: tuple[int, ...]):
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
    memory = DNCMemory(config)
    memory.init_weights()
    hidden = torch.randn(batch, tokens, HIDDEN, requires_grad=True)
    embeddings = torch.randn(batch, tokens, HIDDEN)

    def step() -> None:
        memory(hidden, embeddings).hidden_states.square().mean().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--addressings", nargs="+", default=["lru", "dnc", "simplified"])
    parser.add_argument("--output")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for shape in SHAPES:
        for addressing in arguments.addressings:
            times = interleave(
                {scan: scan_step(addressing, scan, shape) for scan in ("numba", "eager")}, arguments.repeats
            )
            rows.append(
                [str(shape), addressing, 1000 * times["numba"], 1000 * times["eager"], times["eager"] / times["numba"]]
            )
    header = ["batch, tokens, slots, width, heads", "addressing", "fused ms", "eager ms", "eager / fused"]
    publish("Memory forward and backward", header, rows, arguments.output)


if __name__ == "__main__":
    main()
