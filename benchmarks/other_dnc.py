"""Our memory against the package dnc 1.1.0 (Graves et al. 2016, eager PyTorch), forward and backward.

The package runs on torch 2.13 as it is; its dense DNC needs torch and numpy alone, whatever else it asks pip for. It
comes with an LSTM, and its memory is also timed alone, called once a token as the LSTM's output would call it.

pip install --no-deps dnc==1.1.0
python benchmarks/other_dnc.py --threads 2 --output other_dnc.json
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scan import HIDDEN, SHAPES, scan_step, shape
from timing import benchmark_parser, interleave, publish

TARGET = 30.0
OURS = ("dnc", "lru")
"""The addressing that computes what the package computes, and the default one."""


def package_steps(sizes: tuple[int, ...]) -> dict[str, Callable[[], None]]:
    """Functions that run the package's DNC and its memory alone forward and backward at (B, T, N, W, R)."""
    try:
        import dnc
    except ImportError as error:
        sys.exit(f"benchmarks/other_dnc.py needs a package ({error}): pip install --no-deps dnc==1.1.0")
    batch, tokens, slots, width, heads = sizes
    torch.manual_seed(0)
    model = dnc.DNC(HIDDEN, HIDDEN, nr_cells=slots, cell_size=width, read_heads=heads, gpu_id=-1)
    memory = dnc.Memory(HIDDEN, slots, width, heads, gpu_id=-1, independent_linears=False)
    hidden = torch.randn(batch, tokens, HIDDEN, requires_grad=True)

    def whole() -> None:
        output, _ = model(hidden, (None, None, None), reset_experience=True)
        output.square().mean().backward()

    def alone() -> None:
        state, reads = memory.reset(batch), []
        for t in range(tokens):
            read, state = memory(hidden[:, t], state)
            reads.append(read)
        torch.stack(reads, 1).square().mean().backward()

    return {"dnc 1.1.0": whole, "dnc 1.1.0, its memory alone": alone}


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--shape", type=shape, default=SHAPES[0], help="batch,tokens,slots,width,heads; default 4,128,64,128,4"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    steps = package_steps(arguments.shape)
    steps["ours, dnc, eager recurrence"] = scan_step("dnc", "eager", arguments.shape)
    fused = {f"ours, {addressing}, fused scan": scan_step(addressing, "numba", arguments.shape) for addressing in OURS}
    times = interleave(steps | fused, arguments.repeats)
    targets = {"dnc 1.1.0": TARGET}
    rows = [
        [name, 1000 * seconds, *(seconds / times[ours] for ours in fused), targets.get(name)]
        for name, seconds in times.items()
    ]
    sizes = ", ".join(map(str, arguments.shape))
    header = ["implementation", "ms", *(f"times our fused {addressing}" for addressing in OURS), "target, at least"]
    publish(f"DNC forward and backward at batch, tokens, slots, width, heads = {sizes}", header, rows, arguments.output)


if __name__ == "__main__":
    main()
