"""Loss by position in the window and by distance since the last occurrence of a token."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dnc_gpt2.examples import ExampleDataset
from dnc_gpt2.profiles import NEVER, Profile, distances, last_seen, positions
from dnc_gpt2.statistics import Units, clustered_interval, paired_bootstrap
from dnc_gpt2.tokenization import TokenizedText


def dataset(tokens: list[int], starts: list[int] = (0,), **options) -> ExampleDataset:
    document_starts = torch.zeros(len(tokens), dtype=torch.bool)
    document_starts[list(starts)] = True
    text = TokenizedText(torch.tensor(tokens), document_starts, len(tokens), len(tokens))
    return ExampleDataset(text, 2, 2, **options)


def test_positions_count_the_tokens_that_a_target_is_predicted_from():
    groups = positions(5, window=3)
    assert [groups.labels[i] for i in groups.of_target] == ["1", "2", "3", "1", "2"]


def test_positions_of_long_windows_are_in_groups_that_cover_them():
    groups = positions(100, window=100)
    assert len(groups.labels) <= 32 and (groups.labels[0], groups.labels[-1]) == ("1-4", "97-100")
    assert np.bincount(groups.of_target).tolist() == [4] * 25


def naive_last_seen(tokens, runs) -> list[int]:
    found = []
    for target in range(1, len(tokens)):
        before = [j for j in range(target) if runs[j] == runs[target - 1] and tokens[j] == tokens[target]]
        found.append(target - before[-1] if before else 0)
    return found


def test_a_token_was_last_seen_within_the_run_of_the_memory():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens, runs = rng.integers(5, size=40), np.cumsum(rng.random(40) < 0.1)
        assert last_seen(tokens, runs).tolist() == naive_last_seen(tokens, runs)


def test_distances_double_and_a_new_token_was_never_seen():
    groups = distances(dataset([1, 1, 2, 3, 1, 2, 4, 2], streams=1))
    assert [groups.labels[i] for i in groups.of_target] == ["1", NEVER, NEVER, "2-3", "2-3", NEVER, "2-3"]


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({}, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        ({"streams": 1}, [0] * 10),
        ({"streams": 2}, [0] * 8 + [1] * 2),
        ({"streams": 1, "reset_at_documents": True}, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_runs_of_the_memory_begin_where_examples_mark_it_or_state_is_not_carried(options, runs):
    data = dataset(list(range(10)), starts=[0, 3], **options)
    assert data.memory_runs.tolist() == runs
    if "streams" in options:
        marked = torch.cat([data[i]["memory_reset"] for i in range(len(data))])[:9]
        assert marked.tolist() == [True, *(a != b for a, b in pairwise(runs[:9]))]


def test_a_profile_holds_losses_gains_and_their_intervals():
    groups = positions(8, window=2)
    profile = Profile(groups, Units(np.array([0, 0, 0, 0, 1, 1, 1, 1]), "2 documents"))
    first = np.array([2.0, 4.0] * 4)
    profile.add("a", first, None)
    profile.add("b", first - [1, 0, 1, 0, 3, 0, 3, 0], first)
    assert profile.result["labels"] == ["1", "2"] and profile.result["targets"] == [4, 4]
    assert profile.result["loss"] == {"a": [2, 4], "b": [0, 4]}
    assert profile.result["gain"] == {"b": [2, 0]}
    low, high = profile.result["gain_interval"]["b"][0]
    assert (low + high) / 2 == pytest.approx(2) and low < 1
    assert profile.result["gain_interval"]["b"][1] == [0, 0]


def test_groups_without_a_target_are_left_out():
    assert Profile(distances(dataset([1, 2, 1, 2])), Units(np.zeros(3), "")).result["labels"] == ["2-3", NEVER]


def test_the_clustered_interval_is_near_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(60), rng.integers(5, 50, size=60))
    values = rng.normal(size=60)[units] + rng.normal(size=len(units))
    _, expected = paired_bootstrap(values, units)
    np.testing.assert_allclose(clustered_interval(values, units), expected, atol=0.03)
    assert clustered_interval(values[:3], units[:3]) is None
    assert clustered_interval(np.array([1.0, np.inf]), np.array([0, 1])) is None
