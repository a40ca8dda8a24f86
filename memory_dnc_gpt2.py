"""The external memory: its state, its addressing, the readable recurrence that specifies it, and the module.

Shapes: B batch, T tokens, H hidden size, N memory slots, W row width, R read heads, A address width and V value width:
a row of `"lru"` is A columns by which it is found and V = W - A columns that are read, otherwise A = V = W. Sources:
Graves et al. 2016, "Hybrid computing using a neural network with dynamic external memory" (`"dnc"`); Csordas and
Schmidhuber 2019, "Improving differentiable neural computers through memory masking, de-allocation, and link
distribution sharpness control" (its three options).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

try:
    from .configuration_dnc_gpt2 import DNCGPT2Config
    from .kernels_dnc_gpt2 import fused_scan
    from .pointer_dnc_gpt2 import slot_tokens
except ImportError:
    from configuration_dnc_gpt2 import DNCGPT2Config
    from kernels_dnc_gpt2 import fused_scan
    from pointer_dnc_gpt2 import slot_tokens

EPSILON = 1e-6
SMALLEST = 2.0**-126  # of the normal numbers of float32: the reciprocal of a smaller one is infinite


class MemoryState(NamedTuple):
    """All that the memory carries from token to token and from call to call."""

    memory: Tensor  # [B, N, W]
    usage: Tensor  # [B, N]
    write_weights: Tensor  # [B, N], of the last token
    read_weights: Tensor  # [B, R, N], of the last token
    link: Tensor | None  # [B, N, N], "dnc" with temporal links
    precedence: Tensor | None  # [B, N], "dnc" with temporal links
    previous_hidden: Tensor  # [B, H], final hidden state of the last token
    started: Tensor  # [B], 1 where previous_hidden holds a token of this document, else 0
    previous_embedding: Tensor | None = None  # [B, H], embedding of the last token; "lru" whose addresses look at it
    slot_tokens: Tensor | None = None  # [B, N], 1 + id of the token that each slot holds, 0 where there is none; "lru"

    def map(self, function) -> "MemoryState":
        """The state with `function` applied to every tensor."""
        return MemoryState(*(None if tensor is None else function(tensor) for tensor in self))

    def detach(self) -> "MemoryState":
        """The same state, cut from the graph that computed it."""
        return self.map(Tensor.detach)

    def to(self, *args, **kwargs) -> "MemoryState":
        """`Tensor.to` for every tensor; those of token ids stay integers."""
        state = self.map(lambda x: x.to(*args, **kwargs))
        if self.slot_tokens is None:
            return state
        return state._replace(slot_tokens=self.slot_tokens.to(state.memory.device))

    def index_select(self, rows: Tensor) -> "MemoryState":
        """The state of the given batch rows (LongTensor), in their order."""
        return self.map(lambda x: x.index_select(0, rows.to(x.device)))

    def save(self, path: str) -> None:
        """Write the state to `path` as safetensors."""
        tensors = {name: x.detach().contiguous() for name, x in self._asdict().items() if x is not None}
        save_file(tensors, path, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> "MemoryState":
        """Read a state that `save` wrote.

        Raises:
            ValueError: the file is no memory state.
        """
        try:
            tensors = load_file(path, device=device)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}); save the state again.") from error
        required = set(cls._fields) - {"link", "precedence", "previous_embedding", "slot_tokens"}
        if not required <= set(tensors) <= set(cls._fields):
            raise ValueError(f"{path} holds {sorted(tensors)}, not a memory state with {sorted(required)}.")
        return cls(**{name: tensors.get(name) for name in cls._fields})


class MemoryInterface(NamedTuple):
    """What the controller tells the memory, for all tokens at once. `None` where the addressing has no such part."""

    write_keys: Tensor  # [B, T, A]
    write_strengths: Tensor  # [B, T]
    write_vectors: Tensor  # [B, T, W]
    erase_vectors: Tensor  # [B, T, W], in [0, 1]
    write_gates: Tensor  # [B, T], in [0, 1]
    read_keys: Tensor  # [B, T, R, A]
    read_strengths: Tensor  # [B, T, R]
    allocation_gates: Tensor | None = None  # [B, T], in [0, 1]; not "simplified"
    free_gates: Tensor | None = None  # [B, T, R], in [0, 1]; "dnc"
    read_modes: Tensor | None = None  # [B, T, R, 3], backward, content, forward, sum 1; "dnc" with temporal links
    write_masks: Tensor | None = None  # [B, T, W], in [0, 1]; "dnc" with masked content
    read_masks: Tensor | None = None  # [B, T, R, W], in [0, 1]; "dnc" with masked content
    link_sharpness: Tensor | None = None  # [B, T, R, 2], backward, forward, at least 1; "dnc" with sharpened links
    mask: Tensor | None = None  # [B, T] bool: real tokens; the others leave the state as it is
    reset: Tensor | None = None  # [B, T] bool: the memory is emptied before these (real) tokens

    def at(self, t: int) -> "MemoryInterface":
        """The interface of token t, without the token dimension."""
        return MemoryInterface(*(None if x is None else x[:, t] for x in self))


class ScanOutput(NamedTuple):
    """The memory's answer for all tokens: zero where a token is masked."""

    reads: Tensor  # [B, T, R, V]
    write_weights: Tensor  # [B, T, N]
    read_weights: Tensor  # [B, T, R, N]
    state: MemoryState


def content_weights(keys: Tensor, strengths: Tensor, rows: Tensor, masks: Tensor | None = None) -> Tensor:
    """Softmax over the slots of strength times cosine similarity.

    Args: keys [B, K, A], strengths [B, K], rows [B, N, A], masks [B, K, A] that weigh the columns of key and row.
    Returns: [B, K, N]. Finite, with finite gradients, for zero keys and rows.
    """
    if masks is None:
        dot = keys @ rows.mT
        squares = rows.square().sum(-1)[:, None]
    else:
        keys = keys * masks
        dot = (keys * masks) @ rows.mT
        squares = masks.square() @ rows.square().mT
    cosine = dot * torch.rsqrt(keys.square().sum(-1, keepdim=True) + EPSILON) * torch.rsqrt(squares + EPSILON)
    return torch.softmax(strengths[..., None] * cosine, dim=-1)


def retention(free_gates: Tensor, read_weights: Tensor) -> Tensor:
    """Share of each slot that no free gate releases: [B, R], [B, R, N] -> [B, N] (Graves et al.: psi)."""
    return (1 - free_gates[..., None] * read_weights).prod(dim=1)


def dnc_usage(usage: Tensor, write_weights: Tensor, retained: Tensor) -> Tensor:
    """Usage after the previous token's write and this token's freeing, all [B, N]. No gradient to the write."""
    return (usage + (1 - usage) * write_weights.detach()) * retained


def sorted_allocation(usage: Tensor) -> Tensor:
    """Allocation weights [B, N] of Graves et al.: the emptier a slot, and the emptier ones before it, the larger."""
    usage = EPSILON + (1 - EPSILON) * usage
    ascending, order = torch.sort(usage, dim=-1, stable=True)
    before = torch.cumprod(torch.cat([torch.ones_like(ascending[:, :1]), ascending[:, :-1]], dim=-1), dim=-1)
    return torch.zeros_like(usage).scatter(-1, order, (1 - ascending) * before)


@torch.no_grad()
def decayed_usage(
    usage: Tensor, write_weights: Tensor, read_weights: Tensor, decay: float, read_refresh: float
) -> Tensor:
    """Usage [B, N] of `"lru"`: a sum of writes (and of reads, by `read_refresh`) that decays as more is written.

    It does not decay with time: while the write gate is shut, what is kept does not age, over a thousand windows too.
    """
    written = write_weights.sum(dim=-1, keepdim=True)
    usage = (1 - (1 - decay) * written) * usage + write_weights
    return usage + read_refresh * read_weights.sum(dim=1) if read_refresh else usage


def least_used_allocation(usage: Tensor) -> Tensor:
    """One-hot at the least used slot, the lowest index on ties: [B, N] -> [B, N]. No gradient."""
    lowest = usage.min(dim=-1, keepdim=True).values
    first = (usage == lowest).to(torch.uint8).argmax(dim=-1)  # argmax gives the first of equal values
    return F.one_hot(first, usage.shape[-1]).to(usage.dtype)


def write(memory: Tensor, weights: Tensor, erase: Tensor, vector: Tensor) -> Tensor:
    """Erase, then add: [B, N, W], [B, N], [B, W], [B, W] -> [B, N, W]."""
    weights = weights[..., None]
    return memory * (1 - weights * erase[:, None]) + weights * vector[:, None]


def update_link(link: Tensor, precedence: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Temporal link [B, N, N] and precedence [B, N] after a write with `weights` [B, N]; the diagonal stays 0."""
    link = (1 - weights[:, :, None] - weights[:, None]) * link + weights[:, :, None] * precedence[:, None]
    link = link * (1 - torch.eye(link.shape[-1], dtype=link.dtype, device=link.device))
    return link, (1 - weights.sum(-1, keepdim=True)) * precedence + weights


def sharpen(weights: Tensor, sharpness: Tensor) -> Tensor:
    """Raise [B, R, N] to the power `sharpness` [B, R] and normalise; a weight below `SMALLEST` counts as 0."""
    positive = weights >= SMALLEST
    # The result does not depend on the scale, so the largest weight may be detached.
    scaled = weights / weights.detach().amax(-1, keepdim=True).clamp_min(SMALLEST)
    powers = torch.where(positive, torch.where(positive, scaled, 1.0) ** sharpness[..., None], 0.0)
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total > 0, total, 1.0)


def simplified_step(x: MemoryInterface, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """One token of `"simplified"`: reads [B, R, W] and the new state. The strength is one learned temperature."""
    strength = x.write_strengths[:, None]
    content = content_weights(x.write_keys[:, None], strength, state.memory)[:, 0]
    allocation = torch.softmax(strength * (1 - state.usage), dim=-1)
    weights = 0.5 * content + 0.5 * allocation
    read_weights = content_weights(x.read_keys, x.read_strengths, state.memory)  # addressed before the write ...
    written = write(state.memory, weights, x.erase_vectors, x.write_vectors)
    memory = state.memory + x.write_gates[:, None, None] * (written - state.memory)
    usage = state.usage + (1 - state.usage) * weights.detach()  # counts a write even where the gate is shut
    new = state._replace(memory=memory, usage=usage, write_weights=weights, read_weights=read_weights)
    return read_weights @ memory, new  # ... and read after it


def dnc_step(x: MemoryInterface, state: MemoryState, erase_on_free: bool) -> tuple[Tensor, MemoryState]:
    """One token of `"dnc"` (Graves et al. 2016): reads [B, R, W] and the new state."""
    retained = retention(x.free_gates, state.read_weights)
    usage = dnc_usage(state.usage, state.write_weights, retained)
    write_mask = None if x.write_masks is None else x.write_masks[:, None]
    content = content_weights(x.write_keys[:, None], x.write_strengths[:, None], state.memory, write_mask)[:, 0]
    allocation_gate = x.allocation_gates[:, None]
    weights = allocation_gate * sorted_allocation(usage) + (1 - allocation_gate) * content
    weights = x.write_gates[:, None] * weights
    before = state.memory * retained[..., None] if erase_on_free else state.memory
    memory = write(before, weights, x.erase_vectors, x.write_vectors)
    read_weights = content_weights(x.read_keys, x.read_strengths, memory, x.read_masks)
    link, precedence = state.link, state.precedence
    if x.read_modes is not None:
        link, precedence = update_link(link, precedence, weights)
        forward, backward = state.read_weights @ link.mT, state.read_weights @ link
        if x.link_sharpness is not None:
            backward = sharpen(backward, x.link_sharpness[..., 0])
            forward = sharpen(forward, x.link_sharpness[..., 1])
        modes = x.read_modes[..., None]
        read_weights = modes[:, :, 0] * backward + modes[:, :, 1] * read_weights + modes[:, :, 2] * forward
    new = {"memory": memory, "usage": usage, "write_weights": weights, "read_weights": read_weights}
    return read_weights @ memory, state._replace(**new, link=link, precedence=precedence)


def lru_step(
    x: MemoryInterface, state: MemoryState, usage_decay: float, read_refresh: float
) -> tuple[Tensor, MemoryState]:
    """One token of `"lru"`: reads [B, R, V] and the new state. Similarities look at the address columns alone."""
    width = x.read_keys.shape[-1]
    usage = decayed_usage(state.usage, state.write_weights, state.read_weights, usage_decay, read_refresh)
    addresses = state.memory[..., :width]
    content = content_weights(x.write_keys[:, None], x.write_strengths[:, None], addresses)[:, 0]
    allocation_gate = x.allocation_gates[:, None]
    weights = allocation_gate * least_used_allocation(usage) + (1 - allocation_gate) * content
    weights = x.write_gates[:, None] * weights
    memory = write(state.memory, weights, x.erase_vectors, x.write_vectors)
    read_weights = content_weights(x.read_keys, x.read_strengths, memory[..., :width])
    new = state._replace(memory=memory, usage=usage, write_weights=weights, read_weights=read_weights)
    return read_weights @ memory[..., width:], new


def recurrence(interface: MemoryInterface, state: MemoryState, config: DNCGPT2Config) -> ScanOutput:
    """The memory token by token: the specification that every fused scan must equal.

    Args:
        interface: float32 or float64, as the state is.
        state: the state before the first token.
        config: `addressing` and its options.
    """

    def step(x: MemoryInterface, state: MemoryState) -> tuple[Tensor, MemoryState]:
        if config.addressing == "simplified":
            return simplified_step(x, state)
        if config.addressing == "dnc":
            return dnc_step(x, state, config.erase_on_free)
        return lru_step(x, state, config.usage_decay, config.read_refresh)

    def choose(rows: Tensor, new: MemoryState, old: MemoryState) -> MemoryState:
        pairs = zip(new, old, strict=True)
        return MemoryState(
            *(None if a is None else torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs)
        )

    reads, write_weights, read_weights = [], [], []
    for t in range(interface.write_gates.shape[1]):
        x = interface.at(t)
        if x.reset is not None:
            state = choose(x.reset, state.map(torch.zeros_like), state)
        read, new = step(x, state)
        written, read_at = new.write_weights, new.read_weights
        if x.mask is not None:
            state = choose(x.mask, new, state)
            read, read_at = (x.mask[:, None, None] * value for value in (read, read_at))
            written = x.mask[:, None] * written
        else:
            state = new
        reads.append(read)
        write_weights.append(written)
        read_weights.append(read_at)
    return ScanOutput(torch.stack(reads, 1), torch.stack(write_weights, 1), torch.stack(read_weights, 1), state)


class MemoryOutput(NamedTuple):
    """What `DNCMemory` returns."""

    hidden_states: Tensor  # [B, T, H], what was read, to be added to the hidden states
    write_gates: Tensor  # [B, T]
    write_weights: Tensor  # [B, T, N]
    read_weights: Tensor  # [B, T, R, N]
    read_strengths: Tensor  # [B, T, R], of the content addressing
    slot_tokens: Tensor | None  # [B, T, N] as in the state, after each token; "lru", where it was asked for
    state: MemoryState


class DNCMemory(nn.Module):
    """Memory with `mem_slots` rows of `mem_width`, written and read once a token under the backbone's control.

    All projections run over all tokens at once; only the recurrence is sequential.
    """

    def __init__(self, config: DNCGPT2Config):
        super().__init__()
        self.config = config
        # Looking something up in a config takes as long as a small matrix product.
        self.addressing, self.address_columns = config.addressing, config.address_columns
        self.num_reads, self.write_threshold = config.num_reads, config.write_threshold
        self.token_shift, self.address_token = config.token_shift, config.address_token
        hidden, width, address, heads = config.n_embd, config.mem_width, config.address_columns, config.num_reads
        self.state_shapes = self._state_shapes()
        if config.addressing == "lru":
            self.embedding_scale = nn.Parameter(torch.empty(1))  # not a scalar, which fully_shard refuses
            self.write_address = nn.Linear(hidden, address, bias=False)
            self.read_key = nn.Linear(hidden, heads * address, bias=False)
            if config.address_token:
                self.write_token_address = nn.Linear(hidden, address, bias=False)
                self.read_token_key = nn.Linear(hidden, heads * address, bias=False)
            self.write_value = nn.Linear(hidden, width - address, bias=False)
            self.write_key = nn.Linear(2 * hidden, address)
            self.erase = nn.Linear(2 * hidden, width)
            self.write_control = nn.Linear(2 * hidden, 3)  # write gate, allocation gate, strength of the content key
            self.surprise_weight = nn.Parameter(torch.empty(1))
            self.read_control = nn.Linear(hidden, 2 * heads)  # strength and gate of each head
            self.read_projection = nn.Linear(heads * (width - address), hidden, bias=False)
            return
        self.write_key = nn.Linear(hidden, width)
        self.write_value = nn.Linear(hidden, width)
        self.erase = nn.Linear(hidden, width)
        self.read_key = nn.Linear(hidden, heads * width)
        self.read_projection = nn.Linear(heads * width, hidden)
        if config.addressing == "simplified":
            self.temperature = nn.Parameter(torch.empty(1))
            self.write_control = nn.Linear(hidden, 1)  # write gate
            return
        self.write_control = nn.Linear(hidden, 3)  # write gate, allocation gate, strength of the content key
        # Of each head: strength, free gate, then read modes and link sharpness where links exist.
        self.read_control_sizes = [1, 1] + ([3] if config.temporal_links else [])
        self.read_control_sizes += [2] if config.temporal_links and config.sharpen_links else []
        self.read_control = nn.Linear(hidden, heads * sum(self.read_control_sizes))
        if config.masked_content:
            self.content_masks = nn.Linear(hidden, (1 + heads) * width)  # of the write key, then of each read key

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> MemoryState:
        """The empty memory of `batch_size` new documents."""
        zeros = {
            name: None if shape is None else torch.zeros((batch_size, *shape), device=device, dtype=dtype)
            for name, shape in self.state_shapes.items()
        }
        if zeros["slot_tokens"] is not None:
            zeros["slot_tokens"] = zeros["slot_tokens"].long()
        return MemoryState(**zeros)

    def _state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Shapes of a state's tensors but for the batch."""
        config = self.config
        slots, heads = config.mem_slots, config.num_reads
        links = config.addressing == "dnc" and config.temporal_links
        return {
            "memory": (slots, config.mem_width),
            "usage": (slots,),
            "write_weights": (slots,),
            "read_weights": (heads, slots),
            "link": (slots, slots) if links else None,
            "precedence": (slots,) if links else None,
            "previous_hidden": (config.n_embd,),
            "started": (),
            "previous_embedding": (config.n_embd,) if config.addressing == "lru" and config.address_token else None,
            "slot_tokens": (slots,) if config.addressing == "lru" else None,
        }

    def check_state(self, state: MemoryState, batch_size: int) -> None:
        """Raise a ValueError that names the field where `state` does not fit this memory and batch."""
        for (name, shape), tensor in zip(self.state_shapes.items(), state, strict=True):
            if not isinstance(tensor, Tensor | None) or (tensor is not None and tensor.is_meta):
                kind = type(tensor).__name__ if not isinstance(tensor, Tensor) else "tensor without data, on meta"
                raise ValueError(f"memory_state.{name} is a {kind}: pass the state that the model returned.")
            found = None if tensor is None else tuple(tensor.shape)
            expected = None if shape is None else (batch_size, *shape)
            if found != expected:
                raise ValueError(
                    f"memory_state.{name} has shape {found}, but this model and batch need {expected}: pass the state "
                    "that the same model returned for the same rows, or None for an empty memory."
                )

    def forward(
        self,
        hidden_states: Tensor,
        token_embeddings: Tensor,
        state: MemoryState | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        input_ids: Tensor | None = None,
        output_slot_tokens: bool = False,
    ) -> MemoryOutput:
        """Write and read once a token.

        Args:
            hidden_states: the backbone's [B, T, H] where the memory lies, after its last norm.
            token_embeddings: embeddings of the tokens without position [B, T, H].
            state: the state before the first token; `None` is an empty memory.
            mask: [B, T] bool, real tokens; the others leave the state bit-equal and read zero.
            reset: [B, T] bool, tokens before which the memory is emptied.
            input_ids: [B, T] the tokens, which the slots are to remember; `None` where they have no ids.
            output_slot_tokens: return the token that each slot holds after each token.

        The recurrence computes in at least float32, whatever the dtype outside.
        """
        batch = hidden_states.shape[0]
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        if state is None:
            state = self.initial_state(batch, hidden_states.device, dtype)
        else:
            self.check_state(state, batch)
            state = state.to(device=hidden_states.device, dtype=dtype)
        if reset is not None:
            reset = reset if mask is None else reset & mask
        # What the state keeps of the last token.
        kept = [hidden_states] if state.previous_embedding is None else [hidden_states, token_embeddings]
        previous, has_previous, last, started = self._previous(torch.cat(kept, dim=-1), state, mask, reset)
        if self.addressing == "lru":
            interface, read_gates = self._lru_interface(hidden_states, token_embeddings, previous, has_previous)
        elif self.addressing == "dnc":
            interface, read_gates = self._dnc_interface(hidden_states), None
        else:
            interface, read_gates = self._simplified_interface(hidden_states), None
        interface = MemoryInterface(*(None if x is None else x.to(dtype) for x in interface))
        interface = interface._replace(mask=mask, reset=reset)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            output = fused_scan(interface, state, self.config)
            output = recurrence(interface, state, self.config) if output is None else ScanOutput(*output)
        last = dict(zip(("previous_hidden", "previous_embedding"), last.chunk(len(kept), dim=-1), strict=False))
        held = None
        if state.slot_tokens is not None:
            held = slot_tokens(input_ids, output.write_weights.detach(), state.slot_tokens, reset, output_slot_tokens)
            last["slot_tokens"] = held[:, -1]
        # Not by `_replace`: compiled, torch 2.11 cannot return what it makes.
        state = MemoryState(**{**output.state._asdict(), **last, "started": started.to(dtype)})
        reads = output.reads
        if read_gates is not None:
            reads = reads * read_gates[..., None]
        read_hidden = self.read_projection(reads.flatten(2).to(hidden_states.dtype))
        write_gates = interface.write_gates if mask is None else interface.write_gates * mask
        return MemoryOutput(
            read_hidden,
            write_gates,
            output.write_weights,
            output.read_weights,
            interface.read_strengths,
            held if output_slot_tokens else None,
            state,
        )

    def _previous(
        self, now: Tensor, state: MemoryState, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`now` [B, T, K] of the previous real token of the same document, whether there is one, and of the last.

        Returns: previous [B, T, K] (zero where there is none), has_previous [B, T], last [B, K], started [B].
        """
        batch, tokens, _ = now.shape
        started = state.started > 0
        stored = [x for x in (state.previous_hidden, state.previous_embedding) if x is not None]
        stored = torch.where(started[:, None, None], torch.cat(stored, dim=-1)[:, None], 0.0)
        if mask is None:
            previous, has_previous = stored.to(now.dtype), started[:, None]
            if tokens > 1:
                previous = torch.cat([previous, now[:, :-1]], dim=1)
                has_previous = F.pad(has_previous, (0, tokens - 1), value=True)
            if reset is not None:
                has_previous = has_previous & ~reset
                previous = torch.where(reset[..., None], 0.0, previous)
            return previous, has_previous, now[:, -1].to(stored.dtype), torch.ones_like(started)
        # In the state's dtype, so that a call of padding alone leaves it bit-equal.
        history = torch.cat([stored, now.to(stored.dtype)], dim=1)
        # Index 0 stands for the state, index t + 1 for token t.
        index = torch.arange(tokens + 1, device=now.device).expand(batch, -1)
        real = torch.where(mask, index[:, 1:], 0)
        latest = torch.cat([index[:, :1], real], 1).cummax(dim=1).values
        before = latest[:, :-1]
        has_previous = (before > 0) | started[:, None]
        if reset is not None:
            latest_reset = torch.where(reset, index[:, 1:], 0).cummax(dim=1).values
            has_previous = has_previous & (latest_reset <= before)
        gathered = history.gather(1, before[..., None].expand(-1, -1, now.shape[-1]))
        last = latest[:, -1]
        previous = torch.where(has_previous[..., None], gathered, 0.0).to(now.dtype)
        return previous, has_previous, history[torch.arange(batch, device=now.device), last], (last > 0) | started

    def _lru_interface(
        self, hidden: Tensor, embeddings: Tensor, previous: Tensor, has_previous: Tensor
    ) -> tuple[MemoryInterface, Tensor]:
        token = (self.embedding_scale * unit(embeddings)).to(hidden.dtype)
        # A token is written under the context before it: that one's hidden state and token.
        previous_token = embeddings
        if not self.token_shift:
            previous, has_previous = hidden, torch.ones_like(has_previous)
        elif self.address_token:
            previous, previous_token = previous.chunk(2, dim=-1)
        address, read_keys = unit(self.write_address(previous)), unit(self._per_head(self.read_key(hidden)))
        if self.address_token:
            # Normalised apart, so that neither outweighs the other; cosines do not mind the length of the sum.
            address = address + unit(self.write_token_address(previous_token))
            read_keys = read_keys + unit(self._per_head(self.read_token_key(embeddings)))
        control = torch.cat([previous, token], dim=-1)
        write_gate, allocation_gate, strength = self.write_control(control).unbind(-1)
        # What the backbone foresaw from the context before need not be kept: less gate, the larger the token's logit.
        write_gate = write_gate - self.surprise_weight * (previous * embeddings).sum(-1)
        read_strength, read_gate = self.read_control(hidden).unflatten(-1, (2, self.num_reads)).unbind(-2)
        interface = MemoryInterface(
            write_keys=unit(self.write_key(control)),
            write_strengths=one_plus(strength),
            write_vectors=torch.cat([address, self.write_value(token)], dim=-1),
            erase_vectors=torch.sigmoid(self.erase(control)),
            write_gates=self._shut(torch.sigmoid(write_gate)) * has_previous,  # a document's first token writes nothing
            allocation_gates=torch.sigmoid(allocation_gate),
            read_keys=read_keys,
            read_strengths=one_plus(read_strength),
        )
        return interface, torch.sigmoid(read_gate)

    def _shut(self, gates: Tensor) -> Tensor:
        """Gates in [0, 1] of which those up to the threshold are 0: what leaks through thousands of them is much."""
        threshold = self.write_threshold
        return torch.relu(gates - threshold) / (1 - threshold)

    def _dnc_interface(self, hidden: Tensor) -> MemoryInterface:
        config = self.config
        write_gate, allocation_gate, strength = self.write_control(hidden).unbind(-1)
        controls = self._per_head(self.read_control(hidden)).split(self.read_control_sizes, dim=-1)
        read_strength, free_gate, *links = controls
        masks = torch.sigmoid(self.content_masks(hidden)) if config.masked_content else None
        full = torch.promote_types(hidden.dtype, torch.float32)  # modes rounded to half precision do not sum to 1
        return MemoryInterface(
            write_keys=self.write_key(hidden),
            write_strengths=one_plus(strength),
            write_vectors=self.write_value(hidden),
            erase_vectors=torch.sigmoid(self.erase(hidden)),
            write_gates=torch.sigmoid(write_gate),
            allocation_gates=torch.sigmoid(allocation_gate),
            read_keys=self._per_head(self.read_key(hidden)),
            read_strengths=one_plus(read_strength.squeeze(-1)),
            free_gates=torch.sigmoid(free_gate.squeeze(-1)),
            read_modes=torch.softmax(links[0], dim=-1, dtype=full) if links else None,
            write_masks=None if masks is None else masks[..., : config.mem_width],
            read_masks=None if masks is None else self._per_head(masks[..., config.mem_width :]),
            link_sharpness=one_plus(links[1]) if len(links) > 1 else None,
        )

    def _simplified_interface(self, hidden: Tensor) -> MemoryInterface:
        heads = self.num_reads
        return MemoryInterface(
            write_keys=self.write_key(hidden),
            write_strengths=self.temperature.expand(hidden.shape[:2]),
            write_vectors=self.write_value(hidden),
            erase_vectors=torch.sigmoid(self.erase(hidden)),
            write_gates=torch.sigmoid(self.write_control(hidden)).squeeze(-1),
            read_keys=self._per_head(self.read_key(hidden)),
            read_strengths=self.temperature.expand(*hidden.shape[:2], heads),
        )

    def _per_head(self, x: Tensor) -> Tensor:
        """[B, T, R * K] -> [B, T, R, K]."""
        return x.unflatten(-1, (self.num_reads, -1))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start values; `"lru"` starts as a working cache: each token stored under the context that preceded it."""
        config = self.config
        for linear in self.children():  # every child is a linear map
            init.normal_(linear.weight, std=config.initializer_range)
            if linear.bias is not None:
                init.zeros_(linear.bias)
        if config.addressing == "simplified":
            init.constant_(self.temperature, 2.0)
        if config.addressing == "lru":
            init.constant_(self.embedding_scale, 8.0)
            init.constant_(self.surprise_weight, float(config.surprise_weight))
            addresses = [(self.write_address, self.read_key)]
            if config.address_token:
                addresses.append((self.write_token_address, self.read_token_key))
            init.orthogonal_(self.write_value.weight)
            for write_map, read_map in addresses:
                init.orthogonal_(write_map.weight)
                init.copy_(read_map.weight, write_map.weight.repeat(config.num_reads, 1))
            for linear in (self.write_control, self.read_control, self.erase):
                init.zeros_(linear.weight)
            biases = [config.write_gate_bias, config.allocation_gate_bias, 3.0]
            init.copy_(self.write_control.bias, torch.tensor(biases))
            strengths = torch.tensor(config.initial_read_strengths)
            gates = torch.full_like(strengths, config.read_gate_bias)
            init.copy_(self.read_control.bias, torch.cat([torch.log(torch.expm1(strengths - 1)), gates]))
            init.constant_(self.erase.bias, config.erase_gate_bias)
        if config.initial_read_projection == "transpose":
            transposed = self.write_value.weight.mT.repeat(1, config.num_reads) / config.num_reads
            init.copy_(self.read_projection.weight, transposed)
        elif config.initial_read_projection == "zero":
            init.zeros_(self.read_projection.weight)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, 0 for 0, in at least float32: half precision has no epsilon small enough."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def one_plus(x: Tensor) -> Tensor:
    """1 + softplus(x): a strength of at least 1."""
    return 1 + F.softplus(x)
