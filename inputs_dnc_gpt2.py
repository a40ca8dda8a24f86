"""What a call of the model may be given: what does not fit is refused by its name, before anything is computed.

Shapes and types are looked at wherever the model runs; token ids only on the processor and outside of compilers, for
elsewhere that would wait for a device, or branch on data that are not there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from .losses_dnc_gpt2 import IGNORED
except ImportError:
    from losses_dnc_gpt2 import IGNORED

INTEGERS = (torch.int64, torch.int32)


def check_ids(input_ids: Tensor, vocab_size: int, meta: bool) -> None:
    """Raise a ValueError unless these are token ids [B, T], B and T at least 1.

    Args:
        vocab_size: ids are 0 to `vocab_size` - 1.
        meta: whether the model is on the device meta, without data.
    """
    _require_type("input_ids", input_ids, INTEGERS)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; they must be [batch, tokens], neither 0.")
    if input_ids.is_meta and not meta:  # the embedding would read anything
        raise ValueError("input_ids are on the device meta, without data: pass those on the model's device.")
    _require_known("input_ids", input_ids, vocab_size)


def check_inputs(
    batch: int, tokens: int, attention_mask: Tensor | None, position_ids: Tensor | None, memory_reset: Tensor | None
) -> None:
    """Raise a ValueError where one of these does not fit inputs [B, T]. A mask's shape is looked at in use."""
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}; it must be a tensor.")
    if position_ids is not None:
        _require_type("position_ids", position_ids, INTEGERS)
        _require_shape("position_ids", position_ids, [(batch, tokens), (1, tokens), (tokens,)])
    if memory_reset is not None:
        check_choice("memory_reset", memory_reset, (batch, tokens))


def check_positions(position_ids: Tensor, real: Tensor | None) -> None:
    """Raise a ValueError where a real token has a position below 0.

    Args:
        position_ids: [B, T], [1, T] or [T].
        real: [B, T] bool; `None`: all are real.
    """
    if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lowest = int((position_ids if real is None else position_ids.masked_fill(~real, 0)).amin())
    if lowest < 0:
        raise ValueError(f"position_ids hold {lowest}; positions of real tokens are 0 or more.")


def check_state(state: object, fields: Sequence[str], vocab_size: int) -> None:
    """Raise a ValueError unless this is a memory state whose tokens [B, N] are 0 or 1 + a token id.

    Args:
        fields: of a memory state, which tell it: code from the Hub has a class of its own.
    """
    if getattr(state, "_fields", None) != tuple(fields):
        raise ValueError(
            f"memory_state is a {type(state).__name__}: pass the memory_state that the model returned, or what "
            "MemoryState.load(path) reads."
        )
    if state.slot_tokens is not None:
        _require_type("memory_state.slot_tokens", state.slot_tokens, (torch.int64,))
        _require_known("memory_state.slot_tokens", state.slot_tokens, vocab_size + 1)


def check_choice(name: str, chosen: Tensor, shape: tuple[int, int]) -> None:
    """Raise a ValueError unless this chooses tokens [B, T]."""
    _require_type(name, chosen, (torch.bool,))
    _require_shape(name, chosen, [shape])


def check_targets(name: str, targets: Tensor, shape: tuple[int, int], vocab_size: int) -> None:
    """Raise a ValueError unless these are token ids of this shape [B, T], or `IGNORED`.

    Args:
        name: "labels" or "shift_labels".
    """
    _require_type(name, targets, (torch.int64,))
    _require_shape(name, targets, [shape])
    _require_known(name, torch.where(targets == IGNORED, 0, targets), vocab_size)


def _require_type(name: str, x: object, dtypes: Sequence[torch.dtype]) -> None:
    kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
    if kind not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} of type {kind} cannot be used; pass a tensor of {allowed}.")


def _require_shape(name: str, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    if tuple(x.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} has shape {list(x.shape)}; for this input it must be {allowed}.")


def _require_known(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} hold {low if low < 0 else high}, but the vocabulary has the ids 0 to {vocab_size - 1}: use the "
            "tokenizer that was saved with this model."
        )
