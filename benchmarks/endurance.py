"""A million tokens through each addressing, both dtypes, with random and adversarial input: does all stay finite?

    python benchmarks/endurance.py

Each run drives `DNCMemory`, carrying its state, with hidden states that a backbone could never give as well: rows of
zeros, one and the same key for many tokens, numbers so large that every gate is saturated and every strength at its
limit. At the end of each run all invariants of the equations must hold (`violations`).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import publish
from torch import Tensor

from dnc_gpt2 import DNCGPT2Config
from memory_dnc_gpt2 import DNCMemory, MemoryOutput

VARIANTS = {
    "lru": {"addressing": "lru"},
    "lru refreshed": {"addressing": "lru", "read_refresh": 0.5, "usage_decay": 1.0},
    "dnc": {"addressing": "dnc"},
    "dnc all options": {
        "addressing": "dnc",
        "masked_content": True,
        "erase_on_free": True,
        "sharpen_links": True,
    },
    "simplified": {"addressing": "simplified"},
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
INPUTS = ("random", "adversarial")
HIDDEN, LARGE = 16, 1e4
TOLERANCE = 1e-4


def make(variant: str, dtype: str, scan: str = "auto") -> DNCMemory:
    """A small memory whose weights are far from their start."""
    torch.manual_seed(0)
    config = DNCGPT2Config(
        vocab_size=8, n_positions=8, n_embd=HIDDEN, n_layer=1, n_head=1, mem_slots=8, mem_width=8, num_reads=2,
        bos_token_id=0, eos_token_id=0, scan=scan, **VARIANTS[variant],
    )  # fmt: skip
    memory = DNCMemory(config)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            parameter.copy_(torch.full_like(parameter, 100.0) if name == "temperature" else torch.randn_like(parameter))
    return memory.to(DTYPES[dtype]).eval()


def chunks(kind: str, tokens: int, batch: int, length: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and embeddings [batch, length, HIDDEN] of `tokens` tokens in all."""
    generator = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(batch, length, HIDDEN, generator=generator)

    for index in range(-(-tokens // (batch * length))):
        hidden, embeddings = normal(), normal()
        if kind == "adversarial":
            phase = index % 6
            if phase == 0:  # rows of zeros
                hidden, embeddings = torch.zeros_like(hidden), torch.zeros_like(embeddings)
            elif phase == 1:  # equal keys
                hidden, embeddings = hidden[:, :1].expand_as(hidden), embeddings[:, :1].expand_as(embeddings)
            elif phase == 2:  # saturated gates, strengths at their limits
                hidden, embeddings = hidden * LARGE, embeddings * LARGE
            elif phase == 3:  # and from one extreme to the other at each token
                sign = 1.0 - 2.0 * (torch.arange(length) % 2)[:, None]
                hidden, embeddings = hidden[:, :1] * sign * LARGE, embeddings[:, :1] * sign * LARGE
            elif phase == 4:  # almost nothing
                hidden, embeddings = hidden * 1e-30, embeddings * 1e-30
        yield hidden.to(dtype), embeddings.to(dtype)


def violations(output: MemoryOutput, config: DNCGPT2Config) -> list[str]:
    """Which invariants of the memory's equations do not hold at the end of a run; empty where all do."""
    state, found = output.state, []

    def require(name: str, holds: Tensor | bool) -> None:
        if not bool(torch.as_tensor(holds).all()):
            found.append(name)

    for name, x in (("reads", output.hidden_states), *state._asdict().items()):
        if x is not None:
            require(f"{name} finite", x.isfinite())

    def within(name: str, x: Tensor, low: float, high: float) -> None:
        require(f"{low:g} <= {name} <= {high:g}", (x >= low - TOLERANCE) & (x <= high + TOLERANCE))

    within("write gate", output.write_gates, 0, 1)
    within("write weights", state.write_weights, 0, 1)
    within("sum of write weights", state.write_weights.sum(-1), 0, 1)
    within("read weights", state.read_weights, 0, 1)
    within("sum of read weights", state.read_weights.sum(-1), 0, 1)
    within("started", state.started, 0, 1)
    if config.addressing == "lru":
        require("usage >= 0", state.usage >= 0)
        require("reads sum to 1", (state.read_weights.sum(-1) - 1).abs() <= TOLERANCE)
        if config.usage_decay < 1 and not config.read_refresh:
            within("usage", state.usage, 0, 1 / (1 - config.usage_decay))
    else:
        within("usage", state.usage, 0, 1)
    if config.addressing == "simplified":
        require("writes sum to 1", (state.write_weights.sum(-1) - 1).abs() <= TOLERANCE)
    else:
        last_gate = output.write_gates[:, -1].float()
        require("writes sum to at most the gate", state.write_weights.sum(-1) <= last_gate + 1e-2)
    if state.link is not None:
        within("link", state.link, 0, 1)
        within("row sums of link", state.link.sum(-1), 0, 1)
        within("column sums of link", state.link.sum(-2), 0, 1)
        require("diagonal of link 0", state.link.diagonal(dim1=-2, dim2=-1) == 0)
        within("precedence", state.precedence, 0, 1)
        within("sum of precedence", state.precedence.sum(-1), 0, 1)
    return found


@torch.no_grad()
def endure(
    variant: str, dtype: str, kind: str, tokens: int, batch: int = 8, length: int = 512, scan: str = "auto"
) -> dict:
    """One run; its tokens, the largest memory entry and usage ever, and which invariants fail at the end."""
    memory, state = make(variant, dtype, scan), None
    count = largest = usage = 0
    for hidden, embeddings in chunks(kind, tokens, batch, length, DTYPES[dtype]):
        output = memory(hidden, embeddings, state)
        state = output.state
        count += batch * length
        largest, usage = max(largest, float(state.memory.abs().max())), max(usage, float(state.usage.max()))
        if not state.memory.isfinite().all():
            break
    return {
        "tokens": count,
        "largest entry": largest,
        "largest usage": usage,
        "broken invariants": violations(output, memory.config),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the kernels; default 2")
    parser.add_argument("--output", help="JSON file to write the table to")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each run; default 1,000,000")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--length", type=int, default=512, help="tokens of a call; default 512")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for variant in options.variants:
        for dtype in DTYPES:
            for kind in INPUTS:
                found = endure(variant, dtype, kind, options.tokens, length=options.length)
                broken = ", ".join(found.pop("broken invariants")) or "none"
                rows.append([variant, dtype, kind, *found.values(), broken])
    header = ["addressing", "dtype", "input", "tokens", "largest entry", "largest usage", "broken invariants"]
    publish("endurance", header, rows, options.output)


if __name__ == "__main__":
    main()
