"""Training of either model on the same targets: `DNCTrainer` and its arguments."""

import logging
import math
import os
import shutil
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, rotate_checkpoints

from losses_dnc_gpt2 import IGNORED
from memory_dnc_gpt2 import MemoryState

from .attribution import effective_writes, reads_beyond_window
from .checkpoints import check_versions, close, fault, newest_whole, numbered, reading, saving
from .evaluation import evaluate, write_entropy
from .examples import EMPTY, ExampleDataset, StreamBatchSampler, collate
from .histograms import report_histogram
from .metrics import OPEN_GATE
from .models import allow_loss_without_logits, backbone_inputs, has_memory
from .pointing import tune_pointer
from .report import replacing
from .streaming import Place, StreamedExamples

logger = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """A loss or a gradient is not finite; the message names step, batch and term, and what was saved."""


GATE_BINS = 20
"""Bins of the write gates' histogram."""

WITHOUT_EFFECT = (
    "auto_find_batch_size",
    "batch_eval_metrics",
    "bf16_full_eval",
    "dataloader_drop_last",
    "dataloader_in_order",
    "dataloader_multiprocessing_context",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "fp16_full_eval",
    "include_for_metrics",
    "label_names",
    "label_smoothing_factor",
    "length_column_name",
    "prediction_loss_only",
    "train_sampling_strategy",
)
"""Options of `TrainingArguments` for what `DNCTrainer` does in its own way: batches, loss and evaluation."""


@dataclass
class DNCTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the memory's loss terms. The processor is used where there is no other."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run; default runs/<name>."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that the output directory already holds."}
    )
    lambda_routing: float = field(default=0.0, metadata={"help": "Weight of the routing term."})
    lambda_entropy: float = field(default=0.0, metadata={"help": "Weight of the write entropy term."})
    routing_sample: float = field(
        default=1.0,
        metadata={"help": "Share of the scored tokens, evenly spaced, that the routing term is estimated from."},
    )

    def __post_init__(self):
        for name in ("lambda_routing", "lambda_entropy", "learning_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be a finite number from 0 on.")
        if not 0 < self.routing_sample <= 1:
            raise ValueError(f"routing_sample={self.routing_sample} is not allowed; it must be above 0 and at most 1.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1.")
        for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be a finite number above 0.")
        for option in fields(TrainingArguments):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if option.name in WITHOUT_EFFECT and getattr(self, option.name) != default:
                raise ValueError(
                    f"{option.name}={getattr(self, option.name)} would have no effect here, where batches, loss and "
                    "evaluation are of another kind: leave it out."
                )
        if self.ddp_backend in ("nccl", "gloo") and "LOCAL_RANK" not in os.environ:
            raise ValueError(
                f"ddp_backend={self.ddp_backend} is for several processes: start them with torchrun or accelerate "
                "launch, or leave it out (with --num_gpus, too, which takes nccl)."
            )
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter of both models has a gradient in every step
        self.logging_nan_inf_filter = False  # which would hide what `DNCTrainer` stops at
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


class _StepStart(NamedTuple):
    """What a training step changes before the weights, as it was before the step."""

    random: Tensor  # state of torch's generator on the processor
    device_random: Tensor | None  # and on the accelerator
    memory_states: dict[int, MemoryState]
    sums: dict[str, Tensor]
    memory_sums: dict[str, Tensor]
    tr_loss: Tensor


class DNCTrainer(Trainer):
    """`Trainer` for `DNCGPT2LMHeadModel` and, without the memory's terms, for `GPT2LMHeadModel`.

    The loss of a model with memory is L_LM + lambda_routing * L_routing + lambda_entropy * L_entropy with

        L_routing = -mean( write_gate * stop_gradient(KL(p_memory || p_no_memory)) )
        L_entropy = mean( H(w / sum w) ), weighted by the detached gate where w contains it

    each a sum over scored targets divided by the scored targets of the whole accumulated, distributed batch. With
    `routing_sample` below 1 the routing sum is estimated, without bias, from a sample of the targets. The terms and the
    top-1 accuracy are logged beside the loss. No logits of a whole batch are ever built.

    Of the memory are logged, as means over the scored targets, `write_gate` and, of the step that is logged alone,
    `write_rate` (gates above 0.7), `slot_use` (how many slots a row's writes spread over, as exp of their entropy, of
    all), `read_strength` (of the content addressing, over the heads), `reads_beyond_window` (see `attribution`; a row
    of a carried state that is not zero counts as written); and to the trackers of `report_to` that know histograms,
    the histogram of the gates.

    A checkpoint is whole once it has its manifest (`dnc_gpt2.checkpoints`), and resuming from it gives what an unbroken
    run gives. A loss or gradient that is not finite ends training with `NonFiniteError`, before the weights change and
    after the state before the step was saved.

    Args:
        carry_memory: train on contiguous streams whose memory passes, detached, from step to step, and evaluate so.
        tuning_dataset: text that is not trained on, to tune the memory's pointer on before each evaluation.
        eval_streams: contiguous streams of the evaluation split under `carry_memory`.
    """

    def __init__(
        self,
        model,
        args: DNCTrainingArguments,
        train_dataset: ExampleDataset | StreamedExamples,
        eval_dataset: ExampleDataset | None = None,
        carry_memory: bool = False,
        eval_streams: int = 4,
        tuning_dataset: ExampleDataset | None = None,
        **kwargs: Any,
    ):
        allow_loss_without_logits(model)
        use_cache = model.config.use_cache
        self.carry_memory, self.eval_streams, self.tuning_dataset = carry_memory, eval_streams, tuning_dataset
        self.streaming = isinstance(train_dataset, StreamedExamples)
        if self.streaming:
            if args.dataloader_num_workers:
                raise ValueError(
                    f"dataloader_num_workers={args.dataloader_num_workers} is not possible with streaming, where "
                    "checkpoints hold the place in the corpus: leave it at 0."
                )
            args.ignore_data_skip = True  # a checkpoint knows its place in the corpus
        self.memory_states: dict[int, MemoryState] = {}  # by micro-batch of an accumulated batch
        self._sums: Counter[str] = Counter()  # of the log, since the last one, over this process's scored targets
        self._memory_sums: Counter[str] = Counter()  # the same of the steps that are logged
        self._terms: list[dict[str, Tensor]] = []  # the loss terms of this step, by micro-batch
        self._closed: Path | None = None  # the last whole checkpoint of this trainer
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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in transformers; `True` means the newest whole checkpoint.

        Raises:
            ValueError: the checkpoint is not whole, cannot be read or is of another model.
            NonFiniteError: a loss or gradient is not finite.
            OSError: a checkpoint cannot be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint, _ = newest_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from.")
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            if reason := fault(resume_from_checkpoint):
                raise ValueError(
                    f"{resume_from_checkpoint} is not a whole checkpoint ({reason}); resume from another one."
                )
            for name, (then, now) in check_versions(resume_from_checkpoint).items():
                logger.warning("%s was written with %s %s, not %s.", resume_from_checkpoint, name, then, now)
            if Path(resume_from_checkpoint).parent.resolve() == Path(self.args.output_dir).resolve():
                self._closed = Path(self.args.output_dir) / Path(resume_from_checkpoint).name
            with reading(resume_from_checkpoint):
                TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def load_finished(self, checkpoint: str) -> bool:
        """Load model and state of a checkpoint if no step is left to train: `Trainer.train` would train one more.

        Returns:
            Whether it was so.
        """
        with reading(checkpoint):
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        if state.global_step < max_steps:
            return False
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best if best and Path(best).is_dir() else checkpoint)
        self.state = state
        return True

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process: what they are made of knows its rank, so that they must not be sharded again."""
        args = self.args
        pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
        if self.streaming:
            return DataLoader(
                self.train_dataset,
                args.per_device_train_batch_size,
                collate_fn=collate,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # by default it draws from the state that a resumed run has just restored
            )
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
            pin_memory=pin_memory,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._place: Place | None = self.train_dataset.place() if self.streaming else None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for index, batch in enumerate(batches):
            batch["micro_batch"] = index
        return batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        if inputs.get("micro_batch") == 0:  # none where this is called on its own, not by `train`
            self._terms = []
            device = torch.get_device_module(self.args.device) if self.args.device.type != "cpu" else None
            self._step_start = _StepStart(
                torch.get_rng_state(),
                device.get_rng_state() if device is not None else None,
                dict(self.memory_states),
                dict(self._sums),
                dict(self._memory_sums),
                self._tr_loss.clone(),
            )
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        micro_batch = inputs.pop("micro_batch", 0)
        unwrapped = self.accelerator.unwrap_model(model)
        memory = has_memory(unwrapped)
        if not memory:
            inputs = backbone_inputs(unwrapped, inputs)
        scored = inputs["shift_labels"] != IGNORED
        if memory:
            state = self.memory_states.get(micro_batch) if self.carry_memory else None
            compared = take_sample(scored, self.args.routing_sample) if self.args.lambda_routing > 0 else False
            inputs |= {"memory_state": state, "output_memory": True, "output_divergence": compared}
        # Of a process whose rows are all empty there is nothing to divide.
        num_items = torch.as_tensor(scored.sum() if num_items_in_batch is None else num_items_in_batch).clamp_min(1)
        outputs = model(**inputs, num_items_in_batch=num_items, use_cache=False, output_logits=False)
        loss = outputs.loss
        self._add("targets", scored.sum())
        self._add("lm_loss", loss.detach() * num_items)
        self._add("top1_acc", outputs.correct.sum())
        self._terms.append({"L_LM": loss.detach()})
        if memory:
            if self.carry_memory and model.training:
                self.memory_states[micro_batch] = outputs.memory_state.detach()
            loss = loss + self._memory_terms(outputs, scored, unwrapped.config.addressing) / num_items
            if self._step_is_logged():
                self._add_memory_statistics(outputs, scored, state, inputs.get("memory_reset"), unwrapped.config)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # distributed training averages gradients over processes
        return (loss, outputs) if return_outputs else loss

    def _memory_terms(self, outputs, scored: Tensor, addressing: str) -> Tensor:
        """Weighted sum over scored targets of the memory's loss terms; adds each to the log."""
        gates = outputs.write_gates * scored
        self._add("write_gate", gates.detach().sum())
        # "simplified" write weights do not contain the gate.
        share = scored if addressing == "simplified" else gates.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.lambda_entropy > 0):
            entropy = (share * write_entropy(outputs.write_weights)).sum()
        self._add("entropy_loss", entropy.detach())
        self._terms[-1]["L_entropy"] = entropy.detach()
        total = self.args.lambda_entropy * entropy
        if self.args.lambda_routing > 0:
            # Not scored or not in the sample: the divergence is 0.
            routing = -(gates * outputs.divergence).sum() / self.args.routing_sample
            self._add("routing_loss", routing.detach())
            self._terms[-1]["L_routing"] = routing.detach()
            total = total + self.args.lambda_routing * routing
        return total

    def _step_is_logged(self) -> bool:
        """Whether the step being computed will be logged: what costs time is worked out for no other."""
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return True
        step = self.state.global_step + 1
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    @torch.no_grad()
    def _add_memory_statistics(self, outputs, scored: Tensor, state: MemoryState | None, reset, config) -> None:
        """Add what is logged of the memory."""
        gates = outputs.write_gates
        writes = effective_writes(outputs.write_weights, gates, config.addressing)
        spread = write_entropy((writes * scored[..., None]).sum(1)).exp() / config.mem_slots
        filled = None if state is None else (state.memory != 0).any(-1)
        beyond = reads_beyond_window(outputs.read_weights, writes, config.n_positions, reset, filled)
        added = {
            "targets": scored.sum(),
            "write_rate": ((gates > OPEN_GATE) & scored).sum(),
            "slot_use": (spread * scored.sum(1)).sum(),
            "read_strength": (outputs.read_strengths.mean(-1) * scored).sum(),
            "reads_beyond_window": (beyond * scored).sum(),
            "gate_histogram": torch.histc(gates[scored].float(), GATE_BINS, 0, 1),
        }
        for name, value in added.items():
            self._add(name, value, self._memory_sums)

    def _add(self, name: str, value: Tensor, sums: Counter[str] | None = None) -> None:
        sums = self._sums if sums is None else sums
        sums[name] = sums[name] + value  # not in place: what a step starts from is kept

    # Numbers that are not finite

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self._require_finite(model, norm)
        return norm

    def _require_finite(self, model, grad_norm: Tensor | float) -> None:
        """Once a step, after all its micro-batches and before the weights change, in all processes alike."""
        finite = torch.stack([torch.stack([*terms.values()]).isfinite().all() for terms in self._terms])
        everywhere = self.accelerator.gather(finite.all().int()[None]).tolist()  # by process
        # With fp16 a gradient may overflow: the scaler leaves that step out.
        if all(everywhere) and (self.accelerator.scaler is not None or math.isfinite(grad_norm)):
            return
        step = self.state.global_step + 1
        found = [
            f"{name} is {float(x):g} in micro-batch {index} of process {self.args.process_index}, {self._where(index)}"
            for index, terms in enumerate(self._terms)
            for name, x in terms.items()
            if not math.isfinite(x)
        ]
        if not found and all(everywhere):
            batches = "; ".join(self._where(index) for index in range(len(self._terms)))
            found = [f"all loss terms are finite, but the gradient's norm is {float(grad_norm):g} ({batches})"]
        elif not found:
            found = [f"in process {everywhere.index(0)}"]
        start = self._step_start
        torch.set_rng_state(start.random)
        if start.device_random is not None:
            torch.get_device_module(self.args.device).set_rng_state(start.device_random)
        self.memory_states = start.memory_states
        self._sums, self._memory_sums = Counter(start.sums), Counter(start.memory_sums)
        self._tr_loss.copy_(start.tr_loss)
        if self.streaming:
            self.train_dataset.go_to(self._place)
        self._save_checkpoint(model, None)
        raise NonFiniteError(
            f"step {step}: the loss is not finite: {'; '.join(found)}. {self._checkpoint_folder()} holds the state "
            "before this step. Lower --learning_rate, check the data named here, or leave the term out."
        )

    def _where(self, micro_batch: int) -> str:
        """Which data a micro-batch of the step under way holds."""
        if self.streaming:
            return f"examples number {self.state.global_step + 1} of its rows in the stream"
        sampler = self.get_train_dataloader().batch_sampler
        epoch, step = divmod(self.state.global_step, len(sampler) // self.args.gradient_accumulation_steps)
        sampler.set_epoch(epoch)
        number = step * self.args.gradient_accumulation_steps + micro_batch
        examples = [index for index in next(islice(sampler, number, None)) if index != EMPTY]
        ranges = [self.train_dataset.target_range(index) for index in examples]
        return f"examples {examples} (tokens {', '.join(f'{a} to {b}' for a, b in ranges)} of the training text)"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.streaming:  # transformers counts from the last resumption; a stream has no epochs
            self.state.epoch = self.state.global_step / self.state.max_steps
        if "loss" in logs and self._sums:
            histogram = None
            for part in (self._sums, self._memory_sums):
                if part:
                    sums = self.accelerator.reduce({name: x.double() for name, x in part.items()}, "sum")
                    count, histogram = float(sums.pop("targets")), sums.pop("gate_histogram", None)
                    logs |= {name: float(x) / count for name, x in sums.items() if count}
                    part.clear()
            super().log(logs, start_time)
            if histogram is not None and self.is_world_process_zero():
                edges = np.linspace(0, 1, GATE_BINS + 1)
                counts = histogram.cpu().numpy()
                name = "train/write_gate_histogram"
                report_histogram(self.callback_handler.callbacks, name, counts, edges, self.state.global_step)
            return
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: ExampleDataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the whole split, token-weighted: see `dnc_gpt2.metrics`. Leaves the training streams alone.

        Where there is a text to tune the memory's pointer on, that comes first.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.tune_pointer()
        result = evaluate(
            self.accelerator.unwrap_model(self.model),
            dataset,
            streams=self.eval_streams,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            gather=partial(self.accelerator.reduce, reduction="sum") if self.args.world_size > 1 else None,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            **self._evaluation_options(),
        )
        metrics = result.metrics(dataset.text.num_bytes, dataset.text.num_words)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics |= {f"{metric_key_prefix}_runtime": result.seconds}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def tune_pointer(self) -> None:
        """Find the memory's `pointer_weight` on the text that is held out for this, if there is one."""
        if self.tuning_dataset is not None:
            tune_pointer(self.accelerator.unwrap_model(self.model), self.tuning_dataset, **self._evaluation_options())

    def _evaluation_options(self) -> dict[str, Any]:
        return {
            "carry_memory": self.carry_memory,
            "batch_size": self.args.per_device_eval_batch_size,
            "autocast": self.accelerator.autocast,
        }

    def free_optimizer(self) -> None:
        """Let go of the optimizer, which holds twice the weights; training is over."""
        for owner in (self, self.callback_handler):
            owner.optimizer = owner.lr_scheduler = None
        self.accelerator.free_memory()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The library's general card, unless there is a card already: that one tells more."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)

    # Checkpoints: whole or not there

    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model, trial) -> None:
        folder = self._checkpoint_folder()
        if folder == self._closed:  # at the end of a step that ends an epoch
            return
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when this one is whole
        replaced = folder.with_name(f".{folder.name}.replaced")
        try:
            with saving(folder, self.args.output_dir):
                if self.args.should_save and folder.is_dir():
                    shutil.rmtree(replaced, ignore_errors=True)
                    folder.rename(replaced)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                if not self.args.push_to_hub:
                    self._close(folder)
        except BaseException:
            if self.args.should_save and self._closed != folder:  # makes room for what else is to be written
                shutil.rmtree(folder, ignore_errors=True)
                if replaced.is_dir():
                    replaced.rename(folder)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            shutil.rmtree(replaced, ignore_errors=True)
            if limit is not None:
                for path in filter(fault, numbered(folder.parent)):  # half-written ones do not count
                    shutil.rmtree(path, ignore_errors=True)
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._close(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _close(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            close(folder, step=self.state.global_step, seed=self.args.seed)
        self.accelerator.wait_for_everyone()
        self._closed = folder

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers.

        Raises:
            OSError: the model cannot be written.
        """
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        with saving(output_dir or self.args.output_dir, self.args.output_dir):
            super().save_model(output_dir)

    def save_state(self) -> None:
        """As in transformers, but a reader sees the old state or the new, never a part."""
        if self.args.should_save:
            with replacing(Path(self.args.output_dir) / TRAINER_STATE_NAME) as temporary:
                self.state.save_to_json(str(temporary))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with reading(resume_from_checkpoint):
            if any(Path(resume_from_checkpoint).glob("pytorch_model.bin*")):
                raise ValueError("its weights are pickled (pytorch_model.bin); only safetensors are read")
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = self.accelerator.unwrap_model(self.model)._tied_weights_keys or ()
        wrong = {
            "missing": [name for name in load_result.missing_keys if name not in tied],
            "unknown": load_result.unexpected_keys,
        }
        if any(wrong.values()):
            raise ValueError("; ".join(f"{kind} tensors: {', '.join(names)}" for kind, names in wrong.items() if names))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint):
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # which have files of their own
            for name in () if sharded else (OPTIMIZER_NAME, SCHEDULER_NAME):
                if not (Path(checkpoint) / name).is_file():
                    raise ValueError(f"it has no {name}")
            super()._load_optimizer_and_scheduler(checkpoint)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                        moment = self.optimizer.state.get(parameter, {}).get(name)
                        if moment is not None and moment.shape != parameter.shape:
                            raise ValueError(
                                f"the optimizer's {name} has the shape {tuple(moment.shape)} for a parameter of the "
                                f"shape {tuple(parameter.shape)}"
                            )

    # The carried memory, the place in a streamed corpus and what is still to be logged are, like the random state, what
    # a process needs to go on as if nothing had happened.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.streaming:
            self.train_dataset.save(self._data_file(output_dir))
        logged = torch.tensor(self._globalstep_last_logged)
        sums = {"tr_loss": self._tr_loss, "last_logged": logged}
        for kind, part in (("sum", self._sums), ("memory", self._memory_sums)):
            sums |= {f"{kind}.{name}": x for name, x in part.items()}
        save_file({name: x.clone() for name, x in sums.items()}, self._log_file(output_dir), metadata={"format": "pt"})
        if self.carry_memory and self.memory_states:
            tensors = {
                f"{index}.{name}": x.contiguous()
                for index, state in self.memory_states.items()
                for name, x in state._asdict().items()
                if x is not None
            }
            save_file(tensors, self._memory_file(output_dir), metadata={"format": "pt"})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint):
            rank = "" if self.args.world_size == 1 else f"_{self.args.process_index}"
            self._require(Path(checkpoint) / f"rng_state{rank}.pth", "options")
            super()._load_rng_state(checkpoint)
            self._load_log(self._log_file(checkpoint))
            if self.streaming:
                self._require(self._data_file(checkpoint), "--streaming")
                self.train_dataset.load(self._data_file(checkpoint))
            if self.carry_memory and has_memory(self.accelerator.unwrap_model(self.model)):
                self._load_memory(self._memory_file(checkpoint))

    def _load_log(self, path: Path) -> None:
        self._require(path, "options")
        sums = {name: x.to(self.args.device) for name, x in load_file(path).items()}
        self._tr_loss.copy_(sums.pop("tr_loss"))
        self._globalstep_last_logged = int(sums.pop("last_logged"))
        parts = {"sum": Counter(), "memory": Counter()}
        for name, x in sums.items():
            kind, name = name.split(".")
            parts[kind][name] = x
        self._sums, self._memory_sums = parts["sum"], parts["memory"]

    def _load_memory(self, path: Path) -> None:
        if self.state.global_step > 0:  # before the first step there is no memory
            self._require(path, "--carry_memory")
        states: dict[int, dict[str, Tensor | None]] = {}
        for name, x in load_file(path).items() if path.is_file() else ():
            index, field_name = name.split(".")
            states.setdefault(int(index), dict.fromkeys(MemoryState._fields))[field_name] = x.to(self.args.device)
        self.memory_states = {index: MemoryState(**state) for index, state in states.items()}
        memory = self.accelerator.unwrap_model(self.model).transformer.memory
        for state in self.memory_states.values():
            memory.check_state(state, self.args.per_device_train_batch_size)

    @staticmethod
    def _require(path: Path, option: str) -> None:
        if not path.is_file():
            raise ValueError(
                f"{path.parent} has no {path.name}: resume with the number of processes and the {option} that the run "
                "was started with."
            )

    def _memory_file(self, folder: str) -> Path:
        return Path(folder) / f"memory_state_{self.args.process_index}.safetensors"

    def _log_file(self, folder: str) -> Path:
        return Path(folder) / f"log_state_{self.args.process_index}.safetensors"

    def _data_file(self, folder: str) -> Path:
        return Path(folder) / f"data_state_{self.args.process_index}.safetensors"


def take_sample(scored: Tensor, share: float) -> Tensor:
    """Every 1 / `share`-th true entry of `scored`, from a random start: each is taken with the same probability."""
    if share == 1:
        return scored
    counts = (
        scored.flatten().cumsum(0).view(scored.shape)
        + torch.rand((), dtype=torch.float64, device=scored.device) / share
    )
    return scored & ((counts * share).floor() > ((counts - 1) * share).floor())


class _EpochLoader(DataLoader):
    """Tells its batch sampler the epoch, as the training loop tells its loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
