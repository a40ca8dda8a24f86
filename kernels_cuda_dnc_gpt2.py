"""The fused scans for CUDA: Triton kernels of the recurrence, forward and backward.

One program runs one batch row from the first token to the last. Where they fit (64 x 128 in float32), the memory
[N, W] and the temporal links [N, N] stay in its registers; where they do not, every pass over them streams blocks of
columns through global memory (`Sizes.columns`, `Sizes.pair_columns`). Vectors over the slots are whole in either case,
so that both share their code: a pass is a loop over blocks of columns, which makes a single turn where the rows stay
in registers.

The backward pass starts from the states kept at every `chunk`-th token, writes down the states in between, and walks
back over them. Orders of usage come from the forward pass. That one is compiled without fused multiply-adds, so that
usage is rounded as in the eager recurrence and near ties fall alike. All sums are of elementwise products in the
tensors' own precision: nothing is rounded to TF32.

Where nothing written depends on what was read ("lru" without refreshing reads), training leaves the reads to kernels of
their own (`Sizes.reads_apart`), which take all chunks at once: the scan itself is then a chain of writes alone, and the
backward chain adds to the memory's gradient what the reads' kernel found.

Global memory carries values between threads: what one statement stores, another may read only after a barrier, and
what one reads, another may overwrite only after a barrier. Whoever stores such values puts the barriers.

B, T, N, W, A, R are batch, tokens, slots, row width, address width and read heads. Pointers come in the named tuples
of kernels_cpu_dnc_gpt2.py. Padded slots hold zeros throughout. Without triton this file imports, and `triton_problem`
says why the kernels cannot be used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import knobs  # of triton 3.4 and newer, the oldest that the kernels were compiled with
except ImportError as error:
    IMPORT_PROBLEM, INTERPRETED = f"triton 3.4 or newer cannot be imported ({error})", False
else:
    IMPORT_PROBLEM, INTERPRETED = None, knobs.runtime.interpret


def kernel(function: Any) -> Any:
    """Triton's function, compiled once for all numbers of tokens; without triton a plain one that nothing calls."""
    return function if IMPORT_PROBLEM else triton.jit(function, do_not_specialize=["tokens", "chunk"])


def part(function: Any) -> Any:
    """A function that kernels call. The interpreter can do with plain ones, and takes milliseconds for any other."""
    return function if IMPORT_PROBLEM or INTERPRETED else triton.jit(function)


EPSILON = 1e-6  # of the cosine and of the usage, as in the recurrence

# Bytes of a block of the memory or the links: 32 registers a thread at 8 warps, and the backward pass holds several.
# A streamed block has more entries than the program has threads: none is loaded by one while another overwrites it.
TILE_BYTES = 32768

# Of the kernels that take all chunks at once: fewer than of the others, so that more of their programs share a
# multiprocessor.
READ_WARPS = 4


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    addressing: str
    slots: int
    width: int
    address: int  # columns that content addressing looks at, the first of a row
    values: int  # columns that are read, the last of a row
    heads: int
    slot_block: int  # slots, padded
    columns: int  # of a block of the memory: all, padded, where it stays in registers
    streamed: bool  # it does not
    pair_columns: int  # of a block of the links or of a comparison of all slots with all
    pairs_streamed: bool
    usage_decay: float
    read_refresh: float
    erase_on_free: bool
    links: bool
    sharpened: bool
    masked: bool
    training: bool
    reads_apart: bool
    epsilon: float
    warps: int


@kernel
def multiply(x, y):
    return x * y


@part
def zeros(BLOCK: tl.constexpr, dtype: tl.constexpr):
    return tl.zeros((BLOCK,), dtype)


@part
def load_vector(pointer, start, length: tl.constexpr, BLOCK: tl.constexpr):
    """Entries from `start` on, zero behind `length`: [BLOCK]."""
    index = start + tl.arange(0, BLOCK)
    return tl.load(pointer + index, mask=index < length, other=0.0)


@part
def store_vector(pointer, start, length: tl.constexpr, values, BLOCK: tl.constexpr):
    index = start + tl.arange(0, BLOCK)
    tl.store(pointer + index, values, mask=index < length)


@part
def load_slots(pointer, S: tl.constexpr):
    return load_vector(pointer, 0, S.slots, S.slot_block)


@part
def store_slots(pointer, values, S: tl.constexpr):
    store_vector(pointer, 0, S.slots, values, S.slot_block)


@part
def load_tile(pointer, start, width: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr):
    """Columns from `start` on of [N, width], zero outside: [slot_block, BLOCK]."""
    slots, columns = tl.arange(0, S.slot_block), start + tl.arange(0, BLOCK)
    inside = (slots < S.slots)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + slots[:, None] * width + columns[None, :], mask=inside, other=0.0)


@part
def store_tile(pointer, start, width: tl.constexpr, values, BLOCK: tl.constexpr, S: tl.constexpr):
    slots, columns = tl.arange(0, S.slot_block), start + tl.arange(0, BLOCK)
    inside = (slots < S.slots)[:, None] & (columns < width)[None, :]
    tl.store(pointer + slots[:, None] * width + columns[None, :], values, mask=inside)


@part
def save_tile(tile, source, target, width: tl.constexpr, BLOCK: tl.constexpr, streamed: tl.constexpr, S: tl.constexpr):
    """Store a matrix, streamed from `source` or held in `tile`, at `target`."""
    for start in range(0, width, BLOCK):
        if streamed:
            tile = load_tile(source, start, width, BLOCK, S)
        store_tile(target, start, width, tile, BLOCK, S)


@part
def clear_tile(tile, pointer, width: tl.constexpr, BLOCK: tl.constexpr, streamed: tl.constexpr, S: tl.constexpr):
    """A matrix of zeros in place of the one streamed from `pointer` or held in `tile`."""
    tile = tl.zeros_like(tile)
    if streamed:
        tl.debug_barrier()
        for start in range(0, width, BLOCK):
            store_tile(pointer, start, width, tile, BLOCK, S)
        tl.debug_barrier()
    return tile


@part
def column_part(vector, pointer, start, S: tl.constexpr):
    """The entries of a vector over the slots that go with a block of columns of a matrix over pairs of slots.

    Where such matrices are streamed it has to lie at `pointer`.
    """
    if S.pairs_streamed:
        vector = load_vector(pointer, start, S.slots, S.pair_columns)
    return vector


@part
def entry(state, index, S: tl.constexpr):
    """Pointers to entry `index` of every part of a State."""
    return (
        state.memory + index * S.slots * S.width,
        state.usage + index * S.slots,
        state.write_weights + index * S.slots,
        state.read_weights + index * S.heads * S.slots,
        state.link + index * S.slots * S.slots,
        state.precedence + index * S.slots,
    )


@part
def copy_heads(source, target, S: tl.constexpr):
    """Copy [R, N]. The source must be visible to all threads."""
    for r in range(S.heads):
        store_slots(target + r * S.slots, load_slots(source + r * S.slots, S), S)


@part
def clear_heads(target, like, S: tl.constexpr):
    """Set [R, N] to zero."""
    tl.debug_barrier()
    for r in range(S.heads):
        store_slots(target + r * S.slots, tl.zeros_like(like), S)
    tl.debug_barrier()


@part
def softmax(scores, S: tl.constexpr):
    scores = tl.where(tl.arange(0, S.slot_block) < S.slots, scores, float("-inf"))
    powers = tl.exp(scores - tl.max(scores, 0))
    return powers / tl.sum(powers, 0)


@part
def softmax_backward(weights, d_weights):
    return weights * (d_weights - tl.sum(weights * d_weights, 0))


@part
def inverse_norms(memory, rows, S: tl.constexpr):
    """1 / sqrt(|row|^2 + epsilon) over the address columns: [N]."""
    squares = zeros(S.slot_block, memory.dtype)
    for start in range(0, S.address, S.columns):
        if S.streamed:
            memory = load_tile(rows, start, S.width, S.columns, S)
        inside = (start + tl.arange(0, S.columns)) < S.address
        squares += tl.sum(tl.where(inside[None, :], memory * memory, 0.0), 1)
    return 1.0 / tl.sqrt(squares + S.epsilon)


@part
def similarity(memory, rows, key_at, mask_at, inverse, S: tl.constexpr):
    """Products of key and rows [N], the rows' inverse norms [N] and the key's own; under a mask where there is one."""
    dots = zeros(S.slot_block, memory.dtype)
    squares = zeros(S.slot_block, memory.dtype)
    key_squares = zeros(S.columns, memory.dtype)
    for start in range(0, S.address, S.columns):
        if S.streamed:
            memory = load_tile(rows, start, S.width, S.columns, S)
        key = load_vector(key_at, start, S.address, S.columns)
        weighed = key
        if S.masked:
            mask = load_vector(mask_at, start, S.address, S.columns)
            weighed = mask * mask * key
            squares += tl.sum(memory * memory * (mask * mask)[None, :], 1)
        dots += tl.sum(memory * weighed[None, :], 1)
        key_squares += key * weighed
    if S.masked:
        inverse = 1.0 / tl.sqrt(squares + S.epsilon)
    return dots, inverse, 1.0 / tl.sqrt(tl.sum(key_squares, 0) + S.epsilon)


@part
def content_weights(memory, rows, key_at, mask_at, strength, inverse, S: tl.constexpr):
    """softmax_n(strength cos(key, rows[n])): [N]."""
    dots, inverse, length = similarity(memory, rows, key_at, mask_at, inverse, S)
    return softmax(strength * length * inverse * dots, S)


@part
def content_gradients(
    memory, rows, key_at, mask_at, strength, inverse, weights, d_weights, d_key_at, d_mask_at, S: tl.constexpr
):
    """Backward of `content_weights` but for the memory: stores the gradients of key and mask.

    Returns: the gradients of the products of key and rows [N], of the rows' squared norms [N] and of the strength.
    """
    dots, inverse, length = similarity(memory, rows, key_at, mask_at, inverse, S)
    d_scores = softmax_backward(weights, d_weights)
    cosines = inverse * dots * length
    d_strength = tl.sum(d_scores * cosines, 0)
    d_dots = d_scores * strength * length * inverse
    # Of the squared norms: 1 / sqrt(s) has the derivative -1/2 s^(-3/2).
    d_squares = -0.5 * d_scores * strength * cosines * inverse * inverse
    d_key_square = -0.5 * d_strength * strength * length * length
    for start in range(0, S.address, S.columns):
        if S.streamed:
            memory = load_tile(rows, start, S.width, S.columns, S)
        key = load_vector(key_at, start, S.address, S.columns)
        pulled = tl.sum(memory * d_dots[:, None], 0)
        d_key = pulled + 2.0 * key * d_key_square
        if S.masked:
            mask = load_vector(mask_at, start, S.address, S.columns)
            d_square = pulled * key + d_key_square * key * key + tl.sum(memory * memory * d_squares[:, None], 0)
            store_vector(d_mask_at, start, S.address, 2.0 * mask * d_square, S.columns)
            d_key = mask * mask * d_key
        store_vector(d_key_at, start, S.address, d_key, S.columns)
    return d_dots, d_squares, d_strength


@part
def add_content_gradient(memory, rows, key_at, mask_at, d_dots, d_squares, d_memory, d_rows, S: tl.constexpr):
    """d_memory and what products of key and rows, and the rows' squared norms, pass on to it."""
    for start in range(0, S.address, S.columns):
        if S.streamed:
            memory = load_tile(rows, start, S.width, S.columns, S)
            d_memory = load_tile(d_rows, start, S.width, S.columns, S)
        key = load_vector(key_at, start, S.address, S.columns)
        inside = ((start + tl.arange(0, S.columns)) < S.address).to(memory.dtype)
        if S.masked:
            mask = load_vector(mask_at, start, S.address, S.columns)
            inside = mask * mask
        d_memory += d_dots[:, None] * (inside * key)[None, :] + 2.0 * d_squares[:, None] * inside[None, :] * memory
        if S.streamed:
            store_tile(d_rows, start, S.width, d_memory, S.columns, S)
    if S.streamed:
        tl.debug_barrier()
    return d_memory


@part
def content_backward(
    memory, rows, key_at, mask_at, strength, inverse, weights, d_weights, d_memory, d_rows, d_key_at, d_mask_at,
    S: tl.constexpr,
):  # fmt: skip
    """Backward of `content_weights`: stores the gradients of key and mask, returns d_memory and that of strength."""
    d_dots, d_squares, d_strength = content_gradients(
        memory, rows, key_at, mask_at, strength, inverse, weights, d_weights, d_key_at, d_mask_at, S
    )
    return add_content_gradient(memory, rows, key_at, mask_at, d_dots, d_squares, d_memory, d_rows, S), d_strength


@part
def write(memory, source, target, retained, weights, erase_at, vector_at, S: tl.constexpr):
    """memory[n] (1 - weights[n] erase) + weights[n] vector; streamed from `source` to `target`."""
    if S.streamed:
        tl.debug_barrier()
    for start in range(0, S.width, S.columns):
        if S.streamed:
            memory = load_tile(source, start, S.width, S.columns, S)
        erase = load_vector(erase_at, start, S.width, S.columns)
        vector = load_vector(vector_at, start, S.width, S.columns)
        if S.erase_on_free:
            memory = memory * retained[:, None]
        memory = memory * (1.0 - weights[:, None] * erase[None, :]) + weights[:, None] * vector[None, :]
        if S.streamed:
            store_tile(target, start, S.width, memory, S.columns, S)
    if S.streamed:
        tl.debug_barrier()
    return memory


@part
def write_backward(
    before, rows, retained, weights, erase_at, vector_at, d_memory, d_rows, d_erase_at, d_vector_at, S: tl.constexpr
):
    """Backward of `write`: stores the gradients of erase and vector.

    Returns: d_memory of the memory before, those of the weights [N] and of the share retained [N].
    """
    d_weights = zeros(S.slot_block, before.dtype)
    d_retained = zeros(S.slot_block, before.dtype)
    for start in range(0, S.width, S.columns):
        if S.streamed:
            before = load_tile(rows, start, S.width, S.columns, S)
            d_memory = load_tile(d_rows, start, S.width, S.columns, S)
        erase = load_vector(erase_at, start, S.width, S.columns)
        vector = load_vector(vector_at, start, S.width, S.columns)
        kept = before
        if S.erase_on_free:
            kept = before * retained[:, None]
        d_weights += tl.sum(d_memory * (vector[None, :] - kept * erase[None, :]), 1)
        d_vector = tl.sum(d_memory * weights[:, None], 0)
        d_erase = -tl.sum(d_memory * kept * weights[:, None], 0)
        store_vector(d_vector_at, start, S.width, d_vector, S.columns)
        store_vector(d_erase_at, start, S.width, d_erase, S.columns)
        d_memory = d_memory * (1.0 - weights[:, None] * erase[None, :])
        if S.erase_on_free:
            d_retained += tl.sum(d_memory * before, 1)
            d_memory = d_memory * retained[:, None]
        if S.streamed:
            store_tile(d_rows, start, S.width, d_memory, S.columns, S)
    if S.streamed:
        tl.debug_barrier()
    return d_memory, d_weights, d_retained


@part
def first_block(S: tl.constexpr):
    """The first column of the block in which the value columns begin."""
    return (S.width - S.values) // S.columns * S.columns


@part
def load_reads(reads_at, start, S: tl.constexpr):
    """What goes with a block of the memory's columns of a read or its gradient, zero outside of the value columns."""
    place = start + tl.arange(0, S.columns) - (S.width - S.values)
    return tl.load(reads_at + place, mask=(place >= 0) & (place < S.values), other=0.0)


@part
def read_rows(memory, rows, weights, reads_at, S: tl.constexpr):
    """Store sum_n weights[n] rows[n] over the value columns."""
    for start in range(first_block(S), S.width, S.columns):
        if S.streamed:
            memory = load_tile(rows, start, S.width, S.columns, S)
        place = start + tl.arange(0, S.columns) - (S.width - S.values)
        read = tl.sum(memory * weights[:, None], 0)
        tl.store(reads_at + place, read, mask=(place >= 0) & (place < S.values))


@part
def read_rows_gradient(memory, rows, d_reads_at, S: tl.constexpr):
    """Gradient of the weights [N] of `read_rows`."""
    d_weights = zeros(S.slot_block, memory.dtype)
    for start in range(first_block(S), S.width, S.columns):
        if S.streamed:
            memory = load_tile(rows, start, S.width, S.columns, S)
        d_weights += tl.sum(memory * load_reads(d_reads_at, start, S)[None, :], 1)
    return d_weights


@part
def add_read_gradient(weights, d_reads_at, d_memory, d_rows, S: tl.constexpr):
    """d_memory and what `read_rows` passes on to it."""
    for start in range(first_block(S), S.width, S.columns):
        if S.streamed:
            d_memory = load_tile(d_rows, start, S.width, S.columns, S)
        d_memory += weights[:, None] * load_reads(d_reads_at, start, S)[None, :]
        if S.streamed:
            store_tile(d_rows, start, S.width, d_memory, S.columns, S)
    if S.streamed:
        tl.debug_barrier()
    return d_memory


@part
def least_used(usage, S: tl.constexpr):
    """Index of the least used slot, the lowest on ties."""
    slots = tl.arange(0, S.slot_block)
    usage = tl.where(slots < S.slots, usage, float("inf"))
    lowest = tl.min(usage, 0)
    return tl.min(tl.where((usage == lowest) & (slots < S.slots), slots, S.slots), 0)


@part
def retention(free_gates_at, read_at, like, S: tl.constexpr):
    """prod_r (1 - free_gates[r] read_weights[r, n]): [N]."""
    retained = tl.zeros_like(like) + 1.0
    for r in range(S.heads):
        retained = retained * (1.0 - tl.load(free_gates_at + r) * load_slots(read_at + r * S.slots, S))
    return retained


@part
def retention_backward(free_gates_at, read_at, d_retained, d_free_gates_at, d_read_at, S: tl.constexpr):
    """Backward of `retention`: stores the gradients of the free gates, adds to those of the read weights."""
    tl.debug_barrier()
    for r in range(S.heads):
        others = d_retained
        for s in range(S.heads):
            factor = 1.0 - tl.load(free_gates_at + s) * load_slots(read_at + s * S.slots, S)
            others = others * tl.where(s == r, 1.0, factor)
        read = load_slots(read_at + r * S.slots, S)
        d_read = load_slots(d_read_at + r * S.slots, S) - others * tl.load(free_gates_at + r)
        tl.store(d_free_gates_at + r, -tl.sum(others * read, 0))
        tl.debug_barrier()
        store_slots(d_read_at + r * S.slots, d_read, S)
    tl.debug_barrier()


@part
def sorted_allocation(usage, usage_at, order_at, S: tl.constexpr):
    """Allocation weights [N] of Graves et al.; in training, stores the slots by ascending usage, lower index first.

    A slot's rank is the number of slots before it, and so no sort is needed.
    """
    slots = tl.arange(0, S.slot_block)
    rank = zeros(S.slot_block, tl.int32)
    before = tl.zeros_like(usage) + 1.0
    value = S.epsilon + (1.0 - S.epsilon) * usage
    if S.pairs_streamed:
        tl.debug_barrier()
        store_slots(usage_at, usage, S)
        tl.debug_barrier()
    for start in range(0, S.slots, S.pair_columns):
        others = start + tl.arange(0, S.pair_columns)
        other_value = S.epsilon + (1.0 - S.epsilon) * column_part(usage, usage_at, start, S)
        less = other_value[None, :] < value[:, None]
        tie = (other_value[None, :] == value[:, None]) & (others[None, :] < slots[:, None])
        earlier = (less | tie) & (others < S.slots)[None, :]
        rank += tl.sum(earlier.to(tl.int32), 1)
        before = before * tl.reduce(tl.where(earlier, other_value[None, :], 1.0), 1, multiply)
    if S.training:
        tl.store(order_at + rank, slots.to(tl.int64), mask=slots < S.slots)
    return tl.where(slots < S.slots, (1.0 - value) * before, 0.0)


@part
def ranks(order_at, S: tl.constexpr):
    """The place [N] of every slot in the order at `order_at`; padded slots come last."""
    slots = tl.arange(0, S.slot_block)
    rank = zeros(S.slot_block, tl.int32)
    for start in range(0, S.slots, S.pair_columns):
        places = start + tl.arange(0, S.pair_columns)
        order = tl.load(order_at + places, mask=places < S.slots, other=-1).to(tl.int32)
        rank += tl.sum(tl.where(order[None, :] == slots[:, None], places[None, :], 0), 1)
    return tl.where(slots < S.slots, rank, S.slots)


@part
def product_before(rank, value, scratch, S: tl.constexpr):
    """Product [N] of `value` over the slots of lower rank. Leaves the ranks at `scratch`."""
    product = tl.zeros_like(value) + 1.0
    if S.pairs_streamed:
        tl.debug_barrier()
        store_slots(scratch, rank.to(value.dtype), S)
        store_slots(scratch + S.slots, value, S)
        tl.debug_barrier()
    for start in range(0, S.slots, S.pair_columns):
        inside = (start + tl.arange(0, S.pair_columns)) < S.slots
        other_rank = column_part(rank.to(value.dtype), scratch, start, S).to(tl.int32)
        other_value = column_part(value, scratch + S.slots, start, S)
        earlier = (other_rank[None, :] < rank[:, None]) & inside[None, :]
        product = product * tl.reduce(tl.where(earlier, other_value[None, :], 1.0), 1, multiply)
    return tl.where(rank < S.slots, product, 0.0)


@part
def sum_behind(rank, terms, scratch, S: tl.constexpr):
    """Sum [N] of `terms` over the slots of higher rank, after `product_before`."""
    total = tl.zeros_like(terms)
    if S.pairs_streamed:
        tl.debug_barrier()
        store_slots(scratch + S.slots, terms, S)
        tl.debug_barrier()
    for start in range(0, S.slots, S.pair_columns):
        inside = (start + tl.arange(0, S.pair_columns)) < S.slots
        other_rank = column_part(rank.to(terms.dtype), scratch, start, S).to(tl.int32)
        other_terms = column_part(terms, scratch + S.slots, start, S)
        later = (other_rank[None, :] > rank[:, None]) & inside[None, :]
        total += tl.sum(tl.where(later, other_terms[None, :], 0.0), 1)
    return total


@part
def update_link(link, source, target, weights, weights_at, precedence, precedence_at, S: tl.constexpr):
    """Temporal links after a write, streamed from `source` to `target`."""
    slots = tl.arange(0, S.slot_block)
    if S.pairs_streamed:
        tl.debug_barrier()
    for start in range(0, S.slots, S.pair_columns):
        if S.pairs_streamed:
            link = load_tile(source, start, S.slots, S.pair_columns, S)
        others = start + tl.arange(0, S.pair_columns)
        other_weights = column_part(weights, weights_at, start, S)
        other_precedence = column_part(precedence, precedence_at, start, S)
        link = (1.0 - weights[:, None] - other_weights[None, :]) * link + weights[:, None] * other_precedence[None, :]
        link = tl.where(slots[:, None] == others[None, :], 0.0, link)
        if S.pairs_streamed:
            store_tile(target, start, S.slots, link, S.pair_columns, S)
    if S.pairs_streamed:
        tl.debug_barrier()
    return link


@part
def update_precedence(precedence, weights):
    return (1.0 - tl.sum(weights, 0)) * precedence + weights


@part
def update_link_backward(
    link, link_at, weights, weights_at, precedence, precedence_at, d_link, d_link_at, d_precedence, scratch,
    S: tl.constexpr,
):  # fmt: skip
    """Backward of `update_link` and `update_precedence`, given the old link and precedence.

    Returns: the gradients of link, precedence [N] and weights [N].
    """
    slots = tl.arange(0, S.slot_block)
    d_weights = d_precedence - tl.sum(d_precedence * precedence, 0)
    d_precedence = d_precedence * (1.0 - tl.sum(weights, 0))
    faded_to, d_followed = tl.zeros_like(weights), tl.zeros_like(weights)
    if S.pairs_streamed:
        tl.debug_barrier()
    for start in range(0, S.slots, S.pair_columns):
        if S.pairs_streamed:
            link = load_tile(link_at, start, S.slots, S.pair_columns, S)
            d_link = load_tile(d_link_at, start, S.slots, S.pair_columns, S)
        others = start + tl.arange(0, S.pair_columns)
        other_weights = column_part(weights, weights_at, start, S)
        other_precedence = column_part(precedence, precedence_at, start, S)
        d_link = tl.where(slots[:, None] == others[None, :], 0.0, d_link)
        d_weights += tl.sum(d_link * (other_precedence[None, :] - link), 1)
        faded, followed = tl.sum(d_link * link, 0), tl.sum(d_link * weights[:, None], 0)
        d_link = d_link * (1.0 - weights[:, None] - other_weights[None, :])
        if S.pairs_streamed:
            store_tile(d_link_at, start, S.slots, d_link, S.pair_columns, S)
            store_vector(scratch, start, S.slots, faded, S.pair_columns)
            store_vector(scratch + S.slots, start, S.slots, followed, S.pair_columns)
        else:
            faded_to, d_followed = faded, followed
    if S.pairs_streamed:
        tl.debug_barrier()
        faded_to, d_followed = load_slots(scratch, S), load_slots(scratch + S.slots, S)
    return d_link, d_precedence + d_followed, d_weights - faded_to


@part
def follow_links(link, link_at, read, read_at, scratch, S: tl.constexpr):
    """Where read weights [N], which also lie at `read_at`, lead backward and forward: two times [N]."""
    backward, forward = tl.zeros_like(read), tl.zeros_like(read)
    if S.pairs_streamed:
        tl.debug_barrier()
    for start in range(0, S.slots, S.pair_columns):
        if S.pairs_streamed:
            link = load_tile(link_at, start, S.slots, S.pair_columns, S)
        forward += tl.sum(link * column_part(read, read_at, start, S)[None, :], 1)
        reached = tl.sum(link * read[:, None], 0)
        if S.pairs_streamed:
            store_vector(scratch, start, S.slots, reached, S.pair_columns)
        else:
            backward = reached
    if S.pairs_streamed:
        tl.debug_barrier()
        backward = load_slots(scratch, S)
    return backward, forward


@part
def follow_links_backward(
    link, link_at, read, read_at, d_backward, d_forward, d_link, d_link_at, scratch, S: tl.constexpr
):
    """Backward of `follow_links`: returns the gradients of the links and of the read weights [N]."""
    d_read, d_reaching = tl.zeros_like(read), tl.zeros_like(read)
    if S.pairs_streamed:
        tl.debug_barrier()
        store_slots(scratch, d_backward, S)
        tl.debug_barrier()
    for start in range(0, S.slots, S.pair_columns):
        if S.pairs_streamed:
            link = load_tile(link_at, start, S.slots, S.pair_columns, S)
            d_link = load_tile(d_link_at, start, S.slots, S.pair_columns, S)
        other_d_backward = column_part(d_backward, scratch, start, S)
        other_read = column_part(read, read_at, start, S)
        d_link += read[:, None] * other_d_backward[None, :] + d_forward[:, None] * other_read[None, :]
        d_read += tl.sum(link * other_d_backward[None, :], 1)
        reaching = tl.sum(link * d_forward[:, None], 0)
        if S.pairs_streamed:
            store_tile(d_link_at, start, S.slots, d_link, S.pair_columns, S)
            store_vector(scratch + S.slots, start, S.slots, reaching, S.pair_columns)
        else:
            d_reaching = reaching
    if S.pairs_streamed:
        tl.debug_barrier()
        d_reaching = load_slots(scratch + S.slots, S)
    return d_link, d_read + d_reaching


@part
def counts(weights):
    """Whether a weight is sharpened: at least 2 ** -126, as in the recurrence."""
    return weights >= 1.1754943508222875e-38


@part
def log_ratio(weights):
    """Logarithm of each weight over the largest; 0 where a weight does not count."""
    highest = tl.max(weights, 0)
    return tl.log(tl.where(counts(weights), weights / tl.where(counts(highest), highest, 1.0), 1.0))


@part
def sharpen(weights, sharpness):
    """weights ** sharpness over its sum; 0 where a weight does not count."""
    powers = tl.where(counts(weights), tl.exp(sharpness * log_ratio(weights)), 0.0)
    total = tl.sum(powers, 0)
    return powers / tl.where(total > 0, total, 1.0)


@part
def sharpen_backward(weights, sharpness, sharp, d_sharp):
    """Gradients of the weights [N] and of the sharpness, given the result `sharp`."""
    d_log = softmax_backward(sharp, d_sharp)
    positive = counts(weights)
    d_weights = tl.where(positive, d_log * sharpness / tl.where(positive, weights, 1.0), 0.0)
    return d_weights, tl.sum(d_log * log_ratio(weights), 0)


@kernel
def forward_kernel(x, state, outputs, saved, checkpoints, scratch, tokens, chunk, S: tl.constexpr):
    """Batch row `program_id`: `state` becomes the final one; outputs (zero before), saved and checkpoints are written.

    `scratch` [B, 2, N] is working space.
    """
    b = tl.program_id(0).to(tl.int64)
    scratch += b * 2 * S.slots
    slots = tl.arange(0, S.slot_block)
    rows, usage_at, weights_at, read_at, link_at, precedence_at = entry(state, b, S)
    memory = load_tile(rows, 0, S.width, S.columns, S)
    inverse = inverse_norms(memory, rows, S)
    usage, weights = load_slots(usage_at, S), load_slots(weights_at, S)
    if S.links:
        link = load_tile(link_at, 0, S.slots, S.pair_columns, S)
        precedence = load_slots(precedence_at, S)
    for t in range(tokens):
        i = b * tokens + t
        if S.training:  # noqa: SIM102, known at compilation, unlike the next
            if t % chunk == 0:
                kept = b * ((tokens + chunk - 1) // chunk) + t // chunk
                kept_rows, kept_usage, kept_weights, kept_read, kept_link, kept_precedence = entry(checkpoints, kept, S)
                save_tile(memory, rows, kept_rows, S.width, S.columns, S.streamed, S)
                store_slots(kept_usage, usage, S)
                store_slots(kept_weights, weights, S)
                copy_heads(read_at, kept_read, S)
                if S.links:
                    save_tile(link, link_at, kept_link, S.slots, S.pair_columns, S.pairs_streamed, S)
                    store_slots(kept_precedence, precedence, S)
        if tl.load(x.reset + i):
            memory = clear_tile(memory, rows, S.width, S.columns, S.streamed, S)
            inverse = inverse_norms(memory, rows, S)
            usage, weights = tl.zeros_like(usage), tl.zeros_like(weights)
            clear_heads(read_at, usage, S)
            if S.links:
                link = clear_tile(link, link_at, S.slots, S.pair_columns, S.pairs_streamed, S)
                precedence = tl.zeros_like(precedence)
        if tl.load(x.mask + i):
            retained = usage
            gate, strength = tl.load(x.write_gates + i), tl.load(x.write_strengths + i)
            content = content_weights(
                memory, rows, x.write_keys + i * S.address, x.write_masks + i * S.width, strength, inverse, S
            )
            if S.addressing == "simplified":
                for r in range(S.heads):
                    k = i * S.heads + r
                    read = content_weights(
                        memory, rows, x.read_keys + k * S.address, x.read_masks, tl.load(x.read_strengths + k),
                        inverse, S,
                    )  # fmt: skip
                    tl.debug_barrier()
                    store_slots(read_at + r * S.slots, read, S)
                weights = 0.5 * content + 0.5 * softmax(strength * (1.0 - usage), S)
                usage = usage + (1.0 - usage) * weights
                written = gate * weights
            else:
                if S.addressing == "dnc":
                    retained = retention(x.free_gates + i * S.heads, read_at, usage, S)
                    usage = (usage + (1.0 - usage) * weights) * retained
                    allocation = sorted_allocation(usage, usage_at, saved.order + i * S.slots, S)
                else:
                    usage = (1.0 - (1.0 - S.usage_decay) * tl.sum(weights, 0)) * usage + weights
                    if S.read_refresh != 0:
                        total = load_slots(read_at, S)
                        for r in range(1, S.heads):
                            total = total + load_slots(read_at + r * S.slots, S)
                        usage = usage + S.read_refresh * total
                    slot = least_used(usage, S)
                    allocation = (slots == slot).to(usage.dtype)
                    if S.training:
                        tl.store(saved.order + i, slot.to(tl.int64))
                allocated = gate * tl.load(x.allocation_gates + i)
                weights = allocated * allocation + (gate - allocated) * content
                written = weights
            if S.training:
                store_slots(saved.content + i * S.slots, content, S)
            store_slots(outputs.write_weights + i * S.slots, weights, S)
            memory = write(
                memory, rows, rows, retained, written, x.erase_vectors + i * S.width, x.write_vectors + i * S.width, S
            )
            inverse = inverse_norms(memory, rows, S)
            if S.links:
                if S.pairs_streamed:
                    tl.debug_barrier()
                    store_slots(weights_at, weights, S)
                    store_slots(precedence_at, precedence, S)
                link = update_link(link, link_at, link_at, weights, weights_at, precedence, precedence_at, S)
                precedence = update_precedence(precedence, weights)
            if not S.reads_apart:
                tl.debug_barrier()
                for r in range(S.heads):
                    k = i * S.heads + r
                    if S.addressing == "simplified":
                        read = load_slots(read_at + r * S.slots, S)
                    else:
                        read = content_weights(
                            memory, rows, x.read_keys + k * S.address, x.read_masks + k * S.width,
                            tl.load(x.read_strengths + k), inverse, S,
                        )  # fmt: skip
                        if S.links:
                            if S.training:
                                store_slots(saved.read_content + k * S.slots, read, S)
                            old = load_slots(read_at + r * S.slots, S)
                            backward, forward = follow_links(link, link_at, old, read_at + r * S.slots, scratch, S)
                            if S.sharpened:
                                backward = sharpen(backward, tl.load(x.link_sharpness + k * 2))
                                forward = sharpen(forward, tl.load(x.link_sharpness + k * 2 + 1))
                            modes = x.read_modes + k * 3
                            read = tl.load(modes + 1) * read
                            read += tl.load(modes) * backward + tl.load(modes + 2) * forward
                        tl.debug_barrier()
                        store_slots(read_at + r * S.slots, read, S)
                    store_slots(outputs.read_weights + k * S.slots, read, S)
                    read_rows(memory, rows, read, outputs.reads + k * S.values, S)
                tl.debug_barrier()
    tl.debug_barrier()
    if not S.streamed:
        store_tile(rows, 0, S.width, memory, S.columns, S)
    store_slots(usage_at, usage, S)
    store_slots(weights_at, weights, S)
    if S.links:
        if not S.pairs_streamed:
            store_tile(link_at, 0, S.slots, link, S.pair_columns, S)
        store_slots(precedence_at, precedence, S)


@part
def reopen(checkpoints, working, S: tl.constexpr):
    """The memory before chunk `program_id(1)` of batch row `program_id(0)`, and where it lies, if it is streamed."""
    kept = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows = working + kept * S.slots * S.width
    kept_rows = checkpoints.memory + kept * S.slots * S.width
    memory = load_tile(kept_rows, 0, S.width, S.columns, S)
    if S.streamed:
        save_tile(memory, kept_rows, rows, S.width, S.columns, S.streamed, S)
        tl.debug_barrier()
    return memory, rows


@part
def rewrite(memory, rows, x, outputs, i, S: tl.constexpr):
    """The memory after token i, from that before it and the write weights."""
    if tl.load(x.reset + i):
        memory = clear_tile(memory, rows, S.width, S.columns, S.streamed, S)
    if tl.load(x.mask + i):
        weights = load_slots(outputs.write_weights + i * S.slots, S)
        memory = write(
            memory, rows, rows, weights, weights, x.erase_vectors + i * S.width, x.write_vectors + i * S.width, S
        )
    return memory


@kernel
def read_kernel(x, outputs, checkpoints, working, tokens, chunk, S: tl.constexpr):
    """The reads of one chunk, after all of it was written. `working` has room for as many memories, if streamed."""
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    memory, rows = reopen(checkpoints, working, S)
    for t in range(c * chunk, tl.minimum((c + 1) * chunk, tokens)):
        i = b * tokens + t
        memory = rewrite(memory, rows, x, outputs, i, S)
        if tl.load(x.mask + i):
            inverse = inverse_norms(memory, rows, S)
            for r in range(S.heads):
                k = i * S.heads + r
                read = content_weights(
                    memory, rows, x.read_keys + k * S.address, x.read_masks, tl.load(x.read_strengths + k), inverse, S
                )
                store_slots(outputs.read_weights + k * S.slots, read, S)
                read_rows(memory, rows, read, outputs.reads + k * S.values, S)


@kernel
def read_backward_kernel(
    x, outputs, checkpoints, working, d_outputs, d_x, d_dots, d_squares, tokens, chunk, S: tl.constexpr
):
    """Backward of `read_kernel` but for the memory.

    What is left to `add_content_gradient` are the gradients of the products of read keys and rows, `d_dots`
    [B, T, R, N], and of the rows' squared norms, `d_squares` [B, T, R, N].
    """
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    memory, rows = reopen(checkpoints, working, S)
    for t in range(c * chunk, tl.minimum((c + 1) * chunk, tokens)):
        i = b * tokens + t
        memory = rewrite(memory, rows, x, outputs, i, S)
        if tl.load(x.mask + i):
            inverse = inverse_norms(memory, rows, S)
            for r in range(S.heads):
                k = i * S.heads + r
                d_read = load_slots(d_outputs.read_weights + k * S.slots, S)
                d_read += read_rows_gradient(memory, rows, d_outputs.reads + k * S.values, S)
                of_dots, of_squares, d_strength = content_gradients(
                    memory, rows, x.read_keys + k * S.address, x.read_masks, tl.load(x.read_strengths + k), inverse,
                    load_slots(outputs.read_weights + k * S.slots, S), d_read, d_x.read_keys + k * S.address,
                    d_x.read_masks, S,
                )  # fmt: skip
                store_slots(d_dots + k * S.slots, of_dots, S)
                store_slots(d_squares + k * S.slots, of_squares, S)
                tl.store(d_x.read_strengths + k, d_strength)


@part
def replay(x, outputs, checkpoints, states, b, first, last, tokens, chunk, S: tl.constexpr):
    """Write down the states that tokens first to last - 1 start from, after their reset: entries b (chunk + 1) on.

    The last of these entries holds what is streamed of the state on the way.
    """
    kept = b * ((tokens + chunk - 1) // chunk) + first // chunk
    kept_rows, kept_usage, kept_weights, kept_read, kept_link, kept_precedence = entry(checkpoints, kept, S)
    rows, _, _, read_at, link_at, precedence_at = entry(states, b * (chunk + 1) + chunk, S)
    memory = load_tile(kept_rows, 0, S.width, S.columns, S)
    usage, weights = load_slots(kept_usage, S), load_slots(kept_weights, S)
    if S.streamed:
        save_tile(memory, kept_rows, rows, S.width, S.columns, S.streamed, S)
    if S.addressing == "dnc":
        copy_heads(kept_read, read_at, S)
    if S.links:
        link, precedence = load_tile(kept_link, 0, S.slots, S.pair_columns, S), load_slots(kept_precedence, S)
        if S.pairs_streamed:
            save_tile(link, kept_link, link_at, S.slots, S.pair_columns, S.pairs_streamed, S)
    tl.debug_barrier()
    for t in range(first, last):
        i = b * tokens + t
        if tl.load(x.reset + i):
            memory = clear_tile(memory, rows, S.width, S.columns, S.streamed, S)
            usage, weights = tl.zeros_like(usage), tl.zeros_like(weights)
            if S.addressing == "dnc":
                clear_heads(read_at, usage, S)
            if S.links:
                link = clear_tile(link, link_at, S.slots, S.pair_columns, S.pairs_streamed, S)
                precedence = tl.zeros_like(precedence)
        to_rows, to_usage, to_weights, to_read, to_link, to_precedence = entry(states, b * (chunk + 1) + t - first, S)
        save_tile(memory, rows, to_rows, S.width, S.columns, S.streamed, S)
        if S.addressing != "lru":
            store_slots(to_usage, usage, S)
        if S.addressing == "dnc":
            store_slots(to_weights, weights, S)
            copy_heads(read_at, to_read, S)
        if S.links:
            save_tile(link, link_at, to_link, S.slots, S.pair_columns, S.pairs_streamed, S)
            store_slots(to_precedence, precedence, S)
        if tl.load(x.mask + i):
            retained = usage
            if S.addressing == "dnc":
                retained = retention(x.free_gates + i * S.heads, read_at, usage, S)
                usage = (usage + (1.0 - usage) * weights) * retained
            weights = load_slots(outputs.write_weights + i * S.slots, S)
            written = weights
            if S.addressing == "simplified":
                usage = usage + (1.0 - usage) * weights
                written = tl.load(x.write_gates + i) * weights
            memory = write(
                memory, rows, rows, retained, written, x.erase_vectors + i * S.width, x.write_vectors + i * S.width, S
            )
            if S.addressing == "dnc":
                tl.debug_barrier()
                copy_heads(outputs.read_weights + i * S.heads * S.slots, read_at, S)
            if S.links:
                if S.pairs_streamed:
                    store_slots(precedence_at, precedence, S)
                    tl.debug_barrier()
                written_at = outputs.write_weights + i * S.slots
                link = update_link(link, link_at, link_at, weights, written_at, precedence, precedence_at, S)
                precedence = update_precedence(precedence, weights)
        tl.debug_barrier()


@kernel
def backward_kernel(
    x, outputs, saved, checkpoints, states, d_outputs, d_state, d_x, d_dots, d_squares, scratch, tokens, chunk,
    S: tl.constexpr,
):  # fmt: skip
    """Backward of `forward_kernel`: `d_state` becomes the initial state's gradient, d_x (zero before) is written.

    `states` has room for chunk + 1 states a batch row; `scratch` [B, 2, N] is working space. `d_dots` and `d_squares`
    are from `read_backward_kernel` where reads run apart.
    """
    b = tl.program_id(0).to(tl.int64)
    scratch += b * 2 * S.slots
    d_rows, d_usage_at, d_weights_at, d_read_at, d_link_at, d_precedence_at = entry(d_state, b, S)
    d_memory = load_tile(d_rows, 0, S.width, S.columns, S)
    d_usage, d_state_weights = load_slots(d_usage_at, S), load_slots(d_weights_at, S)
    if S.links:
        d_link, d_precedence = load_tile(d_link_at, 0, S.slots, S.pair_columns, S), load_slots(d_precedence_at, S)
    after_rows, _, _, _, new_link_at, _ = entry(states, b * (chunk + 1) + chunk, S)
    chunks = (tokens + chunk - 1) // chunk
    for c in range(chunks):
        first = (chunks - 1 - c) * chunk
        last = tl.minimum(first + chunk, tokens)
        replay(x, outputs, checkpoints, states, b, first, last, tokens, chunk, S)
        for back in range(last - first):
            t = last - 1 - back
            i = b * tokens + t
            if tl.load(x.mask + i):
                rows, usage_at, old_weights_at, old_read_at, link_at, precedence_at = entry(
                    states, b * (chunk + 1) + t - first, S
                )
                erase_at, vector_at = x.erase_vectors + i * S.width, x.write_vectors + i * S.width
                gate, strength = tl.load(x.write_gates + i), tl.load(x.write_strengths + i)
                weights = load_slots(outputs.write_weights + i * S.slots, S)
                written, retained = weights, weights
                if S.addressing == "simplified":
                    written = gate * weights
                if S.addressing == "dnc":
                    old_usage, old_weights = load_slots(usage_at, S), load_slots(old_weights_at, S)
                    retained = retention(x.free_gates + i * S.heads, old_read_at, weights, S)
                before = load_tile(rows, 0, S.width, S.columns, S)
                after = write(before, rows, after_rows, retained, written, erase_at, vector_at, S)
                if S.links:
                    written_at = outputs.write_weights + i * S.slots
                    link, precedence = load_tile(link_at, 0, S.slots, S.pair_columns, S), load_slots(precedence_at, S)
                    new_link = update_link(
                        link, link_at, new_link_at, weights, written_at, precedence, precedence_at, S
                    )

                if S.reads_apart:
                    for r in range(S.heads):
                        k = i * S.heads + r
                        read = load_slots(outputs.read_weights + k * S.slots, S)
                        d_memory = add_read_gradient(read, d_outputs.reads + k * S.values, d_memory, d_rows, S)
                        d_memory = add_content_gradient(
                            after, after_rows, x.read_keys + k * S.address, x.read_masks,
                            load_slots(d_dots + k * S.slots, S), load_slots(d_squares + k * S.slots, S), d_memory,
                            d_rows, S,
                        )  # fmt: skip
                else:
                    inverse = inverse_norms(after, after_rows, S)
                    for r in range(S.heads):
                        k = i * S.heads + r
                        read = load_slots(outputs.read_weights + k * S.slots, S)
                        d_read = load_slots(d_outputs.read_weights + k * S.slots, S)
                        d_read += load_slots(d_read_at + r * S.slots, S)
                        d_reads_at = d_outputs.reads + k * S.values
                        d_read += read_rows_gradient(after, after_rows, d_reads_at, S)
                        d_memory = add_read_gradient(read, d_reads_at, d_memory, d_rows, S)
                        d_old = d_read  # "simplified": kept until the content is walked back through
                        if S.addressing != "simplified":
                            d_old = tl.zeros_like(d_read)
                            if S.links:
                                read = load_slots(saved.read_content + k * S.slots, S)
                                old, old_at = load_slots(old_read_at + r * S.slots, S), old_read_at + r * S.slots
                                raw_backward, raw_forward = follow_links(new_link, new_link_at, old, old_at, scratch, S)
                                backward, forward = raw_backward, raw_forward
                                if S.sharpened:
                                    sharpness = x.link_sharpness + k * 2
                                    backward = sharpen(raw_backward, tl.load(sharpness))
                                    forward = sharpen(raw_forward, tl.load(sharpness + 1))
                                tl.store(d_x.read_modes + k * 3, tl.sum(d_read * backward, 0))
                                tl.store(d_x.read_modes + k * 3 + 1, tl.sum(d_read * read, 0))
                                tl.store(d_x.read_modes + k * 3 + 2, tl.sum(d_read * forward, 0))
                                modes = x.read_modes + k * 3
                                d_backward, d_forward = tl.load(modes) * d_read, tl.load(modes + 2) * d_read
                                d_read = tl.load(modes + 1) * d_read
                                if S.sharpened:
                                    d_backward, d_sharpness = sharpen_backward(
                                        raw_backward, tl.load(sharpness), backward, d_backward
                                    )
                                    tl.store(d_x.link_sharpness + k * 2, d_sharpness)
                                    d_forward, d_sharpness = sharpen_backward(
                                        raw_forward, tl.load(sharpness + 1), forward, d_forward
                                    )
                                    tl.store(d_x.link_sharpness + k * 2 + 1, d_sharpness)
                                d_link, d_old = follow_links_backward(
                                    new_link, new_link_at, old, old_at, d_backward, d_forward, d_link, d_link_at,
                                    scratch, S,
                                )  # fmt: skip
                            d_memory, d_strength = content_backward(
                                after, after_rows, x.read_keys + k * S.address, x.read_masks + k * S.width,
                                tl.load(x.read_strengths + k), inverse, read, d_read, d_memory, d_rows,
                                d_x.read_keys + k * S.address, d_x.read_masks + k * S.width, S,
                            )  # fmt: skip
                            tl.store(d_x.read_strengths + k, d_strength)
                        tl.debug_barrier()
                        store_slots(d_read_at + r * S.slots, d_old, S)

                d_weights = d_state_weights + load_slots(d_outputs.write_weights + i * S.slots, S)
                if S.links:
                    d_link, d_precedence, d_by_link = update_link_backward(
                        link, link_at, weights, written_at, precedence, precedence_at, d_link, d_link_at, d_precedence,
                        scratch, S,
                    )  # fmt: skip
                    d_weights += d_by_link
                d_memory, d_written, d_retained = write_backward(
                    before, rows, retained, written, erase_at, vector_at, d_memory, d_rows,
                    d_x.erase_vectors + i * S.width, d_x.write_vectors + i * S.width, S,
                )  # fmt: skip
                inverse = inverse_norms(before, rows, S)
                content = load_slots(saved.content + i * S.slots, S)
                if S.addressing == "simplified":
                    tl.store(d_x.write_gates + i, tl.sum(d_written * weights, 0))
                    d_weights += gate * d_written
                    d_usage = d_usage * (1.0 - weights)
                    tl.debug_barrier()
                    for r in range(S.heads):
                        k = i * S.heads + r
                        d_memory, d_strength = content_backward(
                            before, rows, x.read_keys + k * S.address, x.read_masks, tl.load(x.read_strengths + k),
                            inverse, load_slots(outputs.read_weights + k * S.slots, S),
                            load_slots(d_read_at + r * S.slots, S), d_memory, d_rows, d_x.read_keys + k * S.address,
                            d_x.read_masks, S,
                        )  # fmt: skip
                        tl.store(d_x.read_strengths + k, d_strength)
                    clear_heads(d_read_at, weights, S)
                    d_content = 0.5 * d_weights
                else:
                    d_weights += d_written
                    allocation_gate = tl.load(x.allocation_gates + i)
                    allocated = gate * allocation_gate
                    if S.addressing == "dnc":
                        usage = (old_usage + (1.0 - old_usage) * old_weights) * retained
                        value = S.epsilon + (1.0 - S.epsilon) * usage
                        rank = ranks(saved.order + i * S.slots, S)
                        product = product_before(rank, value, scratch, S)
                        allocation = (1.0 - value) * product
                    else:
                        allocation = (tl.arange(0, S.slot_block) == tl.load(saved.order + i)).to(weights.dtype)
                    difference = allocation - content
                    d_gate = tl.sum(d_weights * (content + allocation_gate * difference), 0)
                    tl.store(d_x.write_gates + i, d_gate)
                    tl.store(d_x.allocation_gates + i, gate * tl.sum(d_weights * difference, 0))
                    d_content = (gate - allocated) * d_weights
                    if S.addressing == "dnc":
                        d_allocation = allocated * d_weights
                        d_value = sum_behind(rank, d_allocation * allocation, scratch, S) / value
                        d_usage += (1.0 - S.epsilon) * (d_value - product * d_allocation)
                        used = old_usage + (1.0 - old_usage) * old_weights
                        retention_backward(
                            x.free_gates + i * S.heads, old_read_at, d_retained + d_usage * used,
                            d_x.free_gates + i * S.heads, d_read_at, S,
                        )  # fmt: skip
                        d_usage = d_usage * retained * (1.0 - old_weights)
                    else:
                        d_usage = tl.zeros_like(d_usage)  # nothing reaches the old usage
                d_memory, d_strength = content_backward(
                    before, rows, x.write_keys + i * S.address, x.write_masks + i * S.width, strength, inverse,
                    content, d_content, d_memory, d_rows, d_x.write_keys + i * S.address,
                    d_x.write_masks + i * S.width, S,
                )  # fmt: skip
                if S.addressing == "simplified":
                    old_usage = load_slots(usage_at, S)
                    d_scores = softmax_backward(softmax(strength * (1.0 - old_usage), S), d_content)
                    d_strength += tl.sum(d_scores * (1.0 - old_usage), 0)
                    d_usage -= d_scores * strength
                tl.store(d_x.write_strengths + i, d_strength)
                d_state_weights = tl.zeros_like(d_weights)  # the old weights reach only the usage, without gradient
            if tl.load(x.reset + i):
                d_memory = clear_tile(d_memory, d_rows, S.width, S.columns, S.streamed, S)
                d_usage, d_state_weights = tl.zeros_like(d_usage), tl.zeros_like(d_state_weights)
                clear_heads(d_read_at, d_usage, S)
                if S.links:
                    d_link = clear_tile(d_link, d_link_at, S.slots, S.pair_columns, S.pairs_streamed, S)
                    d_precedence = tl.zeros_like(d_precedence)
            tl.debug_barrier()
    if not S.streamed:
        store_tile(d_rows, 0, S.width, d_memory, S.columns, S)
    store_slots(d_usage_at, d_usage, S)
    store_slots(d_weights_at, d_state_weights, S)
    if S.links:
        if not S.pairs_streamed:
            store_tile(d_link_at, 0, S.slots, d_link, S.pair_columns, S)
        store_slots(d_precedence_at, d_precedence, S)


def triton_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run for tensors on `device`, or None."""
    if IMPORT_PROBLEM is not None:
        return IMPORT_PROBLEM
    if device.type == "cuda" or INTERPRETED:
        return None
    return f"the memory is on {device}, where Triton runs under TRITON_INTERPRET=1 alone"


def sizes(addressing: str, x: Any, state: Any, options: Any) -> Sizes:
    """What to compile for an Interface, a State (of any number of entries) and Options of kernels_dnc_gpt2.py."""
    slots, width = state.memory.shape[1:]
    heads, address = x.read_keys.shape[2:]
    itemsize = state.memory.element_size()
    slot_block, width_block = (max(16, triton.next_power_of_2(size)) for size in (slots, width))
    most = max(1, TILE_BYTES // itemsize // slot_block)
    columns, pair_columns = min(width_block, most), min(slot_block, most)
    largest = slot_block * itemsize * (max(columns, pair_columns) if addressing == "dnc" else columns)
    return Sizes(
        addressing=addressing,
        slots=slots,
        width=width,
        address=address,
        values=width if addressing != "lru" else width - address,
        heads=heads,
        slot_block=slot_block,
        columns=columns,
        streamed=width_block > most,
        pair_columns=pair_columns,
        pairs_streamed=slot_block > most,
        usage_decay=float(options.usage_decay),
        read_refresh=float(options.read_refresh),
        erase_on_free=bool(options.erase_on_free) and addressing == "dnc",
        links=options.links,
        sharpened=options.sharpened,
        masked=options.masked,
        training=options.training,
        reads_apart=options.training and addressing == "lru" and not options.read_refresh,
        epsilon=EPSILON,
        warps=min(8, max(4, largest // 4096)),
    )


def triton_forward(
    addressing: str, x: Any, state: Any, outputs: Any, saved: Any, checkpoints: Any, options: Any
) -> None:
    """The scan of all batch rows: see `numba_forward`, whose arguments these are, on any device that Triton takes."""
    batch, tokens = x.mask.shape
    S = sizes(addressing, x, state, options)
    for output in outputs:
        output.zero_()
    arguments = x, state, outputs, saved, checkpoints, _scratch(state.memory, batch), tokens, options.chunk, S
    # Without fused multiply-adds, so that usage is rounded as in the eager recurrence.
    rounding = {"num_stages": 1, "enable_fp_fusion": False}
    with torch.cuda.device_of(state.memory):
        forward_kernel[(batch,)](*arguments, num_warps=S.warps, **rounding)
        if S.reads_apart:
            grid = batch, len(checkpoints.memory) // batch
            arguments = x, outputs, checkpoints, _working(checkpoints.memory, S), tokens, options.chunk, S
            read_kernel[grid](*arguments, num_warps=READ_WARPS, **rounding)
            last, reads = _last_read(x)
            state.read_weights.copy_(torch.where(reads, outputs.read_weights[last], state.read_weights))


def triton_backward(
    addressing: str,
    x: Any,
    outputs: Any,
    saved: Any,
    checkpoints: Any,
    options: Any,
    d_outputs: Any,
    d_state: Any,
    d_x: Any,
) -> None:
    """Backward of `triton_forward`: `d_state` becomes the initial state's gradient, `d_x` is written."""
    for gradient in d_x[: -len((x.mask, x.reset))]:
        gradient.zero_()
    batch, tokens = x.mask.shape
    S = sizes(addressing, x, d_state, options)
    entries = batch * (options.chunk + 1)
    states = type(d_state)(*[part.new_empty(entries, *part.shape[1:]) for part in d_state])
    d_dots, d_squares = d_state.memory.new_empty(2, *outputs.read_weights.shape if S.reads_apart else (0,))
    with torch.cuda.device_of(d_state.memory):
        if S.reads_apart:
            last, reads = _last_read(x)
            d_read_weights = d_outputs.read_weights.clone()
            d_read_weights[last] += torch.where(reads, d_state.read_weights, 0.0)
            d_state.read_weights.masked_fill_(reads, 0.0)
            d_outputs = d_outputs._replace(read_weights=d_read_weights)
            grid = batch, len(checkpoints.memory) // batch
            arguments = x, outputs, checkpoints, _working(checkpoints.memory, S), d_outputs, d_x, d_dots, d_squares
            read_backward_kernel[grid](*arguments, tokens, options.chunk, S, num_warps=READ_WARPS, num_stages=1)
        arguments = x, outputs, saved, checkpoints, states, d_outputs, d_state, d_x, d_dots, d_squares
        scratch = _scratch(d_state.memory, batch)
        backward_kernel[(batch,)](*arguments, scratch, tokens, options.chunk, S, num_warps=S.warps, num_stages=1)


def _scratch(memory: Tensor, batch: int) -> Tensor:
    return memory.new_empty(batch, 2, memory.shape[1])


def _working(memory: Tensor, S: Sizes) -> Tensor:
    """Room for as many memories, where they are streamed."""
    return torch.empty_like(memory) if S.streamed else memory.new_empty(0)


def _last_read(x: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Of every batch row the last token that reads or resets, as an index, and whether it reads [B, 1, 1].

    Where it reads, its read weights are the final state's.
    """
    rows, tokens = (torch.arange(size, device=x.mask.device) for size in x.mask.shape)
    last = rows, torch.where(x.mask | x.reset, tokens, 0).amax(1)
    return last, x.mask[last][:, None, None]
