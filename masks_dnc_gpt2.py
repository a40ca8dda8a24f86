"""Custom 4D attention masks: which token each token continues from, and a memory that branches with them.

Shapes: B batch, T tokens of this call, S tokens seen, those of this call included.
"""

from typing import NamedTuple

import torch
from torch import Tensor

try:
    from .memory_dnc_gpt2 import DNCMemory, MemoryOutput, MemoryState
except ImportError:
    from memory_dnc_gpt2 import DNCMemory, MemoryOutput, MemoryState

MASKED = -1000.0
"""What is added to the score of a token that is not seen: so much or less, whatever its author wrote for infinity."""


def visible_tokens(mask: Tensor, batch: int, tokens: int, seen: int) -> Tensor:
    """[B or 1, heads or 1, T, S], bool or what attention adds to its scores -> [B, T, S] bool, visible to any head.

    Raises:
        ValueError: another shape.
    """
    shape = tuple(mask.shape)
    if shape[0] not in (1, batch) or shape[2:] != (tokens, seen):
        raise ValueError(
            f"attention_mask has shape {shape}; a custom 4D mask must be [batch, 1, tokens, tokens seen], here "
            f"[{batch}, 1, {tokens}, {seen}]."
        )
    if mask.is_floating_point():
        mask = mask > MASKED
    return mask.bool().any(1).expand(batch, -1, -1)


class Ancestry(NamedTuple):
    """Where each of [B, T] tokens goes on from."""

    real: Tensor  # [B, T] bool: tokens that see themselves; the others are padding
    parents: Tensor  # [B, T], the token of this call that it continues, -1 for the state before the call
    reset: Tensor  # [B, T] bool, tokens that continue nothing: a new document begins
    branches: bool  # whether some token continues another one than the real one before it

    @classmethod
    def of(cls, visible: Tensor) -> "Ancestry":
        """Each token continues from the last one before it that it sees (`visible` [B, T, S]).

        A row's first real token continues from the state before the call, if it sees all or nothing of what is behind.

        Raises:
            ValueError: a token continues from one of an earlier call that was not the last.
        """
        tokens = visible.shape[1]
        past, among = visible[..., :-tokens], visible[..., -tokens:]
        real = among.diagonal(dim1=1, dim2=2)
        index = torch.arange(1, tokens + 1, device=visible.device)
        parents = (index * among.tril(-1) * real[:, None]).amax(-1) - 1
        before = (index * torch.ones_like(among).tril(-1) * real[:, None]).amax(-1) - 1
        root = real & (parents < 0)
        if past.shape[-1]:
            if (root & past.any(-1) & ~past[..., -1]).any():
                raise ValueError(
                    "attention_mask lets a token continue from inside an earlier call, whose memory is gone: take the "
                    "later tokens back with the cache's `crop`, or pass all tokens at once."
                )
            reset = root & ~past.any(-1)
        else:
            reset = root & (before >= 0)
        return cls(real, parents, reset, bool((real & ~reset & (parents != before)).any()))


def branching_memory(
    memory: DNCMemory,
    hidden: Tensor,
    embeddings: Tensor,
    state: MemoryState | None,
    ancestry: Ancestry,
    reset: Tensor,
    input_ids: Tensor | None,
    output_slot_tokens: bool,
) -> MemoryOutput:
    """`memory` over [B, T, H], each token from the state after its parent: token by token, with a state for each.

    The state returned is that after each row's last real token.
    """
    batch, tokens, _ = hidden.shape
    if state is None:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        state = memory.initial_state(batch, hidden.device, dtype)
    states, outputs = [state], []
    for t in range(tokens):
        now = slice(t, t + 1)
        before = _choose(states, ancestry.parents[:, t] + 1)
        real = ancestry.real[:, now].contiguous()
        ids = None if input_ids is None else input_ids[:, now]
        outputs.append(memory(hidden[:, now], embeddings[:, now], before, real, reset[:, now], ids, output_slot_tokens))
        states.append(outputs[-1].state)
    last = (torch.arange(1, tokens + 1, device=hidden.device) * ancestry.real).amax(-1)
    *parts, _ = zip(*outputs, strict=True)
    joined = (None if part[0] is None else torch.cat(part, dim=1) for part in parts)
    return MemoryOutput(*joined, _choose(states, last))


def _choose(states: list[MemoryState], index: Tensor) -> MemoryState:
    """For each row the state of its index [B]."""
    chosen = index.tolist()
    if len(set(chosen)) == 1:
        return states[chosen[0]]
    return MemoryState(
        *(
            None if first is None else torch.stack([states[i][field][row] for row, i in enumerate(chosen)])
            for field, first in enumerate(states[0])
        )
    )
