"""Attention windows: where each token of a batch belongs, and the caches that hold each row's current window.

Shapes: B batch, T tokens of this call, K cached columns. Both caches keep the tokens of a row's current window packed
to the left of their columns, and the memory's state beside the keys and values of their last layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

try:
    from .configuration_dnc_gpt2 import DNCGPT2Config
    from .memory_dnc_gpt2 import MemoryState
except ImportError:
    from configuration_dnc_gpt2 import DNCGPT2Config
    from memory_dnc_gpt2 import MemoryState


class WindowLayout(NamedTuple):
    """Where each token of a [B, T] batch is attended to. Values at masked tokens mean nothing."""

    windows: Tensor  # [B, T], 0 for the row's first window (or the one it continues), then 1, 2, ...
    columns: Tensor  # [B, T], how many tokens of the same window come before it in this call
    positions: Tensor  # [B, T]
    restarts: Tensor | None  # [B, T] bool, tokens whose position does not follow on: a new document begins


def locate(
    mask: Tensor, position_ids: Tensor | None, window_size: int, last_positions: Tensor | None = None
) -> WindowLayout:
    """Lay out the real tokens (`mask` [B, T] bool) in attention windows.

    Args:
        position_ids: [B, T]; `None` counts the real tokens on from `last_positions`.
        last_positions: [B], position of the last token of an earlier call, -1 for none.
    """
    counts = mask.long().cumsum(-1)
    if last_positions is None:
        last_positions = torch.full_like(counts[:, 0], -1)
    if position_ids is None:
        positions, restarts = last_positions[:, None] + counts, None
        windows = positions // window_size - last_positions.clamp_min(0)[:, None] // window_size
        begins = positions % window_size == 0
    else:
        positions = position_ids.expand(mask.shape)
        before = previous_real(positions, mask, last_positions)
        restarts = mask & (positions <= before)
        crossed = positions // window_size != before // window_size
        begins = mask & (before >= 0) & (restarts | crossed)
        windows = begins.long().cumsum(-1)
        begins = begins | (mask & (before < 0))
    # The count of real tokens where the current window began, -1 + count so that the first column is 0.
    start = torch.where(begins & mask, counts - 1, 0).cummax(-1).values
    return WindowLayout(windows, counts - 1 - start, positions, restarts)


def previous_real(values: Tensor, mask: Tensor, first: Tensor) -> Tensor:
    """For each token the value [B, T] of the real token before it, `first` [B] where there is none."""
    index = torch.arange(1, values.shape[1] + 1, device=values.device) * mask
    latest = F.pad(index, (1, 0)).cummax(-1).values[:, :-1]
    return torch.cat([first[:, None], values], dim=1).gather(1, latest)


def last_real(values: Tensor, mask: Tensor, default: Tensor) -> Tensor:
    """The value [B, T] of each row's last real token, `default` [B] where it has none."""
    index = (torch.arange(1, values.shape[1] + 1, device=values.device) * mask).amax(-1, keepdim=True)
    return torch.cat([default[:, None], values], dim=1).gather(1, index)[:, 0]


class Folding:
    """Moves tokens between a batch [B, T] and its windows as rows [B * windows, columns] of their own."""

    def __init__(self, layout: WindowLayout, mask: Tensor, window_size: int, num_windows: int):
        self.batch, self.tokens = mask.shape
        # A length that a traced graph leaves open cannot be compared.
        size = window_size if isinstance(self.tokens, torch.SymInt) else min(window_size, self.tokens)
        self.num_windows, self.size = num_windows, size
        rows = torch.arange(self.batch, device=mask.device)[:, None]
        index = (rows * num_windows + layout.windows) * self.size + layout.columns
        self.trash = self.batch * num_windows * self.size  # where masked tokens go and come from
        self.index = torch.where(mask, index, self.trash)

    def fold(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B * windows, columns, ...], zero where no token lives."""
        folded = x.new_zeros((self.trash + 1, *x.shape[2:]))
        # Masked tokens all land in the last place, which is cut off.
        folded = folded.index_copy(0, self.index.flatten(), x.flatten(0, 1))
        return folded[:-1].reshape(self.batch * self.num_windows, self.size, *x.shape[2:])

    def unfold(self, x: Tensor) -> Tensor:
        """[B * windows, columns, ...] -> [B, T, ...], zero at masked tokens."""
        flat = torch.cat([x.flatten(0, 1), x.new_zeros((1, *x.shape[2:]))])
        return flat[self.index]

    def unfold_attention(self, x: Tensor) -> Tensor:
        """[B * windows, heads, columns, columns] -> [B, heads, T, T], zero between windows."""
        queries = self.unfold(x.transpose(1, 2))  # [B, T, heads, columns]
        columns = (self.index % self.size)[:, None, None].expand(-1, *queries.shape[1:3], -1)
        window = torch.where(self.index == self.trash, -1, self.index // self.size)
        same = (window[:, :, None] == window[:, None]) & (window[:, None] >= 0)
        return (queries.gather(-1, columns) * same[:, :, None]).transpose(1, 2)


def _select(x: Tensor, rows: Tensor | None, columns: Tensor | slice) -> Tensor:
    """Rows (`None`: all) and columns (a slice, or [B, K] an index a row) of keys or values [B, heads, K, D]."""
    if rows is not None:
        x = x.index_select(0, rows.to(x.device))
    if isinstance(columns, slice):
        return x[:, :, columns]
    return x.gather(2, columns.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class _MemoryLayer:
    """What layers of both kinds share: a memory state (the last layer's alone) that follows the rows' keys and values.

    Attributes:
        memory_state: after the last token; `None` before the first.
        columns: [B], where the one new token of each row goes at the next `update`; `None` appends all new tokens.
        real: [B] bool, rows whose new token is real, `None` for all; the others keep what their column holds.
        width: number of columns after it.
    """

    memory_state: MemoryState | None = None
    columns: Tensor | None = None
    real: Tensor | None = None
    width = 0

    def put(self, held: Tensor, new: Tensor) -> Tensor:
        """Write `new` [B, heads, 1, D] to `columns` of `held` [B, heads, K, D], in place."""
        index = self.columns.view(-1, 1, 1, 1).expand_as(new)
        if self.real is not None:
            new = torch.where(self.real.view(-1, 1, 1, 1), new, held.gather(2, index))
        return held.scatter_(2, index, new)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows of everything held."""
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
        if self.memory_state is not None:
            self.memory_state = self.memory_state.map(function)

    def offload(self) -> None:
        super().offload()
        self._move_memory("cpu")

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self._move_memory(self.device)

    def _move_memory(self, device: torch.device | str) -> None:
        if self.memory_state is not None:
            self.memory_state = self.memory_state.map(lambda x: x.to(device, non_blocking=True))


class WindowLayer(_MemoryLayer, DynamicLayer):
    """Keys and values [B, heads, K, D] that grow within a window. `record_past`: see `DNCGPT2Cache.crop`."""

    record_past = False

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to: those held and the new ones."""
        if self.columns is None:
            return super().update(key_states, value_states)
        grow = self.width - self.keys.shape[2]
        room = [F.pad(held, (0, 0, 0, grow)) if grow else held.clone() for held in (self.keys, self.values)]
        self.keys, self.values = self.put(room[0], key_states), self.put(room[1], value_states)
        return self.keys, self.values

    def keep(self, rows: Tensor | None, columns: Tensor | slice) -> None:
        """Keep these rows and columns: see `_select`."""
        self.keys, self.values = _select(self.keys, rows, columns), _select(self.values, rows, columns)

    def set_memory(self, state: MemoryState) -> None:
        self.memory_state = state

    def reset(self) -> None:
        super().reset()
        self.memory_state = None


class StaticWindowLayer(_MemoryLayer, StaticLayer):
    """Keys and values in buffers [B, heads, K, D] of constant address, the memory state likewise."""

    holds_tokens = False
    full: tuple[Tensor, Tensor] | None = None  # of a call of several tokens, until `keep` packs them

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to: the buffers, and the new tokens beside them where they are several."""
        if self.columns is not None:
            return self.put(self.keys, key_states), self.put(self.values, value_states)
        self.full = key_states, value_states
        if self.holds_tokens:
            self.full = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        return self.full

    def keep(self, rows: Tensor | None, columns: Tensor | slice) -> None:
        """Copy these rows and columns (see `_select`) of the last call to the left of the buffers."""
        keys, values = (_select(x, rows, columns) for x in self.full)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for buffer, kept in ((self.keys, keys), (self.values, values)):
            columns = min(buffer.shape[2], kept.shape[2])
            buffer[:, :, :columns].copy_(kept[:, :, :columns])
        self.full, self.holds_tokens = None, True

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """As in `_MemoryLayer`, in place where the number of rows stays."""
        super().map(lambda x: _replaced(x, function(x)))

    def set_memory(self, state: MemoryState) -> None:
        """Copy the state to its buffers, which the first one makes."""
        if self.memory_state is None:
            self.memory_state = state.map(lambda x: _static(x.detach().clone()))
        else:
            self.memory_state = MemoryState(
                *(
                    None if old is None else old.copy_(new.detach())
                    for old, new in zip(self.memory_state, state, strict=True)
                )
            )

    def reset(self) -> None:
        super().reset()
        self.full, self.holds_tokens = None, False
        if self.memory_state is not None:
            self.memory_state.map(Tensor.zero_)


def _static(x: Tensor) -> Tensor:
    """Tell compilers that this tensor stays where it is (which cannot be told while one traces)."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x


def _replaced(old: Tensor, new: Tensor) -> Tensor:
    return old.copy_(new) if old.shape == new.shape else _static(new)


class Rows(NamedTuple):
    """What the caches know of each row."""

    lengths: Tensor  # [B], tokens of the row's current window: they lie in its first columns
    last_positions: Tensor  # [B], position of the row's last token, -1 before the first
    origins: Tensor | None  # [B, K], the place that each column's token had among all tokens seen; not in static caches


class _WindowCache:
    """What both caches share: how the tokens of a call are kept, and how rows are chosen."""

    @property
    def memory_state(self) -> MemoryState | None:
        """The state after the last token, `None` before the first."""
        return self.layers[-1].memory_state

    @memory_state.setter
    def memory_state(self, state: MemoryState) -> None:
        self.layers[-1].set_memory(state)

    @property
    def held(self) -> int:
        """Number of columns K, 0 of an empty cache."""
        return self.layers[0].keys.shape[2] if self.has_tokens else 0

    def current(self) -> Tensor:
        """[B, K] bool: columns that hold a token of their row's current window."""
        lengths = self.rows.lengths
        return torch.arange(self.held, device=lengths.device) < lengths[:, None]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns before the new tokens in what `update` returns: masks are made for these."""
        return self.held

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of what `update` returns, and where they begin."""
        return self.layers[0].width or self.held + query_length, 0

    def keep(self, rows: Tensor | None, columns: Tensor | slice) -> None:
        """Keep these rows and columns of the last call's keys and values: see `_select`."""
        for layer in self.layers:
            layer.keep(rows, columns)

    def aim(self, columns: Tensor | None, real: Tensor | None = None) -> int:
        """Say where the next `update` puts each row's one new token (see `_MemoryLayer`); returns K after it."""
        width = 0 if columns is None else self.width(columns)
        for layer in self.layers:
            layer.columns, layer.real, layer.width = columns, real, width
        return width

    def keep_one(self, old: Rows, columns: Tensor, real: Tensor, positions: Tensor) -> None:
        """After a call of one token a row, which `update` has put in `columns`. All [B]; `old` was before the call."""
        self.aim(None)
        lengths, last_positions, origins = old
        if origins is not None:
            origins = F.pad(origins, (0, self.held - origins.shape[1]))
            place = torch.where(real, self.seen_tokens, origins.gather(1, columns[:, None])[:, 0])
            origins = origins.scatter(1, columns[:, None], place[:, None])
        lengths = torch.where(real, columns + 1, lengths)
        self.set_rows(Rows(lengths, torch.where(real, positions, last_positions), origins))

    def keep_first(self, layout: WindowLayout, real: Tensor, folding: Folding, tokens: int) -> None:
        """After a call on an empty cache, whose keys and values are folded: keep each row's last window.

        Args:
            tokens: how many columns of the call count as seen.
        """
        last_window = (layout.windows * real).amax(-1)
        rows = torch.arange(real.shape[0], device=real.device) * folding.num_windows + last_window
        lengths = (real & (layout.windows == last_window[:, None])).sum(-1)
        columns = slice(0, self.room(lengths, tokens))
        self.keep(rows, columns)
        places = torch.arange(real.shape[1], device=real.device).expand(real.shape)
        origins = folding.fold(places).index_select(0, rows)[:, columns]
        last_positions = last_real(layout.positions, real, torch.full_like(lengths, -1))
        position = int(last_positions[0])
        # A window whose positions do not begin at its first, or leave some out, holds fewer tokens than its place says.
        whole = origins.shape[1] == position % self.window_size + 1
        if whole and (last_positions == position).all() and (lengths == origins.shape[1]).all():
            self.set_alike(real.shape[0], position)
        else:
            self.set_rows(Rows(lengths, last_positions, origins))

    def keep_right_padded(self, real: Tensor, tokens: int) -> None:
        """After a call on an empty cache, with one window: its first `tokens` columns, in which padding comes last."""
        self.keep(None, slice(0, tokens))
        lengths = real.sum(-1)
        places = torch.arange(tokens, device=real.device).expand(real.shape[0], -1)
        self.set_rows(Rows(lengths, lengths - 1, places))

    def keep_onward(self, old: Rows, current: Tensor, layout: WindowLayout, real: Tensor, tokens: int) -> None:
        """After a call of several tokens on rows `old` that held `current` [B, K]: keep each row's last window.

        Args:
            tokens: how many columns of the call count as seen.
        """
        last_window = (layout.windows * real).amax(-1, keepdim=True)
        kept = torch.cat([current & (last_window == 0), real & (layout.windows == last_window)], dim=-1)
        self.keep_some(old, kept, last_real(layout.positions, real, old.last_positions), tokens)

    def keep_some(self, old: Rows, kept: Tensor, last_positions: Tensor, tokens: int) -> None:
        """After a call of several tokens on rows `old`: keep these columns [B, K + T] bool, packed to the left."""
        lengths = kept.sum(-1)
        columns = (
            (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[:, : self.room(lengths, self.seen_tokens + tokens)]
        )
        self.keep(None, columns)
        origins = None
        if old.origins is not None:
            appended = torch.arange(kept.shape[1] - old.origins.shape[1], device=kept.device) + self.seen_tokens
            places = torch.cat([old.origins, appended.expand(kept.shape[0], -1)], dim=-1)
            origins = places.gather(1, columns)
        self.set_rows(Rows(lengths, last_positions, origins))

    def keep_alike(self, batch: int, position: int, start: int, num_windows: int = 1) -> None:
        """After a call whose rows are alike: keep the window of `position`, the last that any row has.

        Args:
            batch: rows B; keys and values have B * `num_windows`, of which each row's last is kept.
            start: the column in which that window begins.
        """
        rows = None
        if num_windows > 1:
            rows = torch.arange(batch) * num_windows + position // self.window_size
        self.keep(rows, slice(start, start + position % self.window_size + 1))
        self.set_alike(batch, position)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from row `beam_idx[i]`, memory included."""
        self.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, memory included."""
        self.map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows (indices or a mask), memory included."""
        self.map_rows(lambda x: x[indices.to(x.device)])


class Snapshot(NamedTuple):
    """A dynamic cache between two calls."""

    keys_and_values: list[tuple[Tensor | None, Tensor | None]]
    memory_state: MemoryState | None
    position: int | None
    rows: Rows | None
    seen_tokens: int


class Record(NamedTuple):
    """A call that can be taken back: wholly by the snapshot, in part by playing it again without its last tokens."""

    before: Snapshot
    tokens: int
    replay: Callable[[int], None]  # given the number of last tokens to leave out, fewer than all


class DNCGPT2Cache(_WindowCache, DynamicCache):
    """Keys and values of each row's current window, and the memory state; it never holds more than a window.

    Attributes:
        position: position of every row's last token (-1 before the first) where all rows are alike: as many tokens, and
            no padding among those of the current window. `None` where they differ, which `rows` then tells.
        seen_tokens: number of columns (padding included) that have passed through.
    """

    def __init__(self, config: DNCGPT2Config, offloading: bool = False):
        super().__init__(config=config, offloading=offloading)
        self.layers = [WindowLayer() for _ in self.layers]
        self.window_size = config.n_positions
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        # A copy takes no tokens back: the records would do so in the cache that they were made for.
        return {**self.__dict__, "_records": []}

    def forget(self) -> None:
        """Begin with no token seen."""
        self.position: int | None = -1
        self._rows: Rows | None = None
        self.seen_tokens = 0
        self._records: list[Record] = []

    @property
    def has_tokens(self) -> bool:
        """Whether there is something to go on from."""
        return self.seen_tokens > 0

    @property
    def rows(self) -> Rows:
        """What is known of each row, spelled out where all are alike."""
        if self.position is None:
            return self._rows
        keys, end = self.layers[0].keys, self.seen_tokens
        batch, _, held, _ = keys.shape
        lengths, last_positions = (torch.full((batch,), x, device=keys.device) for x in (held, self.position))
        origins = torch.arange(end - held, end, device=keys.device).expand(batch, -1)
        return Rows(lengths, last_positions, origins)

    def set_rows(self, rows: Rows) -> None:
        """Note what is known of each row."""
        self.position, self._rows = None, rows

    def set_alike(self, batch: int, position: int) -> None:
        """Note that every row has seen the tokens up to `position`."""
        self.position, self._rows = position, None

    def room(self, lengths: Tensor, seen: int) -> int:
        """Columns for rows of these lengths: as many as were seen, padding included, but no more than a window.

        Rows need no room for padding, but where GPT-2 would look for its column there is one.
        """
        return max(int(lengths.amax()), min(seen, self.window_size))

    def width(self, columns: Tensor) -> int:
        """Number of columns after a token of each row has been put in `columns` [B]."""
        return max(self.held, self.room(columns + 1, self.seen_tokens + 1))

    def count(self, tokens: int) -> None:
        """Count columns that have passed through."""
        self.seen_tokens += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, not tokens held: `generate` counts in these."""
        return self.seen_tokens

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows of everything."""
        for layer in self.layers:
            layer.map(function)
        if self._rows is not None:
            self._rows = Rows(*map(function, self._rows))
        self._records.clear()

    @property
    def is_recording(self) -> bool:
        """Whether calls are recorded, so that `crop` can take their tokens back."""
        return self.layers[-1].record_past

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs to go back to before any token since the last `crop`."""
        self.layers[-1].record_past = True

    def end_past_recording(self) -> None:
        """Keep nothing of the past any more."""
        self.layers[-1].record_past = False
        self._records.clear()

    def snapshot(self) -> Snapshot:
        """The cache as it is. Calls replace its tensors and leave those of the snapshot alone."""
        keys_and_values = [(layer.keys, layer.values) for layer in self.layers]
        return Snapshot(keys_and_values, self.memory_state, self.position, self._rows, self.seen_tokens)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot."""
        for layer, (layer.keys, layer.values) in zip(self.layers, snapshot.keys_and_values, strict=True):
            layer.is_initialized = layer.keys is not None
        self.memory_state = snapshot.memory_state
        self.position, self._rows, self.seen_tokens = snapshot.position, snapshot.rows, snapshot.seen_tokens

    def record(self, record: Record) -> None:
        """Keep what takes the last call back."""
        self._records.append(record)

    def crop(self, tokens_to_remove: int) -> None:
        """Go back to before the last tokens; they must have come since the last `crop`.

        Args:
            tokens_to_remove: 0 or less, minus the number of tokens, as transformers calls it. 0 removes none, and ends
                the possibility to go back behind this point.

        Raises:
            ValueError: more tokens than were recorded since the last `crop`, or a positive number.
            RuntimeError: `activate_past_recording` was not called before these tokens.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) names no tokens to remove: pass minus their number.")
        remaining = -tokens_to_remove
        if remaining and not self.is_recording:
            raise RuntimeError(
                "The memory cannot take tokens back that were not recorded: call `activate_past_recording` before them."
            )
        recorded = sum(record.tokens for record in self._records)
        if remaining > recorded:
            raise ValueError(f"crop({tokens_to_remove}) goes back behind the {recorded} tokens since the last crop.")
        while remaining:
            record = self._records.pop()
            if remaining >= record.tokens:
                self.restore(record.before)
            else:
                record.replay(remaining)
            remaining = max(0, remaining - record.tokens)
        self._records.clear()


class DNCGPT2StaticCache(_WindowCache, StaticCache):
    """Keys and values of each row's current window and the memory state in tensors that never move.

    For compiled decoding: a step of one token writes in place and nothing of it depends on how many came before. The
    buffers have `max_cache_len` columns, but no more than a window has.
    """

    position = None  # rows are told apart even where they are alike: what a step does must not depend on it
    is_recording = False

    def __init__(self, config: DNCGPT2Config, max_cache_len: int, offloading: bool = False, **kwargs):
        super().__init__(config=config, max_cache_len=max_cache_len, offloading=offloading)
        self.window_size = config.n_positions
        self.columns = min(max_cache_len, self.window_size)
        self.layers = [StaticWindowLayer(self.columns) for _ in self.layers]
        self.rows: Rows | None = None

    def forget(self) -> None:
        """Begin with no token seen."""
        if self.rows is not None:
            self.rows.lengths.zero_()
            self.rows.last_positions.fill_(-1)

    @property
    def has_tokens(self) -> bool:
        """Whether there is something to go on from."""
        return self.layers[0].holds_tokens

    def set_rows(self, rows: Rows) -> None:
        """Note what is known of each row, in place."""
        if self.rows is None:
            self.rows = Rows(_static(rows.lengths.clone()), _static(rows.last_positions.clone()), None)
        else:
            self.rows.lengths.copy_(rows.lengths)
            self.rows.last_positions.copy_(rows.last_positions)

    def set_alike(self, batch: int, position: int) -> None:
        """Note that every row has seen the tokens up to `position`."""
        counts = position % self.window_size + 1, position
        device = self.layers[0].device
        rows = Rows(*(torch.full((batch,), count, device=device) for count in counts), None)
        self.check_room(rows.lengths)
        self.set_rows(rows)

    def room(self, lengths: Tensor, seen: int) -> int:
        """Columns that any rows need."""
        self.check_room(lengths)
        return self.columns

    def check_room(self, lengths: Tensor) -> None:
        """Raise a ValueError if so many tokens [B] of each row's window do not fit; a whole window always does."""
        if self.columns == self.window_size or torch.compiler.is_compiling():
            return
        if (tokens := int(lengths.amax())) > self.columns:
            raise ValueError(
                f"A static cache of {self.columns} tokens has no room for the {tokens} of this window: make it "
                f"with max_cache_len={self.window_size} or more."
            )

    def width(self, columns: Tensor) -> int:
        """Number of columns, whatever is put in them."""
        self.check_room(columns + 1)
        return self.columns

    def count(self, tokens: int) -> None:
        """Count columns that have passed through."""
        for layer in self.layers:
            layer.cumulative_length.add_(tokens)

    @property
    def seen_tokens(self) -> int | Tensor:
        """Number of columns (padding included) that have passed through."""
        return self.layers[0].cumulative_length if self.has_tokens else 0

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens seen so far, not tokens held: `generate` counts in these."""
        return self.seen_tokens

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows of everything, in place where their number stays."""
        for layer in self.layers:
            layer.map(function)
        if self.rows is not None:
            self.rows = Rows(*(_replaced(x, function(x)) for x in self.rows[:2]), None)

    def activate_past_recording(self) -> None:
        """Static buffers hold no past.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "A static cache records no past, which assisted decoding needs: leave cache_implementation out."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """As `activate_past_recording`, but for `crop(0)`."""
        if tokens_to_remove:
            self.activate_past_recording()
