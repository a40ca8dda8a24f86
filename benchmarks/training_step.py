"""A training step of GPT-2 with memory against plain GPT-2, both through `DNCTrainer`.

python benchmarks/training_step.py --threads 2 --output training_step.json
"""

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import benchmark_parser, interleave, publish

from configuration_dnc_gpt2 import ADDRESSINGS
from dnc_gpt2 import DNCGPT2Config
from dnc_gpt2.examples import ExampleDataset, collate
from dnc_gpt2.models import new_models
from dnc_gpt2.tokenization import TokenizedText
from dnc_gpt2.trainer import DNCTrainer, DNCTrainingArguments


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model, and of the batch that it is trained on: `batch` examples of `tokens` tokens."""

    batch: int
    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    mem_width: int
    mem_slots: int = 64
    num_reads: int = 4
    tokens: int = 128
    n_positions: int = 128

    def config(self, **options: Any) -> DNCGPT2Config:
        """The configuration with memory, with further options."""
        sizes = dataclasses.asdict(self)
        del sizes["batch"], sizes["tokens"]
        return DNCGPT2Config(bos_token_id=0, eos_token_id=0, **sizes, **options)

    def dataset(self) -> ExampleDataset:
        """As many examples of random tokens as make one batch, without padding."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (self.batch * self.tokens + 1,), generator=generator)
        text = TokenizedText(tokens, torch.zeros(len(tokens), dtype=torch.bool), len(tokens), len(tokens))
        return ExampleDataset(text, self.n_positions, self.tokens // self.n_positions)

    def inputs(self) -> dict[str, Tensor]:
        """The batch, each tensor [batch, tokens]."""
        dataset = self.dataset()
        return collate([dataset[row] for row in range(self.batch)])


SIZES = {
    "origin": Sizes(batch=4, vocab_size=50257, n_embd=768, n_layer=6, n_head=8, mem_width=128),
    "small": Sizes(batch=32, vocab_size=2048, n_embd=128, n_layer=2, n_head=4, mem_width=64),
    # To try a benchmark out.
    "tiny": Sizes(
        2, 67, n_embd=16, n_layer=1, n_head=2, mem_width=8, mem_slots=6, num_reads=2, tokens=8, n_positions=8
    ),
}
TERMS = {"lambda_routing": 0.1, "lambda_entropy": 0.05}
"""The weights of the origin's loss; with those of 0, the default, a step is cheaper."""
TARGETS = {("origin", 1.0): 1.20, ("origin", 0.25): 1.08, ("small", 1.0): 1.35}  # by sizes and routing sample


def dnc_trainer(
    folder: str, sizes: Sizes, kind: str, options: Mapping[str, Any] | None = None, **arguments: Any
) -> DNCTrainer:
    """A trainer of a new model.

    Args:
        folder: output folder; nothing is written to it.
        kind: `"baseline"` or `"dnc"`.
        options: further options of the model's configuration.
        arguments: of `DNCTrainingArguments`, in which `TERMS` stand.
    """
    model = new_models(sizes.config(**options or {}), [kind], seed=0)[kind]
    training = DNCTrainingArguments(output_dir=folder, disable_tqdm=True, **{**TERMS, **arguments})
    trainer = DNCTrainer(model, training, sizes.dataset())
    trainer.accelerator.prepare_model(trainer.model)  # its forward pass computes in bf16 from now on, if so asked
    return trainer


def trainer_step(trainer: Trainer, inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    """A function that makes one optimizer step on `inputs`: loss, gradient, clipping, update."""
    trainer.create_optimizer()
    model, num_items = trainer.model, torch.tensor(inputs["input_ids"].numel(), device=trainer.args.device)

    def step() -> None:
        trainer.training_step(model, dict(inputs), num_items)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["origin", "small"])
    parser.add_argument("--addressings", nargs="+", choices=ADDRESSINGS, default=["lru"])
    parser.add_argument(
        "--routing_sample",
        nargs="+",
        type=float,
        default=[1.0, 0.25, 0.0],
        metavar="SHARE",
        help="shares of the targets that the routing term is computed on, 0: neither term; default 1, 0.25 and 0",
    )
    parser.add_argument("--on_top", action="store_true", help="read the memory above the last block, as the origin")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sizes:
            sizes = SIZES[name]
            inputs = sizes.inputs()
            place = {"memory_layer": sizes.n_layer} if arguments.on_top else {}
            trainers = {"baseline": dnc_trainer(folder, sizes, "baseline")}
            for addressing, share in itertools.product(arguments.addressings, arguments.routing_sample):
                terms = {"routing_sample": share} if share else dict.fromkeys(TERMS, 0.0)
                options = {"addressing": addressing, **place}
                trainers[addressing, share] = dnc_trainer(folder, sizes, "dnc", options, **terms)
            steps = {key: trainer_step(trainer, inputs) for key, trainer in trainers.items()}
            times = interleave(steps, arguments.repeats)
            baseline = times.pop("baseline")
            for (addressing, share), seconds in times.items():
                target = TARGETS.get((name, share))
                rows.append([name, addressing, share, 1000 * baseline, 1000 * seconds, seconds / baseline, target])
    header = ["sizes", "addressing", "routing sample", "GPT-2 ms", "with memory ms", "ratio", "target, at most"]
    publish("Training step", header, rows, arguments.output)


if __name__ == "__main__":
    main()
