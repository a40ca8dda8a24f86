"""The fused scan equals the readable recurrence: outputs, weights, final state and every gradient.

The first run compiles the kernels (a minute or so); numba keeps them for the next.
"""

import importlib.util
import inspect
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scan_problems import (
    VARIANTS,
    assert_equals_recurrence,
    assert_vanishing_links_are_finite,
    gradients,
    named,
    problem,
)

import kernels_cpu_dnc_gpt2 as cpu
import kernels_dnc_gpt2 as kernels
from configuration_dnc_gpt2 import DNCGPT2Config
from memory_dnc_gpt2 import MemoryInterface, MemoryState, ScanOutput, recurrence

pytest.importorskip("numba")


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


def test_links_that_almost_vanish_are_sharpened_as_in_the_recurrence():
    assert_vanishing_links_are_finite(*problem("dnc", {"sharpen_links": True}, (1, 1, 5, 6, 2), dtype=torch.float32))


def usages_apart(x: MemoryInterface, state: MemoryState, config: DNCGPT2Config) -> bool:
    """Whether no two usages by which a token allocates are nearer than 1e-4, so that rounding cannot decide."""
    with torch.no_grad():
        for t in range(x.write_keys.shape[1]):
            token = MemoryInterface(*(None if tensor is None else tensor[:, t : t + 1] for tensor in x))
            state = recurrence(token, state, config).state
            if (state.usage.sort(dim=-1).values.diff(dim=-1) < 1e-4).any():
                return False
    return True


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    variant=st.sampled_from(VARIANTS),
    shape=st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 9), (1, 9), (2, 11), (1, 6)))),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    masked=st.booleans(),
    reset=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_equal_the_recurrence(variant, shape, dtype, masked, reset, seed):
    x, state, config = problem(*variant, shape, dtype, masked, reset, seed)
    # Only where allocation orders the slots do near ties matter.
    assume(config.addressing == "simplified" or usages_apart(x, state, config))
    assert_equals_recurrence(x, state, config)


@pytest.mark.parametrize("addressing", ["lru", "simplified", "dnc"])
def test_equal_usages_are_allocated_as_by_the_recurrence(addressing):
    x, state, config = problem(addressing, {}, (2, 1, 6, 6, 2), torch.float32)
    usage = torch.tensor([[0.5, 0.25, 0.25, 0.5, 0.25, 0.75]]).repeat(2, 1).requires_grad_()
    free = state.map(torch.zeros_like)._replace(memory=state.memory, usage=usage)
    assert_equals_recurrence(x, free, config)


@pytest.mark.parametrize(("addressing", "options"), VARIANTS)
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


@pytest.mark.parametrize("addressing", ["lru", "simplified", "dnc"])
def test_number_of_threads_does_not_change_a_bit(addressing, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)  # or work as small as this would stay on one thread
    x, state, config = problem(addressing, {}, (5, 6, 4, 6, 2), torch.float32, masked=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = ScanOutput(*kernels.fused_scan(x, state, config))
            results.append({**named(output), **gradients(output, x, state)})
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert tensor is None or torch.equal(other[name], tensor), name


def test_scan_of_one_token_at_inference_starts_no_threads(monkeypatch):
    x, state, config = problem("lru", {}, (2, 1, 6, 6, 2))
    monkeypatch.setattr(cpu, "_pool", lambda threads: pytest.fail("a thread pool for one token"))
    with torch.no_grad():
        kernels.fused_scan(x, state, config)


@pytest.mark.parametrize("addressing", ["lru", "simplified", "dnc"])
def test_inference_without_the_operator_equals_training_bit_for_bit(addressing):
    x, state, config = problem(addressing, {}, (3, 8, 2, 6, 2), masked=True, reset=True)
    trained = named(ScanOutput(*kernels.fused_scan(x, state, config)))
    with torch.no_grad():
        inferred = named(ScanOutput(*kernels.fused_scan(x, state, config)))
    for name, tensor in trained.items():
        assert tensor is None or torch.equal(inferred[name], tensor), name
    assert not inferred["reads"].requires_grad


def test_compiles_to_one_graph():
    x, state, config = problem("lru", {}, (2, 5, 4, 6, 2))

    def function(keys):
        return kernels.fused_scan(x._replace(read_keys=keys), state, config)[0].square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x.read_keys), x.read_keys)
    (expected,) = torch.autograd.grad(function(x.read_keys), x.read_keys)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_model_with_fused_memory_compiles_to_one_graph(tiny_model, training):
    model = tiny_model(n_positions=8, n_layer=1, scan="numba")
    tokens = torch.randint(0, model.config.vocab_size, (2, 8))

    def run(function):
        with torch.set_grad_enabled(training):
            logits = function(tokens, use_cache=False).logits
        if not training:
            return [logits]
        return [logits, *torch.autograd.grad(logits.square().mean(), [*model.parameters()], allow_unused=True)]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled), run(model), strict=True):
        torch.testing.assert_close(found, expected)


def test_operator_passes_torchs_own_checks():
    x, state, _ = problem("lru", {}, (2, 5, 4, 6, 2))
    arguments = (*kernels._present(x, state), "numba", "lru", 0.99, 0.0, False, True)
    torch.library.opcheck(
        kernels._scan, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_eager_is_left_to_the_recurrence():
    x, state, config = problem("lru", {}, (1, 2, 3, 4, 1))
    config.scan = "eager"
    assert kernels.fused_scan(x, state, config) is None


def test_missing_numba_is_logged_once_and_refused_where_asked_for(monkeypatch, caplog):
    x, state, config = problem("lru", {}, (1, 2, 3, 4, 1))
    monkeypatch.setattr(kernels, "numba_problem", lambda: "numba cannot be imported (test)")
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
    spec = importlib.util.spec_from_file_location("kernels_without_cache", cpu.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    monkeypatch.setattr(numba, "njit", refusing)
    monkeypatch.setattr(copy.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        copy._compile_kernels()
    assert sum("cannot cache function (test)" in record.getMessage() for record in caplog.records) == 1


def test_kernels_from_the_cache_compute_bit_for_bit_what_the_process_that_compiled_them_does(tmp_path):
    def results(variants) -> list:
        outputs = []
        for variant in variants:
            x, state, config = problem(*variant, (3, 20, 13, 16, 2), torch.float32, masked=True, reset=True)
            output = ScanOutput(*kernels.fused_scan(x, state, config))
            outputs.append({**named(output), **{f"d {k}": v for k, v in gradients(output, x, state).items()}})
        return outputs

    here = results(VARIANTS)  # compiled in this process where the cache is empty, as in every fresh clone
    source = f"""
        import sys
        sys.path[:0] = {[str(Path(cpu.__file__).parent), str(Path(__file__).parent)]!r}
        import torch
        from scan_problems import VARIANTS, gradients, named, problem
        import kernels_dnc_gpt2 as kernels
        from memory_dnc_gpt2 import ScanOutput
    """
    code = textwrap.dedent(source) + textwrap.dedent(inspect.getsource(results))
    code += f"torch.save(results(VARIANTS), {str(tmp_path / 'there')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    for ours, theirs in zip(here, torch.load(tmp_path / "there"), strict=True):
        for name, tensor in ours.items():
            assert tensor is None or torch.equal(theirs[name], tensor), name
