"""The Triton scan equals the readable recurrence: outputs, weights, final state and every gradient.

Without a GPU the kernels run in Triton's interpreter (conftest.py sets TRITON_INTERPRET=1), one operation at a time in
numpy, and so the shapes are small; compilation is tested apart. With one, the same tests run on it, and larger ones.
"""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_problems import VARIANTS, assert_equals_recurrence, assert_vanishing_links_are_finite, problem

import kernels_cuda_dnc_gpt2 as cuda
import kernels_dnc_gpt2 as kernels
from memory_dnc_gpt2 import recurrence

pytest.importorskip("triton", reason="triton is not installed")

ALL_OPTIONS = VARIANTS[-1]
GPU = torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="the same runs on the GPU")),
        pytest.param("cuda", marks=pytest.mark.skipif(not GPU, reason="needs a CUDA device")),
    ]
)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _poisoned():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def triton_problem(variant, shape, device, **options):
    return problem(*variant, shape, scan="triton", device=device, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_output_and_gradient_equals_the_recurrence(variant, device):
    assert_equals_recurrence(*triton_problem(variant, (1, 3, 5, 6, 3), device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_slot_and_one_token_equal_the_recurrence(variant, device):
    assert_equals_recurrence(*triton_problem(variant, (1, 1, 1, 3, 1), device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_and_resets_equal_the_recurrence(variant, device):
    slots = 2 if variant[0] == "dnc" else 5  # empty rows written alike would tie, and rounding decide
    x, state, config = triton_problem(variant, (2, 5, slots, 4, 2), device, masked=True, reset=True, seed=3)
    assert x.reset.any() and not x.mask.all()
    assert_equals_recurrence(x, state, config)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile_bytes", [cuda.TILE_BYTES, 1024], ids=["resident", "streamed"])
def test_reads_of_several_chunks_equal_the_recurrence(tile_bytes, masked, device, monkeypatch):
    monkeypatch.setattr(cuda, "TILE_BYTES", tile_bytes)
    x, state, config = triton_problem(("lru", {}), (2, 7, 9, 10, 2), device, masked=masked, reset=masked, seed=2)
    assert kernels._chunk_length(7) < 7
    assert_equals_recurrence(x, state, config)


@pytest.mark.parametrize(
    ("mask", "reset"),
    [("1111", "0001"), ("1110", "0000"), ("1110", "0001"), ("0000", "0000"), ("0000", "0100"), ("0110", "0100")],
)
def test_the_last_read_of_a_row_is_the_final_state(mask, reset, device):
    x, state, config = triton_problem(("lru", {}), (1, 4, 3, 4, 2), device)
    mask, reset = ([[digit == "1" for digit in digits]] for digits in (mask, reset))
    x = x._replace(mask=torch.tensor(mask, device=device), reset=torch.tensor(reset, device=device))
    assert_equals_recurrence(x, state, config)


def test_reads_in_training_equal_those_without(device):
    x, state, config = triton_problem(("lru", {}), (2, 9, 5, 6, 2), device, masked=True, reset=True)
    training = kernels.fused_scan(x, state, config)
    with torch.no_grad():
        inference = kernels.fused_scan(x, state, config)
    for found, expected in zip((*training[:3], *training[3]), (*inference[:3], *inference[3]), strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2], VARIANTS[4], ALL_OPTIONS])
def test_rows_that_do_not_fit_on_the_chip_are_streamed(variant, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(cuda, "TILE_BYTES", 1024)  # two blocks of columns, of memory and links
        shape = (1, 3, 11, 10, 2)
    else:
        shape = (2, 9, 150, 200, 2)
    x, state, config = triton_problem(variant, shape, device, masked=True, reset=variant[0] != "dnc")
    inputs, old = kernels._present(x, state)
    options = kernels._options(kernels.Interface(*inputs), 0.99, 0.0, False, True)
    sizes = cuda.sizes(variant[0], kernels.Interface(*inputs), kernels.State(*old), options)
    assert sizes.streamed and sizes.pairs_streamed
    assert_equals_recurrence(x, state, config)


class Races:
    """Watches the interpreter for global memory that threads of a program share without a barrier in between.

    The interpreter runs one thread; on a GPU those that load, store and load again may be different ones. A block of a
    matrix may be loaded and stored without barrier: each of its entries belongs to one thread.
    """

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.loaded, self.stored, self.found = set(), set(), []
        for name, watch in (
            ("create_masked_load", lambda pointers, mask, *_: self.load(pointers.data, mask.data)),
            ("create_masked_store", lambda pointers, _, mask, *__: self.store(pointers.data, mask.data)),
            ("create_barrier", self.barrier),
        ):
            monkeypatch.setattr(InterpreterBuilder, name, self.watched(getattr(InterpreterBuilder, name), watch))
        for name in ("forward_kernel", "read_kernel", "read_backward_kernel", "backward_kernel"):
            monkeypatch.setattr(cuda, name, self.launched(getattr(cuda, name)))

    def launched(self, kernel):
        """A kernel that begins after all before it have ended."""

        class Launch:
            def __getitem__(launch, grid):
                self.barrier()
                return kernel[grid]

        return Launch()

    @staticmethod
    def watched(original, watch):
        def call(builder, *arguments):
            watch(*arguments)
            return original(builder, *arguments)

        return call

    def load(self, addresses, mask):
        touched = set(addresses[mask].tolist())
        if touched & self.stored:
            self.found.append("load after store")
        if addresses.ndim < 2:
            self.loaded |= touched

    def store(self, addresses, mask):
        touched = set(addresses[mask].tolist())
        if touched & (self.stored | self.loaded):
            self.found.append("store after load or store")
        self.stored |= touched

    def barrier(self):
        self.loaded.clear()
        self.stored.clear()


@pytest.mark.skipif(GPU, reason="needs Triton's interpreter")
@pytest.mark.parametrize("tile_bytes", [cuda.TILE_BYTES, 1024], ids=["resident", "streamed"])
@pytest.mark.parametrize("variant", [*VARIANTS[:3], ALL_OPTIONS])
def test_threads_share_memory_over_barriers_alone(variant, tile_bytes, monkeypatch):
    monkeypatch.setattr(cuda, "TILE_BYTES", tile_bytes)
    races = Races(monkeypatch)
    x, state, config = triton_problem(variant, (1, 5, 11, 10, 2), "cpu", masked=True, reset=True, seed=1)
    output = kernels.fused_scan(x, state, config)
    assert races.stored
    torch.autograd.grad(output[0].sum() + output[3].memory.sum(), x.read_keys)
    assert races.stored and not races.found


@pytest.mark.parametrize("variant", [VARIANTS[0], ALL_OPTIONS])
def test_float32_equals_the_recurrence(variant, device):
    assert_equals_recurrence(*triton_problem(variant, (1, 3, 6, 8, 2), device, dtype=torch.float32, masked=True))


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_full_size_equals_the_recurrence_on_a_gpu(variant, dtype):
    tokens = 100 if variant[0] == "lru" else 20
    assert_equals_recurrence(*triton_problem(variant, (3, tokens, 64, 128, 4), "cuda", dtype=dtype, masked=True))


@pytest.mark.parametrize("addressing", ["lru", "dnc"])
def test_ties_fall_to_the_lowest_index(addressing, device):
    x, state, config = triton_problem((addressing, {}), (1, 4, 6, 6, 1), device)
    state = state.map(torch.zeros_like)
    one = torch.ones(1, 4, dtype=torch.float64, device=device)
    x = x._replace(write_gates=one, allocation_gates=one)
    _, write_weights, _, _ = kernels.fused_scan(x, state, config)
    if addressing == "lru":
        assert torch.equal(write_weights[0].argmax(-1).cpu(), torch.arange(4))
    torch.testing.assert_close(write_weights, recurrence(x, state, config).write_weights, rtol=1e-12, atol=1e-12)


def test_links_that_almost_vanish_are_sharpened_as_in_the_recurrence(device):
    variant = ("dnc", {"sharpen_links": True})
    assert_vanishing_links_are_finite(*triton_problem(variant, (1, 1, 5, 6, 2), device, dtype=torch.float32))


def test_masked_tokens_leave_the_state_bit_equal(device):
    x, state, config = triton_problem(ALL_OPTIONS, (2, 2, 5, 6, 2), device)
    with torch.no_grad():
        mask = torch.zeros(2, 2, dtype=torch.bool, device=device)
        reads, write_weights, read_weights, final = kernels.fused_scan(x._replace(mask=mask), state, config)
    assert not (reads.any() or write_weights.any() or read_weights.any())
    for before, after in zip(state, final, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


def test_compiles_to_one_graph(device):
    x, state, config = triton_problem(("lru", {}), (1, 2, 4, 6, 2), device)

    def function(keys):
        return kernels.fused_scan(x._replace(read_keys=keys), state, config)[0].square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x.read_keys), x.read_keys)
    (expected,) = torch.autograd.grad(function(x.read_keys), x.read_keys)
    assert torch.equal(found, expected)


def test_what_is_saved_is_what_numba_saves():
    pytest.importorskip("numba", reason="numba is not installed")
    for variant in (("lru", {}), ALL_OPTIONS):
        x, state, config = triton_problem(variant, (1, 3, 4, 4, 1), "cuda" if GPU else "cpu")
        inputs, old = kernels._present(x, state)
        options = config.addressing, config.usage_decay, config.read_refresh, config.erase_on_free, True
        with torch.no_grad():
            found = kernels._scan(inputs, old, "triton", *options)
            expected = kernels._scan([t.cpu() for t in inputs], [t.cpu() for t in old], "numba", *options)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-10, atol=1e-10)


def test_auto_is_triton_on_cuda_alone(device, monkeypatch):
    used = []
    monkeypatch.setattr(kernels, "_scan", lambda _, state, implementation, *__: used.append(implementation) or [])
    monkeypatch.setattr(kernels, "_split", lambda *_: ([], [None] * 6))
    x, state, config = triton_problem(("lru", {}), (1, 2, 3, 4, 1), device)
    for config.scan in ("auto", "triton"):
        kernels.fused_scan(x, state, config)
    assert used == ["triton" if device == "cuda" else "numba", "triton"]


def test_triton_that_cannot_run_is_replaced_after_one_warning(monkeypatch, caplog):
    pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr(kernels, "triton_problem", lambda _: "triton cannot be imported (test)")
    monkeypatch.setattr(kernels.logger, "propagate", True)
    x, state, config = triton_problem(("lru", {}), (1, 2, 3, 4, 1), "cpu")
    with caplog.at_level(logging.WARNING):
        found = kernels.fused_scan(x, state, config)
        kernels.fused_scan(x, state, config)
    assert sum("triton cannot be imported (test)" in record.getMessage() for record in caplog.records) == 1
    config.scan = "numba"
    assert torch.equal(found[0], kernels.fused_scan(x, state, config)[0])


def test_cpu_outside_of_the_interpreter_is_a_problem(monkeypatch):
    monkeypatch.setattr(cuda, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in cuda.triton_problem(torch.device("cpu"))
    assert cuda.triton_problem(torch.device("cuda")) is None


def test_kernels_import_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("kernels_without_triton", cuda.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    assert "cannot be imported" in copy.triton_problem(torch.device("cuda"))


def test_kernels_compile_for_cuda_without_a_gpu(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "compile_cuda.py"
    command = [sys.executable, script, "--architectures", "80", "--slots", "16", "--width", "16", "--variants", "lru"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "| lru" in line]
    assert [line.split(" | ")[2] for line in lines] == ["forward", "read", "read_backward", "backward"]
