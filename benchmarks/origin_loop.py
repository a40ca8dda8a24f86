"""A training step of the origin's system, token by token, against GPT-2's and ours.

The origin's loop calls every projection and the LM head once a token and runs the backbone a second time for the logits
without memory. Its equations are those of addressing="simplified", read at the top, where ours are read here, too:
tests/test_benchmarks.py shows that logits, loss and gradients are the same.

python benchmarks/origin_loop.py --threads 2 --output origin_loop.json
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import benchmark_parser, interleave, publish
from training_step import SIZES, TERMS, Sizes, dnc_trainer, trainer_step

from configuration_dnc_gpt2 import ADDRESSINGS
from dnc_gpt2 import DNCGPT2Config
from dnc_gpt2.models import new_models
from dnc_gpt2.trainer import DNCTrainingArguments


class OriginOutput(NamedTuple):
    """What `OriginModel` returns for all tokens."""

    logits: Tensor  # [B, T, V]
    write_gates: Tensor  # [B, T]
    write_weights: Tensor  # [B, T, N]


class OriginMemory(nn.Module):
    """The origin's memory for one token; its parameters have the names of `DNCMemory`'s."""

    def __init__(self, config: DNCGPT2Config):
        super().__init__()
        hidden, width, self.heads = config.n_embd, config.mem_width, config.num_reads
        self.write_key = nn.Linear(hidden, width)
        self.write_value = nn.Linear(hidden, width)
        self.erase = nn.Linear(hidden, width)
        self.write_control = nn.Linear(hidden, 1)
        self.read_key = nn.Linear(hidden, self.heads * width)
        self.read_projection = nn.Linear(self.heads * width, hidden)
        self.temperature = nn.Parameter(torch.tensor([2.0]))

    def address(self, keys: Tensor, memory: Tensor) -> Tensor:
        """Content weights [B, K, N] of keys [B, K, W] in a memory [B, N, W]."""
        keys, rows = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (keys, memory))
        return torch.softmax(self.temperature * (keys @ rows.mT), dim=-1)

    def forward(self, hidden: Tensor, memory: Tensor, usage: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Args: hidden [B, H], memory [B, N, W], usage [B, N].

        Returns: read [B, H], write gate [B], write weights [B, N], new memory, new usage.
        """
        gate = torch.sigmoid(self.write_control(hidden))
        content = self.address(self.write_key(hidden)[:, None], memory)[:, 0]
        allocation = torch.softmax(self.temperature * (1 - usage), dim=-1)
        weights = 0.5 * content + 0.5 * allocation
        read_weights = self.address(self.read_key(hidden).unflatten(-1, (self.heads, -1)), memory)
        erased = memory * (1 - weights[..., None] * torch.sigmoid(self.erase(hidden))[:, None])
        written = erased + weights[..., None] * self.write_value(hidden)[:, None]
        memory = memory + gate[..., None] * (written - memory)
        usage = usage + (1 - usage) * weights.detach()
        read = self.read_projection((read_weights @ memory).flatten(1))
        return read, gate[:, 0], weights, memory, usage


class OriginModel(nn.Module):
    """GPT-2 with the origin's memory, run token by token behind the backbone."""

    def __init__(self, backbone: GPT2LMHeadModel, config: DNCGPT2Config):
        super().__init__()
        self.config, self.backbone, self.memory = config, backbone, OriginMemory(config)

    def forward(self, input_ids: Tensor) -> OriginOutput:
        """Args: input_ids [B, T], T at most one attention window."""
        hidden_states = self.backbone.transformer(input_ids, use_cache=False).last_hidden_state
        batch, tokens, _ = hidden_states.shape
        memory = hidden_states.new_zeros(batch, self.config.mem_slots, self.config.mem_width)
        usage = hidden_states.new_zeros(batch, self.config.mem_slots)
        logits, gates, write_weights = [], [], []
        for t in range(tokens):
            hidden = hidden_states[:, t]
            read, gate, weights, memory, usage = self.memory(hidden, memory, usage)
            logits.append(self.backbone.lm_head(hidden + read))
            gates.append(gate)
            write_weights.append(weights)
        return OriginOutput(torch.stack(logits, 1), torch.stack(gates, 1), torch.stack(write_weights, 1))

    def loss(self, input_ids: Tensor, targets: Tensor, lambda_routing: float, lambda_entropy: float) -> Tensor:
        """The composite loss for targets [B, T], all of them scored."""
        output = self(input_ids)
        with torch.no_grad():  # the divergence is a constant to the gradient: the cheaper way to take it
            base_logits = self.backbone(input_ids, use_cache=False).logits
            log_memory, log_base = (F.log_softmax(x, dim=-1) for x in (output.logits, base_logits))
            divergence = (log_memory.exp() * (log_memory - log_base)).sum(-1)
        language_model = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        routing = -(output.write_gates * divergence).mean()
        entropy = torch.special.entr(output.write_weights).sum(-1).mean()
        return language_model + lambda_routing * routing + lambda_entropy * entropy


class OriginTrainer(Trainer):
    """The same optimizer and clipping as the others' trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        arguments = self.args
        return model.loss(
            inputs["input_ids"], inputs["shift_labels"], arguments.lambda_routing, arguments.lambda_entropy
        )


def origin_trainer(
    folder: str, sizes: Sizes, options: Mapping[str, Any] | None = None, **arguments: Any
) -> OriginTrainer:
    """As `dnc_trainer`, of a new model of the origin's with the weights that ours starts with."""
    config = sizes.config(**{"addressing": "simplified", "memory_layer": sizes.n_layer, **(options or {})})
    models = new_models(config, ["baseline", "dnc"], seed=0)
    model = OriginModel(models["baseline"], config)
    model.memory.load_state_dict(models["dnc"].transformer.memory.state_dict())
    training = DNCTrainingArguments(output_dir=folder, disable_tqdm=True, **{**TERMS, **arguments})
    trainer = OriginTrainer(model, training, train_dataset=sizes.dataset())
    trainer.model_accepts_loss_kwargs = True  # its loss is one batch's mean, never to be divided by accumulation
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["origin", "small"])
    parser.add_argument("--addressings", nargs="+", choices=ADDRESSINGS, default=["simplified", "lru"])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sizes:
            sizes = SIZES[name]
            trainers = {"GPT-2": dnc_trainer(folder, sizes, "baseline"), "origin's loop": origin_trainer(folder, sizes)}
            for addressing in arguments.addressings:
                options = {"addressing": addressing, "memory_layer": sizes.n_layer}  # read at the top, as the loop
                trainers[f"ours, {addressing}"] = dnc_trainer(folder, sizes, "dnc", options)
            steps = {key: trainer_step(trainer, sizes.inputs()) for key, trainer in trainers.items()}
            times = interleave(steps, arguments.repeats)
            for key, seconds in times.items():
                ratio = seconds / times["GPT-2"]
                rows.append([name, key, 1000 * seconds, ratio, times["origin's loop"] / seconds])
    header = ["sizes", "system", "ms a step", "ratio to GPT-2", "origin's loop / this"]
    publish("Training step against the origin's loop", header, rows, arguments.output)


if __name__ == "__main__":
    main()
