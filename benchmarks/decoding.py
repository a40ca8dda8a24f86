"""Tokens per second of greedy generation with a cache, against plain GPT-2, inside the attention window and past it.

python benchmarks/decoding.py --output decoding.json
python benchmarks/decoding.py --tokens 20000        # one long generation: is its memory constant?
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import benchmark_parser, interleave, publish
from training_step import SIZES, Sizes

from configuration_dnc_gpt2 import ADDRESSINGS
from dnc_gpt2.models import new_models

TARGET = 0.9


def models(sizes: Sizes, positions: int, **memory) -> dict[str, PreTrainedModel]:
    """GPT-2 with room for `positions` tokens, and the model with memory, whose window stays as it is."""
    plain = dataclasses.replace(sizes, n_positions=max(sizes.n_positions, positions))
    baseline = new_models(plain.config(), ["baseline"], seed=0)["baseline"]
    dnc = new_models(sizes.config(**memory), ["dnc"], seed=0)["dnc"]
    return {"baseline": baseline.eval(), "dnc": dnc.eval()}


def generation(model: PreTrainedModel, prompt: Tensor, tokens: int, **options) -> Callable[[], Tensor]:
    """A function that continues `prompt` [B, T] by exactly so many tokens, greedily."""
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return lambda: model.generate(prompt, attention_mask=mask, **settings | options)


class Watch(BaseStreamer):
    """Notes the process's resident memory and the clock each time another share of the tokens is there."""

    def __init__(self, every: int):
        self.every, self.count, self.rows, self.since = every, -1, [], time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.count += 1
        if self.count and self.count % self.every == 0:
            now, resident = time.perf_counter(), psutil.Process().memory_info().rss / 2**20
            self.rows.append([self.count, resident, self.every / (now - self.since)])
            self.since = now

    def end(self) -> None:
        """Nothing is held back."""


def long_generation(sizes: Sizes, tokens: int, **memory) -> list[list[float]]:
    """Tokens so far, resident MiB and tokens per second at eight moments of one generation of a batch of one."""
    watch = Watch(max(1, tokens // 8))
    model: GPT2LMHeadModel = models(sizes, 0, **memory)["dnc"]
    generation(model, torch.ones(1, 1, dtype=torch.long), tokens, streamer=watch)()
    return watch.rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["origin", "small"])
    parser.add_argument("--addressings", nargs="+", choices=ADDRESSINGS, default=["lru"])
    parser.add_argument(
        "--pointer_weight", type=float, default=0.0, help="of each prediction, to the tokens in the slots"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, help="generate so many tokens with the last of --sizes and watch memory")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    pointer = {"pointer_weight": arguments.pointer_weight}
    if arguments.tokens:
        name = arguments.sizes[-1]
        rows = [
            [name, addressing, *row]
            for addressing in arguments.addressings
            for row in long_generation(SIZES[name], arguments.tokens, addressing=addressing, **pointer)
        ]
        header = ["sizes", "addressing", "tokens", "resident MiB", "tokens per second"]
        publish("One generation", header, rows, arguments.output)
        return
    rows = []
    for name in arguments.sizes:
        sizes = SIZES[name]
        window = sizes.n_positions
        new = 3 * window // 4
        for addressing in arguments.addressings:
            compared = models(sizes, 2 * window + new, addressing=addressing, **pointer)
            for where, length in (("inside", window // 8), ("past", 2 * window)):
                for batch in arguments.batches:
                    generator = torch.Generator().manual_seed(0)
                    prompt = torch.randint(sizes.vocab_size, (batch, length), generator=generator)
                    runs = {kind: generation(model, prompt, new) for kind, model in compared.items()}
                    seconds = interleave(runs, arguments.repeats)
                    rates = [batch * new / seconds[kind] for kind in ("baseline", "dnc")]
                    rows.append([name, addressing, where, batch, *rates, rates[1] / rates[0], TARGET])
    header = ["sizes", "addressing", "window", "batch", "GPT-2 tokens/s", "with memory tokens/s", "ratio"]
    publish("Decoding", [*header, "target, at least"], rows, arguments.output)


if __name__ == "__main__":
    main()
