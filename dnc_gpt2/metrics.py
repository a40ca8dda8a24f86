"""Language-model and memory metrics as `evaluate` metrics, and the order and names they are reported in.

Both metrics take one number a scored token and average over all tokens added since the last `compute`, so a mean over
batches of unequal size is never taken. They are built directly (`LanguageModelMetrics()`), keep what is added in memory
and need neither the hub nor a cache folder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import evaluate
import numpy as np
from datasets import Features, Value

OPEN_GATE = 0.7
"""A token counts as written when its write gate is above this."""


@dataclass(frozen=True)
class ReportedMetric:
    """How one metric is reported: key, label, which direction is better (`None`: neither), number format."""

    key: str
    label: str
    better: Literal["higher", "lower"] | None
    format: str


METRICS = (
    ReportedMetric("loss", "Loss", "lower", ".4f"),
    ReportedMetric("ppl", "Perplexity", "lower", ".2f"),
    ReportedMetric("bpt", "Bits per Token", "lower", ".3f"),
    ReportedMetric("top1_acc", "Top-1 Accuracy", "higher", ".4f"),
    ReportedMetric("top5_acc", "Top-5 Accuracy", "higher", ".4f"),
    ReportedMetric("confidence", "Confidence", "higher", ".4f"),
    ReportedMetric("mean_rank", "Mean Rank", "lower", ".1f"),
    ReportedMetric("pred_entropy", "Predictive Entropy", None, ".3f"),
    ReportedMetric("avg_gate", "Avg Write Gate", None, ".3f"),
    ReportedMetric("gate_std", "Write Gate Std", None, ".3f"),
    ReportedMetric("write_rate", "Write Rate", None, ".3f"),
    ReportedMetric("write_sparsity", "Write Sparsity", "higher", ".3f"),
    ReportedMetric("mem_kl", "Memory KL", "higher", ".3f"),
    ReportedMetric("bits_per_byte", "Bits per Byte", "lower", ".3f"),
    ReportedMetric("word_perplexity", "Word Perplexity", "lower", ".2f"),
    ReportedMetric("parameters", "Parameters", None, ",.0f"),
    ReportedMetric("tokens_per_second", "Tokens per Second", "higher", ",.0f"),
    ReportedMetric("recall_inside_window", "Recall in Window", "higher", ".3f"),
    ReportedMetric("recall_outside_window", "Recall past Window", "higher", ".3f"),
)
"""Every metric of a comparison, in the order of the table. The last two exist on the embedded corpus only."""

MEMORY_METRICS = ("avg_gate", "gate_std", "write_rate", "write_sparsity", "mem_kl")
"""Keys of `MemoryMetrics`: a model without memory has none of them."""


class _TokenMetric(evaluate.Metric):
    """An `evaluate` metric over columns of one number a token, held in memory."""

    columns: Mapping[str, str]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = Features({name: Value(dtype) for name, dtype in self.columns.items()})
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", features=features, inputs_description="", format="arrow"
        )

    def _build_data_dir(self) -> str:
        # The library would create this folder in the user's cache although nothing is ever put there.
        return self._data_dir_root

    def add_batch(self, **columns: Any) -> None:
        """Add tokens: every column of the metric by name, as equally long one-dimensional arrays or lists.

        Raises:
            ValueError: a column is missing, unknown, not one-dimensional, or of another length.
        """
        columns = {name: column for name, column in columns.items() if column is not None}
        if set(columns) != set(self.columns):
            raise ValueError(f"{type(self).__name__} takes {sorted(self.columns)}, got {sorted(columns)}.")
        columns = {name: np.asarray(column) for name, column in columns.items()}
        shapes = {name: column.shape for name, column in columns.items()}
        if len(set(shapes.values())) > 1 or columns[next(iter(columns))].ndim != 1:
            raise ValueError(f"{type(self).__name__} takes one number a token in every column, got shapes {shapes}.")
        if columns[next(iter(columns))].size:
            super().add_batch(**columns)

    def compute(self, **inputs: Any) -> dict[str, float]:
        """Metrics over everything added since the last call and over the columns passed here, if any.

        Raises:
            ValueError: there is no token at all, or the columns are not those of `add_batch`.
        """
        columns = {name: inputs.pop(name) for name in self.columns if inputs.get(name) is not None}
        if columns:
            self.add_batch(**columns)
        if not len(self):
            raise ValueError(f"{type(self).__name__} has no tokens to average: call add_batch with at least one token.")
        return super().compute(**inputs)


class LanguageModelMetrics(_TokenMetric):
    """Metrics of next-token prediction over all scored tokens.

    Columns, one number a token: `nll` (negative log-likelihood of the correct token, nats), `rank` (of the correct
    token, 1 is best), `confidence` (probability of the correct token), `entropy` (of the predicted distribution, nats).

    `compute(num_bytes=, num_words=)` adds the metrics that are relative to the size of the scored text, if it has any.
    """

    columns = {"nll": "float64", "rank": "int64", "confidence": "float64", "entropy": "float64"}

    def _compute(
        self,
        nll: Any,
        rank: Any,
        confidence: Any,
        entropy: Any,
        num_bytes: int | None = None,
        num_words: int | None = None,
    ) -> dict[str, float]:
        nll, rank, confidence, entropy = map(_to_numpy, (nll, rank, confidence, entropy))
        loss = float(nll.mean())
        metrics = {
            "loss": loss,
            "ppl": _exp(loss),
            "bpt": loss / math.log(2),
            "top1_acc": float((rank <= 1).mean()),
            "top5_acc": float((rank <= 5).mean()),
            "confidence": float(confidence.mean()),
            "mean_rank": float(rank.mean()),
            "pred_entropy": float(entropy.mean()),
        }
        if num_bytes:
            metrics["bits_per_byte"] = float(nll.sum()) / math.log(2) / num_bytes
        if num_words:
            metrics["word_perplexity"] = _exp(float(nll.sum()) / num_words)
        return metrics


class MemoryMetrics(_TokenMetric):
    """Metrics of what a memory does over all scored tokens.

    Columns, one number a token: `write_gate` in [0, 1], `write_sparsity` (1 - H(w / sum w) / log N of the write weights
    w over N slots), `memory_kl` (KL divergence of the prediction from the one without the memory, nats).
    The standard deviation of the gate is that of the population: 0 for a single token.
    """

    columns = {"write_gate": "float64", "write_sparsity": "float64", "memory_kl": "float64"}

    def _compute(self, write_gate: Any, write_sparsity: Any, memory_kl: Any) -> dict[str, float]:
        write_gate, write_sparsity, memory_kl = map(_to_numpy, (write_gate, write_sparsity, memory_kl))
        return {
            "avg_gate": float(write_gate.mean()),
            "gate_std": float(write_gate.std()),
            "write_rate": float((write_gate > OPEN_GATE).mean()),
            "write_sparsity": float(write_sparsity.mean()),
            "mem_kl": float(memory_kl.mean()),
        }


def _to_numpy(column: Any) -> np.ndarray:
    # Read as arrow because the library's own numpy format rounds float64 to float32.
    return column.to_numpy()


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
