"""The three memories written out element by element: the truth that the tensor implementations are compared with.

Every number is a 0-d tensor inside nested Python lists and every sum is a loop, so the equations can be read off the
page one index at a time, and autograd differentiates exactly these loops. Shapes in comments: A address columns, H
hidden size, N slots, R read heads, W row width. Far too slow for anything but tiny float64 sizes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configuration_dnc_gpt2 import DNCGPT2Config
from memory_dnc_gpt2 import MemoryInterface, MemoryOutput, MemoryState, ScanOutput

EPSILON = 1e-6


def elements(x: Tensor) -> list | Tensor:
    """Nested lists of 0-d tensors, of the tensor's shape."""
    return x if x.dim() == 0 else [elements(part) for part in x.unbind(0)]


def assemble(x: list | Tensor) -> Tensor:
    """The tensor of nested lists of 0-d tensors."""
    return x if isinstance(x, Tensor) else torch.stack([assemble(part) for part in x])


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def dot(x: list, y: list) -> Tensor:
    total = zero()
    for x_i, y_i in zip(x, y, strict=True):
        total = total + x_i * y_i
    return total


def cosine(x: list, y: list) -> Tensor:
    return dot(x, y) / torch.sqrt(dot(x, x) + EPSILON) / torch.sqrt(dot(y, y) + EPSILON)


def unit(x: list) -> list:
    """x / |x|; the length must not be zero."""
    length = torch.sqrt(dot(x, x))
    return [x_i / length for x_i in x]


def affine(weight: list, x: list, bias: list | None = None) -> list:
    """weight x + bias, with weight [out][in]."""
    y = [dot(row, x) for row in weight]
    return y if bias is None else [y_i + bias_i for y_i, bias_i in zip(y, bias, strict=True)]


def softmax(scores: list) -> list:
    powers = [torch.exp(score) for score in scores]
    total = sum(powers, zero())
    return [power / total for power in powers]


def one_plus(x: Tensor) -> Tensor:
    return 1 + torch.log1p(torch.exp(x))


def content_addressing(key: list, strength: Tensor, rows: list, mask: list | None = None) -> list:
    """softmax over the slots n of strength * cos(key * mask, rows[n] * mask)."""
    scores = []
    for row in rows:
        if mask is None:
            scores.append(strength * cosine(key, row))
        else:
            masked_key = [k * m for k, m in zip(key, mask, strict=True)]
            masked_row = [x * m for x, m in zip(row, mask, strict=True)]
            scores.append(strength * cosine(masked_key, masked_row))
    return softmax(scores)


def write(memory: list, weights: list, erase: list, vector: list) -> list:
    """M (1 - w e^T) + w v^T."""
    return [
        [memory[n][j] * (1 - weights[n] * erase[j]) + weights[n] * vector[j] for j in range(len(vector))]
        for n in range(len(memory))
    ]


def read(memory: list, weights: list) -> list:
    """The rows' mean under the weights: sum_n weights[n] M[n]."""
    return [dot(weights, [row[j] for row in memory]) for j in range(len(memory[0]))]


def sharpen(d: list, exponent: Tensor) -> list:
    """(d_i / max d)^s / sum_j (d_j / max d)^s, and 0 where d is 0."""
    largest = max(d_i.item() for d_i in d)
    powers = [(d_i / largest) ** exponent if d_i.item() > 0 else zero() for d_i in d]
    total = sum(powers, zero())
    return [power / total if power.item() > 0 else zero() for power in powers]


@dataclass
class RowState:
    """The memory of one batch row."""

    memory: list  # [N][W]
    usage: list  # [N]
    write_weights: list  # [N]
    read_weights: list  # [R][N]
    link: list | None  # [N][N]
    precedence: list | None  # [N]
    previous_hidden: list  # [H]
    started: bool
    previous_embedding: list | None = None  # [H]
    slot_tokens: list | None = None  # [N], 1 + token id, 0 for none

    def empty(self) -> "RowState":
        def cleared(x):
            return [cleared(part) for part in x] if isinstance(x, list) else None if x is None else zero()

        names = ("memory", "usage", "write_weights", "read_weights", "link", "precedence", "previous_hidden")
        names += ("previous_embedding",)
        slot_tokens = None if self.slot_tokens is None else [0] * len(self.slot_tokens)
        cleared_parts = {name: cleared(getattr(self, name)) for name in names}
        return RowState(**cleared_parts, started=False, slot_tokens=slot_tokens)


@dataclass
class TokenInterface:
    """What the controller tells the memory of one batch row at one token."""

    write_keys: list  # [A]
    write_strengths: Tensor
    write_vectors: list  # [W]
    erase_vectors: list  # [W]
    write_gates: Tensor
    read_keys: list  # [R][A]
    read_strengths: list  # [R]
    allocation_gates: Tensor | None = None
    free_gates: list | None = None  # [R]
    read_modes: list | None = None  # [R][3]: backward, content, forward
    write_masks: list | None = None  # [W]
    read_masks: list | None = None  # [R][W]
    link_sharpness: list | None = None  # [R][2]: backward, forward


def simplified_step(x: TokenInterface, s: RowState) -> tuple[list, RowState]:
    """Reads [R][W] and the new state; the temperature is the strength of everything."""
    slots, heads, width = range(len(s.memory)), range(len(x.read_keys)), range(len(s.memory[0]))
    temperature = x.write_strengths
    content = content_addressing(x.write_keys, temperature, s.memory)
    allocation = softmax([temperature * (1 - s.usage[n]) for n in slots])
    w = [0.5 * content[n] + 0.5 * allocation[n] for n in slots]
    wr = [content_addressing(x.read_keys[r], x.read_strengths[r], s.memory) for r in heads]

    written = write(s.memory, w, x.erase_vectors, x.write_vectors)
    memory = [[s.memory[n][j] + x.write_gates * (written[n][j] - s.memory[n][j]) for j in width] for n in slots]
    usage = [s.usage[n] + (1 - s.usage[n]) * w[n].detach() for n in slots]
    reads = [read(memory, wr[r]) for r in heads]
    return reads, RowState(memory, usage, w, wr, s.link, s.precedence, s.previous_hidden, s.started)


def dnc_step(x: TokenInterface, s: RowState, erase_on_free: bool) -> tuple[list, RowState]:
    """Reads [R][W] and the new state. Links are followed where the state has them."""
    slots, heads = range(len(s.memory)), range(len(x.read_keys))

    retained = []
    for n in slots:
        kept = zero() + 1
        for r in heads:
            kept = kept * (1 - x.free_gates[r] * s.read_weights[r][n])
        retained.append(kept)
    usage = [(s.usage[n] + (1 - s.usage[n]) * s.write_weights[n].detach()) * retained[n] for n in slots]

    raised = [EPSILON + (1 - EPSILON) * usage[n] for n in slots]
    order = sorted(slots, key=lambda n: raised[n].item())  # sorted() is stable
    allocation = [zero() for _ in slots]
    product = zero() + 1
    for n in order:
        allocation[n] = (1 - raised[n]) * product
        product = product * raised[n]

    content = content_addressing(x.write_keys, x.write_strengths, s.memory, x.write_masks)
    g_a = x.allocation_gates
    w = [x.write_gates * (g_a * allocation[n] + (1 - g_a) * content[n]) for n in slots]
    kept_memory = [[m * retained[n] for m in s.memory[n]] for n in slots] if erase_on_free else s.memory
    memory = write(kept_memory, w, x.erase_vectors, x.write_vectors)

    link, precedence = None, None
    if s.link is not None:
        link = [
            [zero() if i == j else (1 - w[i] - w[j]) * s.link[i][j] + w[i] * s.precedence[j] for j in slots]
            for i in slots
        ]
        precedence = [(1 - sum(w, zero())) * s.precedence[n] + w[n] for n in slots]

    wr = []
    for r in heads:
        mask = None if x.read_masks is None else x.read_masks[r]
        content = content_addressing(x.read_keys[r], x.read_strengths[r], memory, mask)
        if link is None:
            wr.append(content)
            continue
        forward = [dot(link[i], s.read_weights[r]) for i in slots]
        backward = [dot([link[j][i] for j in slots], s.read_weights[r]) for i in slots]
        if x.link_sharpness is not None:
            backward = sharpen(backward, x.link_sharpness[r][0])
            forward = sharpen(forward, x.link_sharpness[r][1])
        pi_b, pi_c, pi_f = x.read_modes[r]
        wr.append([pi_b * backward[n] + pi_c * content[n] + pi_f * forward[n] for n in slots])
    reads = [read(memory, wr[r]) for r in heads]
    return reads, RowState(memory, usage, w, wr, link, precedence, s.previous_hidden, s.started)


def lru_step(
    x: TokenInterface, s: RowState, address_columns: int, usage_decay: float, read_refresh: float
) -> tuple[list, RowState]:
    """Reads of the value columns [R][W - A] and the new state."""
    slots, heads = range(len(s.memory)), range(len(x.read_keys))
    usage = []
    written = sum((weight.detach() for weight in s.write_weights), zero())
    for n in slots:
        refreshed = sum((s.read_weights[r][n].detach() for r in heads), zero())
        kept = (1 - (1 - usage_decay) * written) * s.usage[n].detach()
        usage.append(kept + s.write_weights[n].detach() + read_refresh * refreshed)
    emptiest = min(slots, key=lambda n: usage[n].item())  # min() returns the first on ties
    content = content_addressing(x.write_keys, x.write_strengths, [row[:address_columns] for row in s.memory])
    g_a = x.allocation_gates
    w = [x.write_gates * (g_a * (1.0 if n == emptiest else 0.0) + (1 - g_a) * content[n]) for n in slots]
    memory = write(s.memory, w, x.erase_vectors, x.write_vectors)
    addresses = [row[:address_columns] for row in memory]
    wr = [content_addressing(x.read_keys[r], x.read_strengths[r], addresses) for r in heads]
    reads = [read([row[address_columns:] for row in memory], wr[r]) for r in heads]
    kept = s.previous_hidden, s.started, s.previous_embedding, s.slot_tokens
    return reads, RowState(memory, usage, w, wr, None, None, *kept)


def step(x: TokenInterface, s: RowState, config: DNCGPT2Config) -> tuple[list, RowState]:
    if config.addressing == "simplified":
        return simplified_step(x, s)
    if config.addressing == "dnc":
        return dnc_step(x, s, config.erase_on_free)
    return lru_step(x, s, config.address_columns, config.usage_decay, config.read_refresh)


def row_states(state: MemoryState) -> list[RowState]:
    """The state of each batch row."""
    rows = []
    for b in range(state.memory.shape[0]):
        parts = {name: None if x is None else elements(x[b]) for name, x in state._asdict().items()}
        tokens = None if state.slot_tokens is None else state.slot_tokens[b].tolist()
        rows.append(RowState(**{**parts, "started": bool(state.started[b]), "slot_tokens": tokens}))
    return rows


def batch_state(rows: list[RowState]) -> MemoryState:
    """The batch of the rows' states."""
    fields = {}
    for name in MemoryState._fields:
        parts = [getattr(row, name) for row in rows]
        if name == "started":
            fields[name] = torch.tensor(parts, dtype=torch.float64)
        elif name == "slot_tokens":
            fields[name] = None if parts[0] is None else torch.tensor(parts)
        else:
            fields[name] = None if parts[0] is None else assemble(parts)
    return MemoryState(**fields)


def scan(interface: MemoryInterface, state: MemoryState, config: DNCGPT2Config) -> ScanOutput:
    """All tokens of all rows, one row after the other."""
    batch, tokens = interface.write_gates.shape
    reads, write_weights, read_weights, rows = [], [], [], row_states(state)
    for b in range(batch):
        row_reads, row_writes, row_read_weights = [], [], []
        for t in range(tokens):
            real = interface.mask is None or bool(interface.mask[b, t])
            if real and interface.reset is not None and bool(interface.reset[b, t]):
                rows[b] = rows[b].empty()
            if real:
                parts = {name: getattr(interface, name) for name in TokenInterface.__dataclass_fields__}
                x = TokenInterface(
                    **{name: None if part is None else elements(part[b, t]) for name, part in parts.items()}
                )
                read_vectors, rows[b] = step(x, rows[b], config)
                row_reads.append(read_vectors)
                row_writes.append(rows[b].write_weights)
                row_read_weights.append(rows[b].read_weights)
            else:
                values = config.mem_width - (config.address_columns if config.addressing == "lru" else 0)
                row_reads.append([[zero() for _ in range(values)] for _ in range(config.num_reads)])
                row_writes.append([zero() for _ in range(config.mem_slots)])
                row_read_weights.append([[zero() for _ in range(config.mem_slots)] for _ in range(config.num_reads)])
        reads.append(row_reads)
        write_weights.append(row_writes)
        read_weights.append(row_read_weights)
    return ScanOutput(assemble(reads), assemble(write_weights), assemble(read_weights), batch_state(rows))


class ReferenceMemory:
    """The controller's maps around `step`, on the parameters of a `DNCMemory` (which are shared, not copied).

    What the layout of the control maps' outputs is, the implementation decides: "lru" read control holds the strengths
    of all heads, then their gates; "dnc" read control holds each head's strength, free gate, read modes and link
    sharpness (backward, forward) in turn; content masks are the write key's, then each read key's.
    """

    def __init__(self, memory: nn.Module):
        self.config = memory.config
        self.parameters = {name: elements(parameter) for name, parameter in memory.named_parameters()}

    def map(self, name: str, x: list) -> list:
        return affine(self.parameters[f"{name}.weight"], x, self.parameters.get(f"{name}.bias"))

    def heads(self, x: list) -> list:
        """[R * K] -> [R][K]."""
        size = len(x) // self.config.num_reads
        return [x[r * size : (r + 1) * size] for r in range(self.config.num_reads)]

    def simplified(self, hidden: list) -> TokenInterface:
        (temperature,) = self.parameters["temperature"]
        return TokenInterface(
            write_keys=self.map("write_key", hidden),
            write_strengths=temperature,
            write_vectors=self.map("write_value", hidden),
            erase_vectors=[torch.sigmoid(e) for e in self.map("erase", hidden)],
            write_gates=torch.sigmoid(self.map("write_control", hidden)[0]),
            read_keys=self.heads(self.map("read_key", hidden)),
            read_strengths=[temperature] * self.config.num_reads,
        )

    def dnc(self, hidden: list) -> TokenInterface:
        config = self.config
        write_gate, allocation_gate, strength = self.map("write_control", hidden)
        heads = self.heads(self.map("read_control", hidden))
        x = TokenInterface(
            write_keys=self.map("write_key", hidden),
            write_strengths=one_plus(strength),
            write_vectors=self.map("write_value", hidden),
            erase_vectors=[torch.sigmoid(e) for e in self.map("erase", hidden)],
            write_gates=torch.sigmoid(write_gate),
            allocation_gates=torch.sigmoid(allocation_gate),
            read_keys=self.heads(self.map("read_key", hidden)),
            read_strengths=[one_plus(head[0]) for head in heads],
            free_gates=[torch.sigmoid(head[1]) for head in heads],
        )
        if config.temporal_links:
            x.read_modes = [softmax(head[2:5]) for head in heads]
        if config.temporal_links and config.sharpen_links:
            x.link_sharpness = [[one_plus(head[5]), one_plus(head[6])] for head in heads]
        if config.masked_content:
            masks = [torch.sigmoid(m) for m in self.map("content_masks", hidden)]
            x.write_masks = masks[: config.mem_width]
            x.read_masks = self.heads(masks[config.mem_width :])
        return x

    def lru(
        self, hidden: list, embedding: list, previous: tuple[list, list | None] | None
    ) -> tuple[TokenInterface, list]:
        """The interface and the read gates [R]; `previous` (hidden state, embedding) is None at a document's start."""
        (scale,), (surprise_weight,) = self.parameters["embedding_scale"], self.parameters["surprise_weight"]

        def place(of_hidden: list, of_token: list) -> list:
            if not self.config.address_token:
                return unit(of_hidden)
            return [a + b for a, b in zip(unit(of_hidden), unit(of_token), strict=True)]

        def apply(name: str, x: list) -> list:
            return self.map(name, x) if f"{name}.weight" in self.parameters else []

        token = [scale * e for e in unit(embedding)]
        if not self.config.token_shift:
            previous = hidden, embedding
        first = previous is None
        control_hidden = [zero() for _ in hidden] if first else previous[0]
        control = [*control_hidden, *token]
        write_gate, allocation_gate, strength = self.map("write_control", control)
        surprise = surprise_weight * dot(control_hidden, embedding)
        address = [zero() for _ in range(self.config.address_columns)]
        if not first:
            before, before_token = previous
            address = place(self.map("write_address", before), apply("write_token_address", before_token))
        keys = self.heads(self.map("read_key", hidden))
        token_keys = self.heads(apply("read_token_key", embedding))
        head_controls = self.map("read_control", hidden)
        strengths, gates = head_controls[: self.config.num_reads], head_controls[self.config.num_reads :]
        x = TokenInterface(
            write_keys=unit(self.map("write_key", control)),
            write_strengths=one_plus(strength),
            write_vectors=[*address, *self.map("write_value", token)],
            erase_vectors=[torch.sigmoid(e) for e in self.map("erase", control)],
            write_gates=zero() if first else self.shut(torch.sigmoid(write_gate - surprise)),
            read_keys=[place(key, token_key) for key, token_key in zip(keys, token_keys, strict=True)],
            read_strengths=[one_plus(s) for s in strengths],
            allocation_gates=torch.sigmoid(allocation_gate),
        )
        return x, [torch.sigmoid(g) for g in gates]

    def shut(self, gate):
        threshold = self.config.write_threshold
        return (gate - threshold) / (1 - threshold) if gate > threshold else zero()

    def row(
        self, hidden: list, embeddings: list, s: RowState, mask: list[bool], reset: list[bool], ids: list[int]
    ) -> tuple[list, list, list, list, RowState]:
        """Of one row what is in `MemoryOutput`, and the final state.

        Entries of masked tokens are None.
        """
        config, outputs = self.config, []
        for t, real in enumerate(mask):
            if not real:
                outputs.append((None,) * 6)
                continue
            if reset[t]:
                s = s.empty()
            gates = None
            if config.addressing == "lru":
                previous = (s.previous_hidden, s.previous_embedding) if s.started else None
                x, gates = self.lru(hidden[t], embeddings[t], previous)
            else:
                x = self.dnc(hidden[t]) if config.addressing == "dnc" else self.simplified(hidden[t])
            reads, s = step(x, s, config)
            if gates is not None:
                reads = [
                    [value * gate for value in read_vector] for read_vector, gate in zip(reads, gates, strict=True)
                ]
            added = self.map("read_projection", [value for read_vector in reads for value in read_vector])
            if s.slot_tokens is not None:
                pairs = zip(s.write_weights, s.slot_tokens, strict=True)
                s.slot_tokens = [ids[t] + 1 if weight.item() > 0.5 else before for weight, before in pairs]
            tokens = None if s.slot_tokens is None else torch.tensor(s.slot_tokens)
            outputs.append((added, x.write_gates, s.write_weights, s.read_weights, x.read_strengths, tokens))
            s.previous_hidden, s.started = hidden[t], True
            if s.previous_embedding is not None:
                s.previous_embedding = embeddings[t]
        return *(list(column) for column in zip(*outputs, strict=True)), s

    def __call__(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        state: MemoryState,
        mask: Tensor | None,
        reset: Tensor | None,
        ids: Tensor,
    ) -> tuple[list[MemoryOutput], MemoryState]:
        """Of each row its outputs at real tokens (state None), and the final state of the batch."""
        batch, tokens, _ = hidden.shape
        mask = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
        reset = torch.zeros(batch, tokens, dtype=torch.bool) if reset is None else reset
        outputs, states = [], []
        for b, s in enumerate(row_states(state)):
            lists = mask[b].tolist(), reset[b].tolist(), ids[b].tolist()
            *columns, s = self.row(elements(hidden[b]), elements(embeddings[b]), s, *lists)
            real = [[entry for entry in column if entry is not None] for column in columns]
            real = [assemble(column) if column else None for column in real]
            outputs.append(MemoryOutput(*real, state=None))
            states.append(s)
        return outputs, batch_state(states)
