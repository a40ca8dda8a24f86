"""Bootstrap intervals of paired differences: against enumeration, against a known distribution, and their units."""

import itertools
import math

import numpy as np
import pytest

from dnc_gpt2 import statistics
from dnc_gpt2.statistics import Units, paired_bootstrap, paired_difference, resampling_units


def starts(*lengths: int) -> np.ndarray:
    """Document starts of a text whose documents have so many tokens."""
    flags = np.zeros(sum(lengths), dtype=bool)
    flags[np.cumsum([0, *lengths[:-1]])] = True
    return flags


def test_two_units_give_the_interval_that_can_be_computed_by_hand():
    # Unit 0 alone is drawn with probability 1/4 (mean 1), unit 1 alone too (mean 4), both otherwise.
    mean, interval = paired_bootstrap(np.array([0.0, 2.0, 4.0]), np.array([0, 0, 1]))
    assert mean == 2
    assert interval == (1, 4)


def test_the_interval_is_the_quantiles_of_all_draws_of_units_weighted_by_tokens():
    rng = np.random.default_rng(3)
    of_target = np.repeat([0, 1, 2, 3], [5, 1, 9, 3])
    differences = rng.normal(size=18)
    units = [differences[of_target == unit] for unit in range(4)]
    means = [np.concatenate([units[u] for u in draw]).mean() for draw in itertools.product(range(4), repeat=4)]
    _, interval = paired_bootstrap(differences, of_target, resamples=40_000, level=0.8)
    # The means of draws are far apart, so that the quantiles are among them.
    for end, share in zip(interval, (0.1, 0.9), strict=True):
        low, high = np.quantile(means, [share - 0.01, share + 0.01])
        assert low <= end <= high


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = {"documents": 0, "tokens": 0}
    trials, documents = 400, 60
    for trial in range(trials):
        lengths = rng.integers(5, 60, size=documents)
        of_target = np.repeat(np.arange(documents), lengths)
        # An effect a document and noise a token, around 0.1.
        differences = 0.1 + 0.3 * rng.normal(size=documents)[of_target] + rng.normal(size=len(of_target))
        for name, units in (("documents", of_target), ("tokens", np.arange(len(of_target)))):
            _, (low, high) = paired_bootstrap(differences, units, resamples=400, seed=trial)
            covered[name] += low <= 0.1 <= high
    assert 0.91 <= covered["documents"] / trials <= 0.98
    assert covered["tokens"] / trials < 0.75, "tokens of a document are not independent"


def test_the_width_is_that_of_the_mean_of_independent_numbers():
    differences = np.random.default_rng(1).normal(0.5, 2.0, size=2_000)
    mean, (low, high) = paired_bootstrap(differences, np.arange(2_000))
    assert mean == pytest.approx(differences.mean())
    assert high - low == pytest.approx(2 * 1.96 * differences.std() / math.sqrt(2_000), rel=0.04)


def test_draws_are_fixed_and_made_in_parts_of_bounded_size(monkeypatch):
    differences = np.random.default_rng(2).normal(size=300)
    of_target = np.arange(300) // 10
    once = paired_bootstrap(differences, of_target)
    assert once == paired_bootstrap(differences, of_target)
    assert once != paired_bootstrap(differences, of_target, seed=1)
    monkeypatch.setattr(statistics, "_DRAWS_AT_A_TIME", 30 * 7)
    assert once == paired_bootstrap(differences, of_target)


@pytest.mark.parametrize("differences", [[1.0, 2.0], [1.0, math.inf], [1.0, math.nan]])
def test_where_there_is_nothing_to_draw_there_is_no_interval(differences):
    mean, interval = paired_bootstrap(np.array(differences), np.array([0, 0 if differences[1] == 2 else 1]))
    assert interval is None
    assert mean == pytest.approx(np.mean(differences), nan_ok=True)


def test_units_are_documents_where_there_are_enough():
    # The first token of the text is no target; the first of each other document is one of its own document.
    units = resampling_units(starts(1, 3, *[2] * 20))
    assert units.of_target.tolist() == [0, 0, 0, *np.repeat(np.arange(1, 21), 2)]
    assert units.description == "21 documents"


@pytest.mark.parametrize(("tokens", "blocks"), [(2, 1), (11, 10), (401, 20), (20 * 4_096 + 2, 21)])
def test_units_are_blocks_of_a_text_of_few_documents(tokens, blocks):
    units = resampling_units(starts(tokens))
    assert len(units.of_target) == tokens - 1
    lengths = np.bincount(units.of_target)
    assert len(lengths) == blocks and lengths.max() - lengths.min() <= 1 and lengths.max() <= 4_096
    assert (np.diff(units.of_target) >= 0).all()
    assert units.description.startswith(f"{blocks} blocks of about {round(lengths.mean()):,} tokens")


def test_a_paired_difference_is_in_nats_and_as_a_ratio_of_perplexities():
    rng = np.random.default_rng(4)
    reference = rng.gamma(2.0, size=500)
    nll = reference - 0.2 + 0.1 * rng.normal(size=500)
    result = paired_difference(nll, reference, Units(np.arange(500) // 10, "50 documents"))
    assert result["loss"] == pytest.approx(nll.mean() - reference.mean())
    assert result["ppl_ratio"] == pytest.approx(math.exp(nll.mean()) / math.exp(reference.mean()))
    low, high = result["loss_interval"]
    assert low < result["loss"] < high < 0
    assert result["ppl_ratio_interval"] == pytest.approx([math.exp(low), math.exp(high)])
    # What both models find hard cancels: an unpaired interval would be ten times as wide.
    assert high - low < 0.04


def test_a_model_does_not_differ_from_itself():
    nll = np.random.default_rng(5).gamma(2.0, size=100)
    result = paired_difference(nll, nll, Units(np.arange(100), "100 documents"))
    assert result == {"loss": 0, "loss_interval": [0, 0], "ppl_ratio": 1, "ppl_ratio_interval": [1, 1]}


def test_a_ratio_beyond_all_numbers_is_infinite():
    result = paired_difference(np.full(4, 1e4), np.zeros(4), Units(np.arange(4), "4 documents"))
    assert result["ppl_ratio"] == math.inf and result["ppl_ratio_interval"] == [math.inf, math.inf]
