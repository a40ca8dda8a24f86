"""Side-by-side evaluation of saved checkpoints and all that is written about it."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import AutoConfig, GPT2Config, PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from configuration_dnc_gpt2 import DNCGPT2Config

from . import plots, report
from .corpus import Corpus, Exam, load_corpus
from .data import DataArguments
from .evaluation import Runner, evaluate
from .examples import ExampleDataset
from .html_report import write_html_report
from .inspection import Inspection, inspect, inspect_tokens
from .metrics import MEMORY_METRICS
from .models import count_parameters, has_memory, load_model, require_checkpoint, window_size
from .opponents import NeuralCache, NeuralCacheRunner, OverlappingRunner, tune_neural_cache
from .options import recall_run
from .pointing import TUNING_TOKENS
from .profiles import Profile, distances, positions
from .statistics import RESAMPLES, paired_difference, resampling_units
from .tokenization import TokenizedText, load_tokenizer, split_end, tokenize_texts

logger = logging.getLogger(__name__)

EINSTEIN = "Albert Einstein was born in 1879"
EXCERPT = "The beginning of the validation text"
EXCERPT_WINDOWS = 8
MOST_EXCERPT_TOKENS = 512


class Comparison:
    """Evaluates one model after the other on the validation split; what is finished is written at once.

    The first model is the reference: of every other the paired difference of losses is reported.

    Args:
        corpus: its validation text is scored; on its training text, read again if it is not there, a cache is tuned.
        tokenizer: of all models.
        data: how the text is read.
        output_dir: folder of comparison.json and comparison.md.
        batch_size: examples at a time where no memory is carried.
        seed: of the training, for the record.
        inspect: texts whose memory writes are recorded, beside `EINSTEIN`.
        report_path: file of the HTML report; `None` writes none.

    Attributes:
        result: the comparison so far, as in comparison.json; every process has it, the main one writes.
        inspections: model -> text -> what its memory does with it.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        data: DataArguments,
        output_dir: str,
        *,
        accelerator: Accelerator,
        batch_size: int = 8,
        seed: int | None = None,
        inspect: Sequence[str] = (),
        report_path: str | os.PathLike | None = None,
        trust_remote_code: bool = False,
        progress: bool = True,
    ):
        self.tokenizer, self.data, self.output_dir = tokenizer, data, output_dir
        self.accelerator, self.batch_size, self.inspect = accelerator, batch_size, inspect
        self.report_path = report_path
        self.trust_remote_code, self.progress = trust_remote_code, progress
        self.training_texts = corpus.texts.get("train")
        self.text = tokenize_texts(corpus.texts["validation"], tokenizer, "validation", data.max_eval_tokens)
        self.dataset = evaluation_dataset(self.text, data)
        self.exam = Exam.of(corpus, self.dataset, tokenizer) if corpus.questions else None
        self.units = resampling_units(self.text.document_starts.numpy())
        self.reference_nll: np.ndarray | None = None
        self.profiles: dict[str, Profile] = {}
        self.inspections: dict[str, dict[str, Inspection]] = {}
        self.result: dict[str, Any] = {
            "models": {},
            "delta_percent": {},
            "differences": {},
            "profiles": {},
            "data": {
                **corpus.description,
                "scored_tokens": self.dataset.num_targets,
                "bytes": self.text.num_bytes,
                "words": self.text.num_words,
                "example_length": self.dataset.example_length,
                "carry_memory": data.carry_memory,
                "eval_streams": data.eval_streams if data.carry_memory else None,
                "reset_at_documents": data.reset_at_documents,
                "bootstrap": f"{RESAMPLES:,} resamples of {self.units.description}",
            },
            "memory_writes": {},
            "seed": seed,
            "versions": report.versions(),
        }

    def add(self, name: str, path: str) -> None:
        """Evaluate a checkpoint: a folder or hub name.

        Raises:
            ValueError: it cannot be loaded, or does not know the tokenizer's tokens.
        """
        model = self._load(path)
        weight = getattr(model.config, "pointer_weight", 0.0)
        self._evaluate(name, path, model, details={"pointer weight": weight} if weight else None)
        if (recall_run(path) or {}).get("untrained"):
            self.result["models"][name]["untrained"] = True
        if has_memory(model):
            texts = dict.fromkeys((EINSTEIN, *self.inspect))
            inspections = {text: inspect(model, self.tokenizer, text) for text in texts}
            self.result["memory_writes"][name] = {
                text: report.write_inspection_records(list(zip(found.tokens, found.write_gates, strict=True)))
                for text, found in inspections.items()
            }
            if self.report_path:
                length = min(MOST_EXCERPT_TOKENS, EXCERPT_WINDOWS * model.config.n_positions)
                excerpt = inspect_tokens(model, self.tokenizer, self.text.tokens[:length])
                self.inspections[name] = {EXCERPT: excerpt, **inspections}
        self._write()

    def add_scored(self, opponent: str, path: str, entries: int) -> None:
        """Evaluate a plain GPT-2's checkpoint as one of `opponents.SCORED` scores it.

        Args:
            entries: of the neural cache.
        """
        model = self._load(path)
        if opponent == "neural_cache":
            cache = self._tuned_cache(model, entries)
            runner = NeuralCacheRunner(model, cache)
            details = {"entries": cache.entries, "theta": cache.theta, "lambda": cache.share}
        else:
            runner = OverlappingRunner(model)
            details = {"stride": runner.stride(self.dataset.example_length)}
        self._evaluate(opponent, path, model, runner, details)
        self._write()

    def finish(self) -> dict[str, Any]:
        """Draw the figures and the HTML report; returns the comparison."""
        if self.accelerator.is_main_process:
            write_figures(self.result, self.output_dir)
            if self.report_path:
                write_html_report(self.result, self.report_path, histories(self.result), self.inspections)
        self.accelerator.wait_for_everyone()
        return self.result

    def _load(self, path: str) -> PreTrainedModel:
        model = load_model(path, self.trust_remote_code).to(self.accelerator.device)
        if (largest := int(self.text.tokens.max())) >= model.config.vocab_size:
            raise ValueError(
                f"{path} knows {model.config.vocab_size} tokens, but its tokenizer gives {largest}: save the tokenizer "
                "that it was trained with beside it."
            )
        return model

    def _evaluate(
        self,
        name: str,
        path: str,
        model: PreTrainedModel,
        runner: Runner | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        accelerator = self.accelerator
        models, window = self.result["models"], window_size(model, self.dataset.example_length)
        result = evaluate(
            model,
            self.dataset,
            runner=runner,
            carry_memory=self.data.carry_memory,
            streams=self.data.eval_streams,
            batch_size=self.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            gather=partial(accelerator.reduce, reduction="sum") if accelerator.num_processes > 1 else None,
            autocast=accelerator.autocast,
            description=f"Evaluating {name}",
            progress=self.progress and accelerator.is_main_process,
        )
        metrics = dict.fromkeys(MEMORY_METRICS) | result.metrics(self.text.num_bytes, self.text.num_words)
        first = next(iter(models.values()))["window"] if models else window
        # All models are asked the same questions, at distances in windows of the reference.
        metrics |= self.exam.recall(result.columns["rank"], first) if self.exam else {}
        models[name] = {"path": str(path), "parameters": count_parameters(model), "window": window, "metrics": metrics}
        models[name] |= {"scoring": dict(details)} if details else {}
        if not self.profiles:
            groups = {"position": positions(self.dataset.num_targets, first), "distance": distances(self.dataset)}
            self.profiles = {name: Profile(group, self.units) for name, group in groups.items()}
            self.result["profiles"] = {name: profile.result for name, profile in self.profiles.items()}
        for profile in self.profiles.values():
            profile.add(name, result.columns["nll"], self.reference_nll)
        if self.reference_nll is None:
            self.reference_nll = result.columns["nll"]
            self.result["data"] |= self.exam.guessing(first) if self.exam else {}
        else:
            self.result["differences"][name] = paired_difference(result.columns["nll"], self.reference_nll, self.units)
        self.result["delta_percent"] = report.delta_percent(models)

    def _tuned_cache(self, model: PreTrainedModel, entries: int) -> NeuralCache:
        data = self.data
        if not data.held_out_tokens and self.accelerator.is_main_process:
            logger.warning(
                "The neural cache is tuned on the end of the training text, which its model was trained on, so that it "
                "may trust the model too much: train with --held_out_tokens %d.",
                TUNING_TOKENS,
            )
        texts = self.training_texts or load_corpus(data, ("train",)).texts["train"]
        text = tokenize_texts(texts, self.tokenizer, "training", data.max_train_tokens)
        if data.held_out_tokens:
            _, text = split_end(text, data.held_out_tokens, self.tokenizer)
        return tune_neural_cache(
            model,
            tuning_dataset(text, data, self.tokenizer),
            entries,
            carry_memory=data.carry_memory,
            batch_size=self.batch_size,
            autocast=self.accelerator.autocast,
        )

    def _write(self) -> None:
        if self.accelerator.is_main_process:
            report.write_comparison(self.result, self.output_dir)


def compare_checkpoints(
    checkpoints: Mapping[str, str],
    data: DataArguments,
    output_dir: str,
    *,
    opponents: Sequence[str] = (),
    cache_entries: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate checkpoints on the validation split and write JSON, Markdown and figures to `output_dir`.

    Args:
        checkpoints: name -> folder or hub name; the first is the reference.
        data: names the split and how it is read.
        opponents: of `opponents.SCORED`, beside the checkpoints. They score the first plain GPT-2 among these.
        cache_entries: of the neural cache; as many as the first memory among the checkpoints has slots by default.
        options: of `Comparison`.

    Returns:
        The comparison, as in comparison.json.

    Raises:
        ValueError: a checkpoint cannot be loaded, or the tokenizers differ, or a text to inspect is empty, or the
            opponents find no plain GPT-2 among the checkpoints or, where `cache_entries` is not given, no memory.
    """
    for name, path in checkpoints.items():
        if name in opponents:
            raise ValueError(f"The checkpoint {path} has the name of the opponent {name}: rename its folder.")
        require_checkpoint(path)
    trusted = options.get("trust_remote_code", False)
    tokenizers = {name: load_tokenizer(path, trusted) for name, path in checkpoints.items()}
    corpus = load_corpus(data, ("validation", "train") if "neural_cache" in opponents else ("validation",))
    sample = corpus.texts["validation"][0][:10_000]
    reference, *others = tokenizers
    tokenizer = tokenizers[reference]
    for other in others:
        same_vocabulary = tokenizers[other].get_vocab() == tokenizer.get_vocab()
        if not same_vocabulary or _ids(tokenizers[other], sample) != _ids(tokenizer, sample):
            raise ValueError(
                f"{checkpoints[other]} and {checkpoints[reference]} have different tokenizers, so that their numbers "
                "cannot be compared: compare checkpoints of one tokenizer."
            )
    plain, entries = _scored_by(opponents, checkpoints, cache_entries, trusted)
    comparison = Comparison(corpus, tokenizer, data, output_dir, **options)
    for name, path in checkpoints.items():
        comparison.add(name, path)
    for opponent in opponents:
        comparison.add_scored(opponent, plain, entries)
    return comparison.finish()


def _scored_by(
    opponents: Sequence[str], checkpoints: Mapping[str, str], cache_entries: int | None, trust_remote_code: bool
) -> tuple[str, int]:
    """The checkpoint that these opponents score, and the entries of the neural cache."""
    if not opponents:
        return "", 0
    configs = {
        path: AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code) for path in checkpoints.values()
    }
    plain = [path for path, config in configs.items() if config.model_type == GPT2Config.model_type]
    if not plain:
        raise ValueError(f"--opponents {','.join(opponents)} score a plain GPT-2: name its checkpoint too.")
    slots = [config.mem_slots for config in configs.values() if config.model_type == DNCGPT2Config.model_type]
    entries = next(iter(slots), 0) if cache_entries is None else cache_entries
    if "neural_cache" in opponents and not entries:
        raise ValueError(
            "--opponents neural_cache has as many entries as a memory has slots: name a checkpoint with memory too, "
            "or set --cache_entries."
        )
    return plain[0], entries


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def evaluation_dataset(text: TokenizedText, data: DataArguments) -> ExampleDataset:
    """The validation examples, as the options say that they are read."""
    return ExampleDataset(
        text,
        data.seq_len,
        data.windows_per_example,
        streams=data.eval_streams if data.carry_memory else None,
        reset_at_documents=data.reset_at_documents,
    )


def tuning_dataset(text: TokenizedText, data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> ExampleDataset:
    """The last `TUNING_TOKENS` of a text; where memory is carried one stream, so that it fills as in a long one."""
    if len(text.tokens) - 1 > TUNING_TOKENS:
        _, text = split_end(text, TUNING_TOKENS, tokenizer)
    return evaluation_dataset(text, replace(data, eval_streams=1))


def histories(comparison: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Training history of each compared checkpoint that has one beside it."""
    found = {}
    for name, model in comparison["models"].items():
        path = Path(model["path"]) / TRAINER_STATE_NAME
        if path.is_file():
            found[name] = TrainerState.load_from_json(str(path)).log_history
    return found


def write_figures(comparison: Mapping[str, Any], output_dir: str) -> None:
    """Draw the figures that the comparison has data for."""
    folder = Path(output_dir)
    if curves := histories(comparison):
        plots.training_curves(curves, folder / "training_curves.png", report.provenance(comparison))
    for name in comparison["profiles"]:
        plots.loss_profile(comparison, name, folder / f"loss_by_{name}.png")
    if any(report.recall_of(model) for model in comparison["models"].values()):
        plots.recall_by_distance(comparison, folder / "recall_by_distance.png")


def printed(comparison: Mapping[str, Any]) -> str:
    """The comparison for a terminal: the table, the paired differences, then the memory writes."""
    parts = [report.comparison_table(comparison)]
    if lines := report.difference_lines(comparison):
        parts.append("\n".join(lines))
    for name, texts in comparison["memory_writes"].items():
        for text, records in texts.items():
            tokens = [(record["token"], record["write_gate"]) for record in records]
            heading = f"  Memory writes of {report.display_name(name)}: {text}"
            parts.append("\n".join([heading, "", *report.write_inspection_lines(tokens)]))
    return "\n\n".join(parts)
