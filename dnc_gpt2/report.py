"""The report of a comparison: changes against the reference, table, Markdown, JSON, and the memory write inspection.

A comparison is the dictionary stored in `comparison.json`:

    {"models": {"baseline": {"path": str, "parameters": int, "metrics": {"ppl": float, ...}}, "dnc": {...}},
     "delta_percent": {"dnc": {"ppl": float or None, ...}}, "data": {...}, "seed": int, "versions": {...},
     "differences": {"dnc": {"loss": float, "loss_interval": [low, high] or None, "ppl_ratio": float, ...}},
     "profiles": {"position": {...}, "distance": {...}}}

The first model is the reference; the differences to it are those of `dnc_gpt2.statistics.paired_difference`, the
profiles those of `dnc_gpt2.profiles`. Only `models` has to be there. `None` (JSON null) means that a metric does not
exist for a model. A number that is not finite is a result and must not look like a missing one, but JSON has no such
numbers: it is stored as one of the strings "NaN", "Infinity" and "-Infinity", which `float` reads back. Everything here
takes either form.
"""

import json
import math
import os
import platform
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import METRICS, OPEN_GATE, ReportedMetric

MODEL_NAMES = {
    "baseline": "GPT2 Baseline",
    "dnc": "GPT2 + DNC",
    "widened": "GPT2 widened",
    "neural_cache": "GPT2 + cache",
    "overlapping": "GPT2 overlapping",
    "long_window": "GPT2 long window",
    "simplified": "GPT2 + simplified",
    "dnc_addressing": "GPT2 + Graves DNC",
}
"""Names shown for the models of a training run; other keys are shown as they are."""

DIFFERENCE_NOTE = (
    "Mean difference of the loss in nats a token on the same targets, and its exponential, the ratio of the "
    "perplexities. Percentile intervals of a paired bootstrap over documents, or over contiguous blocks of a text "
    "of few: see `bootstrap` below. They tell how far other text would give another result, not another training."
)

MODEL_HEADER = ["Model", "Path", "Parameters", "Scored with"]

BAR_WIDTH = 30
"""Blocks of a write gate of 1."""

MOST_WITH_CHANGES = 4
"""Models whose changes still fit a terminal's width beside their values."""

_MISSING = "—"
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
_TABLE_WIDTH = 66
_TOKEN_WIDTH = 21
_MAX_TOKEN_WIDTH = 40


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def display_name(model: str) -> str:
    """Name shown for the model with this key."""
    return MODEL_NAMES.get(model, model)


def delta_percent(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Change of every metric against the first model, in percent of the first model's value.

    `None` where either model lacks the metric or the reference is 0; NaN where a value is NaN or both are infinite.

    Raises:
        ValueError: there is no model.
    """
    reference, *others = _require_models(models)
    return {
        other: {
            metric.key: _change(_value(models[reference], metric.key), _value(models[other], metric.key))
            for metric in _present_metrics(models)
        }
        for other in others
    }


def recall_of(model: Mapping[str, Any]) -> dict[float, float]:
    """Recall of one model of a comparison by distance in windows, ascending; empty where it was not measured."""
    recall = model.get("metrics", {}).get("recall_by_distance") or {}
    return dict(sorted((float(distance), float(value)) for distance, value in recall.items() if value is not None))


def judged_model(comparison: Mapping[str, Any]) -> str | None:
    """The model that a comparison is about: the first after the reference that has a memory, or else the first after.

    `None` where there is no paired difference to judge a model by.
    """
    models = comparison["models"]
    others = [name for name in models if name in (comparison.get("differences") or {})]
    return next((name for name in others if has_memory_metrics(models[name])), others[0] if others else None)


def verdict(comparison: Mapping[str, Any], model: str | None = None) -> str:
    """What the comparison says of a model's perplexity against the first model's, in one sentence with its interval.

    Args:
        model: the model to judge, by default `judged_model`.
    """
    models = comparison["models"]
    reference, *_ = _require_models(models)
    differences = comparison.get("differences") or {}
    name = model or judged_model(comparison)
    if name is None:
        value = _format(_value(models[reference], "ppl"), ".2f")
        return f"{display_name(reference)} has a perplexity of {value}; there is no paired difference to judge it by."
    this, that = display_name(name), f"{display_name(reference)}'s"
    ratio, ends = float(differences[name]["ppl_ratio"]), differences[name]["ppl_ratio_interval"]
    if not math.isfinite(ratio):
        return f"{this} cannot be compared with {display_name(reference)}: a loss is not finite."
    found = f"{this} has a perplexity {_lower_or_higher(ratio)} than {that}"
    if ends is None:
        return f"{found}; how sure that is cannot be told, for want of independent text."
    ends = [float(end) for end in ends]
    method = (comparison.get("data") or {}).get("bootstrap")
    method = f"; {method}" if method else ""
    if ends[0] <= 1 <= ends[1]:
        spread = f"the 95 % interval reaches from {_lower_or_higher(ends[0])} to {_lower_or_higher(ends[1])}"
        return f"No difference is shown: {found}, but {spread}{method}."
    low, high = sorted(abs(100 * (end - 1)) for end in ends)
    interval = f"95 % interval {_percent(low)} to {_percent(high)} %{method}"
    untrained = models[reference].get("untrained", False)
    if has_memory_metrics(models[name]) and not (has_memory_metrics(models[reference]) or untrained):
        judged = "The memory helps" if ratio < 1 else "The memory hurts"
    else:
        judged = f"{this} is better" if ratio < 1 else f"{this} is worse"
    aside = f" {display_name(reference)} was not trained on this text." if untrained else ""
    return f"{judged}: {found} ({interval}).{aside}"


def has_memory_metrics(model: Mapping[str, Any]) -> bool:
    """Whether a model of a comparison has a memory."""
    return _value(model, "avg_gate") is not None


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The table for a terminal: a column a model, and for each model after the first its change, a tick or a cross.

    Of more than `MOST_WITH_CHANGES` models the changes are left to Markdown and JSON. Metrics without a better
    direction, and changes that round to 0, get neither tick nor cross.
    """
    models = comparison["models"]
    names = [display_name(model) for model in _require_models(models)]
    table = metric_rows(comparison)
    if len(names) > MOST_WITH_CHANGES:
        table = [row[: 1 + len(names)] for row in table]
    columns = []
    for index, column in enumerate(zip(*table, strict=True)):
        is_value, is_change = 1 <= index <= len(names), index > len(names)
        width = max(0 if is_change else 15 if is_value else 20, *map(display_width, column))
        columns.append([("   " if is_change else "  ") + _pad(cell, width, align_right=is_value) for cell in column])
    heading, *lines = ["".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    title = f"  FINAL {'COMPARISON' if len(names) > 1 else 'EVALUATION'} — {' vs '.join(names)}"
    width = max(_TABLE_WIDTH, *map(display_width, [title, heading, *lines]))
    return "\n".join(["═" * width, title, "═" * width, heading, f"  {'─' * (width - 4)}", *lines])


def difference_lines(comparison: Mapping[str, Any]) -> list[str]:
    """For a terminal, a line a model: the paired difference of its loss to the first model's, with its interval."""
    table = difference_rows(comparison)
    if not table:
        return []
    columns = []
    for index, column in enumerate(zip(*table, strict=True)):
        width = max(map(display_width, column))
        columns.append([_pad(cell, width, align_right=index > 0) for cell in column])
    return [f"  {'   '.join(cells)}".rstrip() for cells in zip(*columns, strict=True)]


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as a Markdown page: metrics, how it was evaluated, models, versions."""
    models = comparison["models"]
    names = [display_name(model) for model in _require_models(models)]
    header, *rows = metric_rows(comparison)
    alignment = ["---", *["---:"] * len(names), *["---"] * (len(names) - 1)]
    parts = [
        f"# {escaped(' vs '.join(names))}",
        escaped(verdict(comparison)),
        _markdown_table(header, rows, alignment),
        *_difference_sections(comparison),
        "## How it was evaluated",
        escaped(" ".join(evaluation_notes(comparison))),
        settings_table(evaluation_settings(comparison)),
        "## Models",
        _markdown_table(MODEL_HEADER, model_rows(comparison), ["---", "---", "---:", "---"]),
    ]
    if comparison.get("versions"):
        parts += ["## Versions", settings_table(_flat(comparison["versions"]))]
    return "\n\n".join(parts) + "\n"


def metric_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The table of metrics as text: its header, then a row a metric, values before changes."""
    models = comparison["models"]
    names = [display_name(model) for model in _require_models(models)]
    return [["Metric", *names, *_delta_headings(models)], *_table_rows(comparison)]


def difference_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The table of paired differences as text: its header, then a row a model; empty where there is no difference."""
    rows = _difference_rows(comparison)
    header = [_difference_heading(comparison), "Loss", "95 % interval", "Perplexity", "95 % interval"]
    return [header, *rows] if rows else []


def evaluation_notes(comparison: Mapping[str, Any]) -> list[str]:
    """Sentences on what the metrics are."""
    models = comparison["models"]
    names = [display_name(model) for model in models]
    notes = [
        "Every metric is an average over all scored tokens of the split, not over batches. Perplexity is exp of the "
        "mean loss. Padding is never scored. All models predict the same targets.",
        f"Write Rate is the fraction of tokens whose write gate is above {OPEN_GATE}.",
        f"{_MISSING} means that a model has no such metric.",
    ]
    if len(names) > 1:
        notes.append(f"Changes are in percent of {names[0]}.")
    if any(map(recall_of, models.values())):
        notes.append(
            "Recall is the fraction of answers whose tokens are all predicted right, also by the number of attention "
            "windows, those of the first model, between an answer and its fact; guessing always names the most "
            "frequent candidate."
        )
    return notes


def evaluation_settings(comparison: Mapping[str, Any]) -> dict[str, str]:
    """What was evaluated on, and the seed: name -> value as text."""
    seed = comparison.get("seed")
    settings = {**_flat(comparison.get("data") or {}), "seed": _MISSING if seed is None else str(seed)}
    return {name: _setting(value) for name, value in settings.items()}


def provenance(comparison: Mapping[str, Any]) -> dict[str, str]:
    """Seed and versions of a comparison, name -> text, for what carries such metadata."""
    seed = comparison.get("seed")
    known = {} if seed is None else {"seed": str(seed)}
    return known | {f"version of {name}": str(text) for name, text in (comparison.get("versions") or {}).items()}


def model_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """A row a model: name, path, parameters, how it was scored."""
    return [
        [
            display_name(key),
            str(model.get("path", _MISSING)),
            _format(_value(model, "parameters"), ",.0f"),
            ", ".join(f"{name} {_setting(value)}" for name, value in (model.get("scoring") or {}).items()),
        ]
        for key, model in comparison["models"].items()
    ]


def write_comparison(comparison: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Write `comparison.json` and `comparison.md` into `folder`, each replaced in one step."""
    write_text(Path(folder) / "comparison.json", to_json(comparison))
    write_text(Path(folder) / "comparison.md", comparison_markdown(comparison))


def write_inspection_lines(tokens: Sequence[tuple[str, float]]) -> list[str]:
    """Bar chart of the write gate of each token, given as (text, gate in [0, 1]); a started block is not drawn."""
    shown = [_clip(visible_text(token), _MAX_TOKEN_WIDTH) for token, _ in tokens]
    width = max([_TOKEN_WIDTH, *map(display_width, shown)])
    lines = [f"  {_pad('Token', width)}  Gate  bar", f"  {'─' * (width + 37)}"]
    for text, (_, gate) in zip(shown, tokens, strict=True):
        bar = "█" * int(BAR_WIDTH * min(max(gate, 0.0), 1.0)) if math.isfinite(gate) else ""
        lines.append(f"  {_pad(text, width)}  {gate:5.3f}  {bar}".rstrip())
    return lines


def write_inspection_records(tokens: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """The inspection for `to_json`: `[{"token": exact text, "write_gate": float}, ...]`."""
    return [{"token": token, "write_gate": float(gate)} for token, gate in tokens]


def to_json(value: Any) -> str:
    """Indented, valid JSON of nested containers; numbers that are not finite become strings (see the module)."""
    return json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file, so that a reader sees the old content or the new, never a part."""
    with replacing(path) as temporary:
        # A lone surrogate, as a broken token may hold, must not cost the whole report.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write to, moved to `path` on success and removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def visible_text(token: str) -> str:
    """Text of a token that keeps to its line: one leading space dropped, other leading or trailing spaces as ␣,
    control and format characters escaped."""
    text = token.removeprefix(" ") if token.strip(" ") else token
    text = re.sub("^ +| +$", lambda spaces: "␣" * len(spaces[0]), text)
    return "".join(_visible_character(character) for character in text)


def display_width(text: str) -> int:
    """Columns that `text` takes in a terminal: 2 for wide characters, 0 for combining ones."""
    return sum(_character_width(character) for character in text)


def _require_models(models: Mapping[str, Any]) -> list[str]:
    if not models:
        raise ValueError("A comparison needs at least one model, got none.")
    return list(models)


def _value(model: Mapping[str, Any], key: str) -> float | None:
    value = model.get("metrics", {}).get(key)
    if value is None and key == "parameters":
        value = model.get(key)
    return None if value is None else float(value)


def _present_metrics(models: Mapping[str, Mapping[str, Any]]) -> list[ReportedMetric]:
    # A metric that all models name as null keeps its row.
    named = {key for model in models.values() for key in (*model, *model.get("metrics", {}))}
    return [metric for metric in METRICS if metric.key in named]


def _change(reference: float | None, value: float | None) -> float | None:
    if reference is None or value is None or reference == 0:
        return None
    return 100 * (value - reference) / abs(reference)


def _delta_headings(models: Mapping[str, Any]) -> list[str]:
    _, *others = models
    return ["Δ"] if len(others) == 1 else [f"Δ {display_name(model)}" for model in others]


def _table_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    models = comparison["models"].values()
    recalls = [recall_of(model) for model in models]
    rows = [
        (metric.label, metric.better, metric.format, [_value(model, metric.key) for model in models])
        for metric in _present_metrics(comparison["models"])
    ]
    for distance in sorted({distance for recall in recalls for distance in recall}):
        label = f"Recall, {distance:g} Window{'s' * (distance != 1)}"
        rows.append((label, "higher", ".3f", [recall.get(distance) for recall in recalls]))
    guessing = (comparison.get("data") or {}).get("recall_by_guessing")
    if guessing is not None:
        rows.append(("Recall by Guessing", None, ".3f", [float(guessing)] * len(models)))
    return [
        [
            label + _ARROWS[better],
            *(_format(value, spec) for value in values),
            *(_format_change(_change(values[0], value), better) for value in values[1:]),
        ]
        for label, better, spec, values in rows
    ]


def _difference_heading(comparison: Mapping[str, Any]) -> str:
    return f"Against {display_name(next(iter(comparison['models'])))}"


def _difference_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            display_name(model),
            _format(float(row["loss"]), "+.4f"),
            _interval(row["loss_interval"], "+.4f"),
            f"x {_format(float(row['ppl_ratio']), '.4f')}",
            _interval(row["ppl_ratio_interval"], ".4f"),
        ]
        for model, row in (comparison.get("differences") or {}).items()
    ]


def _difference_sections(comparison: Mapping[str, Any]) -> list[str]:
    table = difference_rows(comparison)
    if not table:
        return []
    header, *rows = table
    return ["## Paired differences", _markdown_table(header, rows, ["---", *["---:"] * 4]), DIFFERENCE_NOTE]


def _interval(ends: Sequence[float] | None, spec: str) -> str:
    return _MISSING if ends is None else f"[{', '.join(_format(float(end), spec) for end in ends)}]"


def _lower_or_higher(ratio: float) -> str:
    return f"{_percent(abs(100 * (ratio - 1)))} % {'lower' if ratio < 1 else 'higher'}"


def _percent(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.1 or value == 0 else f"{value:.1g}"


def _format(value: float | None, spec: str) -> str:
    if value is None:
        return _MISSING
    if not math.isfinite(value):
        return str(value)
    text = format(value, spec)
    lost = value != 0 and not any(digit in "123456789" for digit in text)
    return f"{value:.2e}" if lost or ("," not in spec and abs(value) >= 1e7) else text


def _format_change(change: float | None, better: str | None) -> str:
    if change is None:
        return ""
    if math.isnan(change):
        return "nan"
    size = format(abs(change), ",.1f" if abs(change) < 1000 else ",.0f")
    if size == "0.0":
        return "0.0%"
    mark = "" if better is None else " ✓" if (change > 0) == (better == "higher") else " ✗"
    return f"{'▲' if change > 0 else '▼'}{size}%{mark}"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], alignment: Sequence[str]) -> str:
    lines = [list(map(escaped, header)), alignment, *(list(map(escaped, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(settings: Mapping[str, Any]) -> str:
    """Settings, name -> value, as a Markdown table."""
    rows = [[name, _setting(value)] for name, value in settings.items()]
    return _markdown_table(["Setting", "Value"], rows, ["---", "---"])


def _setting(value: Any) -> str:
    if value is None:
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if abs(value) < 10_000 else f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def escaped(text: str) -> str:
    """Text for Markdown, in a line and in a table's cell: neither a bar nor a tag in it is taken for markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _pad(text: str, width: int, align_right: bool = False) -> str:
    padding = " " * (width - display_width(text))
    return padding + text if align_right else text + padding


def _clip(text: str, width: int) -> str:
    if display_width(text) <= width:
        return text
    clipped, used = "", 0
    for character in text:
        used += _character_width(character)
        if used >= width:
            break
        clipped += character
    return clipped + "…"


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _visible_character(character: str) -> str:
    # Controls, formats such as direction marks, surrogates, private use, and line and paragraph separators.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character.encode("unicode_escape").decode("ascii")
    return character
