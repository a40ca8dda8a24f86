"""Figures of a run, a study and an inspected text, dark, as PNG, with seed (where known) and versions as metadata."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .inspection import Inspection
from .report import display_name, display_width, provenance, recall_of, replacing, versions, visible_text

_BACKGROUND = "#0d1117"
_PANEL = "#161b22"
_GRID = "#30363d"
_MUTED = "#8b949e"
_TEXT = "#e6edf3"
# Told apart with the common colour blindnesses too; they repeat from the seventh model on.
_COLOURS = ("#58a6ff", "#ff9e4a", "#3fd0a4", "#f778ba", "#e3d26f", "#b392f0")
_MARKERS = "osD^vP"
_LOG_SCALE_RATIO = 30
_LINE_WIDTH = 120
_SEQUENTIAL = LinearSegmentedColormap.from_list("write", [_PANEL, "#1f6feb"])
_DIVERGING = LinearSegmentedColormap.from_list("gain", ["#c4432f", _PANEL, "#12805f"])

EMPTY_SLOT = 0.05
"""A slot of which less is written counts as empty in pictures."""

# Unlike matplotlib's own, without needless decimals.
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.6g}%")

Points = list[tuple[float, float]]


def training_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike,
    about: Mapping[str, str] | None = None,
) -> None:
    """Plot cross-entropy (left) and top-1 accuracy (right) over steps, all models overlaid, and save the PNG.

    A loss that spans a factor above 30 gets a logarithmic axis. Values that are not finite leave a gap.

    Args:
        histories: for each model the `log_history` of its trainer state: training rows with `step`, `lm_loss` (or
            `loss`) and `top1_acc`, evaluation rows with `step`, `eval_loss` and `eval_top1_acc`. Any may be absent.
        path: file to write, replaced in one step.
        about: text for the file's metadata beside the versions, by name; see `report.provenance`.
    """
    figure = _figure(13, 5.4)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    _style(loss_axes, "Cross-entropy loss", "step", "nats per token")
    _style(accuracy_axes, "Top-1 accuracy", "step", "tokens predicted right")
    for axes, train_keys, eval_key in (
        (loss_axes, ("lm_loss", "loss"), "eval_loss"),
        (accuracy_axes, ("top1_acc",), "eval_top1_acc"),
    ):
        for index, (model, history) in enumerate(histories.items()):
            train, evaluation = history_points(history, *train_keys), history_points(history, eval_key)
            # A line needs two points: a single one is drawn as a dot.
            dot = "." if len(train) == 1 else ""
            _draw(
                axes,
                train,
                index,
                f"{display_name(model)}, training",
                linewidth=1,
                alpha=0.8,
                marker=dot,
                markersize=10,
            )
            _draw(axes, evaluation, index, f"{display_name(model)}, validation", linestyle="--", linewidth=1.8)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if _spans_decades(loss_axes):
        loss_axes.set_yscale("log")
        loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        loss_axes.yaxis.set_minor_formatter(NullFormatter())
    accuracy_axes.yaxis.set_major_formatter(_PERCENT)
    _save(figure, path, about)


def recall_by_distance(comparison: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Plot recall over the distance between fact and answer in windows, with the level of guessing, and save the PNG.

    Args:
        comparison: as in `report`: models with `recall_by_distance` among their metrics, the others are left out, and
            `recall_by_guessing` in the data where known.
        path: file to write, replaced in one step.
    """
    figure = _figure(8, 5.2)
    axes = figure.subplots()
    _style(axes, "Recall by distance", "attention windows between fact and answer", "answers recalled")
    for index, (model, result) in enumerate(comparison["models"].items()):
        _draw(axes, list(recall_of(result).items()), index, display_name(model), linewidth=2)
    guessing = (comparison.get("data") or {}).get("recall_by_guessing")
    if guessing is not None:
        axes.axhline(float(guessing), color=_MUTED, linestyle=":", linewidth=1.6, label="guessing")
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(_PERCENT)
    _save(figure, path, provenance(comparison))


def loss_profile(comparison: Mapping[str, Any], profile: str, path: str | os.PathLike) -> None:
    """Plot what each model gains on the first (left, with 95 % intervals) and the losses (right), and save the PNG.

    Args:
        comparison: as in `report`, with profiles.
        profile: "distance" (since the last occurrence of a token) or "position" (in the attention window).
        path: file to write, replaced in one step.
    """
    found = comparison["profiles"][profile]
    what, x_label = {
        "distance": ("by distance since the last occurrence", "tokens since the token was last seen"),
        "position": ("by position in the window", "position in the attention window"),
    }[profile]
    figure = _figure(13, 5.4)
    gain_axes, loss_axes = figure.subplots(1, 2)
    _style(gain_axes, f"Gain {what}", x_label, f"nats per token over {display_name(next(iter(comparison['models'])))}")
    _style(loss_axes, f"Loss {what}", x_label, "nats per token")
    places = np.arange(len(found["labels"]))
    for index, model in enumerate(comparison["models"]):
        for axes, values in ((gain_axes, found["gain"].get(model)), (loss_axes, found["loss"].get(model))):
            if values is not None:
                _draw(
                    axes, list(zip(places, map(_finite, values), strict=True)), index, display_name(model), linewidth=2
                )
        for place, ends in zip(places, found["gain_interval"].get(model, ()), strict=False):
            if ends is not None:
                gain_axes.vlines(place, *map(float, ends), color=_COLOURS[index % len(_COLOURS)], linewidth=1.4)
    if gain_axes.get_lines():
        gain_axes.hlines(0, places[0] - 0.5, places[-1] + 0.5, color=_MUTED, linewidth=1)
    step = math.ceil(len(places) / 12)
    for axes in (gain_axes, loss_axes):
        axes.set_xticks(places[::step], found["labels"][::step], rotation=30 if profile == "distance" else 0)
    _save(figure, path, provenance(comparison))


def tokens(
    inspection: Inspection,
    path: str | os.PathLike,
    by: str | int = "gain",
    about: Mapping[str, str] | None = None,
) -> None:
    """Draw a text with its tokens coloured, and save the PNG.

    Args:
        inspection: of the text.
        path: file to write, replaced in one step.
        by: "gain" (in log-probability, from the memory), "gate" (the write gate), or the index of a token: where the
            read that predicted it came from.
        about: text for the file's metadata beside the versions, by name.

    Raises:
        ValueError: `by` is none of these.
    """
    count = len(inspection.tokens)
    if by == "gain":
        values = np.nan_to_num(inspection.gains)
        most = max(0.1, float(np.quantile(np.abs(values), 0.98)))
        colours, low, title = _DIVERGING, -most, "Gain in log-probability from the memory (nats)"
    elif by == "gate":
        values, colours, low, most, title = inspection.write_gates, _SEQUENTIAL, 0.0, 1.0, "Write gate"
    elif isinstance(by, int) and 0 <= by < count:
        values = inspection.read_sources[by - 1].mean(0) if by else np.zeros(count)
        colours, low, most = _SEQUENTIAL, 0.0, max(0.01, float(values.max()))
        title = f"Where the read that predicted token {by} “{visible_text(inspection.tokens[by])}” came from (share)"
    else:
        raise ValueError(f"by={by!r} is not allowed; it must be 'gain', 'gate' or a token from 0 to {count - 1}.")
    shown = [visible_text(token) for token in inspection.tokens]
    rows = _rows(shown, [token[:1].isspace() for token in inspection.tokens])
    lines = 1 + max(row for row, _ in rows)
    figure = _figure(0.074 * _LINE_WIDTH + 1.6, 0.24 * lines + 1.0)
    axes = figure.subplots()
    axes.set(xlim=(-1, _LINE_WIDTH + 1), ylim=(lines - 0.3, -0.7))
    axes.set_facecolor(_PANEL)
    axes.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)
    axes.spines[:].set_color(_GRID)
    axes.set_title("\n".join(textwrap.wrap(title, 90)), color=_TEXT, fontsize=12, pad=10, parse_math=False)
    for t, (text, (row, column)) in enumerate(zip(shown, rows, strict=True)):
        width, here = display_width(text), by == t and by not in ("gain", "gate")
        axes.add_patch(
            Rectangle(
                (column, row - 0.42),
                width,
                0.84,
                facecolor=colours((values[t] - low) / (most - low)),
                edgecolor=_TEXT if here else "none",
            )
        )
        style = {"family": ["DejaVu Sans Mono", "monospace"], "fontsize": 8.5, "color": _TEXT, "parse_math": False}
        axes.text(column + width / 2, row, text, ha="center", va="center_baseline", **style)
    scale = ScalarMappable(Normalize(low, most), colours)
    bar = figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.01)
    bar.ax.tick_params(colors=_MUTED, labelsize=9)
    bar.outline.set_edgecolor(_GRID)
    _write(figure, path, about)


def slots(inspection: Inspection, path: str | os.PathLike, about: Mapping[str, str] | None = None) -> None:
    """Plot how old the content of each slot is after each token (left) and the share of slots in use, and save the PNG.

    A slot of which less than `EMPTY_SLOT` is written is left blank.
    """
    figure = _figure(13, 5.4)
    age_axes, share_axes = figure.subplots(1, 2)
    _style(age_axes, "What the slots hold: how old it is", "token", "slot")
    _style(share_axes, "Slots in use", "token", "share that is written")
    age_axes.grid(False)
    ages = np.arange(len(inspection.tokens))[:, None] - inspection.holders
    ages = np.ma.masked_where(inspection.held < EMPTY_SLOT, ages)
    image = age_axes.imshow(ages.T, origin="lower", aspect="auto", interpolation="nearest", cmap="inferno_r", vmin=0)
    bar = figure.colorbar(image, ax=age_axes, fraction=0.04, pad=0.02)
    bar.set_label("tokens ago", color=_MUTED)
    bar.ax.tick_params(colors=_MUTED, labelsize=9)
    share_axes.plot(inspection.held.mean(1), color=_COLOURS[0], linewidth=2)
    share_axes.set_ylim(-0.02, 1.05)
    share_axes.yaxis.set_major_formatter(_PERCENT)
    _write(figure, path, about)


def _rows(shown: Sequence[str], spaced: Sequence[bool]) -> list[tuple[int, int]]:
    """Row and column of each token, in rows of `_LINE_WIDTH` columns."""
    places, row, column = [], 0, 0
    for text, space in zip(shown, spaced, strict=True):
        column += space and column > 0
        width = display_width(text)
        if column and column + width > _LINE_WIDTH:
            row, column = row + 1, 0
        places.append((row, column))
        column += width
    return places


def _finite(value: Any) -> float:
    value = float(value)
    return value if math.isfinite(value) else math.nan


def shares_by_distance(
    panels: Mapping[str, Mapping[str, Points]], path: str | os.PathLike, distance: str = "distance"
) -> None:
    """Plot shares between 0 and 1 over distances that double, a panel beside the other, and save the PNG.

    Args:
        panels: title -> name of a line -> its points (distance, share). A name has the same colour in every panel.
        path: file to write, replaced in one step.
        distance: what the horizontal axis counts.
    """
    figure = _figure(5.5 * len(panels), 4.8)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _style(axes, title, distance, "")
        for name, points in lines.items():
            index = names.index(name)
            _draw(axes, points, index, name, linewidth=2, linestyle="-" if index < len(_COLOURS) else "--")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(_PERCENT)
    _save(figure, path, None)


def history_points(history: Sequence[Mapping[str, Any]], *keys: str) -> Points:
    """Points (step, value under the first key that a row has) in order of steps; a repeated step keeps its last row."""
    points = {}
    for row in history:
        key = next((key for key in keys if row.get(key) is not None), None)
        if key is not None:
            value = float(row[key])
            points[row["step"]] = value if math.isfinite(value) else math.nan
    return sorted(points.items())


def _draw(axes: Axes, points: Points, index: int, label: str, **style: Any) -> None:
    if not points:
        return
    style = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 6, "markeredgecolor": _PANEL} | style
    axes.plot(*zip(*points, strict=True), color=_COLOURS[index % len(_COLOURS)], label=label, **style)


def _spans_decades(axes: Axes) -> bool:
    values = [value for line in axes.get_lines() for value in line.get_ydata() if math.isfinite(value)]
    return bool(values) and 0 < _LOG_SCALE_RATIO * min(values) < max(values)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor=_BACKGROUND)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.08)
    return figure


def _style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_facecolor(_PANEL)
    axes.set_title(title, color=_TEXT, fontsize=14, fontweight="bold", pad=12)
    # A model's name is no formula.
    axes.set_xlabel(x_label, color=_MUTED, fontsize=11, labelpad=8, parse_math=False)
    axes.set_ylabel(y_label, color=_MUTED, fontsize=11, labelpad=8, parse_math=False)
    axes.tick_params(which="both", colors=_MUTED, labelsize=10, length=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(_GRID)


def _save(figure: Figure, path: str | os.PathLike, about: Mapping[str, str] | None) -> None:
    for axes in figure.axes:
        if not axes.get_lines():
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing recorded", color=_MUTED, ha="center", va="center", transform=axes.transAxes)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    if lines:
        columns = min(len(lines), 4)
        legend = figure.legend(
            lines.values(),
            lines,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            labelcolor=_TEXT,
            fontsize=11,
            handlelength=3,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    _write(figure, path, about)


def _write(figure: Figure, path: str | os.PathLike, about: Mapping[str, str] | None) -> None:
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(
            temporary, format="png", dpi=150, metadata=provenance({"versions": versions()}) | dict(about or {})
        )
