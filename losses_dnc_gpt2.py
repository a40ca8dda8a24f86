"""Cross-entropy, and what is measured beside it, without the logits of all tokens in memory.

The logits of a chunk of tokens exist at a time. The gradient of the summed cross-entropy follows from them at once, so
that the forward pass computes it and the backward pass only scales it: three matrix products with the LM head's weight,
as with whole logits, and none of them twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

IGNORED = -100
"""Target that is not scored, as in transformers."""

# A model loaded as Hub code has this file under another module name, possibly in another version: operators of its own.
NAMESPACE = __name__.replace(".", "_")


class TokenLosses(NamedTuple):
    """What `linear_cross_entropy` computes of M tokens; zero at ignored ones."""

    loss: Tensor  # [], cross-entropy (nats) summed over the scored tokens, differentiable
    correct: Tensor  # [M] bool, whether the target is the most probable token, the lowest id among equals
    divergence: Tensor  # [M], KL(p || p_base) in nats where asked for, detached


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    base_hidden: Tensor | None = None,
    compared: Tensor | None = None,
) -> TokenLosses:
    """Cross-entropy of softmax(hidden weight^T), with gradients to `hidden` and `weight`.

    Args:
        hidden: [M, H].
        weight: [V, H] of the LM head.
        targets: [M] token ids, `IGNORED` where there is nothing to score.
        base_hidden: [M, H], hidden states without the memory's read; gives p_base. No gradient flows to it.
        compared: [M] bool, scored tokens whose divergence is wanted; all scored ones by default.

    Under autocast the matrix products run in its type; sums and exponentials in float32 or better.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        base_hidden = None if base_hidden is None else base_hidden.to(dtype)
    if base_hidden is not None:
        base_hidden = base_hidden.detach()
        compared = targets != IGNORED if compared is None else compared & (targets != IGNORED)
    weight_gradient = torch.is_grad_enabled() and weight.requires_grad
    outputs = _linear_cross_entropy(hidden, weight, targets, base_hidden, compared, weight_gradient)
    return TokenLosses(*outputs[: len(TokenLosses._fields)])


def causal_lm_losses(
    lm_head: nn.Linear,
    hidden: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    base_hidden: Tensor | None = None,
    compared: Tensor | None = None,
) -> TokenLosses:
    """`linear_cross_entropy` of hidden states [B, T, H], its loss divided as transformers' causal models divide theirs.

    Args:
        labels, shift_labels: [B, T]; one of them, as the models' `forward` takes them.
        num_items_in_batch: what the sum is divided by; the number of scored tokens by default.

    Returns: per-token fields [B, T].
    """
    if isinstance(lm_head, FSDPModule):
        lm_head.unshard()  # its weight is used here without its `forward`, which would gather it
    elif type(lm_head) is not nn.Linear or lm_head.bias is not None:
        raise ValueError(f"A loss without logits needs a linear LM head without bias, not {lm_head}.")
    elif lm_head.weight.is_meta and not hidden.is_meta:
        raise ValueError("A loss without logits needs an LM head that is not offloaded: pass output_logits=True.")
    targets = next_tokens(labels, shift_labels)
    shape, targets = targets.shape, targets.flatten().to(hidden.device)
    losses = linear_cross_entropy(
        hidden.flatten(0, 1),
        lm_head.weight,
        targets,
        None if base_hidden is None else base_hidden.flatten(0, 1),
        None if compared is None else compared.flatten(),
    )
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(hidden.device)
    return TokenLosses(losses.loss / count, losses.correct.view(shape), losses.divergence.view(shape))


def next_tokens(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """The target of each token [B, T]: `shift_labels`, or `labels` shifted."""
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("A loss without logits needs labels or shift_labels.")
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def chunk_length(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits exist at a time.

    Enough for a matrix product to be efficient; on the CPU no more, for what is in its caches need not be read again.
    """
    if device.type == "cpu":
        return max(256, 2**20 // vocab_size)
    return max(256, 2**26 // vocab_size)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    base_hidden: Tensor | None,
    compared: Tensor | None,
    weight_gradient: bool,
) -> list[Tensor]:
    """Fields of `TokenLosses`, then the loss's gradients to `hidden` and (else empty) `weight`.

    The latter is a sum over all tokens, which float16 may not hold before it is divided by their number.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=precise)
    correct = torch.zeros_like(targets, dtype=torch.bool)
    divergence = hidden.new_zeros(targets.shape, dtype=precise)
    d_hidden = torch.zeros_like(hidden)
    d_weight = weight.new_zeros(weight.shape if weight_gradient else (0,), dtype=precise)
    logits = hidden.new_empty(min(len(targets), chunk_length(len(weight), hidden.device)), len(weight))
    for tokens in (targets != IGNORED).nonzero()[:, 0].split(max(1, len(logits))):
        x, y = hidden[tokens], targets[tokens]
        z = torch.mm(x, weight.mT, out=logits[: len(tokens)])
        of_target = z.gather(-1, y[:, None])[:, 0].to(precise)
        normalizers, hits = _to_probabilities(z, y)
        loss += (normalizers - of_target).sum()
        correct[tokens] = hits
        z.scatter_add_(-1, y[:, None], z.new_full((len(y), 1), -1))
        d_x = z @ weight
        d_hidden[tokens] = d_x
        if weight_gradient:
            _add_product(d_weight, z, x)
        if base_hidden is not None:
            among = compared[tokens].nonzero()[:, 0]
            places = tokens[among]
            base = torch.mm(base_hidden[places], weight.mT, out=logits[: len(places)])
            # sum_v p_v (z_v - base_v) is (p weight) . (x - base_x), and p weight is known from the gradient.
            mean = d_x[among].to(precise) + weight[y[among]]
            read = x[among].to(precise) - base_hidden[places]
            difference = torch.linalg.vecdot(mean, read)
            divergence[places] = difference - normalizers[among] + _normalizers(base)
    return [loss, correct, divergence, d_hidden, d_weight]


def _pieces(logits: Tensor) -> list[Tensor]:
    """Rows of logits [M, V] whose intermediate results stay in a processor's caches."""
    if logits.device.type != "cpu":
        return [logits]
    return list(logits.split(max(1, 2**20 // logits.shape[-1])))


def _to_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of [M, V] in place; returns log sum exp [M] and whether the target [M] is the argmax."""
    normalizers, hits = [], []
    pieces = _pieces(logits)
    for z, y in zip(pieces, targets.split([len(piece) for piece in pieces]), strict=True):
        highest = z.amax(-1)
        hit = z.gather(-1, y[:, None])[:, 0] == highest
        rows = hit.nonzero()[:, 0]  # only these can be right; of equal logits the first counts
        hit[rows] = z[rows].argmax(-1) == y[rows]
        probabilities = _softmax(z)
        normalizers.append(highest.to(probabilities.dtype) - probabilities.amax(-1).log())
        hits.append(hit)
        z.copy_(probabilities)
    return torch.cat(normalizers), torch.cat(hits)


def _normalizers(logits: Tensor) -> Tensor:
    """log sum exp of [M, V]: [M]. From the softmax, whose kernel is faster than that of logsumexp on the CPU."""
    pieces = [z.amax(-1) - _softmax(z).amax(-1).log() for z in _pieces(logits)]
    return torch.cat(pieces)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b."""
    if total.dtype == a.dtype:
        total.addmm_(a.mT, b)
    else:
        total += a.mT @ b


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_fake(hidden, weight, targets, base_hidden, compared, weight_gradient):
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return [
        hidden.new_empty((), dtype=precise),
        torch.empty_like(targets, dtype=torch.bool),
        hidden.new_empty(targets.shape, dtype=precise),
        torch.empty_like(hidden),
        weight.new_empty(weight.shape if weight_gradient else (0,), dtype=precise),
    ]


def _save_for_backward(ctx, inputs, output) -> None:
    *_, d_hidden, d_weight = output
    ctx.save_for_backward(d_hidden, d_weight)
    _, weight, *_, ctx.weight_gradient = inputs
    ctx.weight_dtype = weight.dtype


def _backward(ctx, gradients: list[Tensor]):
    # In place, for the weight's gradient is large. Autograd refuses a second backward pass through the same graph: it
    # sees that what was saved has changed.
    d_hidden, d_weight = ctx.saved_tensors
    d_loss = gradients[0]
    d_hidden = d_hidden.mul_(d_loss)
    d_weight = d_weight.mul_(d_loss).to(ctx.weight_dtype) if ctx.weight_gradient else None
    return d_hidden, d_weight, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
