"""Figures of a run: training curves and recall by distance, dark, as PNG."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .report import display_name, recall_of, replacing

_BACKGROUND = "#0d1117"
_PANEL = "#161b22"
_GRID = "#30363d"
_MUTED = "#8b949e"
_TEXT = "#e6edf3"
# Told apart with the common colour blindnesses too; they repeat from the seventh model on.
_COLOURS = ("#58a6ff", "#ff9e4a", "#3fd0a4", "#f778ba", "#e3d26f", "#b392f0")
_MARKERS = "osD^vP"
_LOG_SCALE_RATIO = 30

# Unlike matplotlib's own, without needless decimals.
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.6g}%")

Points = list[tuple[float, float]]


def training_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> None:
    """Plot cross-entropy (left) and top-1 accuracy (right) over steps, all models overlaid, and save the PNG.

    A loss that spans a factor above 30 gets a logarithmic axis. Values that are not finite leave a gap.

    Args:
        histories: for each model the `log_history` of its trainer state: training rows with `step`, `lm_loss` (or
            `loss`) and `top1_acc`, evaluation rows with `step`, `eval_loss` and `eval_top1_acc`. Any may be absent.
        path: file to write, replaced in one step.
    """
    figure = Figure(figsize=(13, 5.4))
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    _style(loss_axes, "Cross-entropy loss", "step", "nats per token")
    _style(accuracy_axes, "Top-1 accuracy", "step", "tokens predicted right")
    for axes, train_keys, eval_key in (
        (loss_axes, ("lm_loss", "loss"), "eval_loss"),
        (accuracy_axes, ("top1_acc",), "eval_top1_acc"),
    ):
        for index, (model, history) in enumerate(histories.items()):
            train, evaluation = _points(history, *train_keys), _points(history, eval_key)
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
    _save(figure, path)


def recall_by_distance(comparison: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Plot recall over the distance between fact and answer in windows, with the level of guessing, and save the PNG.

    Args:
        comparison: as in `report`: models with `recall_by_distance` among their metrics, the others are left out, and
            `recall_by_guessing` in the data where known.
        path: file to write, replaced in one step.
    """
    figure = Figure(figsize=(8, 5.2))
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
    _save(figure, path)


def _points(history: Sequence[Mapping[str, Any]], *keys: str) -> Points:
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


def _style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_facecolor(_PANEL)
    axes.set_title(title, color=_TEXT, fontsize=14, fontweight="bold", pad=12)
    axes.set_xlabel(x_label, color=_MUTED, fontsize=11, labelpad=8)
    axes.set_ylabel(y_label, color=_MUTED, fontsize=11, labelpad=8)
    axes.tick_params(which="both", colors=_MUTED, labelsize=10, length=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(_GRID)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    figure.set_facecolor(_BACKGROUND)
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
            # A model's name is no formula.
            text.set_parse_math(False)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.08)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
