"""Side-by-side evaluation of saved checkpoints and all that is written about it."""

import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from . import plots, report
from .corpus import Exam, load_corpus
from .data import DataArguments, ExampleDataset, TokenizedText, load_tokenizer, tokenize_texts
from .evaluation import evaluate
from .metrics import MEMORY_METRICS
from .models import count_parameters, has_memory, load_model, require_checkpoint, window_size

EINSTEIN = "Albert Einstein was born in 1879"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def compare_checkpoints(
    checkpoints: Mapping[str, str],
    data: DataArguments,
    output_dir: str,
    *,
    accelerator: Accelerator,
    batch_size: int = 8,
    seed: int | None = None,
    inspect: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate checkpoints on the validation split and write JSON, Markdown and figures to `output_dir`.

    Args:
        checkpoints: name -> folder or hub name; the first is the reference.
        data: names the split and how it is read.
        batch_size: examples at a time where no memory is carried.
        seed: of the training, for the record.
        inspect: texts whose memory writes are recorded, beside `EINSTEIN`.

    Returns:
        The comparison, as in comparison.json; every process has it, the main one writes.

    Raises:
        ValueError: a checkpoint cannot be loaded, or the tokenizers differ, or a text to inspect is empty.
    """
    for path in checkpoints.values():
        require_checkpoint(path)
    tokenizers = {name: load_tokenizer(path) for name, path in checkpoints.items()}
    corpus = load_corpus(data, ("validation",))
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
    text = tokenize_texts(corpus.texts["validation"], tokenizer, "validation", data.max_eval_tokens)
    dataset = evaluation_dataset(text, data)
    exam = Exam.of(corpus, dataset, tokenizer) if corpus.questions else None
    models: dict[str, Any] = {}
    inspections: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, path in checkpoints.items():
        model = load_model(path, trust_remote_code).to(accelerator.device)
        window = window_size(model, dataset.example_length)
        if (largest := int(text.tokens.max())) >= model.config.vocab_size:
            raise ValueError(
                f"{path} knows {model.config.vocab_size} tokens, but its tokenizer gives {largest}: save the tokenizer "
                "that it was trained with beside it."
            )
        result = evaluate(
            model,
            dataset,
            carry_memory=data.carry_memory,
            streams=data.eval_streams,
            batch_size=batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            gather=partial(accelerator.reduce, reduction="sum") if accelerator.num_processes > 1 else None,
            autocast=accelerator.autocast,
            description=f"Evaluating {name}",
            progress=progress and accelerator.is_main_process,
        )
        metrics = dict.fromkeys(MEMORY_METRICS) | result.metrics(text.num_bytes, text.num_words)
        metrics |= exam.recall(result.columns["rank"], window) if exam else {}
        models[name] = {"path": str(path), "parameters": count_parameters(model), "window": window, "metrics": metrics}
        if has_memory(model):
            inspections[name] = {
                sentence: report.write_inspection_records(inspect_writes(model, tokenizer, sentence))
                for sentence in dict.fromkeys((EINSTEIN, *inspect))
            }
    first = models[reference]["window"]
    comparison = {
        "models": models,
        "delta_percent": report.delta_percent(models),
        "data": {
            **corpus.description,
            "scored_tokens": dataset.num_targets,
            "bytes": text.num_bytes,
            "words": text.num_words,
            "example_length": dataset.example_length,
            "carry_memory": data.carry_memory,
            "eval_streams": data.eval_streams if data.carry_memory else None,
            "reset_at_documents": data.reset_at_documents,
            **(exam.guessing(first) if exam else {}),
        },
        "memory_writes": inspections,
        "seed": seed,
        "versions": versions(),
    }
    if accelerator.is_main_process:
        write_comparison(comparison, output_dir)
    accelerator.wait_for_everyone()
    return comparison


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


@torch.no_grad()
def inspect_writes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, float]]:
    """Each token of `text`, as text, and how far the write gate opens for it.

    Raises:
        ValueError: the text has no token.
    """
    ids = _ids(tokenizer, text)
    if not ids:
        raise ValueError("The text to inspect is empty: give --inspect a text with at least one token.")
    device = next(model.parameters()).device
    gates = model.eval()(torch.tensor([ids], device=device), output_memory=True, use_cache=False).write_gates[0]
    tokens = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]
    return list(zip(tokens, gates.tolist(), strict=True))


def histories(comparison: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Training history of each compared checkpoint that has one beside it."""
    found = {}
    for name, model in comparison["models"].items():
        path = Path(model["path"]) / TRAINER_STATE_NAME
        if path.is_file():
            found[name] = TrainerState.load_from_json(str(path)).log_history
    return found


def write_comparison(comparison: Mapping[str, Any], output_dir: str) -> None:
    """Write JSON, Markdown and the figures that the comparison has data for."""
    folder = Path(output_dir)
    report.write_comparison(comparison, folder)
    if curves := histories(comparison):
        plots.training_curves(curves, folder / "training_curves.png")
    if any(report.recall_of(model) for model in comparison["models"].values()):
        plots.recall_by_distance(comparison, folder / "recall_by_distance.png")


def printed(comparison: Mapping[str, Any]) -> str:
    """The comparison for a terminal: the table, then the memory writes."""
    parts = [report.comparison_table(comparison)]
    for name, texts in comparison["memory_writes"].items():
        for text, records in texts.items():
            tokens = [(record["token"], record["write_gate"]) for record in records]
            heading = f"  Memory writes of {report.display_name(name)}: {text}"
            parts.append("\n".join([heading, "", *report.write_inspection_lines(tokens)]))
    return "\n\n".join(parts)
