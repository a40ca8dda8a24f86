"""Compare saved checkpoints side by side on one validation split.

    python compare.py runs/embedded/baseline runs/embedded/dnc

Checkpoints that train.py saved know their data; name a split with the data options to use another.
"""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from transformers import logging as transformers_logging

from dnc_gpt2.comparison import compare_checkpoints, printed
from dnc_gpt2.data import DataArguments
from dnc_gpt2.opponents import SCORED, TRAINED, trained_folder
from dnc_gpt2.options import INSPECT_OPTION, OPPONENTS_OPTION, one_line_errors, parse, recall_run


@dataclass
class CompareArguments:
    """Options of the comparison itself."""

    output_dir: str = field(default="runs/comparison", metadata={"help": "Folder for the results."})
    report: str | None = field(
        default=None, metadata={"help": "File for an HTML page with all of it, such as report.html."}
    )
    reference: str | None = field(
        default=None, metadata={"help": "Checkpoint that changes are measured against; by default the first."}
    )
    cache_entries: int | None = field(
        default=None,
        metadata={"help": "Entries of --opponents neural_cache; by default the slots of the first memory compared."},
    )
    batch_size: int = field(default=8, metadata={"help": "Examples at a time where no memory is carried."})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, fp16 or bf16.", "choices": ["no", "fp16", "bf16"]}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a checkpoint brings along."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace earlier results."})

    def __post_init__(self) -> None:
        for name in ("batch_size", "cache_entries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed; it must be at least 1.")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Compare; returns the comparison."""
    extra = {
        "checkpoints": {"nargs": "+", "help": "Folders or hub names of two or more causal language models."},
        **INSPECT_OPTION,
        **OPPONENTS_OPTION,
    }
    options, data, lists = parse((CompareArguments, DataArguments), arguments, extra=extra)
    runs = [run for run in map(recall_run, lists.checkpoints) if run is not None]
    run = runs[0] if runs else None
    if run is not None:
        options, data, lists = parse((CompareArguments, DataArguments), arguments, extra=extra, defaults=run["data"])
    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=options.use_cpu)
    quiet = not sys.stderr.isatty() or not accelerator.is_main_process
    if quiet:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    results = Path(options.output_dir) / "comparison.json"
    if results.exists() and not options.overwrite_output_dir:
        sys.exit(f"compare.py: {results} already exists; choose another --output_dir or add --overwrite_output_dir.")
    if options.report is not None:
        if Path(options.report).is_dir() or Path(options.report).suffix.lower() not in (".html", ".htm"):
            sys.exit(f"compare.py: --report {options.report} is no HTML file; name one, such as report.html.")
        if Path(options.report).exists() and not options.overwrite_output_dir:
            sys.exit(
                f"compare.py: {options.report} already exists; choose another --report or add --overwrite_output_dir."
            )
    if Path(options.output_dir).is_file():
        sys.exit(f"compare.py: {options.output_dir} is a file; choose another --output_dir.")
    if options.cache_entries is not None and "neural_cache" not in lists.opponents:
        sys.exit(f"compare.py: --cache_entries {options.cache_entries} needs --opponents neural_cache.")
    checkpoints = named(lists.checkpoints)
    if options.reference is not None:
        if options.reference not in lists.checkpoints and options.reference not in checkpoints:
            sys.exit(f"compare.py: --reference {options.reference} is none of {', '.join(lists.checkpoints)}.")
        # A stable sort that puts the reference first.
        checkpoints = dict(sorted(checkpoints.items(), key=lambda item: options.reference not in item))
    checkpoints |= trained_opponents(lists.opponents, checkpoints, run)
    comparison = compare_checkpoints(
        checkpoints,
        data,
        options.output_dir,
        opponents=[name for name in lists.opponents if name in SCORED],
        cache_entries=options.cache_entries,
        accelerator=accelerator,
        batch_size=options.batch_size,
        seed=run["seed"] if len({run["seed"] for run in runs}) == 1 else None,
        inspect=lists.inspect,
        report_path=options.report,
        trust_remote_code=options.trust_remote_code,
        progress=not quiet,
    )
    if accelerator.is_main_process:
        print(printed(comparison))
        print(f"\n  Everything is in {options.output_dir}/")
    return comparison


def named(checkpoints: list[str]) -> dict[str, str]:
    """Name -> checkpoint: the folder's name, or the whole path where several folders share it."""
    last = [Path(path).name or path for path in checkpoints]
    counts = Counter(last)
    names = [name if counts[name] == 1 else path for name, path in zip(last, checkpoints, strict=True)]
    if len(set(names)) < len(names):
        sys.exit(f"compare.py: a checkpoint is named twice in {' '.join(checkpoints)}; name each once.")
    return dict(zip(names, checkpoints, strict=True))


def trained_opponents(opponents: list[str], checkpoints: dict[str, str], run: dict[str, Any] | None) -> dict[str, str]:
    """Name -> checkpoint of the opponents that are models of their own, from the folders beside the checkpoints.

    Ends the process where some are missing; `run` is what the checkpoints remember of their training.
    """
    wanted = [name for name in opponents if name in TRAINED]
    folders = {name: trained_folder(name, list(checkpoints.values())) for name in wanted}
    if missing := [name for name, folder in folders.items() if folder is None]:
        arguments = (run or {}).get("arguments", ["..."])
        if any(argument.startswith("--overwrite_output_dir") for argument in arguments):
            arguments = [*arguments, "--overwrite_output_dir", "false"]
        command = shlex.join(["python", "train.py", *arguments, "--opponents", ",".join(opponents)])
        sys.exit(
            f"compare.py: --opponents {','.join(missing)} not found beside {', '.join(checkpoints.values())}; train "
            f"with: {command} --resume_from_checkpoint true"
        )
    given = {Path(path).resolve() for path in checkpoints.values()}
    found = {name: folder for name, folder in folders.items() if Path(folder).resolve() not in given}
    return {folder if TRAINED[name] in checkpoints else TRAINED[name]: folder for name, folder in found.items()}


if __name__ == "__main__":
    with one_line_errors("compare.py"):
        main()
