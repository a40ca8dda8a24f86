"""A memory on a pretrained GPT-2: does it change nothing at first, and pay after a short fine-tuning?

The GPT-2 of `real_text.py` (3 layers x 128, 1,000 steps) is the pretrained backbone. With a memory attached and nothing
trained it is scored against GPT-2 itself: a difference ends the study. Then GPT-2, the control, and GPT-2 with a memory
are fine-tuned on the same text for the same few steps, the backbone frozen or not, and scored on the whole validation
split with carried memory. What is finished is kept, the pretrained GPT-2 where `real_text.py` looks for it too, and not
made again.

python benchmarks/quality/pretrained.py --train_file test.txt --validation_file valid.txt
"""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import real_text
from fitting import settle
from real_text import SETTING, command_options, run, summary
from timing import publish

from dnc_gpt2.tokenization import load_tokenizer
from modeling_dnc_gpt2 import DNCGPT2LMHeadModel

MEMORY = {"mem_slots": 64, "mem_width": SETTING["mem_width"], "address_width": SETTING["address_width"], "num_reads": 1}
FROZEN = {"freeze_backbone": True, "learning_rate": 2e-3}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model": "baseline"},
    "attached": {},
    "frozen": FROZEN,
    "unfrozen": {},
    "frozen-mid-stack": {**FROZEN, "memory_layer": 2},
    "unfrozen-mid-stack": {"memory_layer": 2},
    "frozen-5e-4": {**FROZEN, "learning_rate": 5e-4},
    "frozen-1e-2": {**FROZEN, "learning_rate": 1e-2},
    "frozen-transpose": {**FROZEN, "read_projection_init": "transpose"},
    "unfrozen-transpose": {"read_projection_init": "transpose"},
}
"""Name -> options of train.py beside those of `SETTING` and `FINE_TUNING`."""
FINE_TUNING = {
    **SETTING,
    **MEMORY,
    "learning_rate": 5e-4,
    "warmup_steps": 10,
    "model": "dnc",
    "max_eval_tokens": 10_000,
}
UNCHANGED = 1e-5
"""Largest difference of two mean losses that float32 arithmetic in another order explains."""


def pretrained(seed: int, options: Namespace) -> Path:
    """The checkpoint of GPT-2, trained unless it is there."""
    given = Namespace(
        train_file=options.train_file,
        validation_file=options.validation_file,
        folder=options.pretrained_folder,
        steps=options.pretraining_steps,
        eval_steps=None,
    )
    settle(given.folder, given, *real_text.SETTLED)
    return real_text.train("gpt2", seed, given)


def attach(backbone: Path, folder: Path) -> None:
    """Save the backbone with a new memory, as it starts."""
    DNCGPT2LMHeadModel.from_pretrained(backbone, **MEMORY).save_pretrained(folder)
    load_tokenizer(str(backbone)).save_pretrained(folder)


def made(name: str, seed: int, options: Namespace) -> Path:
    """The checkpoint of one model, made unless it is there."""
    backbone = pretrained(seed, options)
    folder = options.folder / f"seed-{seed}" / name
    if name == "attached":
        if not (folder / "dnc" / "tokenizer.json").is_file():
            attach(backbone, folder / "dnc")
        return folder / "dnc"
    changes = {**FINE_TUNING, **MODELS[name]}
    if not (folder / "comparison.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        given = {
            "model_name_or_path": backbone,
            "train_file": options.train_file,
            "validation_file": options.validation_file,
            "seed": seed,
            "max_steps": options.steps,
            "output_dir": folder,
            "overwrite_output_dir": True,
        }
        run("train.py", command_options({**changes, **given}), folder / "log.txt")
    return folder / changes["model"]


def beside(reference: Path, model: Path, folder: Path, options: Namespace) -> dict[str, Any]:
    """What compare.py says of a model beside another: perplexities, and the paired difference to the other."""
    if not (folder / "comparison.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        given = {"output_dir": folder, "max_eval_tokens": options.max_eval_tokens}
        run("compare.py", [str(reference), str(model), *command_options(given)], folder / "log.txt")
    comparison = json.loads((folder / "comparison.json").read_text())
    (difference,) = comparison["differences"].values()
    before, after = (result["metrics"] for result in comparison["models"].values())
    return {**difference, "ppl": after["ppl"], "reference_ppl": before["ppl"], "gate": after.get("avg_gate")}


def row(name: str, seed: int, options: Namespace) -> dict[str, Any]:
    """Perplexity of one model, its ratios to GPT-2 before and after fine-tuning, and the interval of the latter.

    Ends this process where a memory that was only attached changes the loss.
    """
    backbone, control, model = pretrained(seed, options), made("gpt2", seed, options), made(name, seed, options)
    folder = options.folder / f"seed-{seed}"
    tuned = beside(backbone, control, folder / "gpt2" / "beside-pretrained", options)
    if name == "gpt2":
        return {**tuned, "before": tuned["ppl_ratio"], "after": 1.0, "interval": None}
    if name == "attached":
        result = beside(backbone, model, folder / name / "beside-pretrained", options)
        if abs(result["loss"]) > UNCHANGED:
            sys.exit(f"The memory that was attached to {backbone} changes its loss by {result['loss']:.2e}.")
        print(f"Seed {seed}: the attached memory changes the loss by {result['loss']:.1e}.")
        return {**result, "before": result["ppl_ratio"], "after": result["ppl"] / tuned["ppl"], "interval": None}
    result = beside(control, model, folder / name / "beside-gpt2", options)
    before, interval = result["ppl"] / tuned["reference_ppl"], result["ppl_ratio_interval"]
    return {**result, "before": before, "after": result["ppl_ratio"], "interval": interval}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help="text to train on")
    parser.add_argument("--validation_file", required=True, help="text to score")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pretraining_steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning; default 200")
    parser.add_argument(
        "--max_eval_tokens", type=int, default=1_000_000, help="of the validation text to score; default 1,000,000"
    )
    parser.add_argument("--pretrained_folder", type=Path, default=Path("runs/quality/real_text"))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality/pretrained"), help="what is finished lies here"
    )
    parser.add_argument("--output", help="JSON file to write the table to")
    options = parser.parse_args(argv)
    settle(options.folder, options, "train_file", "validation_file", "steps", "pretraining_steps", "max_eval_tokens")
    rows = []
    for name in options.models:
        results = [row(name, seed, options) for seed in options.seeds]
        rows.append([name, *summary(results, options.seeds, "ppl", "before", "after")])
    columns = ["ratio to GPT-2 before", "ratio to GPT-2 fine-tuned", "95 % interval of each seed", "write gate"]
    publish(f"Pretrained, {options.steps} steps", ["model", "seeds", "perplexity", *columns], rows, options.output)


if __name__ == "__main__":
    main()
