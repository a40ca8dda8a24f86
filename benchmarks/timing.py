"""Timing side by side: interleaved runs in one process, medians and ratios, a table and a JSON file."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def benchmark_parser(description: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser of the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the kernels; default 2")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"measured calls of each kind; default {repeats}")
    parser.add_argument("--output", help="JSON file to write the table to")
    return parser


def interleave(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function: all are called in turn, `repeats` times, after one unmeasured call each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What a timing depends on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.processor()
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def publish(name: str, header: Sequence[str], rows: Sequence[Sequence[Any]], output: str | None) -> None:
    """Print the rows as a Markdown table, and write them with the machine to the JSON file `output`, if given.

    A cell that is `None` has no value: a dash in the table, null in the file.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    print(f"{name} ({', '.join(f'{key} {value}' for key, value in machine().items())})\n")
    for line in (header, ["---"] * len(header), *cells):
        print(f"| {' | '.join(line)} |")
    if output:
        records = [dict(zip(header, row, strict=True)) for row in rows]
        Path(output).write_text(json.dumps({"name": name, "machine": machine(), "rows": records}, indent=2) + "\n")
