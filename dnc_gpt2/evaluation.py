"""One pass of a model over a split: numbers for every scored token, and the metrics that follow from them."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from losses_dnc_gpt2 import IGNORED

from .examples import EMPTY, ExampleDataset, collate, evaluation_rows
from .metrics import LanguageModelMetrics, MemoryMetrics
from .models import backbone_inputs, has_memory

LANGUAGE_MODEL_COLUMNS = tuple(LanguageModelMetrics.columns)
MEMORY_COLUMNS = tuple(MemoryMetrics.columns)
TOKENS_PER_CHUNK = 256
"""Tokens whose logits exist at a time in evaluation: no [B, T, V] tensor is built."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass: one number a target in text order, [targets] a column, and the time it took."""

    columns: dict[str, np.ndarray]
    seconds: float

    def metrics(self, num_bytes: int | None = None, num_words: int | None = None) -> dict[str, float]:
        """Token-weighted metrics of the split; the memory's only for a model that has one."""
        columns = {name: self.columns[name] for name in LANGUAGE_MODEL_COLUMNS}
        metrics = LanguageModelMetrics().compute(**columns, num_bytes=num_bytes, num_words=num_words)
        if MEMORY_COLUMNS[0] in self.columns:
            metrics |= MemoryMetrics().compute(**{name: self.columns[name] for name in MEMORY_COLUMNS})
        return metrics | {"tokens_per_second": len(self.columns["nll"]) / self.seconds}


def prediction_columns(logits: Tensor, targets: Tensor, base_logits: Tensor | None = None) -> dict[str, Tensor]:
    """What is measured of each prediction.

    Args: logits [M, V], targets [M], base_logits [M, V] without the memory's read.
    Returns: columns [M] of `LanguageModelMetrics`, and `memory_kl` (nats) with `base_logits`.
    """
    logits = finite(logits)
    normalizer = logits.logsumexp(-1)
    probabilities = (logits - normalizer[:, None]).exp_()
    correct = logits.gather(-1, targets[:, None])
    equal = logits == correct
    rank = 1 + (logits > correct).sum(-1)
    if int(equal.sum()) > len(targets):  # of equal logits the lower token id comes first, as in argmax
        ids = torch.arange(logits.shape[-1], device=logits.device)
        rank += (equal & (ids < targets[:, None])).sum(-1)
    nll = normalizer - correct.squeeze(-1)
    columns = {
        "nll": nll,
        "rank": rank,
        "confidence": (-nll).exp(),
        "entropy": normalizer - torch.linalg.vecdot(probabilities, logits),
    }
    if base_logits is not None:
        base_logits = finite(base_logits)
        # The logits' differences are small where the memory changes little, so that nothing cancels.
        difference = torch.linalg.vecdot(probabilities, logits - base_logits)
        columns["memory_kl"] = difference - (normalizer - base_logits.logsumexp(-1))
    return columns


def finite(logits: Tensor) -> Tensor:
    """Logits in at least float32, minus infinity as the lowest number: a probability of 0 counts 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.clamp_min(torch.finfo(logits.dtype).min / 4)


def write_sparsity(write_weights: Tensor) -> Tensor:
    """1 - H(w / sum w) / log N of write weights [..., N]; 1 for a single slot."""
    slots = write_weights.shape[-1]
    if slots == 1:
        return torch.ones_like(write_weights[..., 0])
    return 1 - write_entropy(write_weights) / np.log(slots)


def write_entropy(write_weights: Tensor) -> Tensor:
    """Entropy (nats) of w / sum w for write weights [..., N]; 0 where sum w < 1e-6."""
    total = write_weights.sum(-1, keepdim=True)
    written = total >= 1e-6
    share = torch.where(written, write_weights / torch.where(written, total, 1.0), 0.0)
    # The logarithm is bounded so that a share of 0 has a finite gradient.
    return -(share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum(-1)


class HiddenStates(NamedTuple):
    """What predictions are made of: [B, X, ...] or [M, ...], the last three of a model with memory."""

    hidden: Tensor  # [..., H]
    base_hidden: Tensor | None = None  # [..., H], without the memory's read
    slot_tokens: Tensor | None = None  # [..., N]
    read_weights: Tensor | None = None  # [..., N], averaged over the heads

    @classmethod
    def of(cls, outputs: ModelOutput) -> "HiddenStates":
        """Those of a backbone with memory, run with `output_memory` and `output_base_hidden_state`."""
        reads = None if outputs.slot_tokens is None else outputs.read_weights.mean(2)
        return cls(outputs.last_hidden_state, outputs.base_hidden_state, outputs.slot_tokens, reads)

    def logits(self, model: PreTrainedModel, part: slice) -> Tensor:
        """Of some of the first dimension."""
        if self.slot_tokens is None:
            return model.lm_head(self.hidden[part])
        return model.logits(self.hidden[part], self.slot_tokens[part], self.read_weights[part])


class Runner:
    """Runs a model over batches in text order and hands its memory on; other ways to score a text derive from it."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.state = model, None
        self.memory = has_memory(model)

    def __call__(self, batch: dict[str, Tensor], carry_memory: bool) -> dict[str, Tensor]:
        """Columns [M] of the batch's M scored targets, row by row: see `prediction_columns`, and the memory's."""
        scored = batch["shift_labels"] != IGNORED
        states, columns = self.hidden_states(batch, carry_memory)
        columns = {name: column[scored] for name, column in columns.items()}
        states = HiddenStates(*(None if x is None else x[scored] for x in states))
        return columns | predictions(self.model, states, batch["shift_labels"][scored])

    def hidden_states(self, batch: dict[str, Tensor], carry_memory: bool) -> tuple[HiddenStates, dict[str, Tensor]]:
        """What predictions are made of, and the memory's columns [B, X]."""
        if not self.memory:
            inputs = backbone_inputs(self.model, batch)["input_ids"]
            hidden = self.model.transformer(inputs, use_cache=False).last_hidden_state
            return HiddenStates(hidden.reshape(*batch["input_ids"].shape, -1)), {}
        outputs = self.model.transformer(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            memory_reset=batch["memory_reset"],
            memory_state=self.state if carry_memory else None,
            output_memory=True,
            output_base_hidden_state=True,
            use_cache=False,
        )
        self.state = outputs.memory_state
        columns = {"write_gate": outputs.write_gates, "write_sparsity": write_sparsity(outputs.write_weights)}
        return HiddenStates.of(outputs), columns


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    dataset: ExampleDataset,
    *,
    runner: Runner | None = None,
    carry_memory: bool = False,
    streams: int = 4,
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Tensor], Tensor] | None = None,
    autocast: Callable = nullcontext,
    description: str = "Evaluating",
    progress: bool = True,
) -> Evaluation:
    """Score every target of `dataset` once.

    Args:
        runner: another way to score the text with `model`; used for this pass only.
        carry_memory: read the split as `streams` contiguous streams (those of `dataset`) whose memory state passes from
            example to example; otherwise every example starts with an empty memory.
        batch_size: examples at a time without carried memory.
        rank, world_size, gather: with several processes each scores its part, and `gather` sums a tensor over them.
        autocast: context manager for the forward passes.
        progress: show a progress bar.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    names = LANGUAGE_MODEL_COLUMNS + (MEMORY_COLUMNS if has_memory(model) else ())
    results = torch.zeros(len(names), dataset.num_targets, dtype=torch.float64)
    runner = Runner(model) if runner is None else runner
    if isinstance(model, FSDPModule):
        model.unshard()  # what is not sharded in a unit of its own is used here without the model's own `forward`
    steps = list(evaluation_rows(len(dataset), streams if carry_memory else None, batch_size))
    start = time.perf_counter()
    for step in tqdm(steps, desc=description, leave=False, disable=not progress):
        # A process that has nothing to score takes part all the same: it may hold a shard that the others need.
        rows = step[rank::world_size] or [EMPTY]
        batch = {name: x.to(device) for name, x in collate([dataset[row] for row in rows]).items()}
        with autocast():
            columns = runner(batch, carry_memory)
        places = torch.cat([torch.arange(*dataset.target_range(row)) for row in rows])
        for name, column in columns.items():
            results[names.index(name), places] = column.double().cpu()
    seconds = time.perf_counter() - start
    if gather is not None:
        results = gather(results.to(device)).cpu()
        seconds = float(gather(torch.tensor(seconds, device=device))) / world_size
    if isinstance(model, FSDPModule):
        model.reshard()
    model.train(was_training)
    columns = {name: results[i].numpy() for i, name in enumerate(names)}
    columns["rank"] = columns["rank"].astype(np.int64)
    return Evaluation(columns, seconds)


def predictions(model: PreTrainedModel, states: HiddenStates, targets: Tensor) -> dict[str, Tensor]:
    """`prediction_columns` of M targets, a chunk of tokens at a time."""
    chunks = []
    for start in range(0, len(targets), TOKENS_PER_CHUNK):
        part = slice(start, start + TOKENS_PER_CHUNK)
        inputs = [states.logits(model, part), targets[part]]
        if states.base_hidden is not None:
            inputs.append(model.lm_head(states.base_hidden[part]))
        chunks += [prediction_columns(*piece) for piece in split_tokens(*inputs)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}


def split_tokens(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of logits [M, V] and of other tensors [M, ...] so small that what is computed of them stays in caches.

    On a processor this is several times as fast as all at once; on other devices the pieces are large.
    """
    size = 2**20 if logits.device.type == "cpu" else 2**26
    tokens = max(1, size // logits.shape[-1])
    return zip(*(x.split(tokens) for x in (logits, *others)), strict=True)
