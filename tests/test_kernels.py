"""The fused scan equals the readable recurrence: outputs, weights, final state and every gradient.

The first run compiles the kernels (a minute or so); numba keeps them for the next.
"""

import importlib.util
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_dnc_gpt2 as kernels
from configuration_dnc_gpt2 import DNCGPT2Config
from memory_dnc_gpt2 import MemoryInterface, MemoryState, ScanOutput, recurrence

pytest.importorskip("numba")

DNC_OPTIONS = [
    {"temporal_links": False},
    {"temporal_links": True},
    {"temporal_links": True, "sharpen_links": True},
    {"temporal_links": False, "masked_content": True},
    {"temporal_links": False, "erase_on_free": True},
    {"temporal_links": True, "masked_content": True, "erase_on_free": True, "sharpen_links": True},
]
VARIANTS = [
    ("lru", {}),
    ("lru", {"read_refresh": 0.3}),
    ("simplified", {}),
    *(("dnc", options) for options in DNC_OPTIONS),
]


def problem(
    addressing, options, shape, dtype=torch.float64, masked=False, reset=False, seed=0
) -> tuple[MemoryInterface, MemoryState, DNCGPT2Config]:
    """A random interface and a random, used state for `shape` (batch, tokens, slots, width, heads)."""
    batch, tokens, slots, width, heads = shape
    config = DNCGPT2Config(
        mem_slots=slots, mem_width=width, num_reads=heads, addressing=addressing, scan="numba", **options
    )
    address = width // 2 if addressing == "lru" else width
    links = addressing == "dnc" and config.temporal_links
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=dtype)

    def uniform(*size):
        return torch.rand(size, generator=generator, dtype=dtype)

    x = MemoryInterface(
        write_keys=normal(batch, tokens, address),
        write_strengths=1 + 3 * uniform(batch, tokens),
        write_vectors=normal(batch, tokens, width),
        erase_vectors=uniform(batch, tokens, width),
        write_gates=uniform(batch, tokens),
        read_keys=normal(batch, tokens, heads, address),
        read_strengths=1 + 5 * uniform(batch, tokens, heads),
        allocation_gates=None if addressing == "simplified" else uniform(batch, tokens),
        free_gates=uniform(batch, tokens, heads) if addressing == "dnc" else None,
        read_modes=torch.softmax(normal(batch, tokens, heads, 3), -1) if links else None,
        write_masks=uniform(batch, tokens, width) if config.masked_content else None,
        read_masks=uniform(batch, tokens, heads, width) if config.masked_content else None,
        link_sharpness=1 + uniform(batch, tokens, heads, 2) if links and config.sharpen_links else None,
    )
    mask = uniform(batch, tokens) > 0.3 if masked else None
    starts = uniform(batch, tokens) > 0.7 if reset else None
    if masked and reset:
        starts &= mask
    state = MemoryState(
        memory=normal(batch, slots, width),
        usage=uniform(batch, slots),
        write_weights=uniform(batch, slots) / slots,
        read_weights=torch.softmax(normal(batch, heads, slots), -1),
        link=uniform(batch, slots, slots) / slots * (1 - torch.eye(slots, dtype=dtype)) if links else None,
        precedence=uniform(batch, slots) / slots if links else None,
        previous_hidden=torch.zeros(batch, 1, dtype=dtype),
        started=torch.ones(batch, dtype=torch.bool),
    )
    for tensor in (*x, *state[:6]):
        if tensor is not None:
            tensor.requires_grad_()
    return x._replace(mask=mask, reset=starts), state, config


def named(output: ScanOutput) -> dict[str, torch.Tensor]:
    state = {f"state.{name}": x for name, x in output.state._asdict().items() if x is not None and name != "started"}
    return {**output._asdict(), **state, "state": None}


def gradients(output: ScanOutput, x: MemoryInterface, state: MemoryState) -> dict[str, torch.Tensor]:
    """Gradients of a random linear function of everything that the scan returns."""
    leaves = {n: t for n, t in {**x._asdict(), **state._asdict()}.items() if t is not None and t.requires_grad}
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for tensor in named(output).values():
        if tensor is not None:
            direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            loss = loss + (tensor * direction).sum() if tensor.requires_grad else loss
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}


def assert_close(name: str, fused: torch.Tensor, eager: torch.Tensor) -> None:
    """Relative RMS 1e-5 in float32 and 1e-10 in float64; what is smaller than 1e-4 counts as rounding of 1e-4."""
    tolerance = 1e-5 if eager.dtype == torch.float32 else 1e-10
    scale = eager.square().mean().sqrt().clamp_min(1e-4)
    error = ((fused - eager).square().mean().sqrt() / scale).item()
    assert error <= tolerance, f"{name}: relative RMS {error:.2e}"


def assert_equals_recurrence(x: MemoryInterface, state: MemoryState, config: DNCGPT2Config) -> None:
    fused, eager = ScanOutput(*kernels.fused_scan(x, state, config)), recurrence(x, state, config)
    for name, expected in named(eager).items():
        if expected is not None:
            assert_close(name, named(fused)[name], expected)
    found = gradients(fused, x, state)
    for name, expected in gradients(eager, x, state).items():
        assert_close(f"gradient of {name}", found[name], expected)


@pytest.mark.parametrize(("addressing", "options"), VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 1), (3, 7, 5, 6, 3), (2, 9, 13, 9, 5)])
def test_every_output_and_gradient_equals_the_recurrence(addressing, options, shape):
    assert_equals_recurrence(*problem(addressing, options, shape))


@pytest.mark.parametrize(("addressing", "options"), VARIANTS)
def test_masks_and_resets_equal_the_recurrence(addressing, options):
    slots = 2 if addressing == "dnc" else 7  # empty rows written alike would tie, and rounding decide
    assert_equals_recurrence(*problem(addressing, options, (3, 12, slots, 6, 2), masked=True, reset=True))


@pytest.mark.parametrize(("addressing", "options"), VARIANTS)
def test_masks_equal_the_recurrence(addressing, options):
    assert_equals_recurrence(*problem(addressing, options, (2, 9, 7, 6, 2), masked=True))


def test_float32_equals_the_recurrence():
    assert_equals_recurrence(*problem("lru", {}, (2, 20, 16, 32, 4), dtype=torch.float32, masked=True))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    shape=st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 9), (1, 9), (2, 11), (1, 6)))),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_equal_the_recurrence(variant, shape, masked, seed):
    assert_equals_recurrence(*problem(*variant, shape, masked=masked, seed=seed))


@pytest.mark.parametrize(("addressing", "options"), [("lru", {}), ("simplified", {}), ("dnc", DNC_OPTIONS[-1])])
def test_gradcheck(addressing, options):
    # One token but for "lru": the others' usage does not let the gradient to earlier writes through.
    x, state, config = problem(addressing, options, (1, 3 if addressing == "lru" else 1, 2, 3, 2))
    both = {**x._asdict(), **state._asdict()}
    names = [n for n, t in both.items() if t is not None and t.requires_grad and n != "write_weights"]

    def scan(*tensors):
        values = dict(zip(names, tensors, strict=True))
        changed_x = x._replace(**{n: v for n, v in values.items() if n in x._fields})
        changed_state = state._replace(**{n: v for n, v in values.items() if n in state._fields})
        reads, write_weights, read_weights, final = kernels.fused_scan(changed_x, changed_state, config)
        return reads, write_weights, read_weights, final.memory

    assert torch.autograd.gradcheck(scan, [both[n] for n in names], atol=1e-6)


@pytest.mark.parametrize("addressing", ["lru", "simplified", "dnc"])
def test_reset_starts_as_an_empty_memory_does(addressing):
    x, state, config = problem(addressing, {}, (2, 8, 6, 6, 2))
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[:, 3] = True
    whole = kernels.fused_scan(x._replace(reset=reset), state, config)
    rest = MemoryInterface(*(None if tensor is None else tensor[:, 3:] for tensor in x))
    fresh = kernels.fused_scan(rest, state.map(torch.zeros_like), config)
    assert torch.equal(whole[0][:, 3:], fresh[0])
    assert torch.equal(whole[3].memory, fresh[3].memory)


@pytest.mark.parametrize("addressing", ["lru", "simplified", "dnc"])
def test_pieces_and_decoding_equal_one_pass(addressing):
    x, state, config = problem(addressing, {}, (2, 7, 6, 6, 2))
    whole = kernels.fused_scan(x, state, config)
    with torch.no_grad():
        for t in range(7):
            piece = MemoryInterface(*(None if tensor is None else tensor[:, t : t + 1] for tensor in x))
            reads, _, _, state = kernels.fused_scan(piece, state, config)
            torch.testing.assert_close(reads[:, 0], whole[0][:, t], rtol=1e-12, atol=1e-12)
    assert torch.equal(state.usage, whole[3].usage)


def test_masked_tokens_leave_the_state_bit_equal():
    x, state, config = problem("lru", {}, (2, 5, 6, 6, 2))
    *_, final = kernels.fused_scan(x._replace(mask=torch.zeros(2, 5, dtype=torch.bool)), state, config)
    for before, after in zip(state, final, strict=True):
        assert before is None or torch.equal(before, after)


def test_lru_breaks_ties_by_the_lowest_index():
    x, state, config = problem("lru", {}, (1, 4, 6, 6, 1))
    state = state.map(torch.zeros_like)
    x = x._replace(write_gates=torch.ones(1, 4).double(), allocation_gates=torch.ones(1, 4).double())
    _, write_weights, _, _ = kernels.fused_scan(x, state, config)
    assert torch.equal(write_weights[0].argmax(-1), torch.arange(4))
    assert torch.equal(write_weights, recurrence(x, state, config).write_weights)


@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads_does_not_change_a_bit(threads):
    before = torch.get_num_threads()
    x, state, config = problem("lru", {}, (5, 6, 4, 6, 2))
    expected = kernels.fused_scan(x, state, config)[0]
    try:
        torch.set_num_threads(threads)
        assert torch.equal(kernels.fused_scan(x, state, config)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_compiles_to_one_graph():
    x, state, config = problem("lru", {}, (2, 5, 4, 6, 2))

    def function(keys):
        return kernels.fused_scan(x._replace(read_keys=keys), state, config)[0].square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x.read_keys), x.read_keys)
    (expected,) = torch.autograd.grad(function(x.read_keys), x.read_keys)
    assert torch.equal(found, expected)


def test_operator_passes_torchs_own_checks():
    x, state, _ = problem("lru", {}, (2, 5, 4, 6, 2))
    arguments = (*kernels._present(x, state), "lru", 0.99, 0.0, False, True)
    torch.library.opcheck(
        kernels._scan, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_eager_is_left_to_the_recurrence():
    x, state, config = problem("lru", {}, (1, 2, 3, 4, 1))
    config.scan = "eager"
    assert kernels.fused_scan(x, state, config) is None


def test_missing_numba_is_logged_once_and_refused_where_asked_for(monkeypatch, caplog):
    x, state, config = problem("lru", {}, (1, 2, 3, 4, 1))
    monkeypatch.setattr(kernels, "_numba_problem", lambda: "numba cannot be imported (test)")
    monkeypatch.setattr(kernels.logger, "propagate", True)
    config.scan = "auto"
    with caplog.at_level(logging.WARNING):
        assert kernels.fused_scan(x, state, config) is None
        assert kernels.fused_scan(x, state, config) is None
    assert sum("numba cannot be imported (test)" in record.getMessage() for record in caplog.records) == 1
    config.scan = "numba"
    with pytest.raises(RuntimeError, match="pip install numba"):
        kernels.fused_scan(x, state, config)


def test_cache_that_cannot_be_written_is_logged_once(monkeypatch, caplog):
    import numba

    def refusing(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function (test)")
        return lambda function: function

    # A copy under a name of its own: compiling replaces a module's functions.
    spec = importlib.util.spec_from_file_location("kernels_without_cache", kernels.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    monkeypatch.setattr(numba, "njit", refusing)
    monkeypatch.setattr(copy.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        copy._compile_kernels()
    assert sum("cannot cache function (test)" in record.getMessage() for record in caplog.records) == 1
