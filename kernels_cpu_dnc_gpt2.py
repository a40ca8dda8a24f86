"""The fused scans for the CPU: numba kernels of the recurrence, forward and backward.

The whole recurrence of a batch row runs in one compiled function, and the rows run on as many threads as torch has. The
backward pass keeps the memory at every `chunk`-th token only and replays the writes in between, so that a scan keeps
few copies of the memory, and besides a few weights a token.

The functions under `@_kernel` are plain Python until the first scan compiles them (`_compile_kernels`), so that neither
importing nor using a model without numba pays for it. Inside them B, T, N, W, A, R are batch, tokens, slots, row width,
address width and read heads; "rows" are the memory's rows. Usage and allocation are computed without fastmath, in
the order of the eager recurrence, and the chosen order is saved for the backward pass: near ties cannot fall
differently in the two directions.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

EPSILON = 1e-6  # of the cosine and of the usage, as in the recurrence
SMALLEST = 2.0**-126  # weight that is sharpened, as in the recurrence

_KERNELS: list[tuple[Callable, dict[str, Any]]] = []


def _kernel(function: Callable | None = None, **options: Any) -> Callable:
    """Mark a function for `_compile_kernels`, with options of `numba.njit` that differ from the usual ones."""
    if function is None:
        return functools.partial(_kernel, **options)
    _KERNELS.append((function, options))
    return function


@functools.cache
def _compile_kernels() -> None:
    """Replace the marked functions by numba's; each compiles at its first call."""
    numba = importlib.import_module("numba")  # for a statement, loading the model as Hub code would demand it
    # Sums may be reordered, but NaN and infinity must come out where they came in.
    fastmath = {"reassoc", "contract", "arcp", "nsz", "afn"}
    usual = {"fastmath": fastmath, "error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}
    for function, options in _KERNELS:
        try:
            compiled = numba.njit(**{**usual, **options})(function)
        except RuntimeError as error:  # numba found no writable place for its cache
            logger.warning_once(f"The memory's kernels are compiled anew in every process: {error}.")
            compiled = numba.njit(**{**usual, **options, "cache": False})(function)
        globals()[function.__name__] = compiled


# Of the functions that Python calls: the others live inside them. They take plain tuples and name their parts
# themselves: numba tells named tuples apart by name only, so that with a second copy of this module every call would
# take its slow way (a millisecond).
_ENTRY = {"nogil": True, "no_cpython_wrapper": False, "cache": True}
# A function that LLVM leaves standing in an entry is there twice: the process that compiles the entry calls the
# function's own code, one that loads it from the cache the copy optimised within the entry, which rounds otherwise.
_INLINED = {"forceinline": True}


class Interface(NamedTuple):
    """The arrays of a `MemoryInterface`, or their gradients; empty where the addressing has no such part."""

    write_keys: Any
    write_strengths: Any
    write_vectors: Any
    erase_vectors: Any
    write_gates: Any
    read_keys: Any
    read_strengths: Any
    allocation_gates: Any
    free_gates: Any
    read_modes: Any
    write_masks: Any
    read_masks: Any
    link_sharpness: Any
    mask: Any
    reset: Any


class State(NamedTuple):
    """The arrays of a `MemoryState` that the recurrence changes, or their gradients."""

    memory: Any
    usage: Any
    write_weights: Any
    read_weights: Any
    link: Any
    precedence: Any


class Outputs(NamedTuple):
    """What the scan answers for every token, or its gradients."""

    reads: Any
    write_weights: Any
    read_weights: Any


class Saved(NamedTuple):
    """What the backward pass needs of every token besides."""

    content: Any  # [B, T, N] content weights of the write
    order: Any  # [B, T, N] slots by ascending usage; "lru": [B, T, 1] the allocated slot
    read_content: Any  # [B, T, R, N] content weights of the reads, where links make them part of the read weights


class Options(NamedTuple):
    """Scalars; the floats in the arrays' own precision, so that arithmetic with them stays in it."""

    usage_decay: Any
    read_refresh: Any
    erase_on_free: bool
    chunk: int
    training: bool
    links: bool
    sharpened: bool
    masked: bool


@_kernel
def fill(rows, value):
    """Set every entry of [N, W]. Loops compile several times faster than slice assignment."""
    for n in range(rows.shape[0]):
        for w in range(rows.shape[1]):
            rows[n, w] = value


@_kernel
def copy(rows, out):
    """out = rows, both [N, W]."""
    for n in range(rows.shape[0]):
        for w in range(rows.shape[1]):
            out[n, w] = rows[n, w]


@_kernel
def column(first, w):
    """first + w as an index. Of a signed one numba would ask whether it is negative, and no loop be vectorised."""
    return np.uint64(first + w)


@_kernel
def dots(vectors, rows, first, width, out):
    """out[k, n] = vectors[k] . rows[n] over `width` columns of the rows, from `first` on: [K, *], [N, *] -> [K, N].

    Four rows at a time, so that the last additions of their sums, across a vector register, overlap.
    """
    slots = rows.shape[0]
    zero = rows.dtype.type(0)
    blocked = slots - slots % 4
    for n in range(0, blocked, 4):
        for k in range(vectors.shape[0]):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for w in range(width):
                x, c = vectors[k, w], column(first, w)
                s0 += x * rows[n, c]
                s1 += x * rows[n + 1, c]
                s2 += x * rows[n + 2, c]
                s3 += x * rows[n + 3, c]
            out[k, n], out[k, n + 1], out[k, n + 2], out[k, n + 3] = s0, s1, s2, s3
    for n in range(blocked, slots):
        for k in range(vectors.shape[0]):
            s0 = zero
            for w in range(width):
                s0 += vectors[k, w] * rows[n, column(first, w)]
            out[k, n] = s0


@_kernel
def weighted_sums(weights, rows, first, width, out):
    """out[k] = sum_n weights[k, n] rows[n] over `width` columns from `first` on: [K, N], [N, *] -> [K, width]."""
    slots = rows.shape[0]
    blocked = slots - slots % 4
    for k in range(weights.shape[0]):
        for w in range(width):
            out[k, w] = 0
        for n in range(0, blocked, 4):
            x0, x1, x2, x3 = weights[k, n], weights[k, n + 1], weights[k, n + 2], weights[k, n + 3]
            for w in range(width):
                c = column(first, w)
                out[k, w] += x0 * rows[n, c] + x1 * rows[n + 1, c] + x2 * rows[n + 2, c] + x3 * rows[n + 3, c]
        for n in range(blocked, slots):
            x0 = weights[k, n]
            for w in range(width):
                out[k, w] += x0 * rows[n, column(first, w)]


@_kernel
def add_outer(weights, vectors, first, width, rows):
    """rows[n] += sum_k weights[k, n] vectors[k] over `width` columns of the rows, from `first` on."""
    count = vectors.shape[0]
    blocked = count - count % 4
    for n in range(rows.shape[0]):
        for k in range(0, blocked, 4):
            x0, x1, x2, x3 = weights[k, n], weights[k + 1, n], weights[k + 2, n], weights[k + 3, n]
            for w in range(width):
                rows[n, column(first, w)] += (
                    x0 * vectors[k, w] + x1 * vectors[k + 1, w] + x2 * vectors[k + 2, w] + x3 * vectors[k + 3, w]
                )
        for k in range(blocked, count):
            x0 = weights[k, n]
            for w in range(width):
                rows[n, column(first, w)] += x0 * vectors[k, w]


@_kernel
def inverse_norms(rows, width, out):
    """out[n] = 1 / sqrt(|rows[n]|^2 + EPSILON) over the first `width` columns; four rows at a time, as in `dots`."""
    slots = rows.shape[0]
    zero, one, epsilon = rows.dtype.type(0), rows.dtype.type(1), rows.dtype.type(EPSILON)
    blocked = slots - slots % 4
    for n in range(0, blocked, 4):
        s0, s1, s2, s3 = zero, zero, zero, zero
        for w in range(width):
            s0 += rows[n, w] * rows[n, w]
            s1 += rows[n + 1, w] * rows[n + 1, w]
            s2 += rows[n + 2, w] * rows[n + 2, w]
            s3 += rows[n + 3, w] * rows[n + 3, w]
        out[n], out[n + 1], out[n + 2], out[n + 3] = s0, s1, s2, s3
    for n in range(blocked, slots):
        s0 = zero
        for w in range(width):
            s0 += rows[n, w] * rows[n, w]
        out[n] = s0
    for n in range(slots):
        out[n] = one / math.sqrt(out[n] + epsilon)


@_kernel
def scale_keys(keys, strengths, scaled, lengths):
    """scaled[k] = strengths[k] keys[k] lengths[k], with the inverse norm of the key as its length."""
    inverse_norms(keys, keys.shape[1], lengths)
    for k in range(keys.shape[0]):
        scale = strengths[k] * lengths[k]
        for w in range(keys.shape[1]):
            scaled[k, w] = scale * keys[k, w]


@_kernel(fastmath={"contract"})
def exponential(x):
    """exp(x) of a float32 x <= 0 within a unit in the last place: unlike libm's, the compiler can vectorise it.

    exp(x) = 2^k exp(r) with k = round(x / log 2), |r| <= log(2) / 2 and the Taylor polynomial of exp(r); log 2 in two
    parts, so that k times the first is exact (sums must not be reordered here), and 2^k by its bits. Below exp(-87),
    about the smallest normal number, it stays there; NaN remains NaN.
    """
    x = np.float32(-87) if x < np.float32(-87) else x
    k = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - k * np.float32(0.693359375) + k * np.float32(2.12194440054690583e-4)
    power = np.float32(1 / 720) + r * np.float32(1 / 5040)
    power = np.float32(1 / 120) + r * power
    power = np.float32(1 / 24) + r * power
    power = np.float32(1 / 6) + r * power
    power = np.float32(1 / 2) + r * power
    power = np.float32(1) + r * (np.float32(1) + r * power)
    return power * np.int32((np.int32(k) + 127) << 23).view(np.float32)


@_kernel
def softmax(scores):
    """In place, of every row of [K, N]."""
    for k in range(scores.shape[0]):
        highest = scores[k, 0]
        for n in range(scores.shape[1]):
            highest = max(highest, scores[k, n])
        total = scores.dtype.type(0)
        for n in range(scores.shape[1]):
            x = scores[k, n] - highest
            scores[k, n] = exponential(np.float32(x)) if scores.itemsize == 4 else math.exp(x)
            total += scores[k, n]
        scale = scores.dtype.type(1) / total
        for n in range(scores.shape[1]):
            scores[k, n] *= scale


@_kernel
def softmax_backward(weights, gradients):
    """Gradient of the scores, in place of that of the weights."""
    for k in range(weights.shape[0]):
        total = weights.dtype.type(0)
        for n in range(weights.shape[1]):
            total += weights[k, n] * gradients[k, n]
        for n in range(weights.shape[1]):
            gradients[k, n] = weights[k, n] * (gradients[k, n] - total)


@_kernel
def content_weights(keys, strengths, rows, inverse, scratch, weights):
    """weights[k, n] = softmax_n(strengths[k] cos(keys[k], rows[n])), with the rows' inverse norms [N] given."""
    scaled, _, lengths, _ = scratch
    scale_keys(keys, strengths, scaled, lengths)
    dots(scaled, rows, 0, keys.shape[1], weights)
    for k in range(weights.shape[0]):
        for n in range(weights.shape[1]):
            weights[k, n] *= inverse[n]
    softmax(weights)


@_kernel
def content_backward(keys, strengths, rows, inverse, weights, d_weights, scratch, d_keys, d_strengths, d_rows):
    """Backward of `content_weights`: writes d_keys and d_strengths, adds to d_rows, overwrites d_weights."""
    scaled, d_scaled, lengths, scores = scratch
    width = keys.shape[1]
    scale_keys(keys, strengths, scaled, lengths)
    dots(scaled, rows, 0, width, scores)
    softmax_backward(weights, d_weights)
    pulls = scores[0]  # of each row's own norm
    for n in range(rows.shape[0]):
        pull = rows.dtype.type(0)
        for k in range(keys.shape[0]):
            d_weights[k, n] *= inverse[n]
            pull += d_weights[k, n] * scores[k, n]
        pulls[n] = pull * inverse[n] * inverse[n]
    for n in range(rows.shape[0]):
        x, pull = d_weights[0, n], pulls[n]
        for w in range(width):
            d_rows[n, w] += x * scaled[0, w] - pull * rows[n, w]
    add_outer(d_weights[1:], scaled[1:], 0, width, d_rows)
    weighted_sums(d_weights, rows, 0, width, d_scaled)
    for k in range(keys.shape[0]):
        product = rows.dtype.type(0)
        for w in range(width):
            product += keys[k, w] * d_scaled[k, w]
        d_strengths[k] = product * lengths[k]
        product *= lengths[k] * lengths[k]
        scale = strengths[k] * lengths[k]
        for w in range(width):
            d_keys[k, w] = scale * (d_scaled[k, w] - product * keys[k, w])


@_kernel
def content_scratch(count, width, memory):
    """Working space of `content_weights` and `content_backward` for `count` keys and a memory [*, N, W]."""
    dtype = memory.dtype
    lengths, scores = np.empty(count, dtype), np.empty((count, memory.shape[1]), dtype)
    return np.empty((count, width), dtype), np.empty((count, width), dtype), lengths, scores


@_kernel
def gated_weights(content, allocation, write_gate, allocation_gate, out):
    """out = write_gate (allocation_gate allocation + (1 - allocation_gate) content), all [N]."""
    allocated = write_gate * allocation_gate
    by_content = write_gate - allocated
    for n in range(out.shape[0]):
        out[n] = allocated * allocation[n] + by_content * content[n]


@_kernel
def gated_weights_backward(content, allocation, write_gate, allocation_gate, d_weights, d_content, d_allocation):
    """Backward of `gated_weights`: writes d_content and d_allocation, returns the gradients of the two gates."""
    d_write, d_allocate = content.dtype.type(0), content.dtype.type(0)
    allocated = write_gate * allocation_gate
    by_content = write_gate - allocated
    for n in range(content.shape[0]):
        difference = allocation[n] - content[n]
        d_write += d_weights[n] * (content[n] + allocation_gate * difference)
        d_allocate += d_weights[n] * difference
        d_content[n] = by_content * d_weights[n]
        d_allocation[n] = allocated * d_weights[n]
    return d_write, d_allocate * write_gate


@_kernel
def write(before, weights, erase, vector, after):
    """after[n] = before[n] (1 - weights[n] erase) + weights[n] vector; `after` must not be `before`."""
    for n in range(before.shape[0]):
        x = weights[n]
        for w in range(before.shape[1]):
            after[n, w] = before[n, w] - x * (erase[w] * before[n, w] - vector[w])


@_kernel
def write_in_place(rows, weights, erase, vector):
    """`write` to the rows themselves: two names for the same array would keep the compiler from vectorising."""
    for n in range(rows.shape[0]):
        x = weights[n]
        for w in range(rows.shape[1]):
            rows[n, w] -= x * (erase[w] * rows[n, w] - vector[w])


@_kernel
def write_backward(before, weights, erase, vector, d_memory, d_weights, d_erase, d_vector):
    """Backward of `write`: turns d_memory into that of `before`, adds to d_weights, writes the others."""
    for w in range(before.shape[1]):
        d_erase[w] = 0
        d_vector[w] = 0
    for n in range(before.shape[0]):
        x = weights[n]
        total = before.dtype.type(0)
        for w in range(before.shape[1]):
            d = d_memory[n, w]
            erased = d * before[n, w]
            total += d * vector[w] - erased * erase[w]
            d_vector[w] += x * d
            d_erase[w] -= x * erased
            d_memory[n, w] = d - x * d * erase[w]
        d_weights[n] += total


@_kernel
def copy_state(source, i, target, j):
    """Copy entry i of the arrays of one State to entry j of another's."""
    copy(source.memory[i], target.memory[j])
    copy(source.usage[i : i + 1], target.usage[j : j + 1])
    copy(source.write_weights[i : i + 1], target.write_weights[j : j + 1])
    copy(source.read_weights[i], target.read_weights[j])
    copy(source.link[i], target.link[j])
    copy(source.precedence[i : i + 1], target.precedence[j : j + 1])


@_kernel
def clear(state, i):
    """Set entry i of the arrays of a State to zero."""
    fill(state.memory[i], 0)
    fill(state.usage[i : i + 1], 0)
    fill(state.write_weights[i : i + 1], 0)
    fill(state.read_weights[i], 0)
    fill(state.link[i], 0)
    fill(state.precedence[i : i + 1], 0)


@_kernel
def begin_token(b, t, x, state, inverse, outputs, checkpoints, options):
    """Keep the state where a chunk begins, reset it where the token says so. Returns whether the token is real."""
    if options.training and t % options.chunk == 0:
        chunks = checkpoints.memory.shape[0] // state.memory.shape[0]
        copy_state(state, b, checkpoints, b * chunks + t // options.chunk)
    if x.reset[b, t]:
        clear(state, b)
        inverse_norms(state.memory[b], x.write_keys.shape[2], inverse)
    if x.mask[b, t]:
        return True
    fill(outputs.reads[b, t], 0)
    fill(outputs.write_weights[b, t : t + 1], 0)
    fill(outputs.read_weights[b, t], 0)
    return False


@_kernel
def end_token(b, t, state, outputs):
    """Put out the weights that the state has now, and what the heads read by them."""
    copy(state.write_weights[b : b + 1], outputs.write_weights[b, t : t + 1])
    copy(state.read_weights[b], outputs.read_weights[b, t])
    values = outputs.reads.shape[3]
    weighted_sums(state.read_weights[b], state.memory[b], state.memory.shape[2] - values, values, outputs.reads[b, t])


@_kernel
def replay_buffers(checkpoints, options):
    """A State with an entry for every token of a chunk, one for the state after it and, last, the empty state."""
    slots, width = checkpoints.memory.shape[1:]
    count, heads, links = options.chunk + 2, checkpoints.read_weights.shape[1], checkpoints.link.shape[2]
    dtype = checkpoints.memory.dtype
    states = State(
        np.empty((count, slots, width), dtype),
        np.empty((count, slots), dtype),
        np.empty((count, slots), dtype),
        np.empty((count, heads, slots), dtype),
        np.empty((count, links, links), dtype),
        np.empty((count, links), dtype),
    )
    clear(states, count - 1)
    return states


@_kernel
def replay_token(b, t, j, x, states, outputs, checkpoints, options):
    """First part of replaying token t, whose state before is entry j, into entry j + 1.

    Returns the entry of the state that the token starts from, the empty one after a reset. The weights of a real token
    are in entry j + 1 then, and the rest is still to be computed; that of another token is there.
    """
    if j == 0:
        chunks = checkpoints.memory.shape[0] // x.mask.shape[0]
        copy_state(checkpoints, b * chunks + t // options.chunk, states, j)
    old = states.memory.shape[0] - 1 if x.reset[b, t] else j
    if x.mask[b, t]:
        copy(outputs.write_weights[b, t : t + 1], states.write_weights[j + 1 : j + 2])
        copy(outputs.read_weights[b, t], states.read_weights[j + 1])
    else:
        copy_state(states, old, states, j + 1)
    return old


@_kernel
def clear_gradients(b, t, d_x):
    """Set the gradients of token t's interface to zero."""
    fill(d_x.write_keys[b, t : t + 1], 0)
    fill(d_x.write_strengths[b : b + 1, t : t + 1], 0)
    fill(d_x.write_vectors[b, t : t + 1], 0)
    fill(d_x.erase_vectors[b, t : t + 1], 0)
    fill(d_x.write_gates[b : b + 1, t : t + 1], 0)
    fill(d_x.read_keys[b, t], 0)
    fill(d_x.read_strengths[b, t : t + 1], 0)
    fill(d_x.allocation_gates[b : b + 1, t : t + 1], 0)
    fill(d_x.free_gates[b, t : t + 1], 0)
    fill(d_x.read_modes[b, t], 0)
    fill(d_x.write_masks[b, t : t + 1], 0)
    fill(d_x.read_masks[b, t], 0)
    fill(d_x.link_sharpness[b, t], 0)


@_kernel
def reads_backward(weights, rows, d_reads, d_weights, scratch, d_state, d_rows):
    """Backward of reads = weights @ the last columns of rows, as many as d_reads has.

    Adds to d_rows, and to d_state both gradients of the weights, [R, N].
    """
    values = d_reads.shape[1]
    first = rows.shape[1] - values
    dots(d_reads, rows, first, values, scratch)
    for r in range(weights.shape[0]):
        for n in range(weights.shape[1]):
            d_state[r, n] += scratch[r, n] + d_weights[r, n]
    add_outer(weights, d_reads, first, values, d_rows)


@_kernel
def add(values, out):
    """out += values, both [N]."""
    for n in range(out.shape[0]):
        out[n] += values[n]


@_kernel(fastmath=False)
def least_used(usage, write_weights, read_weights, usage_decay, read_refresh):
    """Update `usage` [N] in place and return the least used slot, the lowest index on ties."""
    written = write_weights[0]
    for n in range(1, usage.shape[0]):
        written = written + write_weights[n]
    kept = 1 - (1 - usage_decay) * written
    best = 0
    for n in range(usage.shape[0]):
        usage[n] = kept * usage[n] + write_weights[n]
        if read_refresh != 0:
            total = read_weights[0, n]
            for r in range(1, read_weights.shape[0]):
                total = total + read_weights[r, n]
            usage[n] = usage[n] + read_refresh * total
        if usage[n] < usage[best]:
            best = n
    return best


@_kernel(**_ENTRY)
def lru_forward(first, last, x, state, outputs, saved, checkpoints, options):
    """Batch rows first to last - 1: `state` becomes the final one, the arrays after it are written."""
    x, state, outputs = Interface(*x), State(*state), Outputs(*outputs)
    saved, checkpoints, options = Saved(*saved), State(*checkpoints), Options(*options)
    tokens, heads, width = x.read_keys.shape[1:]
    write_scratch = content_scratch(1, width, state.memory)
    read_scratch = content_scratch(heads, width, state.memory)
    allocation, inverse = np.zeros_like(state.usage[0]), np.empty_like(state.usage[0])
    for b in range(first, last):
        memory, write_weights, read_weights = state.memory[b], state.write_weights[b], state.read_weights[b]
        inverse_norms(memory, width, inverse)
        for t in range(tokens):
            if not begin_token(b, t, x, state, inverse, outputs, checkpoints, options):
                continue
            s = t if options.training else 0
            slot = least_used(state.usage[b], write_weights, read_weights, options.usage_decay, options.read_refresh)
            saved.order[b, s, 0] = slot
            content = saved.content[b, s : s + 1]
            keys, strengths = x.write_keys[b, t : t + 1], x.write_strengths[b, t : t + 1]
            content_weights(keys, strengths, memory, inverse, write_scratch, content)
            allocation[slot] = 1
            gated_weights(content[0], allocation, x.write_gates[b, t], x.allocation_gates[b, t], write_weights)
            allocation[slot] = 0
            write_in_place(memory, write_weights, x.erase_vectors[b, t], x.write_vectors[b, t])
            inverse_norms(memory, width, inverse)
            content_weights(x.read_keys[b, t], x.read_strengths[b, t], memory, inverse, read_scratch, read_weights)
            end_token(b, t, state, outputs)


@_kernel
def lru_replay(b, start, stop, x, states, norms, outputs, checkpoints, options):
    """Fill the memory of `states` and the inverse norms of its rows, [entries, N], for tokens start to stop - 1."""
    for t in range(start, stop):
        j = t - start
        old, new = replay_token(b, t, j, x, states, outputs, checkpoints, options), j + 1
        if x.mask[b, t]:
            write(
                states.memory[old], states.write_weights[new], x.erase_vectors[b, t], x.write_vectors[b, t],
                states.memory[new],
            )  # fmt: skip
        if j == 0:
            inverse_norms(states.memory[0], x.write_keys.shape[2], norms[0])
        inverse_norms(states.memory[new], x.write_keys.shape[2], norms[new])


@_kernel(**_ENTRY)
def lru_backward(first, last, x, outputs, saved, checkpoints, options, d_outputs, d_state, d_x):
    """Backward of `lru_forward`: `d_state` becomes the initial state's gradient, d_x is written."""
    x, outputs, saved, checkpoints = Interface(*x), Outputs(*outputs), Saved(*saved), State(*checkpoints)
    options, d_outputs, d_state, d_x = Options(*options), Outputs(*d_outputs), State(*d_state), Interface(*d_x)
    tokens, heads, width = x.read_keys.shape[1:]
    write_scratch = content_scratch(1, width, checkpoints.memory)
    read_scratch = content_scratch(heads, width, checkpoints.memory)
    states = replay_buffers(checkpoints, options)
    empty = options.chunk + 1
    norms = np.empty_like(states.usage)
    inverse_norms(states.memory[empty], width, norms[empty])
    allocation, d_allocation = np.zeros_like(norms[0]), np.empty_like(norms[0])
    d_content = np.empty_like(norms[:1])
    for b in range(first, last):
        d_memory, d_write, d_read = d_state.memory[b], d_state.write_weights[b], d_state.read_weights[b]
        for t in range(tokens - 1, -1, -1):
            j = t % options.chunk
            if t == tokens - 1 or j == options.chunk - 1:
                lru_replay(b, t - j, t + 1, x, states, norms, outputs, checkpoints, options)
            clear_gradients(b, t, d_x)
            if x.mask[b, t]:
                old, new = empty if x.reset[b, t] else j, j + 1
                write_weights, read_weights = states.write_weights[new], states.read_weights[new]
                reads_backward(
                    read_weights, states.memory[new], d_outputs.reads[b, t], d_outputs.read_weights[b, t],
                    read_scratch[3], d_read, d_memory,
                )  # fmt: skip
                content_backward(
                    x.read_keys[b, t], x.read_strengths[b, t], states.memory[new], norms[new], read_weights, d_read,
                    read_scratch, d_x.read_keys[b, t], d_x.read_strengths[b, t], d_memory,
                )  # fmt: skip
                add(d_outputs.write_weights[b, t], d_write)
                write_backward(
                    states.memory[old], write_weights, x.erase_vectors[b, t], x.write_vectors[b, t], d_memory,
                    d_write, d_x.erase_vectors[b, t], d_x.write_vectors[b, t],
                )  # fmt: skip
                content, slot = saved.content[b, t : t + 1], saved.order[b, t, 0]
                allocation[slot] = 1
                d_x.write_gates[b, t], d_x.allocation_gates[b, t] = gated_weights_backward(
                    content[0], allocation, x.write_gates[b, t], x.allocation_gates[b, t], d_write, d_content[0],
                    d_allocation,
                )  # fmt: skip
                allocation[slot] = 0
                content_backward(
                    x.write_keys[b, t : t + 1], x.write_strengths[b, t : t + 1], states.memory[old], norms[old],
                    content, d_content, write_scratch, d_x.write_keys[b, t : t + 1], d_x.write_strengths[b, t : t + 1],
                    d_memory,
                )  # fmt: skip
                # The old weights reach nothing but the usage, which takes no gradient.
                fill(d_state.write_weights[b : b + 1], 0)
                fill(d_read, 0)
                fill(d_state.usage[b : b + 1], 0)
            if x.reset[b, t]:
                clear(d_state, b)


@_kernel
def soft_allocation(usage, strength, out):
    """out = softmax(strength (1 - usage)), [N] -> [1, N]."""
    for n in range(usage.shape[0]):
        out[0, n] = -strength * usage[n]
    softmax(out)


@_kernel
def count_writes(usage, write_weights, usage_after):
    """usage_after = usage + (1 - usage) write_weights, all [N]; `usage_after` may be `usage`."""
    for n in range(usage.shape[0]):
        usage_after[n] = usage[n] + (usage.dtype.type(1) - usage[n]) * write_weights[n]


@_kernel
def scale(values, factor, out):
    """out = factor values, both [N]."""
    for n in range(out.shape[0]):
        out[n] = factor * values[n]


@_kernel(**_ENTRY)
def simplified_forward(first, last, x, state, outputs, saved, checkpoints, options):
    """As `lru_forward`. Half the write weights are content, half allocation; reads are addressed before the write."""
    x, state, outputs = Interface(*x), State(*state), Outputs(*outputs)
    saved, checkpoints, options = Saved(*saved), State(*checkpoints), Options(*options)
    tokens, heads, width = x.read_keys.shape[1:]
    write_scratch = content_scratch(1, width, state.memory)
    read_scratch = content_scratch(heads, width, state.memory)
    allocation, inverse, gated = (
        np.empty_like(state.usage[:1]),
        np.empty_like(state.usage[0]),
        np.empty_like(state.usage[0]),
    )
    one, half = state.memory.dtype.type(1), state.memory.dtype.type(0.5)
    for b in range(first, last):
        memory, usage, write_weights = state.memory[b], state.usage[b], state.write_weights[b]
        inverse_norms(memory, width, inverse)
        for t in range(tokens):
            if not begin_token(b, t, x, state, inverse, outputs, checkpoints, options):
                continue
            s = t if options.training else 0
            content = saved.content[b, s : s + 1]
            keys, strengths = x.write_keys[b, t : t + 1], x.write_strengths[b, t : t + 1]
            content_weights(keys, strengths, memory, inverse, write_scratch, content)
            keys, strengths = x.read_keys[b, t], x.read_strengths[b, t]
            content_weights(keys, strengths, memory, inverse, read_scratch, state.read_weights[b])
            soft_allocation(usage, x.write_strengths[b, t], allocation)
            gated_weights(content[0], allocation[0], one, half, write_weights)
            count_writes(usage, write_weights, usage)
            scale(write_weights, x.write_gates[b, t], gated)
            write_in_place(memory, gated, x.erase_vectors[b, t], x.write_vectors[b, t])
            inverse_norms(memory, width, inverse)
            end_token(b, t, state, outputs)


@_kernel
def simplified_replay(b, start, stop, x, states, norms, gated, outputs, checkpoints, options):
    """As `lru_replay`, with the usage; `gated` [N] is working space."""
    for t in range(start, stop):
        j = t - start
        old, new = replay_token(b, t, j, x, states, outputs, checkpoints, options), j + 1
        if x.mask[b, t]:
            weights = states.write_weights[new]
            count_writes(states.usage[old], weights, states.usage[new])
            scale(weights, x.write_gates[b, t], gated)
            write(states.memory[old], gated, x.erase_vectors[b, t], x.write_vectors[b, t], states.memory[new])
        if j == 0:
            inverse_norms(states.memory[0], x.write_keys.shape[2], norms[0])
        inverse_norms(states.memory[new], x.write_keys.shape[2], norms[new])


@_kernel(**_ENTRY)
def simplified_backward(first, last, x, outputs, saved, checkpoints, options, d_outputs, d_state, d_x):
    """Backward of `simplified_forward`, as `lru_backward`."""
    x, outputs, saved, checkpoints = Interface(*x), Outputs(*outputs), Saved(*saved), State(*checkpoints)
    options, d_outputs, d_state, d_x = Options(*options), Outputs(*d_outputs), State(*d_state), Interface(*d_x)
    tokens, heads, width = x.read_keys.shape[1:]
    slots = checkpoints.memory.shape[1]
    write_scratch = content_scratch(1, width, checkpoints.memory)
    read_scratch = content_scratch(heads, width, checkpoints.memory)
    states = replay_buffers(checkpoints, options)
    empty = options.chunk + 1
    norms = np.empty_like(states.usage)
    inverse_norms(states.memory[empty], width, norms[empty])
    gated, d_gated = np.empty_like(norms[0]), np.empty_like(norms[:1])
    allocation, d_allocation, d_content = np.empty_like(norms[:1]), np.empty_like(norms[:1]), np.empty_like(norms[:1])
    one, half = states.memory.dtype.type(1), states.memory.dtype.type(0.5)
    for b in range(first, last):
        d_memory, d_usage = d_state.memory[b], d_state.usage[b]
        d_write, d_read = d_state.write_weights[b], d_state.read_weights[b]
        for t in range(tokens - 1, -1, -1):
            j = t % options.chunk
            if t == tokens - 1 or j == options.chunk - 1:
                simplified_replay(b, t - j, t + 1, x, states, norms, gated, outputs, checkpoints, options)
            clear_gradients(b, t, d_x)
            if x.mask[b, t]:
                old, new = empty if x.reset[b, t] else j, j + 1
                memory, usage = states.memory[old], states.usage[old]
                write_weights, read_weights = states.write_weights[new], states.read_weights[new]
                reads_backward(
                    read_weights, states.memory[new], d_outputs.reads[b, t], d_outputs.read_weights[b, t],
                    read_scratch[3], d_read, d_memory,
                )  # fmt: skip
                gate, strength = x.write_gates[b, t], x.write_strengths[b, t]
                scale(write_weights, gate, gated)
                fill(d_gated, 0)
                write_backward(
                    memory, gated, x.erase_vectors[b, t], x.write_vectors[b, t], d_memory, d_gated[0],
                    d_x.erase_vectors[b, t], d_x.write_vectors[b, t],
                )  # fmt: skip
                add(d_outputs.write_weights[b, t], d_write)
                for n in range(slots):
                    d_x.write_gates[b, t] += d_gated[0, n] * write_weights[n]
                    d_write[n] += gate * d_gated[0, n]
                    d_usage[n] *= one - write_weights[n]
                content_backward(
                    x.read_keys[b, t], x.read_strengths[b, t], memory, norms[old], read_weights, d_read,
                    read_scratch, d_x.read_keys[b, t], d_x.read_strengths[b, t], d_memory,
                )  # fmt: skip
                soft_allocation(usage, strength, allocation)
                content = saved.content[b, t : t + 1]
                gated_weights_backward(content[0], allocation[0], one, half, d_write, d_content[0], d_allocation[0])
                content_backward(
                    x.write_keys[b, t : t + 1], x.write_strengths[b, t : t + 1], memory, norms[old], content, d_content,
                    write_scratch, d_x.write_keys[b, t : t + 1], d_x.write_strengths[b, t : t + 1], d_memory,
                )  # fmt: skip
                softmax_backward(allocation, d_allocation)
                for n in range(slots):
                    d_x.write_strengths[b, t] -= d_allocation[0, n] * usage[n]
                    d_usage[n] -= d_allocation[0, n] * strength
                fill(d_state.write_weights[b : b + 1], 0)
                fill(d_read, 0)
            if x.reset[b, t]:
                clear(d_state, b)


@_kernel(fastmath=False)
def allocate(usage, write_weights, read_weights, free_gates, order, retained, allocation):
    """Update `usage` [N] in place; write the share of each slot that is retained and the allocation weights, [N].

    `order` [N], any permutation at first, becomes that of ascending usage, the lower index first on ties. Insertion
    sort: from token to token the order changes little.
    """
    slots = usage.shape[0]
    one, epsilon = usage.dtype.type(1), usage.dtype.type(EPSILON)
    rest = usage.dtype.type(1 - EPSILON)
    for n in range(slots):
        retained[n] = one
        for r in range(free_gates.shape[0]):
            retained[n] = retained[n] * (one - free_gates[r] * read_weights[r, n])
        usage[n] = (usage[n] + (one - usage[n]) * write_weights[n]) * retained[n]
        allocation[n] = epsilon + rest * usage[n]
    for i in range(1, slots):
        slot = order[i]
        value = allocation[slot]
        j = i - 1
        while j >= 0 and (allocation[order[j]] > value or (allocation[order[j]] == value and order[j] > slot)):
            order[j + 1] = order[j]
            j -= 1
        order[j + 1] = slot
    before = one
    for i in range(slots):
        value = allocation[order[i]]
        allocation[order[i]] = (one - value) * before
        before = before * value


@_kernel
def allocate_backward(usage, order, d_allocation, d_usage):
    """Add the gradient of the usage [N] that the allocation weights were computed from."""
    one, epsilon = usage.dtype.type(1), usage.dtype.type(EPSILON)
    rest = usage.dtype.type(1 - EPSILON)
    later = usage.dtype.type(0)  # sum over the slots behind of gradient times allocation, the own one at first
    before = one
    for i in range(usage.shape[0]):
        value = epsilon + rest * usage[order[i]]
        later += d_allocation[order[i]] * (one - value) * before
        before *= value
    before = one
    for i in range(usage.shape[0]):
        slot = order[i]
        value = epsilon + rest * usage[slot]
        later -= d_allocation[slot] * (one - value) * before
        d_usage[slot] += rest * (later / value - before * d_allocation[slot])
        before *= value


@_kernel
def usage_backward(usage, write_weights, read_weights, free_gates, d_usage, d_retained, d_free_gates, d_read):
    """Backward of the first loop of `allocate`, given the old usage and weights.

    Turns d_usage into the old one's, adds to d_free_gates and to d_read; d_retained is what else reaches `retained`
    and is overwritten.
    """
    one = usage.dtype.type(1)
    for n in range(usage.shape[0]):
        d_retained[n] += d_usage[n] * (usage[n] + (one - usage[n]) * write_weights[n])
        d_usage[n] *= one - write_weights[n]
    for r in range(free_gates.shape[0]):
        d_gate = usage.dtype.type(0)
        for n in range(usage.shape[0]):
            others = d_retained[n]  # times what the other heads retain
            for s in range(free_gates.shape[0]):
                others *= one if s == r else one - free_gates[s] * read_weights[s, n]
            d_gate -= others * read_weights[r, n]
            d_read[r, n] -= others * free_gates[r]
        d_free_gates[r] += d_gate
    for r in range(free_gates.shape[0]):
        for n in range(usage.shape[0]):
            d_usage[n] *= one - free_gates[r] * read_weights[r, n]
    for n in range(usage.shape[0]):
        d_retained[n] = 0


@_kernel(**_INLINED)
def scale_rows(rows, factors, out):
    """out[n] = factors[n] rows[n]; `out` may be `rows`."""
    for n in range(rows.shape[0]):
        for w in range(rows.shape[1]):
            out[n, w] = factors[n] * rows[n, w]


@_kernel(**_INLINED)
def erase_backward(rows, factors, d_rows, d_factors):
    """Backward of `scale_rows`: turns d_rows into that of `rows` and writes d_factors."""
    for n in range(rows.shape[0]):
        total = rows.dtype.type(0)
        for w in range(rows.shape[1]):
            total += d_rows[n, w] * rows[n, w]
            d_rows[n, w] *= factors[n]
        d_factors[n] = total


@_kernel(**_INLINED)
def update_link(link, precedence, weights):
    """Temporal link [N, N] and precedence [N] after a write, in place."""
    one = link.dtype.type(1)
    total = link.dtype.type(0)
    for i in range(link.shape[0]):
        total += weights[i]
        kept = one - weights[i]
        for j in range(link.shape[0]):
            link[i, j] = (kept - weights[j]) * link[i, j] + weights[i] * precedence[j]
        link[i, i] = 0
    for i in range(link.shape[0]):
        precedence[i] = (one - total) * precedence[i] + weights[i]


@_kernel(**_INLINED)
def update_link_backward(link, precedence, weights, d_link, d_precedence, d_weights, scratch):
    """Backward of `update_link`, given the old link and precedence; turns d_link and d_precedence into theirs."""
    one = link.dtype.type(1)
    written, d_written = link.dtype.type(0), link.dtype.type(0)
    for i in range(link.shape[0]):
        written += weights[i]
        d_written -= d_precedence[i] * precedence[i]
    for i in range(link.shape[0]):
        d_weights[i] += d_precedence[i] + d_written
        d_precedence[i] *= one - written
        scratch[i] = 0
    for i in range(link.shape[0]):
        d_link[i, i] = 0
        kept = one - weights[i]
        total = link.dtype.type(0)
        for j in range(link.shape[0]):
            d = d_link[i, j]
            faded = d * link[i, j]
            total += d * precedence[j] - faded
            scratch[j] += faded
            d_precedence[j] += weights[i] * d
            d_link[i, j] = (kept - weights[j]) * d
        d_weights[i] += total
    for j in range(link.shape[0]):
        d_weights[j] -= scratch[j]


@_kernel(**_INLINED)
def sharpen(weights, sharpness, out):
    """out = weights ** sharpness over its sum, both [N]; a weight below SMALLEST counts as 0 and gives 0."""
    zero = weights.dtype.type(0)
    highest, total = zero, zero
    for n in range(weights.shape[0]):
        highest = max(highest, weights[n])
    for n in range(weights.shape[0]):
        out[n] = (weights[n] / highest) ** sharpness if weights[n] >= SMALLEST else zero
        total += out[n]
    for n in range(weights.shape[0]):
        if total > zero:
            out[n] /= total


@_kernel(**_INLINED)
def sharpen_backward(weights, sharpness, sharp, gradients):
    """Backward of `sharpen`, in place of the gradients of its result `sharp`; returns that of the sharpness."""
    zero = weights.dtype.type(0)
    highest, total, d_sharpness = zero, zero, zero
    for n in range(weights.shape[0]):
        total += gradients[n] * sharp[n]
        highest = max(highest, weights[n])
    for n in range(weights.shape[0]):
        d_log = zero
        if weights[n] >= SMALLEST:
            d_log = (gradients[n] - total) * sharp[n]  # of the logarithm of the unnormalised power
            d_sharpness += d_log * math.log(weights[n] / highest)
            d_log *= sharpness / weights[n]
        gradients[n] = d_log
    return d_sharpness


@_kernel
def follow_links(link, read_weights, sharpness, options, raw, directed):
    """Where the old read weights [R, N] lead, backward and forward: raw and directed (sharpened) [2, R, N]."""
    slots = link.shape[0]
    weighted_sums(read_weights, link, 0, slots, raw[0])
    dots(read_weights, link, 0, slots, raw[1])
    for d in range(2):
        copy(raw[d], directed[d])
        if options.sharpened:
            for r in range(read_weights.shape[0]):
                sharpen(raw[d, r], sharpness[r, d], directed[d, r])


@_kernel
def follow_links_backward(
    link, read_weights, sharpness, options, raw, directed, d_directed, scratch, d_sharpness, d_read, d_link
):
    """Backward of `follow_links`: overwrites d_directed, writes d_sharpness and d_read, adds to d_link."""
    slots = link.shape[0]
    if options.sharpened:
        for d in range(2):
            for r in range(read_weights.shape[0]):
                d_sharpness[r, d] = sharpen_backward(raw[d, r], sharpness[r, d], directed[d, r], d_directed[d, r])
    dots(d_directed[0], link, 0, slots, scratch)
    weighted_sums(d_directed[1], link, 0, slots, d_read)
    for r in range(read_weights.shape[0]):
        add(scratch[r], d_read[r])
    add_outer(read_weights, d_directed[0], 0, slots, d_link)
    add_outer(d_directed[1], read_weights, 0, slots, d_link)


@_kernel
def mix_modes(directed, content, modes, out):
    """out = modes over (backward, content, forward), [R, N] with modes [R, 3]."""
    for r in range(out.shape[0]):
        for n in range(out.shape[1]):
            by_link = modes[r, 0] * directed[0, r, n] + modes[r, 2] * directed[1, r, n]
            out[r, n] = by_link + modes[r, 1] * content[r, n]


@_kernel
def mix_modes_backward(directed, content, modes, d_out, d_directed, d_content, d_modes):
    """Backward of `mix_modes`; d_modes is zero before."""
    for r in range(d_out.shape[0]):
        for n in range(d_out.shape[1]):
            d = d_out[r, n]
            d_modes[r, 0] += d * directed[0, r, n]
            d_modes[r, 1] += d * content[r, n]
            d_modes[r, 2] += d * directed[1, r, n]
            d_directed[0, r, n] = modes[r, 0] * d
            d_directed[1, r, n] = modes[r, 2] * d
            d_content[r, n] = modes[r, 1] * d


@_kernel(**_INLINED)
def scale_masked_keys(keys, strengths, masks, scratch):
    """Squares of the masks, keys * squares * strength * inverse norm, and the inverse norms of keys * masks."""
    squares, scaled, _, lengths, _, _ = scratch
    one, epsilon = keys.dtype.type(1), keys.dtype.type(EPSILON)
    for k in range(keys.shape[0]):
        total = keys.dtype.type(0)
        for w in range(keys.shape[1]):
            squares[k, w] = masks[k, w] * masks[k, w]
            total += squares[k, w] * keys[k, w] * keys[k, w]
        lengths[k] = one / math.sqrt(total + epsilon)
        for w in range(keys.shape[1]):
            scaled[k, w] = strengths[k] * lengths[k] * squares[k, w] * keys[k, w]


@_kernel(**_INLINED)
def masked_scores(rows, scratch):
    """Scores of the scaled keys and the rows' inverse norms under each mask, both [K, N]."""
    squares, scaled, _, _, scores, inverse = scratch
    one, epsilon = rows.dtype.type(1), rows.dtype.type(EPSILON)
    dots(scaled, rows, 0, rows.shape[1], scores)
    for k in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            total = rows.dtype.type(0)
            for w in range(rows.shape[1]):
                total += squares[k, w] * rows[n, w] * rows[n, w]
            inverse[k, n] = one / math.sqrt(total + epsilon)
            scores[k, n] *= inverse[k, n]


@_kernel(**_INLINED)
def masked_content_weights(keys, strengths, masks, rows, scratch, weights):
    """As `content_weights`, with keys and rows weighed by masks [K, W]."""
    scale_masked_keys(keys, strengths, masks, scratch)
    masked_scores(rows, scratch)
    copy(scratch[4], weights)
    softmax(weights)


@_kernel(**_INLINED)
def masked_content_backward(
    keys, strengths, masks, rows, weights, d_weights, scratch, d_keys, d_strengths, d_masks, d_rows
):
    """Backward of `masked_content_weights`, as `content_backward`; writes d_masks, too."""
    squares, scaled, d_scaled, lengths, scores, inverse = scratch
    two = rows.dtype.type(2)
    width = keys.shape[1]
    scale_masked_keys(keys, strengths, masks, scratch)
    masked_scores(rows, scratch)
    softmax_backward(weights, d_weights)
    fill(d_masks, 0)
    for k in range(keys.shape[0]):
        for n in range(rows.shape[0]):
            pull = d_weights[k, n] * scores[k, n] * inverse[k, n] * inverse[k, n]  # of the row's own norm
            d_weights[k, n] *= inverse[k, n]
            for w in range(width):
                d_rows[n, w] -= pull * squares[k, w] * rows[n, w]
                d_masks[k, w] -= pull * rows[n, w] * rows[n, w]  # twice the gradient of the mask's square
    add_outer(d_weights, scaled, 0, width, d_rows)
    weighted_sums(d_weights, rows, 0, width, d_scaled)
    for k in range(keys.shape[0]):
        product = rows.dtype.type(0)
        for w in range(width):
            product += squares[k, w] * keys[k, w] * d_scaled[k, w]
        d_strengths[k] = product * lengths[k]
        factor = strengths[k] * lengths[k]
        product *= factor * lengths[k] * lengths[k]
        for w in range(width):
            difference = factor * d_scaled[k, w] - product * keys[k, w]
            d_keys[k, w] = squares[k, w] * difference
            d_square = two * factor * d_scaled[k, w] * keys[k, w] - product * keys[k, w] * keys[k, w]
            d_masks[k, w] = masks[k, w] * (d_masks[k, w] + d_square)


@_kernel
def masked_scratch(count, width, memory):
    """Working space of the masked functions, as `content_scratch`."""
    dtype, slots = memory.dtype, memory.shape[1]
    vectors = np.empty((3, count, width), dtype)
    scores = np.empty((2, count, slots), dtype)
    return vectors[0], vectors[1], vectors[2], np.empty(count, dtype), scores[0], scores[1]


@_kernel
def dnc_content(masked, keys, strengths, masks, rows, inverse, scratch, masked_space, weights):
    """Content weights, masked or not."""
    if masked:
        masked_content_weights(keys, strengths, masks, rows, masked_space, weights)
    else:
        content_weights(keys, strengths, rows, inverse, scratch, weights)


@_kernel
def dnc_content_backward(
    masked, keys, strengths, masks, rows, inverse, weights, d_weights, scratch, masked_space, d_keys, d_strengths,
    d_masks, d_rows,
):  # fmt: skip
    """Backward of `dnc_content`."""
    if masked:
        masked_content_backward(
            keys, strengths, masks, rows, weights, d_weights, masked_space, d_keys, d_strengths, d_masks, d_rows
        )
    else:
        content_backward(keys, strengths, rows, inverse, weights, d_weights, scratch, d_keys, d_strengths, d_rows)


@_kernel(**_ENTRY)
def dnc_forward(first, last, x, state, outputs, saved, checkpoints, options):
    """As `lru_forward`."""
    x, state, outputs = Interface(*x), State(*state), Outputs(*outputs)
    saved, checkpoints, options = Saved(*saved), State(*checkpoints), Options(*options)
    tokens, heads, width = x.read_keys.shape[1:]
    slots = state.memory.shape[1]
    write_scratch, write_masked = content_scratch(1, width, state.memory), masked_scratch(1, width, state.memory)
    read_scratch, read_masked = content_scratch(heads, width, state.memory), masked_scratch(heads, width, state.memory)
    dtype = state.memory.dtype
    allocation, inverse, retained = np.empty(slots, dtype), np.empty(slots, dtype), np.empty(slots, dtype)
    raw, directed = np.empty((2, heads, slots), dtype), np.empty((2, heads, slots), dtype)
    for b in range(first, last):
        memory, write_weights, read_weights = state.memory[b], state.write_weights[b], state.read_weights[b]
        inverse_norms(memory, width, inverse)
        order = np.arange(slots)
        for t in range(tokens):
            if not begin_token(b, t, x, state, inverse, outputs, checkpoints, options):
                continue
            s = t if options.training else 0
            allocate(state.usage[b], write_weights, read_weights, x.free_gates[b, t], order, retained, allocation)
            for n in range(slots):
                saved.order[b, s, n] = order[n]
            content, read_content = saved.content[b, s : s + 1], saved.read_content[b, s]
            dnc_content(
                options.masked, x.write_keys[b, t : t + 1], x.write_strengths[b, t : t + 1],
                x.write_masks[b, t : t + 1], memory, inverse, write_scratch, write_masked, content,
            )  # fmt: skip
            gated_weights(content[0], allocation, x.write_gates[b, t], x.allocation_gates[b, t], write_weights)
            if options.erase_on_free:
                scale_rows(memory, retained, memory)
            write_in_place(memory, write_weights, x.erase_vectors[b, t], x.write_vectors[b, t])
            inverse_norms(memory, width, inverse)
            if not options.links:
                read_content = read_weights
            dnc_content(
                options.masked, x.read_keys[b, t], x.read_strengths[b, t], x.read_masks[b, t], memory, inverse,
                read_scratch, read_masked, read_content,
            )  # fmt: skip
            if options.links:
                update_link(state.link[b], state.precedence[b], write_weights)
                follow_links(state.link[b], read_weights, x.link_sharpness[b, t], options, raw, directed)
                mix_modes(directed, read_content, x.read_modes[b, t], read_weights)
            end_token(b, t, state, outputs)


@_kernel
def dnc_replay(b, start, stop, x, states, norms, retained, allocations, outputs, saved, checkpoints, options):
    """As `lru_replay`, with usage and links; `retained` and `allocations` [entries, N] become what `allocate` gave."""
    for t in range(start, stop):
        j = t - start
        old, new = replay_token(b, t, j, x, states, outputs, checkpoints, options), j + 1
        if x.mask[b, t]:
            before, memory, weights = states.memory[old], states.memory[new], states.write_weights[new]
            copy(states.usage[old : old + 1], states.usage[new : new + 1])
            allocate(
                states.usage[new], states.write_weights[old], states.read_weights[old], x.free_gates[b, t],
                saved.order[b, t], retained[j], allocations[j],
            )  # fmt: skip
            if options.erase_on_free:
                scale_rows(before, retained[j], memory)
                write_in_place(memory, weights, x.erase_vectors[b, t], x.write_vectors[b, t])
            else:
                write(before, weights, x.erase_vectors[b, t], x.write_vectors[b, t], memory)
            if options.links:
                copy(states.link[old], states.link[new])
                copy(states.precedence[old : old + 1], states.precedence[new : new + 1])
                update_link(states.link[new], states.precedence[new], weights)
        if j == 0:
            inverse_norms(states.memory[0], x.write_keys.shape[2], norms[0])
        inverse_norms(states.memory[new], x.write_keys.shape[2], norms[new])


@_kernel(**_ENTRY)
def dnc_backward(first, last, x, outputs, saved, checkpoints, options, d_outputs, d_state, d_x):
    """Backward of `dnc_forward`, as `lru_backward`."""
    x, outputs, saved, checkpoints = Interface(*x), Outputs(*outputs), Saved(*saved), State(*checkpoints)
    options, d_outputs, d_state, d_x = Options(*options), Outputs(*d_outputs), State(*d_state), Interface(*d_x)
    tokens, heads, width = x.read_keys.shape[1:]
    slots, dtype = checkpoints.memory.shape[1], checkpoints.memory.dtype
    write_scratch = content_scratch(1, width, checkpoints.memory)
    write_masked = masked_scratch(1, width, checkpoints.memory)
    read_scratch = content_scratch(heads, width, checkpoints.memory)
    read_masked = masked_scratch(heads, width, checkpoints.memory)
    states = replay_buffers(checkpoints, options)
    empty = options.chunk + 1
    norms, retained, allocations = np.empty_like(states.usage), np.empty_like(states.usage), np.empty_like(states.usage)
    inverse_norms(states.memory[empty], width, norms[empty])
    raw, directed = np.empty((2, heads, slots), dtype), np.empty((2, heads, slots), dtype)
    d_directed = np.empty_like(raw)
    d_read_content, d_content = np.empty((heads, slots), dtype), np.empty((1, slots), dtype)
    d_allocation, d_retained = np.empty(slots, dtype), np.zeros(slots, dtype)
    erased = np.empty((slots, width), dtype)
    for b in range(first, last):
        d_memory, d_usage, d_link = d_state.memory[b], d_state.usage[b], d_state.link[b]
        d_write, d_read = d_state.write_weights[b], d_state.read_weights[b]
        for t in range(tokens - 1, -1, -1):
            j = t % options.chunk
            if t == tokens - 1 or j == options.chunk - 1:
                dnc_replay(
                    b, t - j, t + 1, x, states, norms, retained, allocations, outputs, saved, checkpoints, options
                )
            clear_gradients(b, t, d_x)
            if x.mask[b, t]:
                old, new = empty if x.reset[b, t] else j, j + 1
                memory, read_before = states.memory[old], states.read_weights[old]
                write_weights, read_weights = states.write_weights[new], states.read_weights[new]
                reads_backward(
                    read_weights, states.memory[new], d_outputs.reads[b, t], d_outputs.read_weights[b, t],
                    read_scratch[3], d_read, d_memory,
                )  # fmt: skip
                read_content = read_weights
                if options.links:
                    read_content, link = saved.read_content[b, t], states.link[new]
                    follow_links(link, read_before, x.link_sharpness[b, t], options, raw, directed)
                    mix_modes_backward(
                        directed, read_content, x.read_modes[b, t], d_read, d_directed, d_read_content,
                        d_x.read_modes[b, t],
                    )  # fmt: skip
                    follow_links_backward(
                        link, read_before, x.link_sharpness[b, t], options, raw, directed, d_directed, read_scratch[3],
                        d_x.link_sharpness[b, t], d_read, d_link,
                    )  # fmt: skip
                else:
                    copy(d_read, d_read_content)
                    fill(d_read, 0)
                dnc_content_backward(
                    options.masked, x.read_keys[b, t], x.read_strengths[b, t], x.read_masks[b, t], states.memory[new],
                    norms[new], read_content, d_read_content, read_scratch, read_masked, d_x.read_keys[b, t],
                    d_x.read_strengths[b, t], d_x.read_masks[b, t], d_memory,
                )  # fmt: skip
                add(d_outputs.write_weights[b, t], d_write)
                if options.links:
                    update_link_backward(
                        states.link[old], states.precedence[old], write_weights, d_link, d_state.precedence[b],
                        d_write, d_allocation,
                    )  # fmt: skip
                before = memory
                if options.erase_on_free:
                    before = erased
                    scale_rows(memory, retained[j], before)
                write_backward(
                    before, write_weights, x.erase_vectors[b, t], x.write_vectors[b, t], d_memory, d_write,
                    d_x.erase_vectors[b, t], d_x.write_vectors[b, t],
                )  # fmt: skip
                if options.erase_on_free:
                    erase_backward(memory, retained[j], d_memory, d_retained)
                content = saved.content[b, t : t + 1]
                d_x.write_gates[b, t], d_x.allocation_gates[b, t] = gated_weights_backward(
                    content[0], allocations[j], x.write_gates[b, t], x.allocation_gates[b, t], d_write, d_content[0],
                    d_allocation,
                )  # fmt: skip
                dnc_content_backward(
                    options.masked, x.write_keys[b, t : t + 1], x.write_strengths[b, t : t + 1],
                    x.write_masks[b, t : t + 1], memory, norms[old], content, d_content, write_scratch, write_masked,
                    d_x.write_keys[b, t : t + 1], d_x.write_strengths[b, t : t + 1], d_x.write_masks[b, t : t + 1],
                    d_memory,
                )  # fmt: skip
                allocate_backward(states.usage[new], saved.order[b, t], d_allocation, d_usage)
                usage_backward(
                    states.usage[old], states.write_weights[old], read_before, x.free_gates[b, t], d_usage, d_retained,
                    d_x.free_gates[b, t], d_read,
                )  # fmt: skip
                fill(d_state.write_weights[b : b + 1], 0)
            if x.reset[b, t]:
                clear(d_state, b)


def _arrays(tensors: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
    """Arrays that share the tensors' memory; plain tuples are what numba unpacks fastest."""
    return tuple([tensor.numpy() for tensor in tensors])


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dnc_gpt2_scan")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


# Below so many memory entries times tokens, handing work to other threads costs more than it saves.
SMALL = 1 << 18


def _run(name: str, x: Interface, state: State, *args: tuple) -> None:
    """Call the kernel `name` for all batch rows, on torch's number of threads.

    Threads of Python rather than numba's own parallel loop: that may neither run in two threads at once nor after a
    fork with every threading layer, and compiles longer.
    """
    _compile_kernels()
    function = globals()[name]
    batch, tokens = x.mask.shape
    threads = min(torch.get_num_threads(), batch)
    if threads == 1 or state.memory.numel() * tokens < SMALL:
        function(0, batch, *args)
        return
    step = -(-batch // (4 * threads))  # several blocks a thread even out their speeds
    blocks = iter(range(0, batch, step))

    def work() -> None:
        for first in blocks:
            function(first, min(first + step, batch), *args)

    others = [_pool(threads).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@torch.compiler.assume_constant_result
def numba_problem() -> str | None:
    """Why the kernels cannot run, or None."""
    try:
        _compile_kernels()
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return None


def numba_forward(
    addressing: str,
    x: Interface,
    state: State,
    outputs: Outputs,
    saved: Saved,
    checkpoints: State,
    options: Options,
) -> None:
    """The scan of all batch rows.

    Args:
        addressing: `"lru"`, `"dnc"` or `"simplified"`.
        x, state, outputs, saved, checkpoints: contiguous tensors on the CPU. `state` becomes the final one; the last
            three are written.
    """
    arguments = map(_arrays, (x, state, outputs, saved, checkpoints))
    _run(f"{addressing}_forward", x, state, *arguments, tuple(options))


def numba_backward(
    addressing: str,
    x: Interface,
    outputs: Outputs,
    saved: Saved,
    checkpoints: State,
    options: Options,
    d_outputs: Outputs,
    d_state: State,
    d_x: Interface,
) -> None:
    """Backward of `numba_forward`: `d_state` becomes the initial state's gradient, `d_x` is written."""
    arguments = map(_arrays, (x, outputs, saved, checkpoints))
    gradients = map(_arrays, (d_outputs, d_state, d_x))
    _run(f"{addressing}_backward", x, d_state, *arguments, tuple(options), *gradients)
