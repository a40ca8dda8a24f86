import math
import os

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from dnc_gpt2.plots import recall_by_distance, training_curves

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
