"""What a memory does with a text, token by token: what is written, where it is read from, and what it gains."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .attribution import effective_writes, slot_shares
from .evaluation import HiddenStates, predictions
from .models import has_memory

SOURCES_SHOWN = 8
"""Sources of a read that `Inspection.to_dict` keeps, those with the largest shares."""
LEAST_SHARE = 0.01
"""Smaller shares of a read are left out there."""


@dataclass(frozen=True)
class Inspection:
    """What a memory did with a text of T tokens; N slots, R read heads.

    Attributes:
        tokens: the text of each token.
        window: tokens of an attention window: token t is attended to by the tokens of window t // window alone.
        write_gates: [T] in [0, 1].
        write_weights: [T, N] what is written of each token to each slot.
        read_weights: [T, R, N] how each head weighs the slots at each token, to predict the next one.
        read_sources: [T, R, T] share of the read of each head at each token that comes from each token's write (see
            `attribution`); the rest, to a sum of 1, comes from empty slots.
        held: [T, N] share of each slot that is written, after each token.
        holders: [T, N] the token that each slot mostly holds after each token, -1 where it is empty.
        log_probabilities: [T] of each token given those before it, in nats; NaN for the first.
        gains: [T] how much of it is due to the memory: the log-probability less that of the same hidden state without
            the read, and without pointing at slots; NaN for the first.
    """

    tokens: list[str]
    window: int
    write_gates: np.ndarray
    write_weights: np.ndarray
    read_weights: np.ndarray
    read_sources: np.ndarray
    held: np.ndarray
    holders: np.ndarray
    log_probabilities: np.ndarray
    gains: np.ndarray

    @cached_property
    def write_slots(self) -> np.ndarray:
        """[T] the slot that each token is mostly written to, -1 where it is not written at all."""
        return np.where(self.write_weights.max(-1) > 0, self.write_weights.argmax(-1), -1)

    def sources(self, token: int, head: int | None = None) -> list[tuple[int, float]]:
        """Where the read that predicted a token came from: (earlier token, share) of the largest shares.

        Args:
            token: index of the predicted token; the first was not predicted.
            head: one head alone; `None` is the mean of all.
        """
        if token == 0:
            return []
        shares = self.read_sources[token - 1]
        shares = shares.mean(0) if head is None else shares[head]
        largest = np.argsort(-shares, kind="stable")[:SOURCES_SHOWN]
        return [(int(i), float(shares[i])) for i in largest if shares[i] >= LEAST_SHARE]

    def to_dict(self) -> dict[str, Any]:
        """The inspection for JSON, rounded; of the reads what `sources` gives for each predicted token and head."""
        heads = range(self.read_weights.shape[1])
        return {
            "tokens": self.tokens,
            "window": self.window,
            "write_gates": _numbers(self.write_gates),
            "write_slots": self.write_slots.tolist(),
            "log_probabilities": _numbers(self.log_probabilities),
            "gains": _numbers(self.gains),
            "sources": [
                [[(i, round(share, 3)) for i, share in self.sources(t, head)] for head in heads]
                for t in range(len(self.tokens))
            ],
            "held": [_numbers(row, 3) for row in self.held],
            "holders": self.holders.tolist(),
        }


def inspect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Inspection:
    """Run a model with memory over a text from an empty memory and return what the memory did.

    Args:
        model: a causal language model with memory, in any mode; it is left as it was.
        tokenizer: the one that belongs to it.
        text: of any length; of T tokens the result holds R x T x T shares.

    Raises:
        ValueError: the text has no token, or the model no memory.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("The text to inspect is empty: give one with at least one token.")
    return inspect_tokens(model, tokenizer, torch.tensor(ids))


@torch.no_grad()
def inspect_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> Inspection:
    """`inspect` of token ids [T]."""
    if not has_memory(model):
        raise ValueError(f"A {model.config.model_type} has no memory to inspect: load a checkpoint that has one.")
    was_training = model.training
    ids = ids.to(next(model.parameters()).device)
    asked = {"output_memory": True, "output_base_hidden_state": True}
    out = model.eval().transformer(ids[None], **asked, use_cache=False)
    states = HiddenStates(*(None if x is None else x[0, :-1] for x in HiddenStates.of(out)))
    surprise, base_surprise = (
        predictions(model, states, ids[1:]).get("nll", ids.new_zeros(0, dtype=torch.float32))
        for states in (states._replace(base_hidden=None), HiddenStates(states.base_hidden))
    )
    model.train(was_training)
    reads = out.read_weights[0].float().cpu()
    writes = effective_writes(out.write_weights, out.write_gates, model.config.addressing)[0].float().cpu()
    sources, held, holders = [], [], []
    for read, shares in zip(reads, slot_shares(writes), strict=True):
        sources.append(read @ shares)
        held.append(shares.sum(-1))
        largest = shares.max(-1)
        holders.append(torch.where(largest.values > 0, largest.indices, -1))
    unknown = torch.full((1,), torch.nan)
    return Inspection(
        tokens=[tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids.tolist()],
        window=model.config.n_positions,
        write_gates=out.write_gates[0].float().cpu().numpy(),
        write_weights=writes.numpy(),
        read_weights=reads.numpy(),
        read_sources=torch.stack(sources).numpy(),
        held=torch.stack(held).numpy(),
        holders=torch.stack(holders).numpy(),
        log_probabilities=torch.cat([unknown, -surprise.float().cpu()]).numpy(),
        gains=torch.cat([unknown, (base_surprise - surprise).float().cpu()]).numpy(),
    )


def _numbers(values: np.ndarray, digits: int = 4) -> list[float | None]:
    return [round(float(value), digits) if np.isfinite(value) else None for value in values]
