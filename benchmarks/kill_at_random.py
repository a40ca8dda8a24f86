"""Is a run that is killed at random moments, and resumed each time, the unbroken one, in losses and weights?

    python benchmarks/kill_at_random.py --kills 40

Each run of train.py (both models, tiny, memory carried, dropout, a checkpoint every second step) is killed (SIGKILL) at
a moment drawn from its whole duration and resumed, until it finishes; then the next one begins, until there were as
many kills as asked for.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import publish

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("baseline", "dnc")
OPTIONS = (
    "--tokenizer_vocab_size 280 --hidden_size 32 --num_layers 1 --num_heads 2 --dropout 0.1 --seq_len 16 "
    "--windows_per_example 2 --mem_slots 16 --mem_width 16 --num_reads 1 --carry_memory true --max_steps 24 "
    "--per_device_train_batch_size 4 --logging_steps 7 --save_steps 2 --save_total_limit 2 --scan eager --use_cpu true"
)


def write_texts(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioulnrst", k=rng.randint(2, 7))) for _ in range(60)]
    for name, count in (("train.txt", 4000), ("validation.txt", 100)):
        (folder / name).write_text(" ".join(rng.choices(words, k=count)))


def start(folder: Path, run: str, log: Path) -> subprocess.Popen:
    """The run, gone on with where it was begun."""
    data = ["--train_file", folder / "train.txt", "--validation_file", folder / "validation.txt"]
    resume = ["--resume_from_checkpoint", "true"] if (folder / run).exists() else []
    command = [sys.executable, ROOT / "train.py", *OPTIONS.split(), *data, "--output_dir", folder / run, *resume]
    with open(log, "a") as file:
        return subprocess.Popen(
            [*map(str, command)], stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )


def outcome(run: Path) -> dict:
    """What must be equal: all losses that were logged, and the weights."""
    found = {}
    for kind in KINDS:
        rows = json.loads((run / kind / "trainer_state.json").read_text())["log_history"]
        found[kind] = [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]
        found[f"{kind} weights"] = (run / kind / "model.safetensors").read_bytes()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON file to write the table to")
    parser.add_argument("--kills", type=int, default=40, help="default 40")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    options = parser.parse_args(arguments)
    rng, kills, finished, equal, half_written = random.Random(options.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        write_texts(folder, options.seed)
        begin = time.perf_counter()
        if start(folder, "unbroken", log).wait():
            sys.exit(log.read_text())
        seconds, expected = time.perf_counter() - begin, outcome(folder / "unbroken")
        while kills < options.kills:
            process = start(folder, f"run_{finished}", log)
            try:
                code = process.wait(rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                continue
            if code:
                sys.exit(log.read_text())
            equal += outcome(folder / f"run_{finished}") == expected
            finished += 1
        if start(folder, f"run_{finished}", log).wait():  # the last one, to its end
            sys.exit(log.read_text())
        equal += outcome(folder / f"run_{finished}") == expected
        finished += 1
        half_written = log.read_text().count("is not whole")
    header = ["kills", "half-written checkpoints skipped", "runs finished", "equal to the unbroken one"]
    publish("kill_at_random", header, [[kills, half_written, finished, equal]], options.output)
    if equal < finished:
        sys.exit(1)


if __name__ == "__main__":
    main()
