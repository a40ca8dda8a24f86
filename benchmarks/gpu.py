"""On a CUDA device: a training step against plain GPT-2, and the Triton scan against the readable recurrence.

python benchmarks/gpu.py --output gpu.json
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scan import scan_step
from timing import benchmark_parser, interleave, publish
from training_step import SIZES, TERMS, dnc_trainer, trainer_step

from configuration_dnc_gpt2 import ADDRESSINGS

STEP_TARGET = 1.25  # at most, of GPT-2's step
SCAN_TARGET = 50  # at least, times as fast as the eager recurrence


def measure(arguments: argparse.Namespace) -> list[list]:
    """One row a measurement: name, milliseconds of reference and ours, ratio, target, whether it is reached."""
    rows = []
    sizes = dataclasses.replace(
        SIZES["origin"], batch=arguments.batch, tokens=arguments.tokens, n_positions=arguments.tokens
    )
    inputs = sizes.inputs()
    losses = {"no loss term": dict.fromkeys(TERMS, 0.0), "both terms": TERMS}
    for addressing in arguments.addressings:
        with tempfile.TemporaryDirectory() as folder:
            trainers = {
                name: dnc_trainer(folder, sizes, "dnc", {"addressing": addressing}, bf16=True, **terms)
                for name, terms in losses.items()
            }
            trainers["baseline"] = dnc_trainer(folder, sizes, "baseline", bf16=True)
            functions = {name: trainer_step(trainer, inputs) for name, trainer in trainers.items()}
            times = interleave(functions, arguments.repeats)
        for loss in losses:
            ratio = times[loss] / times["baseline"]
            name = (
                f"training step, {arguments.batch} x {arguments.tokens} tokens, bf16, {addressing}, {loss}, to GPT-2's"
            )
            target = f"at most {STEP_TARGET}", ratio <= STEP_TARGET
            rows.append([name, 1000 * times["baseline"], 1000 * times[loss], ratio, *target])
        del functions, trainers
        torch.cuda.empty_cache()
    shape = (arguments.batch, arguments.tokens, 64, 128, 4)
    for addressing in arguments.addressings:
        functions = {scan: scan_step(addressing, scan, shape, "cuda") for scan in ("triton", "eager")}
        times = interleave(functions, arguments.repeats)
        ratio = times["eager"] / times["triton"]
        target = f"at least {SCAN_TARGET}", ratio >= SCAN_TARGET
        name = f"scan forward and backward, {shape}, {addressing}, eager to Triton"
        rows.append([name, 1000 * times["eager"], 1000 * times["triton"], ratio, *target])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--addressings", nargs="+", choices=ADDRESSINGS, default=list(ADDRESSINGS))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch finds none on this machine.")
    header = ["measurement", "reference ms", "ours ms", "ratio", "target", "reached"]
    publish("On a GPU", header, measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
