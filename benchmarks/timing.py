"""Timing side by side: interleaved runs in one process, medians and ratios, a table and a JSON file."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def interleave(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function: all are called in turn, `repeats` times, after one unmeasured call each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What a timing depends on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def publish(name: str, header: Sequence[str], rows: Sequence[Sequence[Any]], output: str | None) -> None:
    """Print the rows as a Markdown table, and write them with the machine to the JSON file `output`, if given."""
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    print(f"{name} ({', '.join(f'{key} {value}' for key, value in machine().items())})\n")
    for line in (header, ["---"] * len(header), *cells):
        print(f"| {' | '.join(line)} |")
    if output:
        records = [dict(zip(header, row, strict=True)) for row in rows]
        Path(output).write_text(json.dumps({"name": name, "machine": machine(), "rows": records}, indent=2) + "\n")
