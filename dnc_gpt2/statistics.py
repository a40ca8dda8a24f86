"""Paired differences between models, with confidence intervals from a bootstrap over documents.

Tokens of one text are not independent, documents nearly are: the bootstrap (Efron 1979) draws whole documents with
replacement, and both models of a pair are scored on the same draw.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95
FEWEST_UNITS = 20
"""A text of fewer documents is cut into blocks, at least so many where it has as many targets."""
BLOCK_TARGETS = 4_096
"""Most targets of a block: about the length of an article of WikiText."""

_DRAWS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class Units:
    """What the bootstrap draws.

    Attributes:
        of_target: [targets] which unit each target of the text belongs to; 0, 1, ..., none of them empty.
        description: for the record, such as "40 documents".
    """

    of_target: np.ndarray
    description: str


def resampling_units(document_starts: np.ndarray) -> Units:
    """The documents of a text, or contiguous blocks of targets where it has fewer than `FEWEST_UNITS`.

    Args:
        document_starts: [N] bool, as in `TokenizedText`; target t is token t + 1.

    Blocks are equally long, to within a target, and hold `BLOCK_TARGETS` at most.
    """
    documents = np.cumsum(np.asarray(document_starts))[1:]
    _, of_target = np.unique(documents, return_inverse=True)
    count = int(of_target[-1]) + 1
    if count >= FEWEST_UNITS:
        return Units(of_target, f"{count:,} documents")
    targets = len(documents)
    blocks = min(targets, max(FEWEST_UNITS, math.ceil(targets / BLOCK_TARGETS)))
    of_target = np.arange(targets) * blocks // targets
    return Units(of_target, f"{blocks:,} blocks of about {round(targets / blocks):,} tokens")


def paired_bootstrap(
    differences: np.ndarray,
    of_target: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> tuple[float, tuple[float, float] | None]:
    """Mean of one number a target, and its percentile interval.

    Args:
        differences: [targets], such as the difference of two models' losses.
        of_target: [targets] the unit of each, 0, 1, ..., none of them empty.
        resamples: draws of as many units as there are, with replacement; the mean of each is over its targets.
        level: share of the draws' means that the interval holds.

    Returns:
        The mean and the interval's ends; no interval where there is a single unit or a difference is not finite.

    The same seed and units give the same draws, whatever the differences.
    """
    differences = np.asarray(differences, dtype=np.float64)
    sums, counts = np.bincount(of_target, differences), np.bincount(of_target)
    mean = float(differences.mean())
    units = len(counts)
    if units < 2 or not np.isfinite(differences).all():
        return mean, None
    rng = np.random.default_rng(seed)
    means = []
    rows = max(1, _DRAWS_AT_A_TIME // units)
    for start in range(0, resamples, rows):
        draws = rng.integers(units, size=(min(rows, resamples - start), units))
        means.append(sums[draws].sum(-1) / counts[draws].sum(-1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return mean, (float(low), float(high))


def clustered_interval(values: np.ndarray, of_target: np.ndarray) -> list[float] | None:
    """95 % interval of the mean of one number a target, from the spread between units: for many means at once.

    The usual linearised variance of a ratio of sums over independent units; see `paired_bootstrap` for the arguments,
    but here units may be missing.

    Returns:
        `[low, high]`, or `None` where there is a single unit or a value is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    _, of_target = np.unique(of_target, return_inverse=True)
    sums, counts = np.bincount(of_target, values), np.bincount(of_target)
    units = len(counts)
    if units < 2 or not np.isfinite(values).all():
        return None
    mean = sums.sum() / counts.sum()
    error = math.sqrt(units / (units - 1) * np.square(sums - mean * counts).sum()) / counts.sum()
    return [float(mean - 1.96 * error), float(mean + 1.96 * error)]


def paired_difference(nll: np.ndarray, reference_nll: np.ndarray, units: Units) -> dict[str, Any]:
    """How a model's loss differs from the reference's on the same targets, as comparison.json holds it.

    Args:
        nll, reference_nll: [targets] negative log-likelihoods in nats.

    Returns:
        `loss` (nats a token, below 0: better than the reference) and `loss_interval`; their exponentials `ppl_ratio`
        and `ppl_ratio_interval`. An interval is `[low, high]` or `None`.
    """
    loss, interval = paired_bootstrap(np.subtract(nll, reference_nll), units.of_target)
    ends = None if interval is None else list(interval)
    with np.errstate(over="ignore"):
        return {
            "loss": loss,
            "loss_interval": ends,
            "ppl_ratio": float(np.exp(loss)),
            "ppl_ratio_interval": None if ends is None else np.exp(ends).tolist(),
        }
