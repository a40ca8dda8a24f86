"""Options of runs that take a second, and a text for them."""

import random
from pathlib import Path

import train

WORDS = (
    *("the", "a", "sea", "lamp", "old", "stone", "river", "was", "born", "in", "town", "year"),
    *("of", "king", "road", "and", "bells", "rang", "noon", "cart", "gate"),
)


def write_text(path: Path, lines: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    path.write_text("".join(" ".join(rng.choices(WORDS, k=12)) + "\n" for _ in range(lines)), encoding="utf-8")
    return str(path)


def command_line(options: dict) -> list[str]:
    """Options as a command line: a list is several values, `None` leaves an option out."""
    words = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def tiny_options(folder: Path, **options) -> dict:
    """Options of train.py for a tiny run on files in `folder`, which are written when they are not there."""
    for name, lines, seed in (("train.txt", 30, 0), ("validation.txt", 6, 1)):
        if not (folder / name).exists():
            write_text(folder / name, lines, seed)
    defaults = {
        "train_file": folder / "train.txt",
        "validation_file": folder / "validation.txt",
        "output_dir": folder / "run",
        "tokenizer_vocab_size": 280,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "dropout": 0.0,
        "seq_len": 8,
        "windows_per_example": 2,
        "mem_slots": 8,
        "mem_width": 8,
        "num_reads": 2,
        "scan": "eager",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 0.01,
        "lambda_routing": 0.1,
        "lambda_entropy": 0.05,
        "use_cpu": True,
        "seed": 5,
    }
    return {**defaults, **options}


def tiny_run(folder: Path, **options) -> dict:
    """Run train.py in this process; returns the comparison."""
    return train.main(command_line(tiny_options(folder, **options)))
