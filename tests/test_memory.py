"""The memory: its equations against per-element references, the facts they imply, and the rules of its state."""

import math

import pytest
import reference_memory
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from configuration_dnc_gpt2 import DNCGPT2Config
from memory_dnc_gpt2 import (
    DNCMemory,
    MemoryInterface,
    MemoryState,
    content_weights,
    decayed_usage,
    dnc_usage,
    least_used_allocation,
    recurrence,
    retention,
    sharpen,
    sorted_allocation,
    update_link,
    write,
)

CASES = {
    "simplified": {"addressing": "simplified"},
    "lru": {"addressing": "lru"},
    "lru-refresh": {"addressing": "lru", "usage_decay": 0.7, "read_refresh": 0.3, "address_width": 1},
    "lru-no-shift": {"addressing": "lru", "token_shift": False, "address_width": 3},
    "lru-no-token": {"addressing": "lru", "address_token": False},
    "dnc": {"addressing": "dnc"},
    "dnc-no-links": {"addressing": "dnc", "temporal_links": False},
    "dnc-masked-content": {"addressing": "dnc", "masked_content": True},
    "dnc-erase-on-free": {"addressing": "dnc", "erase_on_free": True},
    "dnc-sharpen-links": {"addressing": "dnc", "sharpen_links": True},
    "dnc-all": {"addressing": "dnc", "masked_content": True, "erase_on_free": True, "sharpen_links": True},
    "dnc-no-links-all": {
        "addressing": "dnc",
        "temporal_links": False,
        "masked_content": True,
        "erase_on_free": True,
    },
}
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
every_addressing = pytest.mark.parametrize("addressing", ["simplified", "lru", "dnc"])
properties = settings(max_examples=60, deadline=None, derandomize=True, database=None)

HIDDEN, SLOTS, WIDTH, HEADS = 5, 4, 4, 2


def make_config(**options) -> DNCGPT2Config:
    sizes = {"n_embd": HIDDEN, "mem_slots": SLOTS, "mem_width": WIDTH, "num_reads": HEADS, "vocab_size": 11}
    return DNCGPT2Config(**{**sizes, "n_head": 1, "n_layer": 1, "n_positions": 8, "scan": "eager", **options})


def make_memory(spread: float = 0.8, **options) -> DNCMemory:
    """A float64 memory; with a `spread` all parameters are random, with 0 they are as a new model has them."""
    memory = DNCMemory(make_config(**options)).double()
    memory.init_weights()
    scales = {"temperature": 2.5, "embedding_scale": 1.5}
    if spread:
        with torch.no_grad():
            for name, parameter in memory.named_parameters():
                parameter.copy_(spread * torch.randn_like(parameter))
                if name in scales:
                    parameter.fill_(scales[name])
    return memory


def random_state(memory: DNCMemory, batch: int, started: bool | Tensor = True) -> MemoryState:
    """A state that some document could have left: weights and link rows that sum to at most 1."""
    state = memory.initial_state(batch, torch.device("cpu"), torch.float64)
    slots, heads = memory.config.mem_slots, memory.config.num_reads
    state = state._replace(
        memory=torch.randn_like(state.memory),
        usage=torch.rand_like(state.usage),
        write_weights=0.8 * torch.randn(batch, slots, dtype=torch.float64).softmax(-1),
        read_weights=0.9 * torch.randn(batch, heads, slots, dtype=torch.float64).softmax(-1),
        started=torch.as_tensor(started, dtype=torch.float64).expand(batch).clone(),
    )
    for name in ("previous_hidden", "previous_embedding"):
        if getattr(state, name) is not None:
            state = state._replace(**{name: torch.randn_like(getattr(state, name)) * state.started[:, None]})
    if state.slot_tokens is not None:
        state = state._replace(slot_tokens=torch.randint_like(state.slot_tokens, 10))
    if state.link is not None:
        link = torch.rand_like(state.link) / slots * (1 - torch.eye(slots))
        state = state._replace(link=link, precedence=torch.rand_like(state.precedence) / slots)
    return state


def random_interface(config: DNCGPT2Config, batch: int, tokens: int) -> MemoryInterface:
    """What any controller could say, with gates and masks spread over (0, 1)."""
    shape, heads, width, columns = (batch, tokens), config.num_reads, config.mem_width, config.address_columns
    dnc = config.addressing == "dnc"
    links = dnc and config.temporal_links

    def normal(*size: int) -> Tensor:
        return torch.randn(*shape, *size, dtype=torch.float64)

    temperature = 1 + normal().square()
    simplified = config.addressing == "simplified"
    return MemoryInterface(
        write_keys=normal(columns),
        write_strengths=temperature,
        write_vectors=normal(width),
        erase_vectors=normal(width).sigmoid(),
        write_gates=normal().sigmoid(),
        read_keys=normal(heads, columns),
        read_strengths=temperature[..., None].repeat(1, 1, heads) if simplified else 1 + normal(heads).square(),
        allocation_gates=None if simplified else normal().sigmoid(),
        free_gates=normal(heads).sigmoid() if dnc else None,
        read_modes=normal(heads, 3).softmax(-1) if links else None,
        write_masks=normal(width).sigmoid() if dnc and config.masked_content else None,
        read_masks=normal(heads, width).sigmoid() if dnc and config.masked_content else None,
        link_sharpness=1.01 + normal(heads, 2).square() if links and config.sharpen_links else None,
    )


def steered(config: DNCGPT2Config, batch: int, tokens: int, **fields) -> MemoryInterface:
    """A random interface in which the given fields hold one value everywhere, or the given tensor."""
    x = random_interface(config, batch, tokens)
    for name, value in fields.items():
        x = x._replace(**{name: value if isinstance(value, Tensor) else torch.full_like(getattr(x, name), value)})
    return x


def inputs(batch: int, tokens: int, hidden: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """Random hidden states and token embeddings [B, T, H]."""
    return tuple(torch.randn(2, batch, tokens, hidden, dtype=torch.float64))


def one_hot(index: int, size: int = SLOTS) -> Tensor:
    """[1, size]."""
    return torch.eye(size, dtype=torch.float64)[index][None]


def assert_close(actual: Tensor, expected: Tensor, what: str = "", tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}" if what else text
    )


def assert_states_equal(actual: MemoryState, expected: MemoryState, tolerance: float | None = 1e-10) -> None:
    """Field by field; with tolerance None bit for bit."""
    for name, a, b in zip(MemoryState._fields, actual, expected, strict=True):
        if b is None or tolerance is None or b.dtype == torch.bool:
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
        else:
            assert_close(a, b, name, tolerance)


def differentiable_parts(parts: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The floating-point tensors, as leaves that want a gradient."""
    return {
        name: x.detach().clone().requires_grad_()
        for name, x in parts.items()
        if x is not None and x.is_floating_point()
    }


def gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of one fixed random projection of the outputs; zero where nothing depends on a leaf."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        total = total + (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def float_parts(state: MemoryState) -> list[Tensor]:
    """Everything that gradients flow through."""
    return [x for name, x in state._asdict().items() if x is not None and name not in ("started", "slot_tokens")]


# Two rows of five tokens: padding in the middle, on the left and on the right, a document's start inside, a start that
# falls on padding (which must not count) and one at the first real token.
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
RESET = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]).bool()
RAGGED = {
    "plain": (None, None),
    "padding": (MASK, None),
    "resets": (None, torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()),
    "padding-and-resets": (MASK, RESET),
}


# The references


@every_case
@pytest.mark.parametrize("ragged", RAGGED.keys())
def test_memory_equals_the_reference_on_outputs_state_and_gradients(options, ragged):
    memory, (mask, reset) = make_memory(**options), RAGGED[ragged]
    hidden, embeddings = inputs(2, 5)
    state = random_state(memory, 2, started=torch.tensor([True, False]))
    leaves = differentiable_parts({"hidden": hidden, "embeddings": embeddings, **state._asdict()})
    state = MemoryState(**{name: leaves.get(name, x) for name, x in state._asdict().items()})
    everything = {**leaves, **dict(memory.named_parameters())}

    ids = torch.arange(10, 20).view(2, 5)
    arguments = leaves["hidden"], leaves["embeddings"], state, mask, reset, ids
    output = memory(*arguments, output_slot_tokens=True)
    rows, final = reference_memory.ReferenceMemory(memory)(*arguments)

    real = torch.ones(2, 5, dtype=torch.bool) if mask is None else mask
    actual, expected = [], []
    for b, row in enumerate(rows):
        for name in ("hidden_states", "write_gates", "write_weights", "read_weights", "read_strengths"):
            found = getattr(output, name)[b][real[b]]
            assert_close(found, getattr(row, name), f"{name} of row {b}")
            actual.append(found)
            expected.append(getattr(row, name))
        if state.slot_tokens is not None:
            assert torch.equal(output.slot_tokens[b][real[b]], row.slot_tokens)
    assert_states_equal(output.state, final)
    found = gradients(actual + float_parts(output.state), everything)
    wanted = gradients(expected + float_parts(final), everything)
    for name in everything:
        assert_close(found[name], wanted[name], f"gradient of {name}", 1e-9)


@every_case
def test_recurrence_equals_the_reference_scan_from_an_empty_memory(options):
    config = make_config(**options)
    interface = random_interface(config, 2, 5)
    leaves = differentiable_parts(interface._asdict())
    interface = MemoryInterface(**leaves, mask=MASK, reset=RESET & MASK)
    empty = DNCMemory(config).initial_state(2, torch.device("cpu"), torch.float64)
    results = []
    for scan in (recurrence, reference_memory.scan):
        output = scan(interface, empty, config)
        outputs = [output.reads, output.write_weights, output.read_weights, *float_parts(output.state)]
        results.append((output, gradients(outputs, leaves)))
    (actual, found), (expected, wanted) = results
    for name in ("reads", "write_weights", "read_weights"):
        assert_close(getattr(actual, name), getattr(expected, name), name)
    for name in ("memory", "usage", "write_weights", "read_weights", "link", "precedence"):
        if getattr(expected.state, name) is not None:
            assert_close(getattr(actual.state, name), getattr(expected.state, name), f"state.{name}")
    for name in leaves:
        assert_close(found[name], wanted[name], f"gradient of {name}", 1e-9)


def test_reference_reads_what_it_wrote():
    """The references themselves, on a case one can do in the head: two one-hot writes, then a read by content."""
    config = make_config(addressing="dnc", num_reads=1, mem_slots=2)
    vectors = torch.eye(WIDTH, dtype=torch.float64)[None, :2]
    gates = {"write_gates": 1.0, "allocation_gates": 1.0, "free_gates": 0.0, "erase_vectors": 1.0}
    interface = steered(config, 1, 2, **gates, write_vectors=vectors, read_strengths=100.0)
    modes = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(1, 2, 1, 3)
    interface = interface._replace(read_keys=vectors[:, [0, 0], None], read_modes=modes)
    empty = DNCMemory(config).initial_state(1, torch.device("cpu"), torch.float64)
    output = reference_memory.scan(interface, empty, config)
    for t in range(2):
        assert_close(output.reads[0, t, 0], vectors[0, 0], tolerance=1e-5)
    assert_close(output.state.memory, vectors, tolerance=1e-5)
    assert_close(output.state.precedence, one_hot(1, 2), tolerance=1e-5)
    assert_close(output.state.link[:, 1], one_hot(0, 2), tolerance=1e-5)


# Derivatives


@pytest.mark.parametrize(
    ("options", "tokens", "fixed"),
    [
        # No gradient passes through usage, which finite differences would see; so either one token (from a usage that
        # is given), or several with the allocation shut. lru's allocation is piecewise constant and may stay.
        *[pytest.param(options, 1, {}, id=f"{name}-one-token") for name, options in CASES.items()],
        *[pytest.param(CASES[name], 3, {}, id=f"{name}-three-tokens") for name in ("lru", "lru-refresh")],
        *[
            pytest.param(options, 3, {"allocation_gates": 0.0}, id=f"{name}-three-tokens")
            for name, options in CASES.items()
            if name.startswith("dnc")
        ],
    ],
)
def test_gradients_are_those_of_finite_differences(options, tokens, fixed):
    config = make_config(**{**options, "mem_slots": 3, "mem_width": 3, "address_width": None})
    state = random_state(DNCMemory(config), 1)
    interface = steered(config, 1, tokens, **fixed)
    names = [name for name, x in interface._asdict().items() if x is not None and name not in fixed]
    of_state = ["memory", *(["link", "precedence"] if state.link is not None else [])]
    if config.addressing != "lru":
        of_state += ["read_weights"] + (["usage"] if tokens == 1 else [])

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = interface._replace(**dict(zip(names, tensors, strict=False)))
        s = state._replace(**dict(zip(of_state, tensors[len(names) :], strict=True)))
        output = recurrence(x, s, config)
        return output.reads, output.write_weights, output.state.memory

    leaves = [getattr(interface, name) for name in names] + [getattr(state, name) for name in of_state]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(run, leaves, atol=1e-6, fast_mode=tokens > 1)


# Facts about the parts

unit = st.floats(0, 1, width=32)


def vectors(size: int = SLOTS) -> st.SearchStrategy[Tensor]:
    """[1, size] in [0, 1]."""
    return st.lists(unit, min_size=size, max_size=size).map(lambda x: torch.tensor([x], dtype=torch.float64))


def weightings(size: int = SLOTS) -> st.SearchStrategy[Tensor]:
    """[1, size] in [0, 1] with a sum of at most 1, one-hot and zero ones included."""
    return vectors(size).map(lambda x: x / x.sum().clamp_min(1.0))


@properties
@given(vectors(), weightings(), vectors(HEADS), st.lists(weightings(), min_size=HEADS, max_size=HEADS))
def test_usage_stays_between_zero_and_one(usage, weights, free_gates, reads):
    retained = retention(free_gates, torch.stack(reads, 1))
    usage = dnc_usage(usage, weights, retained)
    assert (usage >= 0).all()
    assert (usage <= 1).all()


@properties
@given(vectors(), st.integers(0, SLOTS - 1))
def test_full_write_gives_usage_one_and_leaves_the_other_slots(usage, slot):
    written = dnc_usage(usage, one_hot(slot), torch.ones_like(usage))
    assert_close(written, torch.where(one_hot(slot).bool(), 1.0, usage), tolerance=1e-15)


def test_full_write_shows_in_usage_one_step_later():
    config = make_config(addressing="dnc")
    empty = DNCMemory(config).initial_state(1, torch.device("cpu"), torch.float64)
    gates = {"write_gates": torch.tensor([[1.0, 0.0]], dtype=torch.float64), "allocation_gates": 1.0, "free_gates": 0.0}
    interface = steered(config, 1, 2, **gates)
    after_one = recurrence(MemoryInterface(*(x if x is None else x[:, :1] for x in interface)), empty, config).state
    after_two = recurrence(interface, empty, config).state
    assert_close(after_one.usage, torch.zeros(1, SLOTS, dtype=torch.float64))
    assert_close(after_two.usage, one_hot(0), tolerance=2e-6)


@properties
@given(vectors(), weightings(), st.integers(0, SLOTS - 1))
def test_full_free_gives_usage_zero_even_right_after_a_write(usage, weights, slot):
    retained = retention(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.stack([one_hot(slot), weights], 1))
    assert dnc_usage(usage, weights, retained)[0, slot] == 0


@properties
@given(vectors())
def test_emptiest_slot_gets_the_largest_allocation(usage):
    allocation = sorted_allocation(usage)
    assert allocation[0, usage.argmin()] >= allocation.max() - 1e-12


@properties
@given(vectors(7))
def test_allocation_weights_are_a_weighting(usage):
    allocation = sorted_allocation(usage)
    assert (allocation >= 0).all()
    assert allocation.sum() <= 1 + 1e-12


def test_allocation_takes_equal_slots_in_their_order():
    allocation = sorted_allocation(torch.full((1, SLOTS), 0.5, dtype=torch.float64))
    assert_close(allocation, torch.tensor([[0.5, 0.25, 0.125, 0.0625]], dtype=torch.float64), tolerance=1e-5)


@properties
@given(unit, unit)
def test_write_weights_sum_to_the_write_gate_where_allocation_and_content_sum_to_one(write_gate, allocation_gate):
    config = make_config(addressing="dnc")
    state = random_state(DNCMemory(config), 1)
    nothing = torch.zeros(1, SLOTS, dtype=torch.float64)
    state = state._replace(usage=nothing, write_weights=nothing)  # allocation sums to 1 - (1e-6)^N
    output = recurrence(steered(config, 1, 1, write_gates=write_gate, allocation_gates=allocation_gate), state, config)
    assert_close(output.write_weights.sum(-1), torch.full((1, 1), write_gate, dtype=torch.float64), tolerance=1e-12)


@pytest.mark.parametrize("addressing", ["dnc", "lru"])
def test_write_to_an_empty_memory_through_open_gates_is_one_hot(addressing):
    config = make_config(addressing=addressing)
    empty = DNCMemory(config).initial_state(1, torch.device("cpu"), torch.float64)
    output = recurrence(steered(config, 1, 1, write_gates=1.0, allocation_gates=1.0), empty, config)
    assert_close(output.write_weights[:, 0], one_hot(0), tolerance=2e-6)


@properties
@given(st.integers(0, SLOTS - 1), st.floats(0.5, 10))
def test_strength_100_makes_content_addressing_one_hot(slot, length):
    rows = length * torch.eye(SLOTS, dtype=torch.float64)[None]
    weights = content_weights(rows[:, slot, None], torch.full((1, 1), 100.0, dtype=torch.float64), rows)
    assert_close(weights[:, 0], one_hot(slot), tolerance=1e-12)


def test_content_addressing_is_uniform_and_differentiable_on_zero_rows_and_keys():
    rows = torch.zeros(1, SLOTS, WIDTH, dtype=torch.float64, requires_grad=True)
    keys = torch.zeros(1, HEADS, WIDTH, dtype=torch.float64, requires_grad=True)
    strengths = torch.full((1, HEADS), 100.0, dtype=torch.float64)
    for some_keys in (keys, torch.ones_like(keys).requires_grad_()):
        weights = content_weights(some_keys, strengths, rows)
        assert_close(weights, torch.full_like(weights, 1 / SLOTS))
        for gradient in torch.autograd.grad(weights[..., 0].sum(), (some_keys, rows)):
            assert gradient.isfinite().all()


def test_masked_content_addressing_ignores_masked_columns():
    rows, keys = torch.randn(1, SLOTS, WIDTH), torch.randn(1, HEADS, WIDTH)
    strengths = torch.full((1, HEADS), 5.0)
    masks = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, HEADS, WIDTH)
    kept = content_weights(keys[..., ::2], strengths, rows[..., ::2])
    assert_close(content_weights(keys, strengths, rows, masks), kept, tolerance=1e-5)
    assert_close(
        content_weights(keys, strengths, rows, torch.ones_like(masks)),
        content_weights(keys, strengths, rows),
        tolerance=1e-5,
    )


def test_full_write_with_full_erase_replaces_the_row():
    memory, vector = torch.randn(1, SLOTS, WIDTH).double(), torch.randn(1, WIDTH).double()
    written = write(memory, one_hot(2), torch.ones_like(vector), vector)
    assert_close(written[:, 2], vector)
    assert torch.equal(written[:, [0, 1, 3]], memory[:, [0, 1, 3]])


@properties
@given(st.lists(weightings(), min_size=1, max_size=6))
def test_link_entries_rows_and_columns_stay_between_zero_and_one(writes):
    link, precedence = torch.zeros(1, SLOTS, SLOTS).double(), torch.zeros(1, SLOTS).double()
    for weights in writes:
        link, precedence = update_link(link, precedence, weights)
    assert (link >= -1e-12).all()
    assert (link <= 1 + 1e-12).all()
    assert (link.sum(1) <= 1 + 1e-12).all()
    assert (link.sum(2) <= 1 + 1e-12).all()
    assert (link.diagonal(dim1=1, dim2=2) == 0).all()
    assert (precedence >= -1e-12).all()
    assert precedence.sum() <= 1 + 1e-12


def test_links_lead_from_one_write_to_the_next_and_back():
    link, precedence = torch.zeros(1, SLOTS, SLOTS).double(), torch.zeros(1, SLOTS).double()
    for slot in (0, 1):
        link, precedence = update_link(link, precedence, one_hot(slot))
    forward_from_0, backward_from_1 = (link @ one_hot(0)[..., None])[..., 0], (one_hot(1)[:, None] @ link)[:, 0]
    assert torch.equal(forward_from_0, one_hot(1))
    assert torch.equal(backward_from_1, one_hot(0))


@pytest.mark.parametrize("sharpened", [False, True])
@pytest.mark.parametrize(("mode", "start", "end"), [(2, 0, 1), (0, 1, 0)], ids=["forward", "backward"])
def test_read_modes_follow_the_links(mode, start, end, sharpened):
    config = make_config(addressing="dnc", num_reads=1, sharpen_links=sharpened)
    state = random_state(DNCMemory(config), 1)
    link, precedence = torch.zeros(1, SLOTS, SLOTS).double(), torch.zeros(1, SLOTS).double()
    for slot in (0, 1):
        link, precedence = update_link(link, precedence, one_hot(slot))
    state = state._replace(link=link, precedence=precedence, read_weights=one_hot(start)[:, None])
    modes = torch.eye(3, dtype=torch.float64)[mode].expand(1, 1, 1, 3)
    output = recurrence(steered(config, 1, 1, write_gates=0.0, read_modes=modes), state, config)
    assert_close(output.read_weights[:, 0, 0], one_hot(end))
    assert_close(output.reads[:, 0, 0], state.memory[:, end])


@properties
@given(weightings())
def test_step_without_a_write_leaves_links_and_precedence(precedence):
    link = torch.rand(1, SLOTS, SLOTS).double() / SLOTS * (1 - torch.eye(SLOTS))
    new_link, new_precedence = update_link(link, precedence, torch.zeros(1, SLOTS).double())
    assert torch.equal(new_link, link)
    assert torch.equal(new_precedence, precedence)


@properties
@given(weightings(), st.integers(0, SLOTS - 1))
def test_full_write_replaces_precedence(precedence, slot):
    assert torch.equal(update_link(torch.zeros(1, SLOTS, SLOTS).double(), precedence, one_hot(slot))[1], one_hot(slot))


@properties
@given(weightings(), st.floats(1, 30))
def test_sharpened_weights_sum_to_one_keep_their_order_and_their_zeros(weights, exponent):
    sharp = sharpen(weights[:, None], torch.full((1, 1), exponent, dtype=torch.float64))[:, 0]
    assert torch.equal(sharp[weights == 0], torch.zeros_like(sharp[weights == 0]))
    if weights.sum() > 0:
        assert_close(sharp.sum(), torch.ones((), dtype=torch.float64))
        assert sharp[0, weights.argmax()] == sharp.max()
        assert sharp.max() >= (weights / weights.sum()).max() - 1e-12


def test_sharpening_has_finite_gradients_at_zeros():
    for values in ([0.0, 0.0, 0.0], [0.0, 0.3, 1e-30]):
        weights = torch.tensor([[values]], dtype=torch.float64, requires_grad=True)
        exponent = torch.full((1, 1), 1.5, dtype=torch.float64, requires_grad=True)
        for gradient in torch.autograd.grad(sharpen(weights, exponent)[..., 1].sum(), (weights, exponent)):
            assert gradient.isfinite().all()


def test_erase_on_free_clears_a_freed_row_before_the_write():
    config = make_config(addressing="dnc", erase_on_free=True, num_reads=1)
    state = random_state(DNCMemory(config), 1)._replace(read_weights=one_hot(1)[:, None])
    output = recurrence(steered(config, 1, 1, free_gates=1.0, write_gates=0.0), state, config)
    assert (output.state.memory[:, 1] == 0).all()
    assert torch.equal(output.state.memory[:, [0, 2, 3]], state.memory[:, [0, 2, 3]])


# Facts about "lru"


@properties
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 3.0]), min_size=6, max_size=6))
def test_least_used_allocation_is_one_hot_at_the_first_of_the_least_used(usage):
    allocation = least_used_allocation(torch.tensor([usage]))
    assert allocation.tolist() == [[float(n == usage.index(min(usage))) for n in range(6)]]


@properties
@given(vectors(), weightings(), st.floats(0.01, 1))
def test_usage_of_lru_decays_with_writes_alone(usage, reads, decay):
    nothing, full = torch.zeros_like(usage), one_hot(1)
    assert (decayed_usage(usage, nothing, reads[:, None], decay, 0.0) == usage).all()
    assert_close(decayed_usage(usage, full, reads[:, None], decay, 0.0), decay * usage + full, tolerance=1e-12)
    half = (1 + decay) / 2 * usage + full / 2
    assert_close(decayed_usage(usage, full / 2, reads[:, None], decay, 0.0), half, tolerance=1e-12)
    refreshed = decayed_usage(usage, nothing, torch.stack([reads, reads], 1), decay, 0.5)
    assert_close(refreshed, usage + reads, tolerance=1e-12)


def test_usage_of_lru_may_exceed_one():
    usage = torch.zeros(1, SLOTS).double()
    for _ in range(3):
        usage = decayed_usage(usage, one_hot(1), torch.zeros(1, HEADS, SLOTS).double(), 0.99, 0.0)
    assert_close(usage, (1 + 0.99 + 0.99**2) * one_hot(1))


def test_no_gradient_passes_through_the_usage_of_lru():
    config = make_config(addressing="lru", read_refresh=0.5)
    state = random_state(DNCMemory(config), 1)
    leaves = {name: getattr(state, name).requires_grad_() for name in ("usage", "write_weights", "read_weights")}
    output = recurrence(random_interface(config, 1, 3), state, config)
    assert not output.state.usage.requires_grad
    outputs = [output.write_weights.requires_grad_(), output.reads.requires_grad_()]
    for gradient in gradients(outputs, leaves).values():
        assert (gradient == 0).all()


@pytest.mark.parametrize("gate_bias", [2.0, 40.0], ids=["default-gates", "open-gates"])
def test_lru_fills_slot_after_slot_and_then_overwrites_the_oldest(gate_bias):
    memory = make_memory(spread=0, addressing="lru", mem_slots=7, write_gate_bias=gate_bias, surprise_weight=0)
    output = memory(*inputs(1, 15))
    assert (output.write_weights[0, 0] == 0).all()  # a document's first token has no context
    assert output.write_gates[0, 0] == 0
    assert output.write_weights[0, 1:].argmax(-1).tolist() == [*range(7), *range(7)]


def test_write_gate_closes_for_a_token_that_the_context_before_it_foresaw():
    memory = make_memory(spread=0, addressing="lru", surprise_weight=0.5)
    context = torch.randn(HIDDEN, dtype=torch.float64)
    tokens = torch.stack([-context, torch.zeros_like(context), context])  # by their logits after that context
    hidden = context.expand(3, 2, -1)
    gates = memory(hidden, torch.stack([torch.zeros_like(tokens), tokens], dim=1)).write_gates[:, 1]
    logits = torch.stack([-context @ context, torch.zeros([]), context @ context])
    assert_close(gates, (torch.sigmoid(2 - 0.5 * logits) - 0.05).clamp_min(0) / 0.95)
    assert gates[0] > gates[1] > gates[2]


@pytest.mark.parametrize("bias, gate", [(-5, 0), (-3, 0), (0, (0.5 - 0.05) / 0.95), (40, 1)])
def test_a_write_gate_up_to_the_threshold_is_shut_and_leaves_the_memory_as_it_is(bias, gate):
    memory = make_memory(spread=0, addressing="lru", write_gate_bias=bias, surprise_weight=0, write_threshold=0.05)
    output = memory(*inputs(1, 4))
    assert_close(output.write_gates[0, 1:], torch.full((3,), gate, dtype=torch.float64), tolerance=1e-12)
    if gate == 0:
        for name in ("memory", "usage", "write_weights"):
            assert (getattr(output.state, name) == 0).all()


@pytest.mark.parametrize("heads", [1, 4])
def test_lru_starts_as_a_working_cache(heads):
    vocabulary, hidden_size, stored = 40, 64, 12
    sizes = {"n_embd": hidden_size, "mem_width": 64, "mem_slots": 16, "num_reads": heads}
    memory = make_memory(spread=0, addressing="lru", **sizes)
    embedding = 0.1 * torch.randn(vocabulary, hidden_size, dtype=torch.float64)
    contexts = torch.randn(stored + 1, hidden_size, dtype=torch.float64)
    tokens = torch.randperm(vocabulary)[: stored + 1]
    past = memory(contexts[None], embedding[tokens][None]).state  # stores token t under context t - 1
    for t in range(stored):
        query = contexts[t][None, None]
        read = memory(query, embedding[tokens[t]][None, None], past).hidden_states[0, 0]
        assert (embedding @ read).argmax() == tokens[t + 1]


def test_new_memory_has_the_start_values_of_its_configuration():
    memory = make_memory(spread=0, addressing="lru", n_embd=8, num_reads=2)
    assert memory.embedding_scale == 8
    assert memory.write_control.bias.tolist() == [2.0, 6.0, 3.0]
    assert (memory.erase.bias == 4).all()
    strengths, gates = memory.read_control.bias.view(2, 2)
    assert_close(1 + torch.nn.functional.softplus(strengths), torch.tensor([4.0, 32.0]).double(), tolerance=1e-6)
    assert (gates == -1).all()
    for linear in (memory.write_control, memory.read_control, memory.erase):
        assert (linear.weight == 0).all()
    for linear in (memory.write_address, memory.write_token_address, memory.write_value):
        assert_close(linear.weight @ linear.weight.mT, torch.eye(WIDTH // 2).double(), tolerance=1e-6)
    for read, written in (("read_key", "write_address"), ("read_token_key", "write_token_address")):
        for head in memory.get_parameter(f"{read}.weight").chunk(2):
            assert torch.equal(head, memory.get_parameter(f"{written}.weight"))
    for read_projection in memory.read_projection.weight.view(8, 2, -1).unbind(1):
        assert_close(read_projection, memory.write_value.weight.mT / 2)
    assert make_memory(spread=0, addressing="simplified").temperature == 2


@every_addressing
def test_zero_read_projection_adds_nothing_at_the_start(addressing):
    memory = make_memory(spread=0, addressing=addressing, read_projection_init="zero")
    assert (memory(*inputs(2, 5)).hidden_states == 0).all()


def test_read_heads_start_distinct_and_differ_after_training():
    memory = make_memory(spread=0, addressing="lru", n_embd=16, mem_width=16, num_reads=3)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-2)
    hidden, embeddings = inputs(2, 12, 16)
    target = torch.randn_like(hidden)
    heads = memory(hidden, embeddings).read_weights[:, 3:].unbind(2)
    assert all((heads[a] - heads[b]).abs().max() > 1e-2 for a, b in [(0, 1), (0, 2), (1, 2)])
    for _ in range(5):
        optimizer.zero_grad()
        (memory(hidden, embeddings).hidden_states - target).square().mean().backward()
        optimizer.step()
    keys = memory.read_key.weight.chunk(3)
    assert all((keys[a] - keys[b]).abs().max() > 1e-4 for a, b in [(0, 1), (0, 2), (1, 2)])


# Numbers


@every_case
@pytest.mark.parametrize("spread", [0, 0.8], ids=["start", "random"])
def test_zero_inputs_give_finite_outputs_and_gradients(options, spread):
    memory = make_memory(spread, **options)
    hidden, embeddings = (torch.zeros(2, 4, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    output = memory(hidden, embeddings)
    leaves = {"hidden": hidden, "embeddings": embeddings, **dict(memory.named_parameters())}
    outputs = [output.hidden_states, output.write_weights, output.read_weights, *float_parts(output.state)]
    assert all(x.isfinite().all() for x in outputs)
    for name, gradient in gradients(outputs, leaves).items():
        assert gradient.isfinite().all(), name


@every_addressing
def test_bfloat16_inputs_are_remembered_in_float32(addressing):
    memory = make_memory(addressing=addressing).bfloat16()
    hidden, embeddings = (x.bfloat16() for x in inputs(2, 5))
    output = memory(hidden, embeddings)
    assert output.hidden_states.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in float_parts(output.state))
    assert output.write_weights.dtype == output.read_weights.dtype == torch.float32
    again = memory(hidden, embeddings, output.state)
    assert again.state.memory.dtype == torch.float32


@every_addressing
def test_autocast_does_not_reach_the_recurrence(addressing):
    memory = make_memory(addressing=addressing).float()
    hidden, embeddings = (x.float() for x in inputs(2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = memory(hidden, embeddings)
    output.hidden_states.float().sum().backward()
    assert all(x.dtype == torch.float32 for x in float_parts(output.state))
    assert_close(output.state.memory, memory(hidden, embeddings).state.memory, tolerance=0.1)


@every_addressing
def test_float64_stays_float64(addressing):
    memory = make_memory(addressing=addressing)
    output = memory(*inputs(1, 3))
    assert output.hidden_states.dtype == torch.float64
    assert all(x.dtype == torch.float64 for x in float_parts(output.state))


# Rules of the state


@every_case
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_document_in_pieces_gives_what_one_pass_gives(options, cut):
    memory = make_memory(**options)
    hidden, embeddings = inputs(2, 7)
    whole = memory(hidden, embeddings)
    first = memory(hidden[:, :cut], embeddings[:, :cut])
    second = memory(hidden[:, cut:], embeddings[:, cut:], first.state)
    assert_states_equal(second.state, whole.state)
    for name in ("hidden_states", "write_gates", "write_weights", "read_weights"):
        assert_close(torch.cat([getattr(first, name), getattr(second, name)], 1), getattr(whole, name), name)


@every_case
@pytest.mark.parametrize("started", [True, False], ids=["in-a-document", "before-it"])
def test_masked_tokens_leave_every_state_tensor_bit_equal(options, started):
    memory = make_memory(**options)
    state = random_state(memory, 2, started)
    output = memory(*inputs(2, 3), state, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert_states_equal(output.state, state, tolerance=None)
    assert (output.write_weights == 0).all()
    assert (output.read_weights == 0).all()


@every_case
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1)], ids=["left", "right", "both"])
def test_padding_changes_neither_the_state_nor_what_real_tokens_read(options, left, right):
    memory = make_memory(**options)
    hidden, embeddings = inputs(2, 4)
    state = random_state(memory, 2, torch.tensor([True, False]))
    whole = memory(hidden, embeddings, state)
    mask = torch.tensor([False] * left + [True] * 4 + [False] * right).expand(2, -1)
    real = slice(left, left + 4)
    outputs = []
    for filling in (torch.zeros, torch.randn):
        padded = []
        for x in (hidden, embeddings):
            long = filling(2, left + 4 + right, HIDDEN, dtype=torch.float64)
            long[:, real] = x
            padded.append(long)
        output = memory(*padded, state, mask=mask)
        assert_states_equal(output.state, whole.state, tolerance=1e-12)
        assert_close(output.hidden_states[:, real], whole.hidden_states, tolerance=1e-12)
        assert_close(output.read_weights[:, real], whole.read_weights, tolerance=1e-12)
        outputs.append(output)
    # Equal shapes leave no room for rounding: what stands in the padding must not change a bit.
    assert_states_equal(outputs[0].state, outputs[1].state, tolerance=None)
    assert torch.equal(outputs[0].hidden_states[:, real], outputs[1].hidden_states[:, real])


@every_case
def test_padding_gets_no_gradient(options):
    memory = make_memory(**options)
    hidden, embeddings = (x.requires_grad_() for x in inputs(2, 5))
    output = memory(hidden, embeddings, mask=MASK)
    outputs = [output.hidden_states[MASK], output.write_weights[MASK], *float_parts(output.state)]
    for name, gradient in gradients(outputs, {"hidden": hidden, "embeddings": embeddings}).items():
        assert (gradient[~MASK] == 0).all(), name


@every_case
def test_rows_do_not_depend_on_their_neighbours(options):
    memory = make_memory(**options)
    hidden, embeddings = inputs(3, 5)
    state = random_state(memory, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()
    together = memory(hidden, embeddings, state, mask)
    for b in range(3):
        row = slice(b, b + 1)
        alone = memory(hidden[row], embeddings[row], state.index_select(torch.tensor([b])), mask[row])
        assert_states_equal(alone.state, together.state.index_select(torch.tensor([b])), tolerance=1e-12)
        assert_close(alone.hidden_states[mask[row]], together.hidden_states[row][mask[row]], tolerance=1e-12)

    others, other_embeddings = inputs(3, 5)
    others[1], other_embeddings[1] = hidden[1], embeddings[1]
    other_state = random_state(memory, 3)
    mixed = MemoryState(
        *(x if x is None else torch.stack([y[0], x[1], y[2]]) for x, y in zip(state, other_state, strict=True))
    )
    among_others = memory(others, other_embeddings, mixed, mask.flip(0))
    assert torch.equal(among_others.hidden_states[1][mask[1]], together.hidden_states[1][mask[1]])


@every_case
def test_detached_state_cuts_the_gradient_and_an_attached_one_lets_it_through(options):
    memory = make_memory(**options, write_threshold=0)  # a shut gate lets no gradient through either
    hidden, embeddings = inputs(2, 6)
    hidden, embeddings = hidden.requires_grad_(), embeddings.requires_grad_()
    state = memory(hidden[:, :3], embeddings[:, :3]).state

    def gradient(state: MemoryState) -> Tensor:
        later = memory(hidden[:, 3:].detach(), embeddings[:, 3:].detach(), state).hidden_states
        return gradients([later], {"hidden": hidden})["hidden"]

    assert (gradient(state.detach()) == 0).all()
    through = gradient(state)
    assert (through[:, :3].abs().amax(-1) > 0).all()

    later = memory(hidden, embeddings).hidden_states[:, 3:]
    whole = gradients([later], {"hidden": hidden})["hidden"]
    # The last three tokens are leaves only in the pass over the whole.
    rest = gradients([memory(hidden[:, 3:], embeddings[:, 3:], state.detach()).hidden_states], {"hidden": hidden})
    assert_close(through + rest["hidden"], whole)


@every_case
def test_reset_empties_the_memory(options):
    memory = make_memory(**options)
    hidden, embeddings = inputs(2, 6)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 4] = True
    reset[1, 0] = True
    output = memory(hidden, embeddings, random_state(memory, 2), reset=reset)
    for row, start in enumerate((4, 0)):
        fresh = memory(hidden[row : row + 1, start:], embeddings[row : row + 1, start:])
        assert_close(output.hidden_states[row : row + 1, start:], fresh.hidden_states)
        assert_states_equal(output.state.index_select(torch.tensor([row])), fresh.state)


@every_case
def test_reset_cuts_the_gradient_between_documents(options):
    memory = make_memory(**options)
    hidden, embeddings = inputs(1, 6)
    hidden, embeddings = hidden.requires_grad_(), embeddings.requires_grad_()
    reset = torch.tensor([[0, 0, 0, 1, 0, 0]]).bool()
    later = memory(hidden, embeddings, reset=reset).hidden_states[:, 3:]
    for name, gradient in gradients([later], {"hidden": hidden, "embeddings": embeddings}).items():
        assert (gradient[:, :3] == 0).all(), name


@every_case
def test_no_state_is_an_empty_memory(options):
    memory = make_memory(**options)
    x = inputs(2, 4)
    empty = memory.initial_state(2, torch.device("cpu"), torch.float64)
    assert all((part == 0).all() for part in empty if part is not None)
    assert_states_equal(memory(*x).state, memory(*x, empty).state, tolerance=None)


def test_future_tokens_do_not_change_what_was_read():
    for options in CASES.values():
        memory = make_memory(**options)
        hidden, embeddings = inputs(1, 6)
        before = memory(hidden, embeddings).hidden_states[:, :3]
        hidden[:, 3:], embeddings[:, 3:] = torch.randn(2, 1, 3, HIDDEN, dtype=torch.float64)
        assert torch.equal(memory(hidden, embeddings).hidden_states[:, :3], before)


# MemoryState


@every_case
def test_saved_state_loads_bit_equal(options, tmp_path):
    memory = make_memory(**options)
    state = memory(*inputs(2, 5)).state
    path = str(tmp_path / "state.safetensors")
    state.save(path)
    assert_states_equal(MemoryState.load(path), state.detach(), tolerance=None)


def test_loading_a_corrupt_state_says_so(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"this is no safetensors file, whatever its name says")
    with pytest.raises(ValueError, match=r"state\.safetensors is not a readable safetensors file"):
        MemoryState.load(str(path))


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_loading_a_file_with_other_tensors_says_which(change, tmp_path):
    path = str(tmp_path / "state.safetensors")
    make_memory(addressing="lru").initial_state(1, torch.device("cpu")).save(path)
    tensors = load_file(path)
    if change == "missing":
        del tensors["usage"]
    else:
        tensors["weight"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not a memory state") as error:
        MemoryState.load(path)
    assert ("'weight'" in str(error.value)) == (change == "unknown")


@pytest.mark.parametrize("addressing", ["lru", "dnc"])
def test_state_moves_detaches_and_reorders_as_one(addressing):
    memory = make_memory(addressing=addressing)
    state = memory(*inputs(3, 4)).state
    assert any(x.requires_grad for x in float_parts(state))
    assert not any(x.requires_grad for x in float_parts(state.detach()))
    halved = state.to(torch.float32)
    assert all(x.dtype == torch.float32 for x in float_parts(halved))
    assert halved.slot_tokens is None or halved.slot_tokens.dtype == torch.int64
    beams = state.index_select(torch.tensor([2, 0, 0]))
    for name, a, b in zip(MemoryState._fields, beams, state, strict=True):
        assert (a is None and b is None) or torch.equal(a, b[[2, 0, 0]]), name


@pytest.mark.parametrize("field", MemoryState._fields)
def test_state_of_a_wrong_shape_is_refused_by_its_field(field):
    memory = make_memory(addressing="lru" if field in ("previous_embedding", "slot_tokens") else "dnc")
    state = memory.initial_state(2, torch.device("cpu"), torch.float64)
    wrong = state._replace(**{field: getattr(state, field)[..., :-1]})
    with pytest.raises(ValueError, match=rf"memory_state\.{field} has shape .* need"):
        memory(*inputs(2, 3), wrong)


def test_state_of_another_batch_size_is_refused():
    memory = make_memory(addressing="lru")
    state = memory.initial_state(3, torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match=r"memory_state\.memory has shape \(3, .*need \(2, "):
        memory(*inputs(2, 3), state)


@pytest.mark.parametrize(("owner", "other"), [("lru", "dnc"), ("dnc", "lru")])
def test_state_of_a_memory_with_other_links_is_refused(owner, other):
    state = make_memory(addressing=owner).initial_state(2, torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match=r"memory_state\.link"):
        make_memory(addressing=other)(*inputs(2, 3), state)


def test_outputs_have_the_documented_shapes():
    for options in CASES.values():
        output = make_memory(**options)(*inputs(3, 5))
        assert output.hidden_states.shape == (3, 5, HIDDEN)
        assert output.write_gates.shape == (3, 5)
        assert output.write_weights.shape == (3, 5, SLOTS)
        assert output.read_weights.shape == (3, 5, HEADS, SLOTS)
        assert math.isfinite(output.hidden_states.sum().item())
