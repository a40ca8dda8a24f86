"""How near the fused scans come to the processor's ceiling for passes over the memory's rows.

The ceiling is that of the simplest numba loops of the same kind, on rows of the memory's size, which stay in the
caches: dot products of vectors with rows, and adding multiples of vectors to rows. The scans' floating-point
operations are counted, not measured (`operations`).

python benchmarks/ceiling.py --threads 1 2 --output ceiling.json
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import publish

from configuration_dnc_gpt2 import DNCGPT2Config
from kernels_dnc_gpt2 import Interface, State, fused_scan

SHAPES = ((4, 128, 64, 128, 4), (32, 128, 64, 64, 4))
PASSES = 2000


@numba.njit(fastmath=True, nogil=True)
def dot_products(vectors, rows, out, passes):
    """out[k, n] = vectors[k] . rows[n] for four vectors, `passes` times."""
    for _ in range(passes):
        for n in range(rows.shape[0]):
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for w in range(rows.shape[1]):
                a += vectors[0, w] * rows[n, w]
                b += vectors[1, w] * rows[n, w]
                c += vectors[2, w] * rows[n, w]
                d += vectors[3, w] * rows[n, w]
            out[0, n], out[1, n], out[2, n], out[3, n] = a, b, c, d


@numba.njit(fastmath=True, nogil=True)
def added_rows(vectors, rows, out, passes):
    """rows[n] += sum_k out[k, n] vectors[k] for four vectors, `passes` times."""
    for _ in range(passes):
        for n in range(rows.shape[0]):
            a, b, c, d = out[0, n], out[1, n], out[2, n], out[3, n]
            for w in range(rows.shape[1]):
                rows[n, w] += a * vectors[0, w] + b * vectors[1, w] + c * vectors[2, w] + d * vectors[3, w]


def best_seconds(function: Callable[[], object], repeats: int) -> float:
    """Shortest of `repeats` calls, after one that is not measured: a ceiling is what nothing else disturbed."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def ceiling(loop: Callable, slots: int, width: int, threads: int, repeats: int) -> float:
    """GFLOP/s of `loop`, all threads together, each on rows of its own."""
    vectors, rows = np.full((4, width), 1e-3, np.float32), np.zeros((threads, slots, width), np.float32)
    weights = np.full((threads, 4, slots), 1e-3, np.float32)
    with ThreadPoolExecutor(threads) as pool:
        seconds = best_seconds(
            lambda: list(pool.map(lambda i: loop(vectors, rows[i], weights[i], PASSES), range(threads))), repeats
        )
    return threads * PASSES * 2 * 4 * slots * width / seconds / 1e9


def operations(addressing: str, shape: tuple[int, ...]) -> float:
    """Floating-point operations of a scan forward and backward; those that grow with slots times columns only.

    A multiplication and an addition count as two, A are the address columns, V the value columns (`"lru"`: half of W
    each, otherwise W) and L = N for links:
    forward    scores of one write and R read keys 2 (1 + R) N A, norms 2 N A, write 4 N W, reads 2 R N V
    backward   the writes and norms once more; gradients of the read weights and through the reads to the memory
               4 R N V; of each key's scores, recomputed, keys and rows 6 (1 + R) N A; of the rows' norms
               2 N A for the write and the read; of the write 11 N W
    links      forward update 5 N L and following both ways 4 R N L; backward the same again, 8 R N L for what follows
               and 9 N L for the update
    """
    batch, tokens, slots, width, heads = shape
    address = values = width // 2 if addressing == "lru" else width
    forward = slots * (2 * (1 + heads) * address + 2 * address + 4 * width + 2 * heads * values)
    backward = slots * (4 * width + 2 * address + 4 * heads * values + (6 * (1 + heads) + 4) * address + 11 * width)
    links = slots**2 * ((5 + 4 * heads) + (5 + 4 * heads) + 8 * heads + 9) if addressing == "dnc" else 0
    return batch * tokens * (forward + backward + links)


def scan(addressing: str, shape: tuple[int, ...]):
    """A function that runs the fused scan alone, forward and backward."""
    batch, tokens, slots, width, heads = shape
    config = DNCGPT2Config(
        mem_slots=slots, mem_width=width, num_reads=heads, addressing=addressing, scan="numba", temporal_links=True
    )
    address, dnc = config.address_columns, addressing == "dnc"
    torch.manual_seed(0)
    sizes = Interface(
        *((address,), (), (width,), (width,), (), (heads, address), (heads,)),
        *(() if addressing != "simplified" else None, (heads,) if dnc else None, (heads, 3) if dnc else None),
        *(None, None, None, None, None),
    )
    x = Interface(*(None if size is None else torch.rand(batch, tokens, *size) for size in sizes))
    if dnc:
        x = x._replace(read_modes=torch.softmax(x.read_modes, -1))
    x = x._replace(**{name: t.requires_grad_() for name, t in x._asdict().items() if t is not None})
    link = (torch.zeros(batch, slots, slots), torch.zeros(batch, slots)) if dnc else (None, None)
    state = State(
        torch.zeros(batch, slots, width), torch.zeros(batch, slots), torch.zeros(batch, slots),
        torch.zeros(batch, heads, slots), *link,
    )  # fmt: skip

    def step() -> None:
        fused_scan(x, state, config)[0].mean().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            dots, adds = (ceiling(loop, *shape[2:4], threads, arguments.repeats) for loop in (dot_products, added_rows))
            # Seen from the scans: half of their operations are dot products, half are added rows.
            mean = 2 / (1 / dots + 1 / adds)
            for name in ("lru", "dnc", "simplified"):
                speed = operations(name, shape) / best_seconds(scan(name, shape), arguments.repeats) / 1e9
                rows.append([threads, str(shape), name, dots, adds, speed, speed / mean])
    header = ["threads", "batch, tokens, slots, width, heads", "addressing", "dots GFLOP/s", "adds GFLOP/s"]
    publish("Scans and the ceiling of row passes", [*header, "scan GFLOP/s", "share"], rows, arguments.output)


if __name__ == "__main__":
    main()
