"""The model card that goes with a checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from . import report

REPORTED = {"ppl": ("perplexity", "Perplexity"), "top1_acc": ("accuracy", "Top-1 accuracy")}


def model_card(
    name: str,
    metrics: Mapping[str, float],
    training: Mapping[str, Any],
    comparison: Mapping[str, Any] | None = None,
    *,
    memory: bool,
) -> str:
    """A card with metadata for the Hub: how to load the model, how and on what it was trained, how it compares.

    Args:
        name: of the model.
        metrics: its metrics on the validation split, by the keys of `dnc_gpt2.metrics`.
        training: option -> value, what it was trained with; what is `None` is left out.
        comparison: with other models, as in comparison.json.
        memory: whether the model has a memory, and brings code along.
    """
    dataset = str(training.get("dataset") or "text")
    results = [
        EvalResult("text-generation", dataset.replace(" ", "-"), dataset, kind, float(metrics[key]), metric_name=label)
        for key, (kind, label) in REPORTED.items()
        if math.isfinite(float(metrics.get(key, math.nan)))
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "dnc", "memory"] if memory else ["gpt2"],
        model_name=name,
        eval_results=results or None,
    )
    remote = ", trust_remote_code=True" if memory else ""
    what = (
        "GPT-2 with a differentiable external memory (a DNC, Graves et al. 2016) that reaches past its window."
        if memory
        else "A plain GPT-2, the reference of a GPT-2 with an external memory."
    )
    usage = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "..."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder{remote})
model = AutoModelForCausalLM.from_pretrained(folder{remote})
```"""
    parts = [f"---\n{data.to_yaml()}\n---", f"# {report.escaped(name)}", what]
    if comparison is not None and name in (comparison.get("differences") or {}):
        parts.append(report.escaped(report.verdict(comparison, name)))
    known = {option: value for option, value in training.items() if value is not None}
    parts += ["## Use", usage, "## Training", report.settings_table(known)]
    parts.append("## Validation")
    if comparison is not None:
        parts.append(report.comparison_markdown(comparison).replace("\n#", "\n##").removeprefix("#").strip())
    else:
        rows = (f"| {key} | {value:.4g} |" for key, value in metrics.items())
        parts.append("\n".join(["| Metric | Value |", "| --- | ---: |", *rows]))
    return "\n\n".join(parts) + "\n"
