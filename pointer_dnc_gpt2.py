"""Reads as pointers: the tokens that the slots hold, each as probable as its slot is read, mixed into the prediction.

The read that is added to the hidden states is a mean of what several slots hold, and the softmax over the vocabulary
decides between them; a pointer gives each its own share (Merity et al. 2017, "Pointer sentinel mixture models"; Grave
et al. 2017, "Improving neural language models with a continuous cache"). It reads the same slots with the same weights
and has no parameter but its share of the prediction.

Token ids in slots are stored plus 1: 0 is a slot whose token is not known, or that is empty.
"""

import torch
from torch import Tensor

HELD = 0.5
"""A slot holds the last token of whose write it took more than this."""


def slot_tokens(
    input_ids: Tensor | None, write_weights: Tensor, before: Tensor, reset: Tensor | None, every: bool
) -> Tensor:
    """The token that each slot holds after each token, or (without `every`) after the last alone: [B, T or 1, N].

    Args:
        input_ids: [B, T], `None` where tokens have no ids.
        write_weights: [B, T, N], 0 where a token is masked.
        before: [B, N] after the token before the first.
        reset: [B, T] bool, tokens before which the memory is emptied.
    """
    if write_weights.shape[1] == 1 and input_ids is not None and reset is None:
        # One token, as in generation: the same in a few operations less.
        return torch.where(write_weights > HELD, (input_ids + 1)[..., None], before[:, None])
    number = torch.arange(1, write_weights.shape[1] + 1, device=write_weights.device)
    written = torch.where(write_weights > HELD, number[:, None], 0)
    written = written.cummax(1).values if every else written.amax(1, keepdim=True)
    if input_ids is None:
        tokens = torch.zeros_like(written)
    else:
        tokens = (input_ids + 1).gather(1, (written - 1).clamp_min(0).flatten(1)).view_as(written)
    tokens = torch.where(written > 0, tokens, before[:, None])
    if reset is not None:
        emptied = torch.where(reset, number, 0)
        emptied = emptied.cummax(1).values if every else emptied.amax(1, keepdim=True)
        tokens = torch.where(written >= emptied[..., None], tokens, 0)
    return tokens


def pointer_mass(tokens: Tensor, weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the read points at the targets, and how much at any token: [...], [...].

    Args: tokens [..., N], weights [..., N], targets [...] token ids.
    """
    return (weights * (tokens == targets[..., None] + 1)).sum(-1), (weights * (tokens > 0)).sum(-1)


def mix(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Logarithm of (1 - sum_n w_n) softmax(logits) + sum_n w_n [token n], in at least float32: [..., V].

    Args: logits [..., V], tokens [..., N] as in slots, weights w [..., N] whose sum is below 1.
    """
    model = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    weights = torch.where(tokens > 0, weights, 0).to(model.dtype)
    pointed = torch.zeros_like(model).scatter_add(-1, (tokens - 1).clamp_min(0), weights)
    # In logarithms: a small probability of the model must not become 0. log 0 itself would have no gradient.
    pointed = torch.where(pointed > 0, pointed.clamp_min(torch.finfo(model.dtype).tiny).log(), -torch.inf)
    return torch.logaddexp(torch.log1p(-weights.sum(-1, keepdim=True)) + model, pointed)
