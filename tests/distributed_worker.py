"""What `test_distributed.py` runs in two processes, and what it needs of it: torchrun distributed_worker.py FOLDER.

Each process saves what it finds to FOLDER/<name>_<rank>.pt.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import TINY
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dnc_gpt2 import DNCGPT2Config, DNCGPT2LMHeadModel
from dnc_gpt2.data import DataArguments, stream_records
from dnc_gpt2.evaluation import evaluate
from dnc_gpt2.examples import ExampleDataset
from dnc_gpt2.streaming import StreamedExamples
from dnc_gpt2.tokenization import TokenizedText, train_tokenizer
from dnc_gpt2.trainer import DNCTrainer, DNCTrainingArguments

CASES = ("gpt2", "lru", "dnc", "simplified")
TRAINER_CASES = ("gpt2", "lru")
WINDOW, BATCH, STEPS = 8, 4, 2


def make(case: str) -> PreTrainedModel:
    """A tiny model without dropout: plain GPT-2, or an addressing."""
    torch.manual_seed(0)
    options = {**TINY, "n_positions": WINDOW, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if case != "gpt2":
        return DNCGPT2LMHeadModel(DNCGPT2Config(**options, addressing=case))
    shared = {name: value for name, value in options.items() if name in GPT2Config().to_dict()}
    return GPT2LMHeadModel(GPT2Config(**{**shared, "n_positions": 3 * WINDOW}))


def batches() -> Tensor:
    """Tokens [steps, batch, length] of several windows."""
    return torch.randint(1, TINY["vocab_size"], (STEPS, BATCH, 20), generator=torch.Generator().manual_seed(1))


def held_out() -> ExampleDataset:
    tokens = torch.randint(1, TINY["vocab_size"], (100,), generator=torch.Generator().manual_seed(2))
    return ExampleDataset(TokenizedText(tokens, torch.arange(100) == 0, num_bytes=100, num_words=50), WINDOW, 2)


def accelerate_steps(case: str) -> dict:
    """Plain data parallelism, which stops at a parameter without gradient."""
    accelerator = Accelerator(cpu=True)
    model = make(case).train()
    loader = torch.utils.data.DataLoader(batches().flatten(0, 1), batch_size=BATCH // 2)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    for tokens in loader:
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {"processes": accelerator.num_processes, "weights": accelerator.unwrap_model(model).state_dict()}


def sharded_steps(case: str) -> dict:
    """The same with the model's own units and the rest of it sharded; then an evaluation and one more forward pass."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make(case).train()
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in (*units, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine = batches().chunk(world_size, dim=1)[rank]
    for tokens in mine:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def gather(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    columns = evaluate(
        model, held_out(), batch_size=3, rank=rank, world_size=world_size, gather=gather, progress=False
    ).columns
    with torch.no_grad():
        logits = model(mine[0]).logits
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"units": len(units), "held": held, "columns": columns, "logits": logits, "weights": weights}


def trainer_steps(folder: Path, case: str) -> dict:
    """Training with `DNCTrainer`, an evaluation and a checkpoint, resumed for one step more."""

    def trainer(model: PreTrainedModel) -> DNCTrainer:
        training = DNCTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=3,
            save_steps=2,
            logging_steps=1,
            learning_rate=0.01,
            ddp_backend="gloo",
            use_cpu=True,
            disable_tqdm=True,
        )
        return DNCTrainer(model, training, held_out(), held_out())

    first = trainer(make(case))
    first.train()
    first.save_model()
    again = trainer(make(case))
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    histories = [
        [row[name] for row in t.state.log_history for name in ("loss", "grad_norm", "eval_loss") if name in row]
        for t in (first, again)
    ]
    sharded = {type(module).__name__ for module in first.model.modules() if isinstance(module, FSDPModule)}
    return {"histories": histories, "sharded": sharded, "weights": load_file(folder / "model.safetensors")}


@contextmanager
def sharding_as_configured() -> Iterator[None]:
    """What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets up, on processors too.

    There accelerate offers data parallelism alone, though all that sharding needs works: its state is told otherwise.
    """
    config = Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp2.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    chosen = {k: v for k, v in environment.items() if k.startswith("FSDP_") or k == "ACCELERATE_USE_FSDP"}
    original = AcceleratorState.__init__

    def told(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.distributed_type = DistributedType.FSDP
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState._reset_state()
    with patch.dict(os.environ, chosen), patch.object(AcceleratorState, "__init__", told):
        yield
    AcceleratorState._reset_state()


def write_records(folder: Path) -> None:
    rows = [{"text": f"{i}: " + "the old sea by the stone river " * (1 + i % 3)} for i in range(30)]
    for shard in range(2):
        lines = "".join(json.dumps(row) + "\n" for row in rows[shard::2])
        (folder / f"{shard}.jsonl").write_text(lines)


def streamed_training(folder: Path, name: str, resume: str | None = None) -> dict:
    """Training on a stream with carried memory; what was read comes back as [micro-batches, rows, tokens]."""
    torch.manual_seed(0)
    arguments = DataArguments(train_file=[str(folder / "*.jsonl")], streaming=True, max_eval_tokens=9)
    tokenizer = train_tokenizer(["the old sea by the stone river 0123456789: "], 270)
    config = DNCGPT2Config(**{**TINY, "vocab_size": len(tokenizer)})
    training = DNCTrainingArguments(
        output_dir=str(folder / name),
        per_device_train_batch_size=2,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        learning_rate=0.01,
        ddp_backend="gloo",
        use_cpu=True,
        disable_tqdm=True,
    )
    examples = StreamedExamples(
        stream_records(arguments, "train"),
        tokenizer,
        WINDOW,
        2,
        rows=2,
        rank=training.process_index,
        world_size=training.world_size,
    )
    read = []

    class Recorder(DNCTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            read.append(inputs["input_ids"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Recorder(DNCGPT2LMHeadModel(config), training, examples, carry_memory=True)
    trainer.train(resume_from_checkpoint=resume)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    state = [x for x in trainer.memory_states[0] if x is not None]
    return {"losses": losses, "read": torch.stack(read), "state": state, "weights": trainer.model.state_dict()}


def main(folder: Path) -> None:
    found = {}
    for case in CASES:
        found[f"accelerate_{case}"] = accelerate_steps(case)
        found[f"sharded_{case}"] = sharded_steps(case)
    found["stream_unbroken"] = streamed_training(folder, "unbroken")
    found["stream_resumed"] = streamed_training(folder, "resumed", str(folder / "unbroken" / "checkpoint-3"))
    for case in TRAINER_CASES:
        found[f"trainer_{case}"] = trainer_steps(folder / f"whole_{case}", case)
        with sharding_as_configured():
            found[f"sharded_trainer_{case}"] = trainer_steps(folder / f"sharded_{case}", case)
    for name, value in found.items():
        torch.save(value, folder / f"{name}_{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
