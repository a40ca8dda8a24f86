"""Peak memory of the whole process in training steps: each system in a fresh process of its own.

All processes load the same libraries before the model; what they hold by then is printed beside the peak.

python benchmarks/peak_memory.py --threads 2 --output peak_memory.json
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from origin_loop import origin_trainer
from scan import scan_step
from timing import benchmark_parser, publish
from training_step import SIZES, Sizes, dnc_trainer, trainer_step

from configuration_dnc_gpt2 import ADDRESSINGS
from dnc_gpt2.models import new_models

MIB = 2**20
SYSTEMS = {
    "gpt2": "GPT-2, transformers' Trainer and loss",
    "baseline": "GPT-2, DNCTrainer",
    "dnc": "with memory, DNCTrainer",
    "eager": "with memory, DNCTrainer, eager scan",
    "origin": "the origin's loop",
}


def process_memory() -> tuple[int, int]:
    """Bytes that this process holds now, and the most that it ever held.

    `resource.getrusage` is no substitute: there a process starts with its parent's peak.

    Raises:
        OSError: the system is no Linux.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        raise OSError(f"Peak memory is read from {status}, which this system does not have: run this on Linux.")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def system_step(system: str, sizes: Sizes, options: Mapping[str, Any], folder: str) -> Callable[[], None]:
    """A function that makes one optimizer step of a new model of `SYSTEMS`; `options` of the memory's configuration."""
    inputs = sizes.inputs()
    if system == "gpt2":
        model = new_models(sizes.config(), ["baseline"], seed=0)["baseline"]
        arguments = TrainingArguments(output_dir=folder, disable_tqdm=True, use_cpu=True)
        trainer = Trainer(model, arguments, train_dataset=sizes.dataset())
        return trainer_step(trainer, {name: inputs[name] for name in ("input_ids", "labels")})
    if system == "origin":
        return trainer_step(origin_trainer(folder, sizes), inputs)
    options = {**options, "scan": "eager"} if system == "eager" else options
    return trainer_step(dnc_trainer(folder, sizes, "baseline" if system == "baseline" else "dnc", options), inputs)


def _steps_in_this_process(
    system: str, sizes: Sizes, options: Mapping[str, Any], repeats: int, threads: int
) -> tuple[int, int]:
    torch.set_num_threads(threads)
    before, _ = process_memory()
    with tempfile.TemporaryDirectory() as folder:
        step = system_step(system, sizes, options, folder)
        for _ in range(repeats):
            step()
    return before, process_memory()[1]


def peak_memory(
    system: str, sizes: Sizes, options: Mapping[str, Any], repeats: int, threads: int
) -> tuple[float, float]:
    """MiB that a fresh process holds before it has a model, and at most in `repeats` training steps.

    From the second step on the optimizer's state stands beside all else.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        before, peak = pool.submit(_steps_in_this_process, system, sizes, options, repeats, threads).result()
    return before / MIB, peak / MIB


def compile_kernels(addressings: Sequence[str]) -> None:
    """Have the fused scans in numba's cache, so that no measured process holds a compiler's memory."""
    for addressing in addressings:
        scan_step(addressing, "numba", (1, 2, 2, 4, 1))()


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--sizes", choices=SIZES, default="origin")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--addressings", nargs="+", choices=ADDRESSINGS, default=["lru"])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    compile_kernels(arguments.addressings)
    # GPT-2 comes first: all else is compared with it.
    kinds = [("gpt2", None)]
    for system in arguments.systems:
        if system in ("dnc", "eager"):
            kinds += [(system, addressing) for addressing in arguments.addressings]
        elif system != "gpt2":
            kinds.append((system, None))
    rows = []
    for system, addressing in kinds:
        options = {} if addressing is None else {"addressing": addressing}
        before, peak = peak_memory(system, SIZES[arguments.sizes], options, arguments.repeats, arguments.threads)
        first = rows[0][3] if rows else peak
        target = 1.0 if system == "dnc" else None
        rows.append([SYSTEMS[system], addressing, before, peak, peak / first, target])
    header = ["system", "addressing", "before the model MiB", "peak MiB", "ratio to GPT-2", "target, at most"]
    publish(f"Peak memory of training steps, sizes {arguments.sizes}", header, rows, arguments.output)


if __name__ == "__main__":
    main()
