"""A training step of GPT-2 with memory against plain GPT-2, both through `DNCTrainer`.

python benchmarks/training_step.py --threads 2 --output training_step.json
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import interleave, publish

from dnc_gpt2 import DNCGPT2Config
from dnc_gpt2.data import ExampleDataset, TokenizedText, collate
from dnc_gpt2.models import new_models
from dnc_gpt2.trainer import DNCTrainer, DNCTrainingArguments

SIZES = {
    "origin's sizes": {"batch": 4, "vocab_size": 50257, "n_embd": 768, "n_layer": 6, "n_head": 8, "mem_width": 128},
    "small": {"batch": 32, "vocab_size": 2048, "n_embd": 128, "n_layer": 2, "n_head": 4, "mem_width": 64},
}
TOKENS = 128


def steps(folder: str, batch: int, **sizes):
    """Name -> function that makes one optimizer step, for both models."""
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = DNCGPT2Config(n_positions=TOKENS, mem_slots=64, num_reads=4, **special, **sizes)
    tokens = torch.randint(config.vocab_size, (batch * TOKENS + 1,), generator=torch.Generator().manual_seed(0))
    text = TokenizedText(tokens, torch.zeros(len(tokens), dtype=torch.bool), len(tokens), len(tokens))
    dataset = ExampleDataset(text, TOKENS, 1)
    inputs = collate([dataset[row] for row in range(batch)])
    functions = {}
    for kind, model in new_models(config, ["baseline", "dnc"], seed=0).items():
        trainer = DNCTrainer(model, DNCTrainingArguments(output_dir=f"{folder}/{kind}", disable_tqdm=True), dataset)
        trainer.create_optimizer()

        def step(trainer=trainer, model=model) -> None:
            trainer.training_step(model, inputs, torch.tensor(batch * TOKENS))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        functions[kind] = step
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in SIZES.items():
            times = interleave(steps(folder, **sizes), arguments.repeats)
            rows.append([name, 1000 * times["baseline"], 1000 * times["dnc"], times["dnc"] / times["baseline"]])
    publish("Training step", ["sizes", "GPT-2 ms", "with memory ms", "ratio"], rows, arguments.output)


if __name__ == "__main__":
    main()
