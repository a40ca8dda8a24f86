"""Time and peak memory of a training step against the number of tokens in its one example: a small model, window 128.

Times are of one process, interleaved; the peak of each length is that of a process of its own.

python benchmarks/long_examples.py --threads 2 --output long_examples.json
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peak_memory import compile_kernels, peak_memory, system_step
from timing import benchmark_parser, interleave, publish
from training_step import SIZES

from configuration_dnc_gpt2 import ADDRESSINGS

TARGET = 1.1  # of the longest against the shortest, per token


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--sizes", choices=SIZES, default="small")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192, 16384])
    parser.add_argument("--addressings", nargs="+", choices=ADDRESSINGS, default=["lru"])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    lengths = {
        tokens: dataclasses.replace(SIZES[arguments.sizes], batch=1, tokens=tokens) for tokens in arguments.tokens
    }
    for tokens, sizes in lengths.items():
        if tokens % sizes.n_positions:
            parser.error(f"--tokens {tokens} is not a multiple of the attention window {sizes.n_positions}")
    compile_kernels(arguments.addressings)
    rows = []
    for addressing in arguments.addressings:
        options = {"addressing": addressing}
        peaks = {
            tokens: peak_memory("dnc", sizes, options, arguments.repeats, arguments.threads)[1]
            for tokens, sizes in lengths.items()
        }
        with tempfile.TemporaryDirectory() as folder:
            steps = {tokens: system_step("dnc", sizes, options, folder) for tokens, sizes in lengths.items()}
            times = interleave(steps, arguments.repeats)
        first = previous = arguments.tokens[0]
        for tokens, seconds in times.items():
            ratio = (seconds / tokens) / (times[first] / first)
            grown = 1024 * (peaks[tokens] - peaks[previous]) / (tokens - previous) if tokens > previous else None
            target = TARGET if tokens > first else None
            rows.append([addressing, tokens, 1000 * seconds, 1e6 * seconds / tokens, ratio, target])
            rows[-1] += [peaks[tokens], grown]
            previous = tokens
    header = ["addressing", "tokens", "ms a step", "us a token", "ratio to the first", "target, at most"]
    header += ["peak MiB", "KiB a further token"]
    publish(f"Tokens in one example, sizes {arguments.sizes}", header, rows, arguments.output)


if __name__ == "__main__":
    main()
