"""Training of either model on the same targets: `DNCTrainer` and its arguments."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from memory_dnc_gpt2 import MemoryState

from .data import IGNORED, ExampleDataset, StreamBatchSampler, collate
from .evaluation import evaluate, memory_divergence, split_tokens, write_entropy
from .models import backbone_inputs, has_memory


@dataclass
class DNCTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the memory's loss terms. The processor is used where there is no other."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run; default runs/<name>."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that the output directory already holds."}
    )
    lambda_routing: float = field(default=0.1, metadata={"help": "Weight of the routing term."})
    lambda_entropy: float = field(default=0.05, metadata={"help": "Weight of the write entropy term."})

    def __post_init__(self):
        for name in ("lambda_routing", "lambda_entropy", "learning_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be a finite number from 0 on.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1.")
        for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be a finite number above 0.")
        output_dir = self.output_dir
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        self.output_dir = output_dir  # without one the library takes a folder of its own

    @property
    def n_gpu(self) -> int:
        """At most 1: several devices are used by several processes, never by `DataParallel`."""
        return min(1, super().n_gpu)


class _EvaluateBeforeSaving(TrainerCallback):
    """Every checkpoint carries the validation metrics of its step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_evaluate or control.should_save
        return control

    on_epoch_end = on_step_end


class DNCTrainer(Trainer):
    """`Trainer` for `DNCGPT2LMHeadModel` and, without the memory's terms, for `GPT2LMHeadModel`.

    The loss of a model with memory is L_LM + lambda_routing * L_routing + lambda_entropy * L_entropy with

        L_routing = -mean( write_gate * stop_gradient(KL(p_memory || p_no_memory)) )
        L_entropy = mean( H(w / sum w) ), weighted by the detached gate where w contains it

    each a sum over scored targets divided by the scored targets of the whole accumulated, distributed batch. The terms,
    the mean write gate and the top-1 accuracy are logged beside the loss.

    Args:
        carry_memory: train on contiguous streams whose memory passes, detached, from step to step, and evaluate so.
        eval_streams: contiguous streams of the evaluation split under `carry_memory`.
    """

    def __init__(
        self,
        model,
        args: DNCTrainingArguments,
        train_dataset: ExampleDataset,
        eval_dataset: ExampleDataset | None = None,
        carry_memory: bool = False,
        eval_streams: int = 4,
        **kwargs: Any,
    ):
        use_cache = model.config.use_cache
        self.carry_memory, self.eval_streams = carry_memory, eval_streams
        self.memory_states: dict[int, MemoryState] = {}  # by micro-batch of an accumulated batch
        self._sums: Counter[str] = Counter()  # of the log, since the last one, over this process's scored targets
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,
            **kwargs,
        )
        self.remove_callback(PrinterCallback)  # standard output is for the results
        self.model.config.use_cache = use_cache  # the loss asks for no cache itself; what is saved should generate fast
        if eval_dataset is not None:
            self.add_callback(_EvaluateBeforeSaving())

    def load_finished(self, checkpoint: str) -> bool:
        """Load model and state of a checkpoint if no step is left to train: `Trainer.train` would train one more.

        Returns:
            Whether it was so.
        """
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        if state.global_step < max_steps:
            return False
        self._load_from_checkpoint(checkpoint)
        self.state = state
        return True

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process: the sampler knows its rank, so that the loader must not be sharded again."""
        args = self.args
        sampler = StreamBatchSampler(
            num_examples=len(self.train_dataset),
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            carry_memory=self.carry_memory,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for index, batch in enumerate(batches):
            batch["micro_batch"] = index
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        micro_batch = inputs.pop("micro_batch", 0)
        unwrapped = self.accelerator.unwrap_model(model)
        memory = has_memory(unwrapped)
        if memory:
            state = self.memory_states.get(micro_batch) if self.carry_memory else None
            inputs |= {
                "memory_state": state,
                "output_memory": True,
                "output_base_logits": self.args.lambda_routing > 0,
            }
        else:
            inputs = backbone_inputs(unwrapped, inputs)
        targets = inputs["shift_labels"]
        scored = targets != IGNORED
        num_items = scored.sum() if num_items_in_batch is None else num_items_in_batch
        outputs = model(**inputs, num_items_in_batch=num_items, use_cache=False)
        loss = outputs.loss
        self._sums["targets"] += scored.sum()
        self._sums["lm_loss"] += loss.detach() * num_items
        self._sums["top1_acc"] += (outputs.logits.detach().argmax(-1) == targets).sum()
        if memory:
            if self.carry_memory and model.training:
                self.memory_states[micro_batch] = outputs.memory_state.detach()
            loss = loss + self._memory_terms(outputs, targets, scored, unwrapped.config.addressing) / num_items
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # distributed training averages gradients over processes
        return (loss, outputs) if return_outputs else loss

    def _memory_terms(self, outputs, targets: Tensor, scored: Tensor, addressing: str) -> Tensor:
        """Weighted sum over scored targets of the memory's loss terms; adds each to the log."""
        gates = outputs.write_gates[scored]
        self._sums["write_gate"] += gates.detach().sum()
        entropy = write_entropy(outputs.write_weights[scored])
        if addressing != "simplified":  # there w does not contain the gate
            entropy = entropy * gates.detach()
        entropy = entropy.sum()
        self._sums["entropy_loss"] += entropy.detach()
        total = self.args.lambda_entropy * entropy
        if outputs.base_logits is not None:
            with torch.no_grad():
                pieces = split_tokens(outputs.logits[scored], outputs.base_logits[scored])
                divergence = torch.cat([memory_divergence(*piece) for piece in pieces])
            routing = -(gates * divergence).sum()
            self._sums["routing_loss"] += routing.detach()
            total = total + self.args.lambda_routing * routing
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            sums = self.accelerator.reduce({name: x.double() for name, x in self._sums.items()}, "sum")
            count = float(sums.pop("targets"))
            logs |= {name: float(x) / count for name, x in sums.items() if count}
            self._sums.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: ExampleDataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the whole split, token-weighted: see `dnc_gpt2.metrics`. Leaves the training streams alone."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        result = evaluate(
            self.accelerator.unwrap_model(self.model),
            dataset,
            carry_memory=self.carry_memory,
            streams=self.eval_streams,
            batch_size=self.args.per_device_eval_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            gather=partial(self.accelerator.reduce, reduction="sum") if self.args.world_size > 1 else None,
            autocast=self.accelerator.autocast,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )
        metrics = result.metrics(dataset.text.num_bytes, dataset.text.num_words)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics |= {f"{metric_key_prefix}_runtime": result.seconds}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The library's general card, unless there is a card already: that one tells more."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)

    # The carried memory is, like the random state, what a process needs to go on as if nothing had happened.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.carry_memory and self.memory_states:
            tensors = {
                f"{index}.{name}": x.contiguous()
                for index, state in self.memory_states.items()
                for name, x in state._asdict().items()
                if x is not None
            }
            save_file(tensors, self._memory_file(output_dir), metadata={"format": "pt"})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self.carry_memory or not has_memory(self.accelerator.unwrap_model(self.model)):
            return
        path = self._memory_file(checkpoint)
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {path.name}: resume with the number of processes and the --carry_memory that "
                "the run was started with."
            )
        states: dict[int, dict[str, Tensor | None]] = {}
        for name, x in load_file(path, device=str(self.args.device)).items():
            index, field_name = name.split(".")
            states.setdefault(int(index), dict.fromkeys(MemoryState._fields))[field_name] = x
        self.memory_states = {index: MemoryState(**state) for index, state in states.items()}

    def _memory_file(self, folder: str) -> Path:
        return Path(folder) / f"memory_state_{self.args.process_index}.safetensors"


class _EpochLoader(DataLoader):
    """Tells its batch sampler the epoch, as the training loop tells its loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
