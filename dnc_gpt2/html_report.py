"""The HTML report of a comparison: one page that needs nothing else, for any screen, light and dark.

Everything that is shown travels in the page: the charts' library, and the data as JSON. A content security policy
forbids the page to load or send anything. Texts, names and paths are data: they are escaped here or set as text by the
page's script (`report_page.html`), never as markup.
"""

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from . import report
from .inspection import Inspection
from .plots import EMPTY_SLOT, history_points
from .profiles import NEVER
from .report import display_name, recall_of

MOST_POINTS = 400
"""Points of a curve; longer ones are thinned out evenly."""
MOST_CELLS = 60_000
"""Slots times moments of a picture of the memory; of longer texts every second, third, ... token is shown."""

_COLOURS = ("#2f81f7", "#e8743b", "#12a37f", "#d6539c", "#b58900", "#8a63d2")
_DASHES = ("solid", "dash", "dot", "dashdot")

Figure = dict[str, Any]
Inspections = Mapping[str, Mapping[str, Inspection]]


def write_html_report(
    comparison: Mapping[str, Any],
    path: str | os.PathLike,
    histories: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    inspections: Inspections | None = None,
) -> None:
    """Write the page of `html_report` to `path`, replaced in one step."""
    report.write_text(path, html_report(comparison, histories, inspections))


def html_report(
    comparison: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    inspections: Inspections | None = None,
) -> str:
    """The whole page. What there are no data for is left out.

    Args:
        comparison: as in `report`.
        histories: for each model the `log_history` of its trainer state.
        inspections: model with memory -> title of a text -> what the memory did with it.
    """
    names = [display_name(model) for model in comparison["models"]]
    figures = [
        *training_figures(histories or {}),
        *profile_figures(comparison),
        *recall_figures(comparison),
    ]
    data = {
        "figures": figures,
        "empty_slot": EMPTY_SLOT,
        "inspections": [
            {"model": display_name(model), "title": title, **inspection_data(found)}
            for model, texts in (inspections or {}).items()
            for title, found in texts.items()
        ],
    }
    parts = {
        "title": html.escape(" vs ".join(names)),
        "empty": f"{100 * EMPTY_SLOT:g}",
        "verdict": html.escape(_unbroken(report.verdict(comparison))),
        "summary": html.escape(_summary(comparison)),
        "metrics": _table(report.metric_rows(comparison), numbers=len(names)),
        "differences": _differences(comparison),
        "where": html.escape(where_it_helps(comparison)),
        "notes": html.escape(" ".join(report.evaluation_notes(comparison))),
        "settings": _settings(comparison),
        "models": _table([report.MODEL_HEADER, *report.model_rows(comparison)], numbers=0),
        "data": script_json(data),
        "plotly": get_plotlyjs(),
    }
    page = files(__package__).joinpath("report_page.html").read_text(encoding="utf-8")
    # Cut at the placeholders, so that what is put in is never looked through for them.
    first, *rest = page.split("{{")
    pieces = [first]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: no character of it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def training_figures(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """Curves over the steps of training: loss, accuracy, and what the memory does."""
    kinds = (
        ("Cross-entropy loss", "nats per token", ("lm_loss", "loss"), "eval_loss", ".4f", ""),
        ("Top-1 accuracy", "tokens predicted right", ("top1_acc",), "eval_top1_acc", ".1%", ".3~%"),
        ("Write gate", "mean over tokens", ("write_gate",), "eval_avg_gate", ".3f", ""),
        ("Reads beyond the window", "share of what is read", ("reads_beyond_window",), "", ".1%", ".3~%"),
        ("Spread of the writes", "share of the slots", ("slot_use",), "", ".1%", ".3~%"),
    )
    figures = []
    for title, unit, train_keys, eval_key, form, axis_form in kinds:
        traces = []
        for index, (model, history) in enumerate(histories.items()):
            for label, keys, style in (
                ("training", train_keys, {"mode": "lines", "line": {"width": 1.5}}),
                ("validation", (eval_key,), {"mode": "lines+markers", "line": {"width": 2, "dash": "dash"}}),
            ):
                points = thinned([p for p in history_points(history, *keys) if math.isfinite(p[1])])
                if points:
                    style = {**style, "mode": "markers"} if len(points) == 1 else style
                    name = f"{display_name(model)}, {label}"
                    traces.append(_line(name, index, *zip(*points, strict=True), f"%{{y:{form}}}", **style))
        if traces:
            figures.append(_figure("training", title, traces, "step", unit, axis_form))
    return figures


def profile_figures(comparison: Mapping[str, Any]) -> list[Figure]:
    """Gain and loss by distance since the last occurrence of a token, and by position in the window."""
    profiles, models = comparison.get("profiles") or {}, comparison["models"]
    reference, *_ = models
    figures = []
    for key, what, x_label in (
        ("distance", "by distance since the last occurrence", "tokens since the token was last seen"),
        ("position", "by position in the window", "position in the attention window"),
    ):
        profile = profiles.get(key)
        if not profile:
            continue
        x, options = profile["lowest"], {}
        if key == "distance":
            x = profile["labels"]
            ticks = [label if low is None else _short(low) for label, low in zip(x, profile["lowest"], strict=True)]
            options = {"x_axis": {"type": "category", "tickvals": x, "ticktext": ticks, "range": [-0.5, len(x) - 0.5]}}
            options["edge"] = _attention_ends(profile, models[reference].get("window"))
        numbers = dict(enumerate(models))
        texts = [f"{label}: {n:,} tokens" for label, n in zip(profile["labels"], profile["targets"], strict=True)]
        gains = [
            _gain_line(display_name(m), i, x, profile, m, texts) for i, m in numbers.items() if m in profile["gain"]
        ]
        losses = [
            _line(display_name(m), i, x, list(map(_number, profile["loss"][m])), "%{y:.3f} nats (%{text})", text=texts)
            for i, m in numbers.items()
            if m in profile["loss"]
        ]
        if gains:
            y_label = f"nats per token over {html.escape(display_name(reference))}"
            figures.append(_figure("help", f"Gain {what}", gains, x_label, y_label, "", zero=True, **options))
        figures.append(_figure("help", f"Loss {what}", losses, x_label, "nats per token", "", **options))
    return figures


def where_it_helps(comparison: Mapping[str, Any]) -> str:
    """At which distances the judged model gains most and least on the first one, in a sentence; empty if unknown."""
    profile = (comparison.get("profiles") or {}).get("distance") or {}
    model = report.judged_model(comparison)
    gains = map(_number, (profile.get("gain") or {}).get(model, ()))
    known = [(gain, label) for gain, label in zip(gains, profile.get("labels", ()), strict=False) if gain is not None]
    if not known:
        return ""
    (least, low), (most, high) = min(known), max(known)

    def told(label: str) -> str:
        return "was not seen before" if label == NEVER else f"was last seen {label} tokens before"

    reference, *_ = comparison["models"]
    return (
        f"{display_name(model)} gains most on {display_name(reference)} where a token {told(high)}, "
        f"{_signed(most)} nats a token, and least where it {told(low)}, {_signed(least)}."
    )


def recall_figures(comparison: Mapping[str, Any]) -> list[Figure]:
    """Recall over the distance between fact and answer, where questions were asked."""
    traces = [
        _line(display_name(model), index, *zip(*points.items(), strict=True), "%{y:.1%}")
        for index, (model, result) in enumerate(comparison["models"].items())
        if (points := recall_of(result))
    ]
    if not traces:
        return []
    figure = _figure(
        "help", "Recall by distance", traces, "windows between fact and answer", "answers recalled", ".3~%"
    )
    guessing = (comparison.get("data") or {}).get("recall_by_guessing")
    if guessing is not None:
        figure["level"] = {"value": float(guessing), "text": "guessing"}
    return [figure]


def inspection_data(found: Inspection) -> dict[str, Any]:
    """An inspection for the page: tokens with what was written, gained and read; the slots over time, thinned."""
    data = found.to_dict()
    moments = list(range(0, len(found.tokens), max(1, math.ceil(found.held.size / MOST_CELLS))))
    held, holders = data.pop("held"), data.pop("holders")
    data["tokens"] = [report.visible_text(token) for token in found.tokens]
    data["spaced"] = [token[:1].isspace() for token in found.tokens]
    data["moments"] = moments
    data["held"] = [held[t] for t in moments]
    data["holders"] = [holders[t] for t in moments]
    return data


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS` of the points, evenly chosen, the last one always among them."""
    step = math.ceil(len(points) / MOST_POINTS)
    return points[::-1][:: max(step, 1)][::-1]


def _line(name: str, index: int, x: Sequence, y: Sequence, hover: str, **style: Any) -> dict[str, Any]:
    line = {"color": _COLOURS[index % len(_COLOURS)], "dash": _DASHES[index // len(_COLOURS) % len(_DASHES)]}
    line |= style.pop("line", {})
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(name, quote=False),  # the library understands some markup in names
        "x": list(x),
        "y": list(y),
        "line": line,
        "hovertemplate": f"{hover}<extra>%{{fullData.name}}</extra>",
        **style,
    }


def _gain_line(
    name: str, index: int, x: list, profile: Mapping[str, Any], model: str, texts: list[str]
) -> dict[str, Any]:
    ends = [None if end is None else list(map(float, end)) for end in profile["gain_interval"][model]]
    told = [
        text if end is None else f"95 % {end[0]:+.3f} to {end[1]:+.3f}; {text}"
        for text, end in zip(texts, ends, strict=True)
    ]
    spread = [0 if end is None else (end[1] - end[0]) / 2 for end in ends]
    bars = {"array": spread, "thickness": 1.2, "width": 3}
    return _line(
        name, index, x, list(map(_number, profile["gain"][model])), "%{y:+.3f} nats (%{text})", text=told, error_y=bars
    )


def _attention_ends(profile: Mapping[str, Any], window: int | None) -> float | None:
    """Place on the axis of distances before the first group that attention cannot reach."""
    outside = [low is not None and window is not None and low >= window for low in profile["lowest"]]
    return outside.index(True) - 0.5 if any(outside) else None


def _short(number: int) -> str:
    return str(number) if number < 1024 else f"{number // 1024}k" if number < 2**20 else f"{number >> 20}M"


def _figure(section: str, title: str, traces: list, x_label: str, y_label: str, form: str, **options: Any) -> Figure:
    return {
        "section": section,
        "title": title,
        "traces": traces,
        "x_label": x_label,
        "y_label": y_label,
        "format": form,
        **options,
    }


def _unbroken(sentence: str) -> str:
    """Percent signs stay with their numbers."""
    return sentence.replace(" %", "\u00a0%")


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return text if round(value, 2) else "0.00"


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _summary(comparison: Mapping[str, Any]) -> str:
    data = comparison.get("data") or {}
    source = next((data[key] for key in ("corpus", "dataset_name", "validation_file") if data.get(key)), None)
    source = ", ".join(map(str, source)) if isinstance(source, list | tuple) else source
    tokens = data.get("scored_tokens")
    parts = [source, f"{tokens:,} scored tokens" if tokens else None]
    seed = comparison.get("seed")
    parts += [f"seed {seed}" if seed is not None else None]
    return " · ".join(str(part) for part in parts if part)


def _differences(comparison: Mapping[str, Any]) -> str:
    rows = report.difference_rows(comparison)
    if not rows:
        return ""
    others = [report.verdict(comparison, name) for name in comparison["differences"]]
    more = "".join(f"<li>{html.escape(_unbroken(sentence))}</li>" for sentence in others)
    listed = f"<ul>{more}</ul>" if len(others) > 1 else ""
    note = html.escape(report.DIFFERENCE_NOTE.replace("`", ""))
    return f'<h3>Paired differences</h3>{listed}{_table(rows, numbers=len(rows[0]) - 1)}<p class="note">{note}</p>'


def _settings(comparison: Mapping[str, Any]) -> str:
    rows = [["Setting", "Value"], *map(list, report.evaluation_settings(comparison).items())]
    versions = report.provenance({"versions": comparison.get("versions")})
    rows += map(list, versions.items())
    return _table(rows, numbers=0)


def _table(rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A table whose columns 1 to `numbers` hold numbers; ticks and crosses are coloured."""
    header, *body = rows

    def cell(tag: str, column: int, text: str) -> str:
        kinds = ["number"] * (1 <= column <= numbers) + ["good"] * text.endswith("✓") + ["bad"] * text.endswith("✗")
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        tag, scope = ("th", ' scope="row"') if tag == "td" and column == 0 else (tag, "")
        return f"<{tag}{scope}{kind}>{html.escape(text)}</{tag}>"

    lines = ["".join(cell("th", i, text) for i, text in enumerate(header))]
    lines += ["".join(cell("td", i, text) for i, text in enumerate(row)) for row in body]
    head, *rest = (f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rest)}</tbody></table></div>'
