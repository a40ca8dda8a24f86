"""compare.py: the same numbers as train.py's, for any saved GPT-2 with or without memory."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import command_line, tiny_options, tiny_run, write_text
from transformers import GPT2Config, GPT2LMHeadModel

import compare
from dnc_gpt2 import comparison as comparison_module
from dnc_gpt2.comparison import EINSTEIN, EXCERPT
from dnc_gpt2.options import one_line_errors
from dnc_gpt2.tokenization import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a finished run, `run`."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_run(folder, carry_memory=True, eval_streams=3, max_steps=2)
    return folder


@pytest.fixture(scope="module")
def checkpoints(folder):
    return [str(folder / "run" / kind) for kind in ("baseline", "dnc")]


@pytest.fixture(scope="module")
def plain(folder, checkpoints):
    """Two plain GPT-2 folders with the run's tokenizer, that say nothing of their data."""
    tokenizer = load_tokenizer(checkpoints[0])
    for seed in (1, 2):
        torch.manual_seed(seed)
        sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / f"gpt2_{seed}")
        tokenizer.save_pretrained(folder / f"gpt2_{seed}")
    return [str(folder / f"gpt2_{seed}") for seed in (1, 2)]


def run_compare(names: list[str], output_dir: Path, **options) -> dict:
    return compare.main([*names, *command_line({"output_dir": output_dir, "use_cpu": True, **options})])


def without_times(models: dict) -> dict:
    return {
        name: {**model, "metrics": {k: v for k, v in model["metrics"].items() if k != "tokens_per_second"}}
        for name, model in models.items()
    }


def refused(arguments: list[str], *culprits: str, capsys=None) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors("compare.py"):
        compare.main(arguments)
    assert end.value.code not in (0, None)
    message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.strip()
    assert "\n" not in message, message
    for culprit in culprits:
        assert culprit in message, message


def test_the_seed_is_told_where_all_checkpoints_share_it(folder, checkpoints, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoints[1], other, ignore=shutil.ignore_patterns("checkpoint-*"))
    run = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**run, "seed": run["seed"] + 1}))
    assert run_compare([checkpoints[0], str(other)], tmp_path / "out")["seed"] is None


def test_a_checkpoint_with_the_name_of_an_opponent_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints[0], tmp_path / "overlapping", ignore=shutil.ignore_patterns("checkpoint-*"))
    arguments = [str(tmp_path / "overlapping"), "--opponents", "overlapping", "--output_dir", str(tmp_path / "out")]
    refused(arguments, str(tmp_path / "overlapping"), "the name of the opponent overlapping", "rename")


def test_checkpoints_of_a_run_give_its_numbers_without_any_option(folder, checkpoints, tmp_path, capsys):
    again = run_compare(checkpoints, tmp_path / "out")
    before = json.loads((folder / "run" / "comparison.json").read_text())
    assert without_times(again["models"]) == without_times(before["models"])
    assert again["data"] == before["data"] and again["seed"] == before["seed"]
    assert again["memory_writes"] == before["memory_writes"]
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["models"] == again["models"]
    # The same files as a run's, and the same table.
    names = {"comparison.json", "comparison.md", "training_curves.png", "loss_by_distance.png", "loss_by_position.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    shown = capsys.readouterr().out
    assert "FINAL COMPARISON — GPT2 Baseline vs GPT2 + DNC" in shown
    assert f"Memory writes of GPT2 + DNC: {EINSTEIN}" in shown
    assert shown.endswith(f"Everything is in {tmp_path / 'out'}/\n")


def test_a_report_is_written_where_it_is_asked_for(folder, checkpoints, tmp_path):
    path = tmp_path / "new" / "page.html"
    result = run_compare(checkpoints, tmp_path / "out", report=path, inspect=["old <b>king</b>"])
    page = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    assert [x["title"] for x in data["inspections"]] == [EXCERPT, EINSTEIN, "old <b>king</b>"]
    assert len(data["inspections"][0]["tokens"]) == 8 * 8  # windows of 8
    profiles = result["profiles"]
    assert (
        sum(profiles["distance"]["targets"]) == sum(profiles["position"]["targets"]) == result["data"]["scored_tokens"]
    )
    for profile in profiles.values():
        for name, model in result["models"].items():
            assert np.average(profile["loss"][name], weights=profile["targets"]) == pytest.approx(
                model["metrics"]["loss"]
            )
        mean = np.average(profile["gain"]["dnc"], weights=profile["targets"])
        assert mean == pytest.approx(-result["differences"]["dnc"]["loss"])
    before = path.read_bytes()
    refused([*checkpoints, "--output_dir", str(tmp_path / "other"), "--report", str(path)], str(path), "already exists")
    refused([*checkpoints, "--report", str(tmp_path)], str(tmp_path), "no HTML file")
    refused([*checkpoints, "--report", str(tmp_path / "x.png")], "x.png", "no HTML file")
    assert path.read_bytes() == before


def test_options_replace_what_a_checkpoint_remembers(folder, checkpoints, tmp_path):
    write_text(folder / "other.txt", 4, seed=9)
    other = run_compare(
        checkpoints, tmp_path, validation_file=folder / "other.txt", carry_memory=False, inspect=["old king"]
    )
    assert other["data"]["validation_file"] == [str(folder / "other.txt")]
    assert "train_file" not in other["data"]
    assert (other["data"]["carry_memory"], other["data"]["eval_streams"]) == (False, None)
    assert other["data"]["example_length"] == 16
    assert list(other["memory_writes"]["dnc"]) == [EINSTEIN, "old king"]


def test_plain_gpt2_checkpoints_on_named_data(folder, plain, tmp_path):
    result = run_compare(
        plain, tmp_path, validation_file=folder / "validation.txt", seq_len=8, windows_per_example=4, seed=None
    )
    assert list(result["models"]) == ["gpt2_1", "gpt2_2"]
    for model in result["models"].values():
        assert model["window"] == 32
        assert model["metrics"]["avg_gate"] is None and model["metrics"]["ppl"] > 1
    assert set(result["delta_percent"]) == {"gpt2_2"}
    assert result["seed"] is None and result["memory_writes"] == {}
    # Nothing was trained here, so that there are no curves.
    pictures = {"loss_by_distance.png", "loss_by_position.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.json", "comparison.md", *pictures}


def test_more_than_two_checkpoints_and_a_reference(checkpoints, plain, tmp_path, capsys):
    # The first checkpoint knows no data; the run's do.
    names = [plain[0], *checkpoints]
    result = run_compare(names, tmp_path, reference=checkpoints[1])
    assert list(result["models"]) == ["dnc", "gpt2_1", "baseline"]
    assert set(result["delta_percent"]) == {"gpt2_1", "baseline"}
    assert result["data"]["carry_memory"] is True
    first = result["models"]["dnc"]["metrics"]["loss"]
    for name, changes in result["delta_percent"].items():
        assert changes["loss"] == pytest.approx(100 * (result["models"][name]["metrics"]["loss"] / first - 1))
    assert "FINAL COMPARISON — GPT2 + DNC vs gpt2_1 vs GPT2 Baseline" in capsys.readouterr().out
    by_name = run_compare(names, tmp_path, reference="dnc", overwrite_output_dir=True)
    assert list(by_name["models"]) == ["dnc", "gpt2_1", "baseline"]


def test_checkpoints_of_one_folder_name_are_told_apart_by_their_paths(folder, checkpoints, tmp_path):
    shutil.copytree(checkpoints[0], tmp_path / "baseline", ignore=shutil.ignore_patterns("checkpoint-*"))
    names = [checkpoints[0], str(tmp_path / "baseline")]
    result = run_compare(names, tmp_path / "out")
    assert list(result["models"]) == names
    assert result["delta_percent"][names[1]]["loss"] == 0


def test_an_intermediate_checkpoint_can_be_compared(checkpoints, tmp_path):
    result = run_compare([checkpoints[1], f"{checkpoints[1]}/checkpoint-2"], tmp_path)
    assert result["delta_percent"]["checkpoint-2"]["loss"] == 0


def test_earlier_results_are_kept_unless_they_may_be_replaced(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "comparison.json").write_text("{}")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(comparison_module, "evaluate", lambda *_, **__: pytest.fail("evaluation has started"))
    refused([*checkpoints, "--output_dir", str(tmp_path)], "comparison.json", "--overwrite_output_dir")
    assert (tmp_path / "comparison.json").read_text() == "{}"
    refused([*checkpoints, "--output_dir", str(tmp_path / "file")], "is a file", "--output_dir")


def test_tokenizers_of_one_vocabulary_that_cut_differently_are_refused(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_module, "evaluate", lambda *_, **__: pytest.fail("evaluation has started"))
    other = tmp_path / "other"
    shutil.copytree(checkpoints[0], other, ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "add_prefix_space": True}))
    refused([checkpoints[1], str(other), "--output_dir", str(tmp_path / "out")], str(other), "different tokenizers")


def test_mismatching_tokenizers_are_refused(folder, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_module, "evaluate", lambda *_, **__: pytest.fail("evaluation has started"))
    other = tmp_path / "other"
    shutil.copytree(checkpoints[0], other, ignore=shutil.ignore_patterns("checkpoint-*"))
    train_tokenizer(["quite another text " * 9], 270).save_pretrained(other)
    refused(
        [checkpoints[1], str(other), "--output_dir", str(tmp_path / "out")],
        str(other),
        checkpoints[1],
        "different tokenizers",
    )


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints[0], tmp_path / "small", ignore=shutil.ignore_patterns("checkpoint-*"))
    sizes = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes)).save_pretrained(tmp_path / "small")
    refused([str(tmp_path / "small"), "--output_dir", str(tmp_path / "out")], "small", "50", "tokenizer")


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["nobody/nothing"], ("nobody/nothing",)),
        (["RUN"], ("is not a checkpoint", "baseline", "dnc")),
        (["BASELINE/config.json"], ("config.json is a file",)),
        (["BASELINE", "BASELINE"], ("named twice",)),
        (["BASELINE", "DNC", "--reference", "other"], ("--reference other",)),
        (["BASELINE", "--batch_size", "0"], ("batch_size=0",)),
        (["BASELINE", "--seq_len", "6", "--windows_per_example", "3"], ("18 tokens", "n_positions=8", "baseline")),
        (["BASELINE", "--validation_file", "missing.txt"], ("missing.txt",)),
        (["BASELINE", "--hidden_size", "6"], ("--hidden_size",)),
        (["BASELINE", "--mixed_precision", "int3"], ("mixed_precision", "int3")),
        ([], ("checkpoints",)),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_that_names_the_culprit(folder, tmp_path, capsys, arguments, culprits):
    places = {"RUN": folder / "run", "BASELINE": folder / "run" / "baseline", "DNC": folder / "run" / "dnc"}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    out = tmp_path / "out"
    refused([*arguments, "--output_dir", str(out), "--use_cpu"], *culprits, capsys=capsys)
    assert not out.exists()


@pytest.mark.parametrize("damage", [None, b"\xff" * 999])
def test_missing_and_corrupt_weights_are_refused(checkpoints, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints[1], folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    (folder / "model.safetensors").unlink()
    if damage:
        (folder / "model.safetensors").write_bytes(damage)
    refused([str(folder), "--output_dir", str(tmp_path / "out")], str(folder), "save_pretrained")


def test_the_script_ends_with_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "compare.py"), str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"compare.py: {tmp_path} is not a checkpoint")


def test_the_options_of_train_name_the_same_data(folder):
    # compare.py reads a run's data options as they were given, whatever the working directory's defaults are.
    remembered = json.loads((folder / "run" / "dnc" / "run.json").read_text())
    options = tiny_options(folder)
    assert remembered["data"]["seq_len"] == options["seq_len"]
    assert remembered["data"]["validation_file"] == [str(options["validation_file"])]
    assert remembered["seed"] == options["seed"]
