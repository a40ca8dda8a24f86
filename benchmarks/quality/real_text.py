"""Validation perplexity on real text relative to plain GPT-2: the memory, its parts taken away, and other systems.

A small GPT-2 (3 layers x 128, attention window of 64 tokens, a BPE of its own of 4,096 tokens) is trained for 1,000
steps of 8 x 256 tokens, memory carried from step to step, and scored on the whole validation split. Every model of a
seed sees the same data in the same order from the same initial backbone. What is finished is kept in `--folder` and not
made again, so that a run can be interrupted, and go on with further models and seeds.

python benchmarks/quality/real_text.py --train_file test.txt --validation_file valid.txt --models gpt2 lru-64 cache-64
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from fitting import settle
from timing import publish

ROOT = Path(__file__).resolve().parent.parent.parent
SETTING = {
    "hidden_size": 128,
    "num_layers": 3,
    "num_heads": 4,
    "mem_width": 192,
    "address_width": 64,
    "num_reads": 1,
    "tokenizer_vocab_size": 4096,
    "seq_len": 64,
    "windows_per_example": 4,
    "carry_memory": True,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "warmup_steps": 30,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": json.dumps({"min_lr_rate": 0.05}),
    "lambda_routing": 0.0,
    "lambda_entropy": 0.0,
    "held_out_tokens": 10_000,
    "eval_strategy": "no",
    "save_strategy": "no",
}
OPEN = 30.0  # the logit of a gate that is open and, its gradient being nothing, stays so
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model": "baseline"},
    **{f"lru-{slots}": {"mem_slots": slots} for slots in (64, 256, 1024)},
    **{f"lru-{slots}-no-pointer": {"mem_slots": slots, "pointer_weight": 0.0} for slots in (64, 256, 1024)},
    "lru-64-no-token": {"mem_slots": 64, "address_token": False},
    "lru-64-no-shift": {"mem_slots": 64, "token_shift": False},
    "lru-64-no-surprise": {"mem_slots": 64, "surprise_weight": 0.0},
    "lru-64-no-threshold": {"mem_slots": 64, "write_threshold": 0.0},
    "lru-64-refresh": {"mem_slots": 64, "read_refresh": 0.3},
    "lru-64-open": {"mem_slots": 64, "write_gate_bias": OPEN, "allocation_gate_bias": OPEN},
    "lru-256-open": {"mem_slots": 256, "write_gate_bias": OPEN, "allocation_gate_bias": OPEN},
    "lru-64-routing": {"mem_slots": 64, "lambda_routing": 0.1},
    "lru-64-entropy": {"mem_slots": 64, "lambda_entropy": 0.05},
    "lru-64-both-terms": {"mem_slots": 64, "lambda_routing": 0.1, "lambda_entropy": 0.05},
    "lru-64-4-heads": {"mem_slots": 64, "num_reads": 4},
    "lru-1024-strength-9": {"mem_slots": 1024, "read_strength_init": 9.0},
    "widened": {"model": "baseline", "hidden_size": 140},  # 1,293,740 parameters; those with memory have 1,259,911
    "long-window": {"model": "baseline", "seq_len": 256, "windows_per_example": 1},
    "dnc-64": {"mem_slots": 64, "addressing": "dnc", "address_width": None},
    "simplified-64": {"mem_slots": 64, "addressing": "simplified", "address_width": None},
}
"""Name -> options of train.py beside those of `SETTING`; `None` leaves one of those out."""
MODELS |= {
    f"{name}-on-top": {**options, "memory_layer": SETTING["num_layers"]}
    for name, options in MODELS.items()
    if "mem_slots" in options
}
SCORED = {
    **{f"cache-{entries}": {"opponents": "neural_cache", "cache_entries": entries} for entries in (64, 256, 1024)},
    "overlapping": {"opponents": "overlapping"},
}
"""Another way to score GPT-2 -> options of compare.py."""
SETTLED = ("train_file", "validation_file", "steps", "eval_steps")
"""Options that the results in a folder share."""


def command_options(options: Mapping[str, Any]) -> list[str]:
    """Options as train.py takes them."""
    return [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]


def run(script: str, arguments: Sequence[str], log: Path) -> None:
    """Run a script of the project; its output goes to the end of `log`. Ends this process where it fails."""
    with log.open("a") as output:
        code = subprocess.run([sys.executable, ROOT / script, *arguments], stdout=output, stderr=output).returncode
    if code:
        sys.exit(f"{script} failed; see {log}.")


def finished(folder: Path, models: int) -> bool:
    """Whether the comparison in a folder, which fills up model by model, has all of them."""
    path = folder / "comparison.json"
    return path.is_file() and len(json.loads(path.read_text())["models"]) == models


def train(name: str, seed: int, options: argparse.Namespace) -> Path:
    """The checkpoint of one model, trained unless it is there."""
    folder = options.folder / f"seed-{seed}" / name
    changes = {"model": "dnc", **MODELS[name]}
    kind = changes["model"]
    if not finished(folder, 1):
        folder.mkdir(parents=True, exist_ok=True)
        data = {"train_file": options.train_file, "validation_file": options.validation_file}
        given = {"seed": seed, "max_steps": options.steps, "output_dir": folder, "overwrite_output_dir": True}
        if options.eval_steps:
            given |= {"eval_strategy": "steps", "eval_steps": options.eval_steps}
        run("train.py", command_options({**SETTING, **changes, **data, **given}), folder / "log.txt")
    return folder / kind


def best_step(checkpoint: Path) -> str:
    """The lowest perplexity of the whole validation split that training saw, and after how many steps."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    perplexity, step = min((entry["eval_ppl"], entry["step"]) for entry in history if "eval_ppl" in entry)
    return f"{perplexity:.1f} at {step}"


def compare(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What compare.py says of one model beside GPT-2: metrics of both, and the paired difference."""
    kinds = ["gpt2"] if name in SCORED else ["gpt2", name]
    checkpoints = [str(train(kind, seed, options)) for kind in kinds]
    folder = options.folder / f"seed-{seed}" / f"{name}-beside-gpt2"
    if not finished(folder, 2):
        folder.mkdir(parents=True, exist_ok=True)
        given = command_options({**SCORED.get(name, {}), "output_dir": folder})
        run("compare.py", [*checkpoints, *given], folder / "log.txt")
    return json.loads((folder / "comparison.json").read_text())


def row(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of one model, its ratio to GPT-2's with the 95 % interval over documents, and its mean write gate."""
    if name == "gpt2":
        train(name, seed, options)
        result = json.loads((options.folder / f"seed-{seed}" / name / "comparison.json").read_text())
        return {"ppl": result["models"]["baseline"]["metrics"]["ppl"], "ratio": 1.0, "interval": None, "gate": None}
    result = compare(name, seed, options)
    _, key = result["models"]
    metrics, difference = result["models"][key]["metrics"], result["differences"][key]
    return {
        "ppl": metrics["ppl"],
        "ratio": difference["ppl_ratio"],
        "interval": difference["ppl_ratio_interval"],
        "gate": metrics.get("avg_gate"),
    }


def summary(results: Sequence[Mapping[str, Any]], seeds: Sequence[int], *means: str) -> list[Any]:
    """A table's cells of one model: its seeds, the mean of these numbers, every seed's interval, the mean gate."""
    gates = [result["gate"] for result in results if result["gate"] is not None]
    intervals = " ".join("{:.3f}-{:.3f}".format(*r["interval"]) for r in results if r["interval"]) or None
    averages = [statistics.fmean(result[key] for result in results) for key in means]
    return [" ".join(map(str, seeds)), *averages, intervals, statistics.fmean(gates) if gates else None]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help="text to train on")
    parser.add_argument("--validation_file", required=True, help="text to score")
    names = [*MODELS, *SCORED]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=" ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--eval_steps", type=int, help="score trained models every so many steps, too, and name the best (own --folder)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality/real_text"), help="what is finished lies here"
    )
    parser.add_argument("--output", help="JSON file to write the table to")
    options = parser.parse_args(argv)
    settle(options.folder, options, *SETTLED)
    rows = []
    for name in options.models:
        results = [row(name, seed, options) for seed in options.seeds]
        rows.append([name, *summary(results, options.seeds, "ppl", "ratio")])
        if options.eval_steps:
            trained = [] if name in SCORED else [train(name, seed, options) for seed in options.seeds]
            rows[-1].append(" ".join(map(best_step, trained)) or None)
    header = ["model", "seeds", "perplexity", "ratio to GPT-2", "95 % interval of each seed", "write gate"]
    header += ["best step of each seed"] * bool(options.eval_steps)
    publish(f"Real text, {options.steps} steps", header, rows, options.output)


if __name__ == "__main__":
    main()
