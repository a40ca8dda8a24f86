import json
import math
import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnc_gpt2.report import (
    comparison_markdown,
    comparison_table,
    delta_percent,
    difference_lines,
    display_width,
    replacing,
    to_json,
    verdict,
    visible_text,
    write_comparison,
    write_inspection_lines,
    write_inspection_records,
    write_text,
)

ORIGINAL_TABLE = """\
══════════════════════════════════════════════════════════════════
  FINAL COMPARISON — GPT2 Baseline vs GPT2 + DNC
══════════════════════════════════════════════════════════════════
  Metric                  GPT2 Baseline       GPT2 + DNC   Δ
  ──────────────────────────────────────────────────────────────
  Perplexity ↓                    45.21            41.88   ▼7.4% ✓
  Top-1 Accuracy ↑               0.3412           0.3601   ▲5.5% ✓
  Avg Write Gate                      —            0.512
  Write Sparsity ↑                    —            0.731
  Memory KL ↑                         —            0.284"""

ORIGINAL_INSPECTION = """\
  Token                  Gate  bar
  ──────────────────────────────────────────────────────────
  Albert                 0.821  ████████████████████████
  Einstein               0.143  ████
  was                    0.031
  born                   0.612  ██████████████████
  in                     0.028
  1879                   0.897  ██████████████████████████"""


def model(**metrics) -> dict:
    return {"path": "runs/default", "parameters": 1000, "metrics": {"parameters": 1000, **metrics}}


def rows(comparison: dict) -> dict[str, str]:
    """The table's lines below its heading, by metric label without direction."""
    lines = comparison_table(comparison).splitlines()[5:]
    return {line[2:22].rstrip(" ↑↓"): line[22:].strip() for line in lines}


def pair(key: str, reference, value) -> dict:
    return {"models": {"baseline": model(**{key: reference}), "dnc": model(**{key: value})}}


@pytest.fixture
def comparison() -> dict:
    memory = {"avg_gate": 0.512, "write_sparsity": 0.731, "mem_kl": 0.284}
    models = {
        "baseline": {"path": "a", "metrics": {"ppl": 45.21, "top1_acc": 0.3412, **dict.fromkeys(memory)}},
        "dnc": {"path": "b", "metrics": {"ppl": 41.88, "top1_acc": 0.3601, **memory}},
    }
    data = {"dataset_name": "Salesforce/wikitext", "tokens": 245569, "carry_memory": True, "streams": {"count": 4}}
    versions = {"torch": "2.13.0"}
    return {"models": models, "delta_percent": delta_percent(models), "data": data, "seed": 12345, "versions": versions}


def test_deltas_are_percent_of_the_first_model():
    models = {
        "baseline": model(ppl=50.0, loss=4.0),
        "dnc": model(ppl=40.0, loss=5.0),
        "wide": model(ppl=60.0, loss=4.0),
    }
    deltas = delta_percent(models)
    assert list(deltas) == ["dnc", "wide"]
    assert deltas["dnc"] == {"loss": 25.0, "ppl": -20.0, "parameters": 0.0}
    assert deltas["wide"]["ppl"] == pytest.approx(20)


@pytest.mark.parametrize(("reference", "value"), [(None, 0.5), (0.5, None), (None, None), (0.0, 0.5)])
def test_deltas_without_a_base_are_null(reference, value):
    assert delta_percent(pair("mem_kl", reference, value)["models"])["dnc"]["mem_kl"] is None


def test_deltas_of_one_model_are_empty_and_of_none_an_error():
    assert delta_percent({"dnc": model(ppl=3.0)}) == {}
    with pytest.raises(ValueError, match="at least one model"):
        delta_percent({})


def test_table_has_the_documented_layout(comparison):
    assert comparison_table(comparison) == ORIGINAL_TABLE


@pytest.mark.parametrize("count", [4, 5])
def test_the_changes_of_many_models_are_left_to_the_page(count):
    many = {"models": {f"model {i}": model(ppl=10.0 + i) for i in range(count)}}
    assert ("▲10.0%" in comparison_table(many)) == (count == 4)
    assert "▲10.0%" in comparison_markdown(many)


DIFFERENCES = """\
  Against GPT2 Baseline      Loss        95 % interval   Perplexity      95 % interval
  GPT2 + DNC              -0.0765   [-0.0812, -0.0719]     x 0.9264   [0.9220, 0.9306]
  GPT2 + cache            +0.1000                    —     x 1.1052                  —"""


def test_paired_differences_are_a_line_a_model(comparison):
    comparison["models"]["neural_cache"] = model(ppl=49.97) | {"scoring": {"entries": 64, "theta": 0.25}}
    comparison["differences"] = {
        "dnc": {
            "loss": -0.0765,
            "loss_interval": [-0.0812, -0.0719],
            "ppl_ratio": 0.92635,
            "ppl_ratio_interval": [0.92201, 0.93062],
        },
        "neural_cache": {"loss": 0.1, "loss_interval": None, "ppl_ratio": 1.10517, "ppl_ratio_interval": None},
    }
    assert "\n".join(difference_lines(comparison)) == DIFFERENCES
    page = comparison_markdown(comparison).splitlines()
    assert "| GPT2 + DNC | -0.0765 | [-0.0812, -0.0719] | x 0.9264 | [0.9220, 0.9306] |" in page
    assert "| GPT2 + cache | runs/default | 1,000 | entries 64, theta 0.25 |" in page


def test_without_paired_differences_there_is_no_such_section(comparison):
    assert difference_lines(comparison) == []
    assert "Paired" not in comparison_markdown(comparison)


def judged(ratio, interval, **models) -> dict:
    difference = {"loss": 0, "loss_interval": None, "ppl_ratio": ratio, "ppl_ratio_interval": interval}
    models = models or {"baseline": model(ppl=10.0), "dnc": model(ppl=9.0, avg_gate=0.5)}
    data = {"bootstrap": "10,000 resamples of 40 documents"}
    return {"models": models, "differences": {list(models)[-1]: difference}, "data": data}


@pytest.mark.parametrize(
    ("ratio", "interval", "sentence"),
    [
        (
            0.543,
            [0.534, 0.553],
            "The memory helps: GPT2 + DNC has a perplexity 45.7 % lower than GPT2 Baseline's (95 % interval 44.7 to "
            "46.6 %; 10,000 resamples of 40 documents).",
        ),
        (
            1.25,
            [1.2, 1.3],
            "The memory hurts: GPT2 + DNC has a perplexity 25.0 % higher than GPT2 Baseline's (95 % interval 20.0 to "
            "30.0 %; 10,000 resamples of 40 documents).",
        ),
        (
            0.99,
            [0.98, 1.0004],
            "No difference is shown: GPT2 + DNC has a perplexity 1.0 % lower than GPT2 Baseline's, but the 95 % "
            "interval reaches from 2.0 % lower to 0.04 % higher; 10,000 resamples of 40 documents.",
        ),
        (
            0.9,
            None,
            "GPT2 + DNC has a perplexity 10.0 % lower than GPT2 Baseline's; how sure that is cannot be told, for want "
            "of independent text.",
        ),
        ("NaN", None, "GPT2 + DNC cannot be compared with GPT2 Baseline: a loss is not finite."),
    ],
    ids=["helps", "hurts", "no difference", "no interval", "not finite"],
)
def test_the_verdict_is_one_honest_sentence(ratio, interval, sentence):
    assert verdict(judged(ratio, interval)) == sentence
    assert sentence in comparison_markdown(judged(ratio, interval)).splitlines()


def test_the_verdict_without_a_memory_or_a_second_model():
    plain = judged(0.9, [0.8, 0.95], a=model(ppl=10.0), b=model(ppl=9.0))
    assert verdict(plain).startswith("b is better: b has a perplexity 10.0 % lower than a's (95 % interval 5.0 to")
    both = judged(1.1, [1.05, 1.15], a=model(ppl=9.0, avg_gate=0.5), b=model(ppl=9.9, avg_gate=0.5))
    assert verdict(both).startswith("b is worse: ")
    alone = {"models": {"dnc": model(ppl=9.0, avg_gate=0.5)}}
    assert verdict(alone) == "GPT2 + DNC has a perplexity of 9.00; there is no paired difference to judge it by."


def test_the_verdict_leaves_open_what_a_gain_on_an_untrained_model_comes_of():
    comparison = judged(0.9, [0.8, 0.95])
    comparison["models"]["baseline"]["untrained"] = True
    found = verdict(comparison)
    assert found.startswith("GPT2 + DNC is better: ")
    assert found.endswith("GPT2 Baseline was not trained on this text.")


def test_the_verdict_is_of_the_model_with_memory_or_of_the_one_asked_for():
    row = {"ppl_ratio": 0.5, "ppl_ratio_interval": [0.4, 0.6], "loss": -0.7, "loss_interval": None}
    models = {"baseline": model(ppl=10.0), "widened": model(ppl=5.0), "dnc": model(ppl=5.0, avg_gate=0.9)}
    comparison = {"models": models, "differences": {"widened": row, "dnc": row}}
    assert verdict(comparison).startswith("The memory helps: GPT2 + DNC")
    assert verdict(comparison, "widened").startswith("GPT2 widened is better: ")


@pytest.mark.parametrize(
    ("key", "reference", "value", "change"),
    [
        ("loss", 4.0, 5.0, "▲25.0% ✗"),
        ("loss", 4.0, 3.0, "▼25.0% ✓"),
        ("top1_acc", 0.4, 0.3, "▼25.0% ✗"),
        ("avg_gate", 0.4, 0.3, "▼25.0%"),
        ("loss", 4.0, 4.0001, "0.0%"),
        ("ppl", 4.0, math.inf, "▲inf% ✗"),
        ("ppl", 4.0, "Infinity", "▲inf% ✗"),
        ("ppl", 4.0, math.nan, "nan"),
        ("mem_kl", None, 0.3, "0.300"),
    ],
)
def test_change_shows_direction_size_and_verdict(key, reference, value, change):
    table = comparison_table(pair(key, reference, value))
    assert any(line.endswith(f" {change}") for line in table.splitlines())


def test_small_and_huge_values_stay_readable():
    assert rows(pair("mem_kl", 0.00001, 0.1))["Memory KL"].startswith("1.00e-05")
    assert rows(pair("ppl", 1e30, 1.0))["Perplexity"].startswith("1.00e+30")


def test_table_shows_any_number_of_models():
    three = {"models": {"baseline": model(ppl=50.0), "dnc": model(ppl=40.0), "runs/模型": model(ppl=75.0)}}
    table = comparison_table(three)
    assert "Δ GPT2 + DNC" in table and "Δ runs/模型" in table
    assert rows(three)["Perplexity"].split()[-4:] == ["▼20.0%", "✓", "▲50.0%", "✗"]
    alone = comparison_table({"models": {"dnc": model(ppl=40.0)}})
    assert "FINAL EVALUATION — GPT2 + DNC" in alone and "Δ" not in alone and "40.00" in alone


def test_table_columns_align_by_display_width():
    table = comparison_table({"models": {"模型一二三四五六七八九十": model(ppl=50.0), "dnc": model(ppl=40.0)}})
    heading, row = (next(line for line in table.splitlines() if line.startswith(f"  {s}")) for s in ("Metric", "Perpl"))
    assert display_width(heading[: heading.index("Δ")]) == display_width(row[: row.index("▼")])


def test_table_and_page_show_recall_by_distance_and_guessing():
    comparison = pair("recall_outside_window", 0.05, 0.97)
    comparison["data"] = {"recall_by_guessing": 0.04}
    comparison["models"]["dnc"]["metrics"]["recall_by_distance"] = {"10": 0.95, "2": 0.98}
    comparison["models"]["baseline"]["metrics"]["recall_by_distance"] = {"2": 0.06, "10": None}
    shown = rows(comparison)
    assert shown["Recall, 2 Windows"].split()[:2] == ["0.060", "0.980"]
    assert shown["Recall, 10 Windows"].split()[:2] == ["—", "0.950"]
    assert shown["Recall by Guessing"].split()[:2] == ["0.040", "0.040"]
    assert list(shown).index("Recall, 2 Windows") < list(shown).index("Recall, 10 Windows")
    assert "| Recall, 10 Windows ↑ | — | 0.950 |" in comparison_markdown(comparison)


def test_page_tells_metrics_data_seed_models_and_versions(comparison):
    page = comparison_markdown(comparison)
    for line in (
        "| Perplexity ↓ | 45.21 | 41.88 | ▼7.4% ✓ |",
        "| dataset_name | Salesforce/wikitext |",
        "| tokens | 245,569 |",
        "| carry_memory | yes |",
        "| streams.count | 4 |",
        "| seed | 12345 |",
        "| torch | 2.13.0 |",
    ):
        assert line in page.splitlines()


def test_page_escapes_what_would_break_its_tables():
    page = comparison_markdown({"models": {"<b>": {**model(ppl=2.0), "path": "a|b\n<c>"}}})
    assert "| &lt;b> | a\\|b &lt;c> | 1,000 |  |" in page.splitlines() and "<" not in page


def test_comparison_is_written_whole_and_reads_back(comparison, tmp_path):
    write_comparison(comparison, tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "comparison.json").read_text(encoding="utf-8"))
    assert stored == comparison
    assert comparison_table(stored) == comparison_table(comparison)
    assert (tmp_path / "new" / "comparison.md").read_text(encoding="utf-8") == comparison_markdown(comparison)


def test_numbers_that_are_not_finite_are_stored_as_strings_apart_from_null():
    text = to_json({"a": math.nan, "b": [math.inf, -math.inf], "c": None, "d": np.float32(0.5), "e": np.arange(2)})
    stored = json.loads(text, parse_constant=pytest.fail)
    assert stored == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": None, "d": 0.5, "e": [0, 1]}
    assert math.isnan(float(stored["a"])) and float(stored["b"][1]) == -math.inf


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "file", "old")

    def fail_halfway():
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_written_files_have_ordinary_permissions(tmp_path):
    write_text(tmp_path / "ours", "text")
    (tmp_path / "ordinary").write_text("text")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "ordinary")}
    assert len(modes) == 1


def test_inspection_has_the_documented_layout():
    tokens = [
        ("Albert", 0.821),
        (" Einstein", 0.143),
        (" was", 0.031),
        (" born", 0.612),
        (" in", 0.028),
        (" 1879", 0.897),
    ]
    assert "\n".join(write_inspection_lines(tokens)) == ORIGINAL_INSPECTION


def test_inspection_bar_spans_30_blocks_and_survives_odd_gates():
    _, _, *lines = write_inspection_lines([("a", 1.0), ("b", 0.0), ("c", math.nan), ("d", 1.5), ("e", -0.5)])
    assert [line.count("█") for line in lines] == [30, 0, 0, 30, 0]
    assert "nan" in lines[2]


def test_inspection_of_nothing_is_its_heading():
    assert len(write_inspection_lines([])) == 2


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" word", "word"),
        ("word", "word"),
        ("  two", "␣two"),
        (" ", "␣"),
        ("\n", r"\n"),
        (" \t", r"\t"),
        ("a b", "a b"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u202e", r"\u202e"),
        ("\ud800", r"\ud800"),
        ("日本", "日本"),
        ("", ""),
    ],
)
def test_tokens_are_shown_as_visible_text(token, shown):
    assert visible_text(token) == shown


def test_display_width_counts_terminal_columns():
    assert [display_width(text) for text in ("abc", "日本", "e\u0301", "—█✓")] == [3, 4, 1, 3]


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), st.floats(0, 1)), max_size=8))
def test_any_token_keeps_to_one_aligned_line(tokens):
    heading, _, *lines = write_inspection_lines(tokens)
    assert len("\n".join(lines).splitlines()) == len(tokens)
    for line, (_, gate) in zip(lines, tokens, strict=True):
        before_gate = line[: line.rstrip(" █").rindex(f"{gate:.3f}")]
        assert display_width(before_gate) == heading.index("Gate")


def test_inspection_records_keep_exact_tokens_and_survive_json():
    records = write_inspection_records([("\n", np.float32(0.5)), (" é", 1), ("\ud800", math.nan)])
    assert records[:2] == [{"token": "\n", "write_gate": 0.5}, {"token": " é", "write_gate": 1.0}]
    assert json.loads(to_json(records))[2]["write_gate"] == "NaN"


def test_lone_surrogates_do_not_prevent_writing(tmp_path):
    write_text(tmp_path / "inspection.json", to_json(write_inspection_records([("\ud800", 0.5)])))
    assert json.loads((tmp_path / "inspection.json").read_text(encoding="utf-8"))[0]["token"] == "\ud800"
