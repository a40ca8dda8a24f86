import math

import numpy as np
import pytest

from dnc_gpt2.metrics import METRICS, LanguageModelMetrics, MemoryMetrics


def language_model_columns(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "nll": random.exponential(3, size),
        "rank": random.integers(1, 50, size),
        "confidence": random.random(size),
        "entropy": random.random(size),
    }


def test_language_model_metrics_have_their_definitions():
    metrics = LanguageModelMetrics().compute(
        nll=[math.log(2), math.log(8)],
        rank=[1, 6],
        confidence=[0.5, 0.125],
        entropy=[1.0, 2.0],
        num_bytes=4,
        num_words=1,
    )
    assert metrics == pytest.approx(
        {
            "loss": math.log(4),
            "ppl": 4,
            "bpt": 2,
            "top1_acc": 0.5,
            "top5_acc": 0.5,
            "confidence": 0.3125,
            "mean_rank": 3.5,
            "pred_entropy": 1.5,
            "bits_per_byte": 1,
            "word_perplexity": 16,
        }
    )


def test_memory_metrics_have_their_definitions():
    metrics = MemoryMetrics().compute(
        write_gate=[0.2, 0.7, 0.9, 1.0], write_sparsity=[0.0, 0.5, 1.0, 1.0], memory_kl=[0.0, 0.0, 0.5, 1.5]
    )
    assert metrics == pytest.approx(
        {
            "avg_gate": 0.7,
            "gate_std": np.std([0.2, 0.7, 0.9, 1.0]),
            "write_rate": 0.5,  # a gate of exactly 0.7 does not count
            "write_sparsity": 0.625,
            "mem_kl": 0.5,
        }
    )


def test_top5_accuracy_counts_rank_5_and_not_6():
    columns = {"nll": [0.0] * 2, "confidence": [0.0] * 2, "entropy": [0.0] * 2}
    assert LanguageModelMetrics().compute(rank=[5, 6], **columns)["top5_acc"] == 0.5


def test_batches_of_any_size_are_weighted_by_tokens():
    columns = language_model_columns(1000)
    metric = LanguageModelMetrics()
    for start, end in ((0, 1), (1, 700), (700, 700), (700, 1000)):
        metric.add_batch(**{name: column[start:end] for name, column in columns.items()})
    assert metric.compute() == LanguageModelMetrics().compute(**columns)


def test_columns_keep_double_precision():
    columns = language_model_columns(100)
    assert LanguageModelMetrics().compute(**columns)["loss"] == columns["nll"].mean()


def test_compute_starts_afresh_afterwards():
    metric = MemoryMetrics()
    tokens = {"write_sparsity": [1.0], "memory_kl": [0.0]}
    metric.compute(write_gate=[1.0], **tokens)
    assert metric.compute(write_gate=[0.0], **tokens)["avg_gate"] == 0


def test_text_size_is_optional():
    assert not {"bits_per_byte", "word_perplexity"} & set(LanguageModelMetrics().compute(**language_model_columns(3)))


def test_diverged_models_show_as_such():
    columns = {"rank": [1], "confidence": [0.0], "entropy": [0.0]}
    assert LanguageModelMetrics().compute(nll=[5000.0], num_words=1, **columns)["word_perplexity"] == math.inf
    assert math.isnan(LanguageModelMetrics().compute(nll=[math.nan], **columns)["ppl"])


@pytest.mark.parametrize("metric", [LanguageModelMetrics, MemoryMetrics])
def test_no_tokens_is_an_error(metric):
    with pytest.raises(ValueError, match="no tokens"):
        metric().compute()
    with pytest.raises(ValueError, match="no tokens"):
        metric().compute(**dict.fromkeys(metric.columns, np.zeros(0)))


def test_wrong_columns_are_errors_that_name_them():
    columns = language_model_columns(4)
    metric = LanguageModelMetrics()
    with pytest.raises(ValueError, match=r"takes \['confidence', 'entropy', 'nll', 'rank'\], got \['nll'\]"):
        metric.add_batch(nll=columns["nll"])
    with pytest.raises(ValueError, match="one number a token"):
        metric.add_batch(**{**columns, "rank": columns["rank"][:3]})
    with pytest.raises(ValueError, match="one number a token"):
        metric.add_batch(**{name: column.reshape(2, 2) for name, column in columns.items()})


def test_what_a_text_without_words_or_bytes_cannot_be_divided_by_is_left_out():
    computed = LanguageModelMetrics().compute(**language_model_columns(4), num_bytes=1, num_words=0)
    assert "bits_per_byte" in computed and "word_perplexity" not in computed
    assert "bits_per_byte" not in LanguageModelMetrics().compute(**language_model_columns(4), num_bytes=0)


def test_nothing_is_written_to_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    LanguageModelMetrics().compute(**language_model_columns(5))
    assert not list(tmp_path.iterdir())


def test_the_report_covers_every_metric_once_in_order():
    keys = [metric.key for metric in METRICS]
    memory = {name: [1.0] for name in MemoryMetrics.columns}
    computed = LanguageModelMetrics().compute(**language_model_columns(3), num_bytes=9, num_words=2)
    assert keys[:13] == [*list(computed)[:8], *MemoryMetrics().compute(**memory)]
    assert set(computed) < set(keys) and len(set(keys)) == len(keys)
