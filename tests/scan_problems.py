"""Random problems for the scans, and what it means that a fused scan equals the readable recurrence."""

import torch

from configuration_dnc_gpt2 import DNCGPT2Config
from kernels_dnc_gpt2 import fused_scan
from memory_dnc_gpt2 import MemoryInterface, MemoryState, ScanOutput, recurrence

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
    addressing, options, shape, dtype=torch.float64, masked=False, reset=False, seed=0, scan="numba", device="cpu"
) -> tuple[MemoryInterface, MemoryState, DNCGPT2Config]:
    """A random interface and a random, used state for `shape` (batch, tokens, slots, width, heads)."""
    batch, tokens, slots, width, heads = shape
    config = DNCGPT2Config(
        mem_slots=slots, mem_width=width, num_reads=heads, addressing=addressing, scan=scan, **options
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
        started=torch.ones(batch, dtype=dtype),
    )
    # Drawn on the CPU, so that the numbers are the same on every device.
    x = MemoryInterface(*(None if tensor is None else tensor.to(device) for tensor in (*x[:-2], mask, starts)))
    state = state.to(device)
    for tensor in (*x[:-2], *state[:6]):
        if tensor is not None:
            tensor.requires_grad_()
    return x, state, config


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
            direction = torch.randn(tensor.shape, generator=generator).to(tensor.dtype).to(tensor.device)
            loss = loss + (tensor * direction).sum() if tensor.requires_grad else loss
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}


def root_mean_square(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_close(name: str, fused: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Relative RMS 1e-5 in float32 and 1e-10 in float64, or ten times what the recurrence itself is off by rounding.

    Strengths reach 6, and small gradients are differences of such numbers: what is smaller than 0.3 counts as 0.3.
    """
    tolerance = 1e-5 if eager.dtype == torch.float32 else 1e-10
    allowed = max(tolerance * max(root_mean_square(eager), 0.3), 10 * root_mean_square(eager - exact))
    error = root_mean_square(fused - eager)
    assert error <= allowed, f"{name}: RMS error {error:.2e}, allowed {allowed:.2e}"


def doubled(tensors):
    """The same named tuple in float64, leaves again."""
    return type(tensors)(
        *(
            x if x is None or not x.is_floating_point() else x.detach().double().requires_grad_(x.requires_grad)
            for x in tensors
        )
    )


def assert_equals_recurrence(x: MemoryInterface, state: MemoryState, config: DNCGPT2Config) -> None:
    fused, eager = ScanOutput(*fused_scan(x, state, config)), recurrence(x, state, config)
    precise = doubled(x), doubled(state)
    exact = recurrence(*precise, config)
    for name, expected in named(eager).items():
        if expected is not None:
            assert_close(name, named(fused)[name], expected, named(exact)[name])
    found, wanted = gradients(fused, x, state), gradients(exact, *precise)
    for name, expected in gradients(eager, x, state).items():
        assert_close(f"gradient of {name}", found[name], expected, wanted[name])


def assert_vanishing_links_are_finite(x: MemoryInterface, state: MemoryState, config: DNCGPT2Config) -> None:
    """Links too small for their reciprocals to be finite, sharpened to the utmost, give what the recurrence gives."""
    x = x._replace(write_gates=torch.zeros_like(x.write_gates))
    for scale in (1e-3, 1e-37, 1e-38, 1e-39, 1e-44):
        for sharpness in (1.5, 1e5):
            sharper = x._replace(link_sharpness=torch.full_like(x.link_sharpness, sharpness))
            faint = state._replace(link=state.link * scale)
            with torch.no_grad():
                found = ScanOutput(*fused_scan(sharper, faint, config))
                expected = recurrence(sharper, faint, config)
            assert found.read_weights.isfinite().all()
            torch.testing.assert_close(found.read_weights, expected.read_weights, rtol=1e-3, atol=1e-5)
