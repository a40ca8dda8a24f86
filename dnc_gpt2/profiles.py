"""Where each model is good: loss by position in the attention window, and by how long ago a token was last seen."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .examples import ExampleDataset
from .statistics import Units, clustered_interval

MOST_POSITIONS = 32
"""Groups of positions; longer windows have several positions in one."""
NEVER = "never"
"""Label of targets that were not seen before."""


@dataclass(frozen=True)
class Groups:
    """The targets of a text in groups.

    Attributes:
        of_target: [targets] the group of each target.
        labels: what each group holds, such as "4-7".
        lowest: the lowest number of each group, `None` where there is none.
    """

    of_target: np.ndarray
    labels: list[str]
    lowest: list[int | None]


def positions(num_targets: int, window: int) -> Groups:
    """Targets by how many tokens of the attention window, 1 to `window`, they are predicted from."""
    width = -(-window // MOST_POSITIONS)
    lowest = list(range(1, window + 1, width))
    labels = [_range(low, min(low + width - 1, window)) for low in lowest]
    return Groups(np.arange(num_targets) % window // width, labels, lowest)


def distances(dataset: ExampleDataset) -> Groups:
    """Targets by how many tokens before them the same token last stood in the same run of the memory.

    Groups double: 1, 2-3, 4-7, ...; the last one is `NEVER`.
    """
    distance = last_seen(dataset.text.tokens.numpy(), dataset.memory_runs)
    exponents = np.floor(np.log2(np.maximum(distance, 1))).astype(np.int64)
    count = int(exponents.max(initial=0)) + 1
    lowest = [2**k for k in range(count)]
    labels = [_range(low, 2 * low - 1) for low in lowest]
    return Groups(np.where(distance == 0, count, exponents), [*labels, NEVER], [*lowest, None])


def last_seen(tokens: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """For targets 1 to N - 1 of tokens [N], how far back the same token last stood; 0 where it did not.

    Args:
        runs: [N] `ExampleDataset.memory_runs`: only what was read in the run of the token before the target counts.
    """
    places = np.arange(len(tokens))
    order = np.argsort(tokens, kind="stable")
    same = tokens[order[1:]] == tokens[order[:-1]]
    last = np.full(len(tokens), -1)
    last[order[1:][same]] = order[:-1][same]
    first_of_run = np.searchsorted(runs, runs[:-1])
    return np.where(last[1:] >= first_of_run, places[1:] - last[1:], 0)


class Profile:
    """Mean loss in each group of targets, and what each model gains on the first.

    Args:
        groups: of the targets; those without a target are left out.
        units: what the intervals take as independent.

    Attributes:
        result: as comparison.json holds it, for each group its `labels`, `lowest` and number of `targets`, and for each
            model its `loss` (nats a token), and but for the first its `gain` (the first one's loss less its own) and
            `gain_interval` ([low, high] or `None`).
    """

    def __init__(self, groups: Groups, units: Units):
        self.groups, self.units = groups, units
        counts = np.bincount(groups.of_target, minlength=len(groups.labels))
        self.present = np.flatnonzero(counts)
        self.result: dict[str, Any] = {
            "labels": [groups.labels[i] for i in self.present],
            "lowest": [groups.lowest[i] for i in self.present],
            "targets": counts[self.present].tolist(),
            "loss": {},
            "gain": {},
            "gain_interval": {},
        }

    def add(self, name: str, nll: np.ndarray, reference_nll: np.ndarray | None) -> None:
        """Add a model by its losses [targets]; the first one has no reference."""
        members = [self.groups.of_target == i for i in self.present]
        self.result["loss"][name] = [float(nll[chosen].mean()) for chosen in members]
        if reference_nll is None:
            return
        gain = reference_nll - nll
        self.result["gain"][name] = [float(gain[chosen].mean()) for chosen in members]
        self.result["gain_interval"][name] = [
            clustered_interval(gain[chosen], self.units.of_target[chosen]) for chosen in members
        ]


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
