"""Fused scans of the memory's recurrence: the same numbers as `recurrence` in memory_dnc_gpt2.py, without its overhead.

One pair of operators, forward and backward, stands for every implementation: numba's on the CPU, Triton's on CUDA. To
`torch.compile`, autocast, distributed training and checkpointing the whole scan is one opaque step.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

try:
    from .kernels_cpu_dnc_gpt2 import (
        Interface,
        Options,
        Outputs,
        Saved,
        State,
        numba_backward,
        numba_forward,
        numba_problem,
    )
    from .kernels_cuda_dnc_gpt2 import triton_backward, triton_forward, triton_problem
except ImportError:
    from kernels_cpu_dnc_gpt2 import (
        Interface,
        Options,
        Outputs,
        Saved,
        State,
        numba_backward,
        numba_forward,
        numba_problem,
    )
    from kernels_cuda_dnc_gpt2 import triton_backward, triton_forward, triton_problem

logger = logging.get_logger(__name__)

# A model loaded as Hub code has this file under another module name, possibly in another version: operators of its own.
NAMESPACE = __name__.replace(".", "_")


def _chunk_length(tokens: int) -> int:
    """Tokens between two kept states: twice the square root, at most 64.

    Every batch row keeps tokens / length states and every thread replays into length of them: the square root of the
    tokens would make their sum smallest for one row a thread, twice that does for four. The bound
    keeps a thread's replayed states few however long the example; where it lies was not seen to matter for time.
    """
    return min(64, 2 * math.isqrt(max(0, tokens - 1)) + 1)


def _options(
    interface: Interface, usage_decay: float, read_refresh: float, erase_on_free: bool, training: bool
) -> Options:
    real = np.float64 if interface.write_keys.dtype == torch.float64 else np.float32
    return Options(
        real(usage_decay),
        real(read_refresh),
        erase_on_free,
        _chunk_length(interface.mask.shape[1]),
        training,
        links=interface.read_modes.numel() > 0,
        sharpened=interface.link_sharpness.numel() > 0,
        masked=interface.write_masks.numel() > 0,
    )


def _scan_all(
    interface: Sequence[Tensor],
    state: Sequence[Tensor],
    implementation: str,
    addressing: str,
    usage_decay: float,
    read_refresh: float,
    erase_on_free: bool,
    training: bool,
) -> list[Tensor]:
    """The tensors of `Interface` and `State` to those of `Outputs` and the new `State`.

    With `training` those of `Saved` and the checkpoints follow: the states [B * chunks, ...] before every chunk.
    """
    interface = Interface(*[x.contiguous() for x in interface])
    outputs = _new_outputs(interface, state, addressing)
    new_state = [x.clone(memory_format=torch.contiguous_format) for x in state]
    kept = _new_kept(interface, state, addressing, training)
    saved, checkpoints = _split(kept, Saved, State)
    arguments = interface, State(*new_state), Outputs(*outputs), Saved(*saved), State(*checkpoints)
    forward = triton_forward if implementation == "triton" else numba_forward
    forward(addressing, *arguments, _options(interface, usage_decay, read_refresh, erase_on_free, training))
    return [*outputs, *new_state, *kept] if training else [*outputs, *new_state]


_scan = torch.library.custom_op(f"{NAMESPACE}::scan", _scan_all, mutates_args=())


@_scan.register_fake
def _scan_fake(interface, state, implementation, addressing, usage_decay, read_refresh, erase_on_free, training):
    kept = _new_kept(interface, state, addressing, training) if training else []
    return [*_new_outputs(interface, state, addressing), *(x.new_empty(x.shape) for x in state), *kept]


def _new_outputs(interface: Sequence[Tensor], state: Sequence[Tensor], addressing: str) -> list[Tensor]:
    """Memory for the tensors of `Outputs`."""
    new = state[0].new_empty
    batch, slots, width = state[0].shape
    tokens, heads, address = Interface(*interface).read_keys.shape[1:]
    values = width - address if addressing == "lru" else width
    return [new(batch, tokens, heads, values), new(batch, tokens, slots), new(batch, tokens, heads, slots)]


def _new_kept(interface: Sequence[Tensor], state: Sequence[Tensor], addressing: str, training: bool) -> list[Tensor]:
    """Memory for the tensors of `Saved` and the checkpoints; without `training` the working space of one token."""
    new = state[0].new_empty
    batch, slots, _ = state[0].shape
    tokens, heads = Interface(*interface).read_keys.shape[1:3]
    links = State(*state).link.shape[-1]
    kept = tokens if training else 1
    chunks = -(-tokens // _chunk_length(tokens)) if training else 0
    order = new((batch, kept, 1 if addressing == "lru" else slots), dtype=torch.int64)
    checkpoints = [new(batch * chunks, *x.shape[1:]) for x in state]
    return [new(batch, kept, slots), order, new(batch, kept, heads, links), *checkpoints]


def _split(tensors: Sequence[Any], *kinds: type) -> list[list[Any]]:
    """A flat sequence by named tuples."""
    tensors = iter(tensors)
    return [list(itertools.islice(tensors, len(kind._fields))) for kind in kinds]


@torch.library.custom_op(f"{NAMESPACE}::scan_backward", mutates_args=())
def _scan_backward(
    interface: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    checkpoints: Sequence[Tensor],
    d_outputs: Sequence[Tensor],
    d_state: Sequence[Tensor],
    implementation: str,
    addressing: str,
    usage_decay: float,
    read_refresh: float,
    erase_on_free: bool,
) -> list[Tensor]:
    """Gradients of the interface's floating-point tensors, then of the initial state, given those of the outputs."""
    interface = Interface(*[x.contiguous() for x in interface])
    masks = interface.mask, interface.reset
    d_interface = [torch.empty_like(x) for x in interface[: -len(masks)]]
    d_state = [x.clone(memory_format=torch.contiguous_format) for x in d_state]
    options = _options(interface, usage_decay, read_refresh, erase_on_free, training=True)
    arguments = interface, Outputs(*outputs), Saved(*saved), State(*checkpoints)
    gradients = Outputs(*[x.contiguous() for x in d_outputs]), State(*d_state), Interface(*d_interface, *masks)
    backward = triton_backward if implementation == "triton" else numba_backward
    backward(addressing, *arguments, options, *gradients)
    return [*d_interface, *d_state]


@_scan_backward.register_fake
def _scan_backward_fake(interface, outputs, saved, checkpoints, d_outputs, d_state, *options):
    return [d_state[0].new_empty(x.shape) for x in (*interface[:-2], *d_state)]


def _save_for_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    interface, _, *ctx.options, _ = inputs
    outputs, _, saved, checkpoints = _split(output, Outputs, State, Saved, State)
    ctx.save_for_backward(*interface, *outputs, *saved, *checkpoints)
    ctx.set_materialize_grads(False)  # or autograd would build zeros as large as everything that is saved


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple:
    interface, outputs, saved, checkpoints = _split(ctx.saved_tensors, Interface, Outputs, Saved, State)
    d_outputs, d_state = _split(gradients, Outputs, State)
    batch = outputs[0].shape[0]
    d_outputs = [torch.zeros_like(x) if d is None else d for x, d in zip(outputs, d_outputs, strict=True)]
    d_state = [x.new_zeros(batch, *x.shape[1:]) if d is None else d for x, d in zip(checkpoints, d_state, strict=True)]
    results = _scan_backward(interface, outputs, saved, checkpoints, d_outputs, d_state, *ctx.options)
    d_interface, d_state = results[: -len(State._fields)], results[-len(State._fields) :]
    return [*d_interface, None, None], d_state, *[None] * (len(ctx.options) + 1)


_scan.register_autograd(_backward, setup_context=_save_for_backward)


@torch.compiler.assume_constant_result
def _triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot be used on this device, or None."""
    return triton_problem(device)


def _obstacle(implementation: str, interface: Any, state: Any) -> str | None:
    """Why the fused scan cannot run for these tensors, or None."""
    device, dtype = state.memory.device, state.memory.dtype
    if dtype not in (torch.float32, torch.float64):
        return f"the memory is of dtype {dtype} and the fused scan computes in float32 or float64"
    if interface.write_gates.shape[1] == 0:
        return "there are no tokens"
    if implementation == "triton":
        return _triton_problem(device)
    if device.type != "cpu":
        return f"the memory is on {device} and the fused scan runs on the CPU and on CUDA"
    return numba_problem()


def fused_scan(interface: Any, state: Any, config: Any) -> tuple[Tensor, Tensor, Tensor, Any] | None:
    """Run the memory over all tokens, as `recurrence` does, in one fused operator.

    Args:
        interface: `MemoryInterface` of B rows and T tokens.
        state: `MemoryState` before the first token.
        config: `scan`, `addressing` and its options.
    Returns:
        reads [B, T, R, V], write_weights [B, T, N], read_weights [B, T, R, N] and the new state; or None where the
        recurrence itself has to run (`scan="eager"`, or without what the fused scan needs).
    Raises:
        RuntimeError: `scan="numba"`, but numba's scan cannot run.

    `scan="auto"` is numba on the CPU and Triton on CUDA. `"triton"` where Triton cannot run is `"auto"`, after a
    warning. Gradients reach every floating-point input, once: second derivatives need `scan="eager"`.
    """
    if config.scan == "eager":
        return None
    usual = "triton" if state.memory.device.type == "cuda" else "numba"
    implementation = usual if config.scan == "auto" else config.scan
    obstacle = _obstacle(implementation, interface, state)
    if obstacle is not None and implementation != usual and implementation == "triton":
        logger.warning_once(f'scan="triton" cannot be used, "auto" is instead: {obstacle}.')
        implementation, obstacle = usual, _obstacle(usual, interface, state)
    if obstacle is not None:
        if config.scan == "numba":
            raise RuntimeError(
                f'scan="numba" cannot be used: {obstacle}. Install numba (`pip install numba`) and run on the CPU, or '
                'set scan="auto" or "eager".'
            )
        logger.warning_once(f"The memory runs without its fused scan, which is slower: {obstacle}.")
        return None
    inputs, old = _present(interface, state)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *old))
    options = implementation, config.addressing, config.usage_decay, config.read_refresh, config.erase_on_free, training
    # Outside of graphs inference does without the operator's dispatch, which takes longer than the scan of a token.
    direct = not training and not torch.compiler.is_compiling() and type(state.memory) is Tensor
    outputs, new = _split((_scan_all if direct else _scan)(inputs, old, *options), Outputs, State)
    new = State(*new)
    if state.link is None:
        new = new._replace(link=None, precedence=None)
    return (*outputs, state._replace(**new._asdict()))


def _present(interface: Any, state: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of interface and state, empty ones for what is missing: numba compiles once for all of it."""
    batch, tokens = interface.write_gates.shape
    new = interface.write_keys.new_empty
    shapes = {
        "allocation_gates": (batch, 0),
        "free_gates": (batch, tokens, 0),
        "read_modes": (batch, tokens, 0, 0),
        "write_masks": (batch, tokens, 0),
        "read_masks": (batch, tokens, 0, 0),
        "link_sharpness": (batch, tokens, 0, 0),
    }
    constants = {"mask": True, "reset": False}
    inputs = []
    for name, x in zip(Interface._fields, interface, strict=True):
        if x is None and name in constants:
            x = new((batch, tokens), dtype=torch.bool).fill_(constants[name])
        inputs.append(new(shapes[name]) if x is None else x)
    link = new(batch, 0, 0) if state.link is None else state.link
    precedence = new(batch, 0) if state.precedence is None else state.precedence
    return inputs, [state.memory, state.usage, state.write_weights, state.read_weights, link, precedence]
