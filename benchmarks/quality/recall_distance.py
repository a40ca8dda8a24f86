"""Recall against distance: for how long does a memory that has to select hold on to what it was told?

A small GPT-2 with memory (2 layers x 64, attention windows of 32 tokens, 32 or 64 slots) reads a register: 8 facts,
which fill the first window, then up to 31 windows of filler with up to 16 other facts, then questions about all of
them. It is trained on the answers and, less, on every token, at distances of 1 and 2 windows first, and pays for every
write: it has 32 or 64 rows for up to 1,120 tokens. Then the way between facts and questions grows to 1,000 windows,
read in pieces with the memory's state carried; at each distance the first 8 facts are asked of that state. What is
finished is kept in `--folder` and not made again.

python benchmarks/quality/recall_distance.py --models lru-32 --seeds 0 1 2
"""

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fitting import fit, once, settle
from timing import publish

from dnc_gpt2 import DNCGPT2Config, DNCGPT2LMHeadModel
from dnc_gpt2.plots import shares_by_distance
from dnc_gpt2.tasks import VALUES, LocatedQuestion, RecallText, biographies, distant_questions, locate

WINDOW = 32
FACTS = 8  # of 4 tokens each: one window
TRAINED_DISTANCES = (1, 2, 4, 8, 16, 32)
MOST_DISTRACTORS = 16  # in training
BATCH, LEARNING_RATE = 16, 3e-3
TEXT_WEIGHT = 0.1  # of the loss of all tokens, beside that of the answers
# Nats. Without it the memory writes whatever there is room for in training. It grows through the first half: a memory
# that pays before it has learned what a fact is good for never writes facts of that kind again.
WRITE_COST = 0.01
PIECE = 8  # windows read at a time
SETTING = {
    "n_positions": WINDOW,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "mem_slots": 32,
    "mem_width": 128,
    "address_width": 64,
    "num_reads": 1,
    "activation_function": "gelu_pytorch_tanh",  # GPT-2's own in one operation
    "write_gate_bias": -2.0,  # a gate that starts open overwrites every fact before it is asked for
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "lru-32": {},
    "lru-64": {"mem_slots": 64},
    "lru-32-no-threshold": {"write_threshold": 0.0},
    "lru-32-no-decay": {"usage_decay": 1.0},
}
MODELS |= {f"{name}-on-top": {**options, "memory_layer": SETTING["n_layer"]} for name, options in MODELS.items()}
"""Name -> options of the configuration beside those of `SETTING`."""
PANELS = {"Recall": "recall", "Share of a fact's row left": "row_left", "Facts overwritten": "overwritten"}
GIVEN_UP = 0.1  # a recall below which a model is not taken any farther


def word_tokenizer() -> Tokenizer:
    """A tokenizer of the corpus whose tokens are words and full stops."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(biographies(300, seed=0).documents, trainer)
    return tokenizer


def encode(text: RecallText, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Documents of equal length and equally many questions as tokens.

    Returns: tokens [B, T]; for each question the positions of its answer and of the fact [B, Q].
    """
    encoded = tokenizer.encode_batch(text.documents)
    tokens = torch.tensor([document.ids for document in encoded])
    questions: list[LocatedQuestion] = locate(text.questions, [d.offsets for d in encoded], [0] * len(encoded))
    places = torch.tensor([(question.answer_start, question.statement) for question in questions])
    answers, facts = places.view(len(encoded), -1, 2).unbind(-1)
    return tokens, answers, facts


def train(name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train a model and save it in `folder`; returns what is worth keeping of it."""
    tokenizer = word_tokenizer()
    torch.manual_seed(seed)
    config = DNCGPT2Config(vocab_size=tokenizer.get_vocab_size(), **{**SETTING, **MODELS[name]})
    model = DNCGPT2LMHeadModel(config)
    rng = random.Random(seed)
    recalled: list[float] = []

    def loss(step: int) -> Tensor:
        reached = 2 + 8 * step // steps  # the longest distances come in the second half
        between = (rng.choice(TRAINED_DISTANCES[:reached]) - 1) * WINDOW
        distractors = rng.randint(0, min(MOST_DISTRACTORS, between // 8))
        text = distant_questions(
            BATCH, rng.getrandbits(40), distance=between, facts=FACTS, distractors=distractors, ask_all=True
        )
        tokens, answers, _ = encode(text, tokenizer)
        output = model(tokens, output_memory=True)
        logits, targets = output.logits[:, :-1], tokens[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        recalled.append(float((logits.argmax(-1) == targets).gather(1, answers - 1).float().mean()))
        cost = WRITE_COST * min(1.0, 2 * step / steps) * output.write_gates.sum(1).mean()  # of a document
        return losses.gather(1, answers - 1).mean() + TEXT_WEIGHT * losses.mean() + cost

    start = time.perf_counter()
    fit(model.parameters(), loss, steps, LEARNING_RATE)
    model.save_pretrained(folder)
    last = recalled[-50:]
    return {"seconds": time.perf_counter() - start, "recall of the last steps": statistics.fmean(last)}


@torch.no_grad()
def recall_at(
    model: DNCGPT2LMHeadModel, tokenizer: Tokenizer, every: int, distances: Sequence[int], documents: int
) -> dict[str, Any]:
    """Recall at each distance, and what became of the rows that the facts were written to.

    Args:
        every: another fact is stated every so many windows; 0 is never.
        distances: in windows, increasing.
        documents: how many, of `FACTS` questions each.

    Returns:
        By distance, `None` once recall was below `GIVEN_UP`: recall; row_left, the mean share of a fact's row that
        writes to its slot since have not erased; overwritten, the share of facts whose slot took another write of more
        than half. Of all tokens between facts and questions: value_gate and other_gate, the mean write gate at the
        values of other facts and at the other tokens.
    """
    model.eval()
    erase: list[Tensor] = []
    hook = model.transformer.memory.erase.register_forward_hook(lambda *call: erase.append(call[-1].sigmoid().mean(-1)))
    between = (distances[-1] - 1) * WINDOW
    distractors = distances[-1] // every if every else 0
    seed = 2**40 + every  # above all seeds of training
    tokens, answers, facts = encode(
        distant_questions(documents, seed, distance=between, facts=FACTS, distractors=distractors), tokenizer
    )
    is_value = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.bool)
    is_value[[tokenizer.token_to_id(value) for values in VALUES.values() for value in values]] = True
    told, asked = FACTS * 4, tokens.shape[1] - FACTS * 4
    questions, answers = tokens[:, asked:], answers - asked
    right_answers = questions.gather(1, answers)

    output = model.transformer(tokens[:, :told], output_memory=True, use_cache=False)
    state = output.memory_state
    rows = torch.arange(documents)[:, None]
    slots = output.write_weights[rows, facts].argmax(-1)  # [B, Q]
    kept = torch.ones(slots.shape, dtype=torch.float64)
    largest = torch.zeros(slots.shape)

    def follow(output, since: Tensor) -> None:
        """Account for the writes to the facts' slots at tokens after `since` [B, Q]."""
        writes = output.write_weights.gather(2, slots[:, None].expand(-1, output.write_weights.shape[1], -1))
        writes = writes * (torch.arange(writes.shape[1])[None, :, None] > since[:, None])
        kept.mul_((1 - writes.double() * erase.pop()[..., None]).prod(1))
        largest.copy_(torch.maximum(largest, writes.amax(1)))

    follow(output, facts)
    gates = {True: [0.0, 0], False: [0.0, 0]}  # at values or not: sum and number
    results: dict[str, Any] = {name: [] for name in PANELS.values()}
    read = 1
    for distance in distances:
        if results["recall"] and (results["recall"][-1] is None or results["recall"][-1] < GIVEN_UP):
            for shares in results.values():
                shares.append(None)
            continue
        while read < distance:
            windows = min(PIECE, distance - read)
            piece = tokens[:, read * WINDOW : (read + windows) * WINDOW]
            output = model.transformer(piece, memory_state=state, output_memory=True, use_cache=False)
            state, read = output.memory_state, read + windows
            follow(output, torch.full(slots.shape, -1))
            for at_value, total in gates.items():
                chosen = output.write_gates[is_value[piece] == at_value]
                total[0] += float(chosen.double().sum())
                total[1] += chosen.numel()
        logits = model(questions, memory_state=state, use_cache=False).logits
        erase.clear()
        named = logits.argmax(-1).gather(1, answers - 1)
        results["recall"].append(float((named == right_answers).double().mean()))
        results["row_left"].append(float(kept.mean()))
        results["overwritten"].append(float((largest > 0.5).double().mean()))
    hook.remove()
    value_gate, other_gate = (total / number if number else None for total, number in gates.values())
    return results | {"value_gate": value_gate, "other_gate": other_gate}


def measure(name: str, slots: int | None, seed: int, every: int, options: argparse.Namespace) -> dict[str, Any]:
    """`recall_at` of one model, which is trained unless it is there, with so many slots or those of its training."""
    folder = options.folder / name / f"seed-{seed}"
    once(folder / "training.json", lambda: train(name, seed, options.steps, folder))
    longest, documents = options.distances[-1], options.documents
    slots = slots or {**SETTING, **MODELS[name]}["mem_slots"]
    path = folder / f"every-{every}-to-{longest}-of-{documents}-with-{slots}-slots.json"

    def read_on() -> dict[str, Any]:
        model = DNCGPT2LMHeadModel.from_pretrained(folder, mem_slots=slots)  # no parameter depends on their number
        return recall_at(model, word_tokenizer(), every, options.distances, documents)

    return once(path, read_on)


def described(every: int) -> str:
    """How often other facts are stated, in words."""
    return {0: "never", 1: "every window"}.get(every, f"every {every} windows")


def mean(results: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    """The mean over seeds at each distance, `None` where one of them was not asked any more."""
    columns = zip(*(result[name] for result in results), strict=True)
    return [None if None in column else statistics.fmean(column) for column in columns]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(MODELS)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=" ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--every", nargs="+", type=int, default=[0, 64, 1], help="windows from one other fact to the next; 0: none"
    )
    parser.add_argument("--distances", nargs="+", type=int, default=[*(2**i for i in range(10)), 1000])
    parser.add_argument(
        "--slots", nargs="+", type=int, default=[None], help="to read on with, in place of those of the training"
    )
    parser.add_argument("--documents", type=int, default=128, help=f"of {FACTS} questions each")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality/recall_distance"), help="what is finished lies here"
    )
    parser.add_argument("--output", help="JSON file to write the table to")
    parser.add_argument("--figure", help="PNG to draw recall, and what became of the facts' rows, to")
    options = parser.parse_args(argv)
    options.distances.sort()
    settle(options.folder, options, "steps", "distances")
    rows, panels = [], {title: {} for title in PANELS}
    for name, slots in itertools.product(options.models, options.slots):
        label = f"{name} with {slots} slots" if slots else name
        for every in options.every:
            results = [measure(name, slots, seed, every, options) for seed in options.seeds]
            means = {key: mean(results, key) for key in PANELS.values()}
            gates = [[result[key] for result in results] for key in ("value_gate", "other_gate")]
            last = [
                next((x for x in reversed(means[key]) if x is not None), None) for key in ("row_left", "overwritten")
            ]
            gates = [None if None in gate else statistics.fmean(gate) for gate in gates]
            rows.append([label, " ".join(map(str, options.seeds)), described(every), *means["recall"], *last, *gates])
            for title, key in PANELS.items():
                points = [(d, x) for d, x in zip(options.distances, means[key], strict=True) if x is not None]
                panels[title][f"{label}, others {described(every)}"] = points
    header = ["model", "seeds", "other facts", *map(str, options.distances), "row left", "overwritten"]
    header += ["gate at values", "gate elsewhere"]
    publish(f"Recall by distance in windows, {options.steps} steps", header, rows, options.output)
    if options.figure:
        shares_by_distance(panels, options.figure, "attention windows between fact and question")


if __name__ == "__main__":
    main()
