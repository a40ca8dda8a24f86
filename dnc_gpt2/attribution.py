"""Which tokens the memory's slots hold, and so which tokens a read comes from.

A token that is written to a slot with weight w takes over the share w of it: every earlier token keeps 1 - w of the
share that it had. This counts each write as if it erased fully. Where the erase vector or the freeing of rows (`"dnc"`
with `erase_on_free`) says otherwise, the old content weighs more or less than is counted here.

Shapes: B batch, T tokens, N slots, R read heads.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_writes(write_weights: Tensor, write_gates: Tensor, addressing: str) -> Tensor:
    """What is really written of each token to each slot: [..., N], [...] -> [..., N] in [0, 1].

    The write weights of `"simplified"` do not contain the gate.
    """
    return write_weights * write_gates[..., None] if addressing == "simplified" else write_weights


def slot_shares(writes: Tensor) -> Iterator[Tensor]:
    """After each token, the share [N, T] of every slot that each token holds. The tensor is reused: copy what you keep.

    Args:
        writes: `effective_writes` [T, N] of one text from an empty memory.
    """
    tokens, slots = writes.shape
    shares = writes.new_zeros(slots, tokens)
    for t in range(tokens):
        shares *= 1 - writes[t][:, None]
        shares[:, t] = writes[t]
        yield shares


def reads_beyond_window(
    read_weights: Tensor, writes: Tensor, window: int, reset: Tensor | None = None, filled: Tensor | None = None
) -> Tensor:
    """Share of each token's reads, averaged over the heads, that comes from before its attention window: [B, T].

    Args:
        read_weights: [B, T, R, N].
        writes: `effective_writes` [B, T, N]; the first token begins a window.
        window: tokens of an attention window.
        reset: [B, T] bool, tokens before which the memory is emptied.
        filled: [B, N] the share of each slot that was written before the first token; `None`: an empty memory.

    What is read of empty slots counts as read from nowhere.
    """
    tokens = writes.shape[1]
    keep = 1 - writes
    if reset is not None:
        keep = keep * ~reset[..., None]
    padding = (0, 0, 0, -tokens % window)
    keep = F.pad(keep, padding, value=1.0).unflatten(1, (-1, window))
    written = F.pad(writes, padding).unflatten(1, (-1, window))
    survived = keep.cumprod(2)  # of what a slot held at the window's start
    later = F.pad(keep[:, :, 1:], (0, 0, 0, 1), value=1.0).flip(2).cumprod(2).flip(2)
    added = (written * later).sum(2)  # in the window, and still there at its end
    before = torch.zeros_like(writes[:, 0]) if filled is None else filled.to(writes.dtype)
    old = []
    for k in range(keep.shape[1]):
        old.append(before[:, None] * survived[:, k])
        before = old[-1][:, -1] + added[:, k]
    return (read_weights.mean(2) * torch.cat(old, dim=1)[:, :tokens]).sum(-1)
