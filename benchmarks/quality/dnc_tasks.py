"""The DNC paper's tasks with `addressing="dnc"`: copy, repeat copy and associative recall, beyond training lengths.

A tiny GPT-2 (1 or 2 layers x 64) reads each sequence through an attention window far shorter than it, and is trained on
the answers alone, with lengths drawn anew for every step. Reads do not feed back into the backbone, so that whatever
lies outside the window has to come from the memory's own state. Scored are the answers, and the sequences with every
answer right, at the longest training length and at two and four times it, with as many times the slots: no parameter
depends on their number. Plain GPT-2 with the same window is the control; the others take the links away or add some of
the three options of Csordas and Schmidhuber 2019. What is finished is kept in `--folder` and not made again.

python benchmarks/quality/dnc_tasks.py
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from fitting import settle
from timing import publish

from configuration_dnc_gpt2 import DNCGPT2Config
from dnc_gpt2.models import backbone_inputs, has_memory, new_models
from dnc_gpt2.tasks import PADDING, TASK_VOCABULARY, associative_recall_task, copy_task, repeat_copy_task
from modeling_dnc_gpt2 import DNCGPT2LMHeadModel


@dataclass(frozen=True)
class Task:
    """A task and how it is trained.

    Attributes:
        make: (rng, rows, length) -> token ids and where the answers are, both [rows, T].
        window: attention window in tokens.
        layers: of the backbone.
        slots, width: of the memory at training lengths.
        start: standard deviation that the memory's weights start with. At GPT-2's 0.02 all rows get the same weight.
        shortest, longest: training lengths.
    """

    make: Callable[..., tuple[np.ndarray, np.ndarray]]
    window: int
    layers: int
    slots: int
    width: int
    start: float
    shortest: int
    longest: int


TASKS = {
    "copy": Task(copy_task, window=4, layers=1, slots=16, width=16, start=0.4, shortest=1, longest=8),
    "repeat-copy": Task(repeat_copy_task, window=4, layers=1, slots=16, width=16, start=0.4, shortest=1, longest=6),
    # An item and its separator fill a window, and name the item together.
    "associative-recall": Task(
        associative_recall_task, window=3, layers=2, slots=32, width=32, start=0.3, shortest=2, longest=4
    ),
}
OPTIONS = ("masked_content", "erase_on_free", "sharpen_links")
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "dnc": {},
    "no-links": {"temporal_links": False},
    **{option: {option: True} for option in OPTIONS},
    "masked-and-erased": {"masked_content": True, "erase_on_free": True},
    "all-three": dict.fromkeys(OPTIONS, True),
}
"""Name -> options of the memory; `gpt2` has none."""
SIZES = {"n_embd": 64, "n_head": 4, "num_reads": 2}
BATCH, LEARNING_RATE, WARMUP, CLIP = 32, 3e-3, 50, 1.0
LOOK_EVERY, LOOK_BATCHES = 50, 4  # steps between two looks at the training length, and what is looked at
TARGET, LOOKS_REACHED = 0.99, 3  # training ends after so many looks in a row with this share of sequences right
FACTORS = (1, 2, 4)


def build(task: Task, name: str, seed: int) -> PreTrainedModel:
    """A new model for a task."""
    config = DNCGPT2Config(
        vocab_size=TASK_VOCABULARY,
        n_positions=task.window,
        n_layer=task.layers,
        memory_layer=task.layers,  # a DNC reads into its output
        addressing="dnc",
        mem_slots=task.slots,
        mem_width=task.width,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
        **SIZES,
        **MODELS[name],
    )
    kind = "baseline" if name == "gpt2" else "dnc"
    model = new_models(config, [kind], seed)[kind]
    if has_memory(model):
        for linear in model.transformer.memory.children():
            torch.nn.init.normal_(linear.weight, std=task.start)
    return model


def batch(task: Task, rng: np.random.Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, T], T a multiple of the window; the target is -100 where no answer comes next."""
    tokens, is_answer = task.make(rng, rows, length)
    missing = -(tokens.shape[1] - 1) % task.window
    inputs = np.pad(tokens[:, :-1], ((0, 0), (0, missing)), constant_values=PADDING)
    targets = np.where(is_answer, tokens, -100)[:, 1:]
    targets = np.pad(targets, ((0, 0), (0, missing)), constant_values=-100)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def forward(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and logits [rows, T, V]; a plain GPT-2 sees its windows one by one."""
    given = {"input_ids": inputs, "labels": targets, "shift_labels": targets}
    output = model(**(given if has_memory(model) else backbone_inputs(model, given)))
    return output.loss, output.logits.reshape(*inputs.shape, -1)


@torch.no_grad()
def score(model: PreTrainedModel, task: Task, factor: int, batches: int) -> tuple[float, float]:
    """Share of the answers, and of the sequences, that are right at `factor` times the longest training length."""
    if has_memory(model) and factor > 1:
        config = type(model.config).from_dict({**model.config.to_dict(), "mem_slots": factor * task.slots})
        longer = DNCGPT2LMHeadModel(config)
        longer.load_state_dict(model.state_dict())
        model = longer
    training = model.training
    model.eval()
    rng = np.random.default_rng(10_000 + factor)  # other sequences than in training, the same for every model
    answers, sequences = [], []
    for _ in range(batches):
        inputs, targets = batch(task, rng, BATCH, factor * task.longest)
        right, scored = forward(model, inputs, targets)[1].argmax(-1) == targets, targets != -100
        answers.append(right[scored])
        sequences.append((right | ~scored).all(-1))
    model.train(training)
    return torch.cat(answers).float().mean().item(), torch.cat(sequences).float().mean().item()


def rate(step: int, steps: int) -> float:
    """Learning rate relative to its peak: a warm-up, then a cosine down to 5 percent."""
    return min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(task: Task, name: str, seed: int, steps: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A trained model, and what happened: losses, seconds, and the first of the looks that ended the training."""
    model = build(task, name, seed).train()
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, steps=steps))
    start, reached, losses = time.perf_counter(), [], []
    while len(losses) < steps and len(reached) < LOOKS_REACHED:
        length = int(rng.integers(task.shortest, task.longest + 1))
        loss, _ = forward(model, *batch(task, rng, BATCH, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % LOOK_EVERY == 0:
            _, right = score(model, task, 1, LOOK_BATCHES)
            reached = [*reached, len(losses)] if right >= TARGET else []
    steps_to_target = reached[0] if len(reached) == LOOKS_REACHED else None
    return model, {"steps_to_target": steps_to_target, "losses": losses, "seconds": time.perf_counter() - start}


def result(name: str, task_name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of one model on one task, made unless they are there."""
    folder = options.folder / task_name / f"{name}-{seed}-of-{options.steps}-steps"
    file = folder / "result.json"
    if not file.is_file():
        task = TASKS[task_name]
        model, history = train(task, name, seed, options.steps)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        scores = {str(factor): score(model, task, factor, options.batches) for factor in FACTORS}
        made = folder / "result.json.new"
        made.write_text(json.dumps({"scores": scores, **history}))
        made.replace(file)
    return json.loads(file.read_text())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=4000, help="at most; default 4000")
    parser.add_argument(
        "--batches", type=int, default=16, help=f"of {BATCH} sequences to score at each length; default 16"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default 1")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality/dnc_tasks"), help="what is finished lies here"
    )
    parser.add_argument("--output", help="JSON file to write the table to")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    settle(options.folder, options, "batches")
    rows = []
    for task_name in options.tasks:
        for name in options.models:
            for seed in options.seeds:
                made = result(name, task_name, seed, options)
                scores = [100 * value for factor in FACTORS for value in made["scores"][str(factor)]]
                rows.append(
                    [task_name, name, seed, made["steps_to_target"], len(made["losses"]), *scores, made["seconds"]]
                )
    scored = [f"{what} % at {factor}x" for factor in FACTORS for what in ("answers", "sequences")]
    header = ["task", "model", "seed", "steps to 99 %", "steps", *scored, "seconds"]
    publish("The DNC paper's tasks", header, rows, options.output)


if __name__ == "__main__":
    main()
