import math
import os
from importlib.metadata import version

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from dnc_gpt2.inspection import Inspection
from dnc_gpt2.plots import loss_profile, recall_by_distance, shares_by_distance, slots, tokens, training_curves

HISTORY = [
    {"step": 10, "loss": 9.0, "lm_loss": 8.0, "top1_acc": 0.1, "learning_rate": 1e-3},
    {"step": 20, "loss": 7.0, "lm_loss": 6.0, "top1_acc": 0.2, "learning_rate": 1e-3},
    {"step": 20, "eval_loss": 6.5, "eval_ppl": 665.0, "eval_top1_acc": 0.18},
    {"step": 20, "train_runtime": 1.0, "train_loss": 8.0},
]


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that were saved, in order."""
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), savefig(self, *args, **options))
    )
    return figures


def lines(figure: Figure, axes: int) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in figure.axes[axes].get_lines()}


def test_curves_show_both_models_training_and_validation(saved, tmp_path):
    training_curves({"baseline": HISTORY, "dnc": HISTORY}, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").std() > 0
    loss, accuracy = lines(saved[0], 0), lines(saved[0], 1)
    for name in ("GPT2 Baseline", "GPT2 + DNC"):
        assert loss[f"{name}, training"] == [(10, 8.0), (20, 6.0)]
        assert loss[f"{name}, validation"] == [(20, 6.5)]
        assert accuracy[f"{name}, training"] == [(10, 0.1), (20, 0.2)]
        assert accuracy[f"{name}, validation"] == [(20, 0.18)]


def test_curves_tell_training_from_validation_by_line(saved, tmp_path):
    training_curves({"dnc": HISTORY}, tmp_path / "curves.png")
    training, validation = saved[0].axes[0].get_lines()
    assert training.get_linestyle() == "-" and validation.get_linestyle() == "--"
    assert training.get_linewidth() < validation.get_linewidth()
    assert training.get_marker() == "" and validation.get_marker() != ""
    assert training.get_color() == validation.get_color()


def test_training_loss_falls_back_to_the_total(saved, tmp_path):
    training_curves({"baseline": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]}, tmp_path / "curves.png")
    assert lines(saved[0], 0) == {"GPT2 Baseline, training": [(1, 3.0), (2, 2.0)]}


def test_a_single_point_is_visible(saved, tmp_path):
    training_curves({"dnc": HISTORY[:1]}, tmp_path / "curves.png")
    assert saved[0].axes[0].get_lines()[0].get_marker() == "."


def test_a_repeated_step_keeps_its_last_row(saved, tmp_path):
    training_curves({"dnc": [{"step": 5, "eval_loss": 3.0}, {"step": 5, "eval_loss": 2.0}]}, tmp_path / "curves.png")
    assert lines(saved[0], 0) == {"GPT2 + DNC, validation": [(5, 2.0)]}


@pytest.mark.parametrize(("first", "scale"), [(9.0, "linear"), (9000.0, "log")])
def test_a_loss_over_decades_gets_a_logarithmic_axis(saved, tmp_path, first, scale):
    training_curves({"dnc": [{"step": 1, "loss": first}, {"step": 2, "loss": 2.0}]}, tmp_path / "curves.png")
    assert saved[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize(
    "history", [[], [{"step": 0, "eval_loss": 1.0}], [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}]]
)
def test_curves_of_almost_nothing_are_still_a_figure(tmp_path, history):
    training_curves({"dnc": history, "_a $x^$ name": history}, tmp_path / "curves.png")
    assert os.listdir(tmp_path) == ["curves.png"]


def test_recall_shows_models_over_distance_and_guessing(saved, tmp_path):
    models = {
        "baseline": {"metrics": {"recall_by_distance": {"2": 0.05, "10": 0.04}}},
        "dnc": {"metrics": {"recall_by_distance": {"10": 0.9, "2": 1.0, "3": None}}},
        "plain": {"metrics": {}},
    }
    recall_by_distance({"models": models, "data": {"recall_by_guessing": 0.04}}, tmp_path / "recall.png")
    assert imread(tmp_path / "recall.png").std() > 0
    shown = lines(saved[0], 0)
    assert shown["GPT2 Baseline"] == [(2, 0.05), (10, 0.04)] and shown["GPT2 + DNC"] == [(2, 1.0), (10, 0.9)]
    assert {height for _, height in shown["guessing"]} == {0.04} and set(shown) == {
        "GPT2 Baseline",
        "GPT2 + DNC",
        "guessing",
    }


def metadata(path) -> dict[str, str]:
    with Image.open(path) as image:
        return image.text


def test_losses_and_gains_are_shown_in_their_groups_with_seed_and_versions(saved, tmp_path):
    profile = {
        "labels": ["1", "2-3", "never"],
        "targets": [9, 9, 9],
        "loss": {"_a $x^$ name": [3.0, 2.0, 4.0], "dnc": [1.0, 2.0, "NaN"]},
        "gain": {"dnc": [2.0, 0.0, "NaN"]},
        "gain_interval": {"dnc": [[1.5, 2.5], None, None]},
    }
    models = {"_a $x^$ name": {"metrics": {}}, "dnc": {"metrics": {}}}
    comparison = {"models": models, "profiles": {"distance": profile}, "seed": 7, "versions": {"torch": "2.13"}}
    loss_profile(comparison, "distance", tmp_path / "loss.png")
    gains, losses = lines(saved[0], 0), lines(saved[0], 1)
    assert gains["GPT2 + DNC"][:2] == [(0, 2.0), (1, 0.0)] and set(gains) == {"GPT2 + DNC"}
    assert losses["_a $x^$ name"] == [(0, 3.0), (1, 2.0), (2, 4.0)] and math.isnan(losses["GPT2 + DNC"][2][1])
    assert [label.get_text() for label in saved[0].axes[1].get_xticklabels()] == ["1", "2-3", "never"]
    legend = [text.get_text() for text in saved[0].legends[0].get_texts()]
    assert legend == ["GPT2 + DNC", "_a $x^$ name"]
    assert metadata(tmp_path / "loss.png").items() >= {"seed": "7", "version of torch": "2.13"}.items()


@pytest.fixture
def inspection() -> Inspection:
    count, unknown = 60, np.array([np.nan])
    sources = np.zeros((count, 1, count))
    sources[30, 0, 10] = 0.75
    held = np.zeros((count, 4))
    held[5:, 1] = 1
    return Inspection(
        tokens=["The", *[" word"] * 57, " $x_", "\né"],
        window=8,
        write_gates=np.linspace(0, 1, count),
        write_weights=np.zeros((count, 4)),
        read_weights=np.zeros((count, 1, 4)),
        read_sources=sources,
        held=held,
        holders=np.where(held > 0, 5, -1),
        log_probabilities=np.concatenate([unknown, -np.ones(count - 1)]),
        gains=np.concatenate([unknown, np.linspace(-1, 1, count - 1)]),
    )


@pytest.mark.parametrize("by", ["gain", "gate", 31, 0])
def test_tokens_are_coloured_by_what_is_asked_for(saved, inspection, tmp_path, by):
    tokens(inspection, tmp_path / "tokens.png", by, {"seed": "3"})
    assert metadata(tmp_path / "tokens.png").items() >= {"seed": "3", "version of torch": version("torch")}.items()
    axes = saved[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["The", *["word"] * 57, "$x_", r"\né"]
    boxes = axes.patches
    right = [box.get_x() + box.get_width() for box in boxes]
    assert max(right) <= 121 and len({box.get_y() for box in boxes}) == 3
    colours = {tuple(box.get_facecolor()) for box in boxes}
    assert (len(colours) > 20) == (by in ("gain", "gate"))
    if by == 31:
        marked = [i for i, box in enumerate(boxes) if box.get_facecolor() != boxes[0].get_facecolor()]
        assert marked == [10] and boxes[31].get_edgecolor() != boxes[30].get_edgecolor()


@pytest.mark.parametrize("by", ["loss", -1, 60])
def test_tokens_cannot_be_coloured_by_anything_else(inspection, tmp_path, by):
    with pytest.raises(ValueError, match=f"by={by!r} is not allowed.*from 0 to 59"):
        tokens(inspection, tmp_path / "tokens.png", by)


def test_slots_show_the_age_of_what_they_hold_and_how_many_are_in_use(saved, inspection, tmp_path):
    slots(inspection, tmp_path / "slots.png")
    ages = saved[0].axes[0].images[0].get_array()
    assert ages.shape == (4, 60) and ages[1, 5] == 0 and ages[1, 59] == 54
    assert ages.mask[0].all() and ages.mask[1, :5].all() and not ages.mask[1, 5:].any()
    assert saved[0].axes[1].get_lines()[0].get_ydata()[[0, 59]].tolist() == [0, 0.25]


def test_shares_have_a_panel_each_and_a_colour_for_each_name(saved, tmp_path):
    panels = {"Recall": {"a": [(1, 1.0), (1000, 0.5)], "b": [(1, 0.9)]}, "Left": {"b": [(1, 0.8), (2, 0.4)]}}
    shares_by_distance(panels, tmp_path / "shares.png", "windows")
    assert imread(tmp_path / "shares.png").std() > 0
    (figure,) = saved
    assert [axes.get_title() for axes in figure.axes] == ["Recall", "Left"]
    assert all(axes.get_xscale() == "log" and axes.get_xlabel() == "windows" for axes in figure.axes)
    assert lines(figure, 0) == panels["Recall"] and lines(figure, 1) == panels["Left"]
    assert figure.axes[0].get_lines()[1].get_color() == figure.axes[1].get_lines()[0].get_color()
