"""train.py from its options to its outputs, on runs of a second."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import command_line, tiny_options, tiny_run, write_text
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import compare
import train
from dnc_gpt2 import DNCGPT2LMHeadModel
from dnc_gpt2.comparison import EINSTEIN
from dnc_gpt2.report import verdict
from dnc_gpt2.tokenization import train_tokenizer
from dnc_gpt2.trainer import DNCTrainer, DNCTrainingArguments

ROOT = Path(__file__).parent.parent
KINDS = ("baseline", "dnc")
METRICS = {
    *("loss", "ppl", "bpt", "top1_acc", "top5_acc", "confidence", "mean_rank", "pred_entropy"),
    *("avg_gate", "gate_std", "write_rate", "write_sparsity", "mem_kl"),
    *("bits_per_byte", "word_perplexity", "tokens_per_second"),
}
MEMORY_METRICS = {"avg_gate", "gate_std", "write_rate", "write_sparsity", "mem_kl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def run(folder):
    """A finished run: its folder."""
    tiny_run(folder, carry_memory=True, inspect=["the old lamp", "sea"])
    return folder / "run"


@pytest.fixture(scope="module")
def comparison(run):
    return json.loads((run / "comparison.json").read_text())


@pytest.fixture(scope="module")
def gpt2(folder):
    """A plain GPT-2 folder with its tokenizer, its window longer than the runs'."""
    tokenizer = train_tokenizer([(Path(tiny_options(folder)["train_file"])).read_text()], 280)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def run_python(*arguments, cwd=ROOT, pythonpath: str | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = pythonpath
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def history(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def losses(checkpoint: Path) -> list[float]:
    return [row["loss"] for row in history(checkpoint) if "loss" in row]


def evaluations(checkpoint: Path) -> dict[int, float]:
    return {row["step"]: row["eval_ppl"] for row in history(checkpoint) if "eval_ppl" in row}


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Outputs


def test_a_run_leaves_two_checkpoints_and_the_comparison(run):
    assert {path.name for path in run.iterdir()} == {
        *KINDS,
        *("comparison.json", "comparison.md", "report.html", "training_curves.png"),
        *("loss_by_distance.png", "loss_by_position.png"),
    }
    everywhere = {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "trainer_state.json", "run.json"),
    }
    code = {f"{name}_dnc_gpt2.py" for name in ("configuration", "kernels", "memory", "modeling")}
    for kind in KINDS:
        present = {path.name for path in (run / kind).iterdir()}
        assert everywhere | {"checkpoint-3", "checkpoint-4"} <= present
        assert present & code == (code if kind == "dnc" else set())
    assert (run / "training_curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_every_checkpoint_has_what_resuming_needs_and_its_perplexity(run):
    for checkpoint in run.glob("*/checkpoint-*"):
        assert (checkpoint / "optimizer.pt").is_file() and (checkpoint / "scheduler.pt").is_file()
        assert int(checkpoint.name.split("-")[1]) in evaluations(checkpoint)
        carried = checkpoint.parent.name == "dnc"
        assert (checkpoint / "memory_state_0.safetensors").is_file() == carried
    for kind in KINDS:
        assert set(evaluations(run / kind)) == {2, 3, 4}
        terms = {"routing_loss", "entropy_loss", "write_gate"} if kind == "dnc" else set()
        for row in history(run / kind):
            if "loss" in row:
                assert {"lm_loss", "top1_acc", *terms} <= set(row)


def test_comparison_json_has_every_metric(run, comparison):
    names = ["models", "delta_percent", "differences", "profiles", "data", "memory_writes", "seed", "versions"]
    assert list(comparison) == names
    assert list(comparison["models"]) == list(KINDS)
    for kind, model in comparison["models"].items():
        assert set(model["metrics"]) >= METRICS
        assert model["path"] == str(run / kind)
        missing = {name for name in METRICS if model["metrics"][name] is None}
        assert missing == (MEMORY_METRICS if kind == "baseline" else set())
    baseline, dnc = (comparison["models"][kind] for kind in KINDS)
    assert dnc["parameters"] > baseline["parameters"] > 0
    (changes,) = comparison["delta_percent"].values()
    assert set(comparison["delta_percent"]) == {"dnc"}
    expected = 100 * (dnc["metrics"]["ppl"] / baseline["metrics"]["ppl"] - 1)
    assert changes["ppl"] == pytest.approx(expected)
    assert changes["avg_gate"] is None
    assert comparison["seed"] == 5
    assert {"python", "torch", "transformers"} <= set(comparison["versions"])


def test_comparison_json_says_how_it_was_evaluated(folder, comparison):
    data = comparison["data"]
    assert data["validation_file"] == [str(folder / "validation.txt")]
    assert (data["carry_memory"], data["eval_streams"], data["example_length"]) == (True, 4, 16)
    tokenizer = AutoTokenizer.from_pretrained(comparison["models"]["dnc"]["path"])
    text = (folder / "validation.txt").read_text()
    tokens = tokenizer(text)["input_ids"]
    assert data["scored_tokens"] == len(tokens) - 1
    assert data["bytes"] == len(text) - len(tokenizer.decode(tokens[:1]))


def test_the_final_evaluation_is_that_of_the_comparison(run, comparison):
    for kind in KINDS:
        final = evaluations(run / kind)[4]
        assert comparison["models"][kind]["metrics"]["ppl"] == pytest.approx(final, rel=1e-4)


def test_memory_writes_are_recorded_for_einstein_and_the_texts_to_inspect(comparison):
    (writes,) = comparison["memory_writes"].values()
    assert set(comparison["memory_writes"]) == {"dnc"}
    assert list(writes) == [EINSTEIN, "the old lamp", "sea"]
    for text, records in writes.items():
        assert "".join(record["token"] for record in records) == text
        assert all(0 <= record["write_gate"] <= 1 for record in records)


def test_the_card_of_each_model_says_how_it_was_trained_on_what_how_it_compares_and_how_to_load_it(
    run, folder, comparison
):
    for kind in KINDS:
        card = (run / kind / "README.md").read_text()
        assert "Perplexity" in card and "AutoModelForCausalLM" in card
        for line in (f"| dataset | {folder / 'train.txt'} |", "| optimizer steps | 4 |", "| seed | 5 |"):
            assert line in card.splitlines()
        assert re.search(r"\| training tokens \| \d+ \|", card) and "| torch | " in card
        assert "| layers, width, heads | 1, 16, 2 |" in card and "| attention window | 8 |" in card
        assert ("trust_remote_code=True" in card) == ("| mem_slots | 8 |" in card) == (kind == "dnc")
        assert (verdict(comparison) in card.split("## Use")[0]) == (kind == "dnc")
    assert "Perplexity" in (run / "comparison.md").read_text()


def test_the_configuration_that_is_saved_keeps_the_cache_on(run):
    for config in run.glob("**/config.json"):
        assert json.loads(config.read_text())["use_cache"] is True


def test_a_quiet_run_prints_its_results_and_nothing_else(folder, capfd):
    # Prints of libraries under us would be seen too.
    tiny_run(folder, output_dir=folder / "quiet", max_steps=1, inspect=["the old lamp"])
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("═══") and "FINAL COMPARISON — GPT2 Baseline vs GPT2 + DNC" in lines[1]
    assert lines[-1] == f"  Everything is in {folder / 'quiet'}/"
    for label in ("Perplexity ↓", "Top-1 Accuracy ↑", "Avg Write Gate", "Write Sparsity ↑", "Memory KL ↑"):
        assert sum(line.startswith(f"  {label} ") for line in lines) == 1
    for text in (EINSTEIN, "the old lamp"):
        assert f"  Memory writes of GPT2 + DNC: {text}" in lines
    assert not [line for line in lines if line.startswith("{")], "logs belong into the history"
    assert "it/s" not in captured.err and "\r" not in captured.err, "no progress bars where nobody looks"


def test_checkpoints_load_in_a_process_without_this_project(run, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(
        f"""
import importlib.util
for name in ("dnc_gpt2", "modeling_dnc_gpt2", "train"):
    assert importlib.util.find_spec(name) is None, name
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, remote in (({str(run / "baseline")!r}, False), ({str(run / "dnc")!r}, True)):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = tokenizer("the old", return_tensors="pt")["input_ids"]
    print(type(model).__name__, model(ids).logits.shape[-1] == len(tokenizer))
"""
    )
    result = run_python(script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n") == ["GPT2LMHeadModel True", "DNCGPT2LMHeadModel True", ""]


# Fairness


def test_both_models_start_equal_and_see_the_same_targets(folder, monkeypatch):
    weights, targets = {}, {kind: [] for kind in KINDS}
    compute_loss = DNCTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        kind = Path(self.args.output_dir).name
        if kind not in weights:
            weights[kind] = {name: p.detach().clone() for name, p in model.named_parameters()}
        targets[kind].append(inputs["shift_labels"])
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DNCTrainer, "compute_loss", spy)
    tiny_run(folder, output_dir=folder / "fair", max_steps=2)
    assert all(torch.equal(p, weights["dnc"][name]) for name, p in weights["baseline"].items())
    assert len(targets["baseline"]) == 2
    assert all(torch.equal(x, y) for x, y in zip(*targets.values(), strict=True))


# Processes

DRIVER = """
import json, sys
sys.path.insert(0, {root!r})
import train
for arguments in json.loads({runs!r}):
    train.main(arguments)
"""


def test_two_processes_equal_one_with_the_same_global_batch(folder, tmp_path):
    def options(carry_memory: bool, processes: int, output_dir: Path) -> dict:
        return tiny_options(
            folder,
            output_dir=output_dir,
            carry_memory=carry_memory,
            per_device_train_batch_size=4 // processes,
            optim="sgd",
            learning_rate=0.1,
            eval_streams=3,
            ddp_backend="gloo" if processes > 1 else None,
        )

    names = {True: "carried", False: "not_carried"}
    runs = [command_line(options(carry, 2, tmp_path / name)) for carry, name in names.items()]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), runs=json.dumps(runs)))
    result = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, driver)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("FINAL COMPARISON") == len(runs), "only the main process prints"
    for carry, name in names.items():
        alone = tmp_path / f"{name}_alone"
        train.main(command_line(options(carry, 1, alone)))
        one, two = (json.loads((path / "comparison.json").read_text()) for path in (alone, tmp_path / name))
        for kind in KINDS:
            assert losses(tmp_path / name / kind) == pytest.approx(losses(alone / kind), rel=1e-4)
            assert evaluations(tmp_path / name / kind) == pytest.approx(evaluations(alone / kind), rel=1e-4)
            metrics = [comparison["models"][kind]["metrics"] for comparison in (one, two)]
            measured = {name for name, value in metrics[0].items() if value is not None}
            for metric in (METRICS & measured) - {"tokens_per_second"}:
                assert metrics[1][metric] == pytest.approx(metrics[0][metric], rel=1e-3, abs=1e-6), metric
        if carry:
            states = sorted(path.name for path in (tmp_path / name / "dnc" / "checkpoint-4").glob("memory_state_*"))
            assert states == ["memory_state_0.safetensors", "memory_state_1.safetensors"]


def test_one_of_several_gpus_is_used_and_the_rest_is_mentioned(tmp_path, monkeypatch, caplog):
    training = DNCTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    train.mention_idle_gpus(training)
    assert not caplog.records
    training.use_cpu = False
    train.mention_idle_gpus(training)
    assert "accelerate launch --num_processes 3" in caplog.text and "--num_gpus 3" in caplog.text


def test_num_gpus_starts_as_many_processes_with_the_other_options(monkeypatch):
    commands = []

    def become(program, command):
        commands.append(command)
        sys.exit(3)  # what takes the place of the process never returns to it

    monkeypatch.setattr(os, "execv", become)
    with pytest.raises(SystemExit):
        train.main(["--seq_len", "8", "--num_gpus", "2", "--max_steps=4"])
    (command,) = commands
    assert command[:5] == [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    assert command[-3:] == ["--seq_len", "8", "--max_steps=4"]


def test_the_optimizer_of_a_finished_model_is_gone_when_the_next_one_trains(folder, tmp_path, monkeypatch):
    create, made = DNCTrainer.create_optimizer, []

    def watched(self, *args, **kwargs):
        assert all(optimizer() is None for optimizer in made)
        optimizer = create(self, *args, **kwargs)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(DNCTrainer, "create_optimizer", watched)
    tiny_run(folder, output_dir=tmp_path / "run", opponents="widened")
    assert [optimizer() for optimizer in made] == [None] * 3


# Resuming


def test_a_run_that_was_interrupted_resumes_and_a_finished_model_is_left_as_it_is(folder, tmp_path, monkeypatch):
    options = {"carry_memory": True, "dropout": 0.1, "max_steps": 5, "save_steps": 2}
    tiny_run(folder, output_dir=tmp_path / "unbroken", **options)
    compute_loss = DNCTrainer.compute_loss

    def interrupted(self, model, *args, **kwargs):
        if Path(self.args.output_dir).name == "dnc" and self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(self, model, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DNCTrainer, "compute_loss", interrupted)
        tiny_run(folder, output_dir=tmp_path / "broken", **options)
    assert not (tmp_path / "broken" / "dnc" / "model.safetensors").exists()

    trained = []

    def counted(self, *args, **kwargs):
        trained.append(Path(self.args.output_dir).name)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(DNCTrainer, "compute_loss", counted)
    tiny_run(folder, output_dir=tmp_path / "broken", resume_from_checkpoint="true", **options)
    assert trained == ["dnc"] * 3
    for kind in KINDS:
        unbroken, broken = (tmp_path / name / kind for name in ("unbroken", "broken"))
        assert (unbroken / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
        assert losses(unbroken) == losses(broken)
        assert evaluations(unbroken) == evaluations(broken)
    one, two = (
        json.loads((tmp_path / name / "comparison.json").read_text())["models"] for name in ("unbroken", "broken")
    )
    for kind in KINDS:
        metrics = [comparison[kind]["metrics"] for comparison in (one, two)]
        assert all(metrics[0][name] == metrics[1][name] for name in METRICS - {"tokens_per_second"})

    # A finished run is left as it is; with more steps it goes on, each model from its last checkpoint.
    tiny_run(folder, output_dir=tmp_path / "broken", resume_from_checkpoint="true", **options)
    assert trained == ["dnc"] * 3
    named = str(tmp_path / "broken" / "dnc" / "checkpoint-4")
    shutil.rmtree(tmp_path / "broken" / "dnc" / "checkpoint-5")
    tiny_run(folder, output_dir=tmp_path / "broken", resume_from_checkpoint=named, **options)
    assert trained == ["dnc"] * 4
    assert (tmp_path / "broken" / "dnc" / "model.safetensors").read_bytes() == (
        tmp_path / "unbroken" / "dnc" / "model.safetensors"
    ).read_bytes()


def refused(arguments: list[str], *culprits: str, capsys=None) -> str:
    """The message with which train.py refuses these arguments, as a user would see it."""
    with pytest.raises(SystemExit) as end, train.one_line_errors("train.py"):
        train.main(arguments)
    assert end.value.code not in (0, None)
    message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.strip()
    assert "\n" not in message, message
    for culprit in culprits:
        assert culprit in message, message
    return message


def test_what_cannot_be_resumed_is_refused(run, folder, tmp_path):
    before = snapshot(run)
    for asked in (tmp_path / "nothing", run / "dnc", run):
        options = tiny_options(folder, resume_from_checkpoint=asked)
        refused(command_line(options), f"--resume_from_checkpoint {asked}", "checkpoint-<step>")
    elsewhere = tiny_options(folder, output_dir=tmp_path / "new", resume_from_checkpoint=run / "dnc" / "checkpoint-4")
    refused(command_line(elsewhere), "checkpoint-4", str(tmp_path / "new"))
    older = tmp_path / "run" / "dnc" / "checkpoint-2"
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(older.with_name("checkpoint-4"), older)
    going_back = tiny_options(folder, output_dir=tmp_path / "run", resume_from_checkpoint=older)
    refused(command_line(going_back), "checkpoint-4 is newer", "move it to another folder")
    both = tiny_options(folder, resume_from_checkpoint="true", overwrite_output_dir=True)
    refused(command_line(both), "--overwrite_output_dir", "--resume_from_checkpoint")
    assert snapshot(run) == before

    # A finished model without checkpoints cannot be trained any longer.
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoint-*"))
    options = tiny_options(folder, output_dir=bare, carry_memory=True, resume_from_checkpoint="true", max_steps=5)
    refused(command_line(options), "baseline", "no checkpoint-<step>", "--overwrite_output_dir")


# Options of a run


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_alone_is_the_same_as_beside_the_other(run, folder, kind):
    output_dir = folder / f"only_{kind}"
    comparison = tiny_run(folder, output_dir=output_dir, model=kind, carry_memory=True)
    assert list(comparison["models"]) == [kind] and comparison["delta_percent"] == {}
    assert {path.name for path in output_dir.iterdir() if path.is_dir()} == {kind}
    assert losses(output_dir / kind) == losses(run / kind)


@pytest.mark.parametrize("seq_len", [16, 8])
def test_training_goes_on_from_a_plain_gpt2(gpt2, folder, seq_len):
    output_dir = folder / f"from_gpt2_{seq_len}"
    comparison = tiny_run(
        folder, output_dir=output_dir, model_name_or_path=gpt2, seq_len=seq_len, learning_rate=0.0, max_steps=1
    )
    assert [model["window"] for model in comparison["models"].values()] == [seq_len, seq_len]
    start = load_file(gpt2 / "model.safetensors")
    for kind in KINDS:
        weights = load_file(output_dir / kind / "model.safetensors")
        assert torch.equal(weights["transformer.wpe.weight"], start["transformer.wpe.weight"][:seq_len])
        assert torch.equal(weights["transformer.wte.weight"], start["transformer.wte.weight"])
    # With a zero read projection the memory changes nothing yet; a learned backbone's logits do not move its gate.
    memory = DNCGPT2LMHeadModel.from_pretrained(output_dir / "dnc").transformer.memory
    assert not memory.read_projection.weight.any() and memory.surprise_weight == 0
    baseline, dnc = (comparison["models"][kind]["metrics"] for kind in KINDS)
    assert dnc["ppl"] == pytest.approx(baseline["ppl"], rel=1e-6)
    assert dnc["mem_kl"] == pytest.approx(0, abs=1e-9)


def test_a_frozen_backbone_stays_as_it_was_and_the_memory_learns(gpt2, folder, caplog):
    output_dir = folder / "frozen"
    options = {"output_dir": output_dir, "model_name_or_path": gpt2, "seq_len": 8, "freeze_backbone": True}
    comparison = tiny_run(folder, **options)
    assert "leaves the plain GPT-2 as it is" in caplog.text
    assert comparison["models"]["baseline"]["untrained"] and "untrained" not in comparison["models"]["dnc"]
    assert "| optimizer steps | 0 |" in (output_dir / "baseline" / "README.md").read_text()
    checkpoints = [str(output_dir / kind) for kind in KINDS]
    later = compare.main([*checkpoints, "--output_dir", str(folder / "frozen-compared"), "--use_cpu"])
    assert later["models"]["baseline"]["untrained"] and "untrained" not in later["models"]["dnc"]
    start = load_file(gpt2 / "model.safetensors")
    for kind in KINDS:
        weights = load_file(output_dir / kind / "model.safetensors")
        for name, tensor in start.items():
            if name != "transformer.wpe.weight":  # cut to the window
                assert torch.equal(weights[name], tensor), name
    memory = DNCGPT2LMHeadModel.from_pretrained(output_dir / "dnc").transformer.memory
    assert memory.read_projection.weight.any()
    assert comparison["models"]["dnc"]["metrics"]["mem_kl"] > 0
    # The baseline has nothing to train, also where an interrupted run goes on.
    again = tiny_run(folder, **options, resume_from_checkpoint="true")
    for kind in KINDS:
        assert again["models"][kind]["metrics"]["ppl"] == comparison["models"][kind]["metrics"]["ppl"]
    refused(command_line(tiny_options(folder, output_dir=folder / "new", freeze_backbone=True)), "--model_name_or_path")


def test_a_tokenizer_can_be_named(gpt2, folder):
    output_dir = folder / "named_tokenizer"
    tiny_run(folder, output_dir=output_dir, tokenizer_name=gpt2, model="baseline", max_steps=1)
    vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (gpt2, output_dir / "baseline")]
    assert vocabularies[0] == vocabularies[1]


def test_epochs_precision_checkpointing_and_compilation(folder):
    options = {
        "max_steps": None,
        "num_train_epochs": 1,
        "bf16": True,
        "gradient_checkpointing": True,
        "torch_compile_backend": "eager",
        "eval_strategy": "no",
        "save_strategy": "no",
        "max_train_tokens": 193,  # 12 examples: 3 steps of 4
    }
    comparison = tiny_run(folder, output_dir=folder / "all", **options)
    for kind in KINDS:
        state = json.loads((folder / "all" / kind / "trainer_state.json").read_text())
        assert (state["global_step"], state["epoch"]) == (3, 1.0)
        assert set(evaluations(folder / "all" / kind)) == {3}, "a final evaluation always happens"
    assert comparison["models"]["dnc"]["metrics"]["ppl"] < 300


def test_the_embedded_corpus_is_the_default_and_measures_recall(tmp_path, monkeypatch):
    monkeypatch.setattr("dnc_gpt2.corpus.EMBEDDED_DOCUMENTS", {"train": 4, "validation": 2})
    sizes = {name: value for name, value in tiny_options(tmp_path).items() if not name.endswith("_file")}
    sizes |= {"output_dir": tmp_path / "run", "seq_len": 16, "max_steps": 1, "lr_scheduler_type": "constant"}
    for carry_memory in (True, False):
        options = {**sizes, "carry_memory": carry_memory, "overwrite_output_dir": True}
        options |= {"lr_scheduler_kwargs": "{}", "warmup_steps": 0}
        comparison = train.main(command_line(options))
        assert 0 < comparison["data"]["recall_by_guessing"] < 0.5 or not carry_memory
        for model in comparison["models"].values():
            assert {"recall_inside_window", "recall_outside_window", "recall_by_distance"} <= set(model["metrics"])
        assert (tmp_path / "run" / "baseline" / "run.json").is_file()


def test_without_an_output_directory_the_run_is_named_after_its_data(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run(folder, output_dir=None, model="baseline", max_steps=1)
    assert (tmp_path / "runs" / "text" / "comparison.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


# Bad input


@pytest.fixture
def untrained(monkeypatch):
    """Fails the test if training starts."""
    monkeypatch.setattr(DNCTrainer, "train", lambda *_, **__: pytest.fail("training has started"))


def test_a_finished_run_is_not_damaged(run, folder, untrained):
    before = snapshot(run)
    refused(command_line(tiny_options(folder)), str(run / "baseline"), "--overwrite_output_dir", "--output_dir")
    refused(command_line(tiny_options(folder, model="dnc")), str(run / "dnc"), "--overwrite_output_dir")
    # Bad input is found before the old run is removed.
    broken = tiny_options(folder, overwrite_output_dir=True, train_file=folder / "missing.txt")
    refused(command_line(broken), "missing.txt")
    assert snapshot(run) == before


def test_a_finished_run_is_replaced_on_demand(folder, tmp_path):
    options = {"output_dir": tmp_path / "run", "model": "baseline", "max_steps": 3}
    tiny_run(folder, **options)
    tiny_run(folder, **{**options, "max_steps": 2}, overwrite_output_dir=True)
    assert max(evaluations(tmp_path / "run" / "baseline")) == 2
    assert not (tmp_path / "run" / "baseline" / "checkpoint-3").exists()


def test_the_other_model_may_not_replace_the_comparison_unasked(folder, tmp_path, untrained):
    (tmp_path / "comparison.json").write_text("{}")
    refused(command_line(tiny_options(folder, output_dir=tmp_path)), "comparison.json", "--overwrite_output_dir")


@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        ({"train_file": "missing.txt"}, ("missing.txt", "check the path")),
        ({"train_file": "empty.txt"}, ("empty.txt", "empty")),
        ({"validation_file": "short.txt"}, ("validation text", "at least 2")),
        ({"validation_file": None}, ("--validation_file",)),
        ({"train_file": None, "validation_file": None, "dataset_name": "nobody/nothing"}, ("nobody/nothing",)),
        ({"tokenizer_name": "nobody/nothing"}, ("nobody/nothing", "--tokenizer_name")),
        ({"model_name_or_path": "."}, (". is not a checkpoint", "config.json")),
        ({"model_name_or_path": "empty.txt"}, ("empty.txt is a file",)),
        ({"model_name_or_path": "corrupt"}, ("corrupt", "save_pretrained")),
        ({"model_name_or_path": "gpt2", "seq_len": 32}, ("seq_len=32", "16")),
        ({"hidden_size": 30, "num_heads": 4}, ("n_embd=30", "n_head=4")),
        ({"addressing": "foo"}, ("addressing='foo'", "simplified")),
        ({"mem_slots": 0}, ("mem_slots=0", "at least 1")),
        ({"num_reads": -1}, ("num_reads=-1", "at least 1")),
        ({"usage_decay": 1.5}, ("usage_decay=1.5",)),
        ({"dropout": 1.5}, ("1.5", "[0, 1)")),
        ({"scan": "fast"}, ("scan='fast'", "eager")),
        ({"lambda_routing": -0.1}, ("lambda_routing=-0.1",)),
        ({"lambda_entropy": "nan"}, ("lambda_entropy=nan",)),
        ({"eval_steps": -1}, ("eval_steps=-1",)),
        ({"logging_steps": 0}, ("logging_steps=0",)),
        ({"per_device_train_batch_size": 0}, ("per_device_train_batch_size=0",)),
        ({"ddp_backend": "gloo"}, ("ddp_backend=gloo", "torchrun")),
        ({"model": "all"}, ("all", "baseline")),
        ({"output_dir": "empty.txt"}, ("empty.txt is a file", "--output_dir")),
        ({"mem_slot": 3}, ("--mem_slot",)),
        ({"config": "missing.yaml"}, ("missing.yaml",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_that_names_the_culprit_before_training(
    gpt2, folder, options, culprits, capsys, monkeypatch, untrained
):
    monkeypatch.chdir(folder)
    if not (folder / "corrupt").exists():
        shutil.copytree(gpt2, folder / "corrupt")
        (folder / "corrupt" / "model.safetensors").write_bytes(b"\xff" * 999)
        (folder / "empty.txt").write_text("")
        (folder / "short.txt").write_text("a")
    refused(command_line({**tiny_options(folder, output_dir="refused"), **options}), *culprits, capsys=capsys)
    assert not list(folder.glob("refused/*/*"))


def test_tokens_beyond_a_pretrained_vocabulary_are_refused(gpt2, folder, tmp_path, untrained):
    larger = train_tokenizer([(folder / "train.txt").read_text() * 3], 320)
    larger.save_pretrained(tmp_path / "larger")
    options = tiny_options(
        folder, output_dir=tmp_path / "run", model_name_or_path=gpt2, tokenizer_name=tmp_path / "larger"
    )
    refused(command_line(options), "beyond the vocabulary", "tokenizer")


def test_the_script_ends_with_one_line_and_no_traceback(folder, tmp_path):
    write_text(tmp_path / "validation.txt", 2)
    result = run_python(
        ROOT / "train.py", "--train_file", "missing.txt", "--validation_file", "validation.txt", cwd=tmp_path
    )
    assert result.returncode != 0 and result.stdout == ""
    assert result.stderr.splitlines() == ["train.py: file missing.txt does not exist; check the path"]
    assert [path.name for path in tmp_path.iterdir()] == ["validation.txt"]


def test_a_finished_run_that_kept_its_best_model_still_has_it_when_resumed(tmp_path):
    options = {"model": "baseline", "save_steps": 1, "eval_steps": 1, "max_steps": 3, "learning_rate": 1.0}
    options |= {"load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    tiny_run(tmp_path, **options)
    weights = tmp_path / "run" / "baseline" / "model.safetensors"
    best, last = weights.read_bytes(), (weights.parent / "checkpoint-3" / "model.safetensors").read_bytes()
    assert best != last
    tiny_run(tmp_path, **options, resume_from_checkpoint="true")
    assert weights.read_bytes() == best


def test_a_run_that_would_delete_the_checkpoint_it_starts_from_is_refused(folder, run, tmp_path):
    shutil.copytree(folder / "run" / "baseline", tmp_path / "run" / "baseline")
    source = tmp_path / "run" / "baseline"
    with pytest.raises(SystemExit, match=r"would delete .*baseline, which --model_name_or_path starts from"):
        tiny_run(tmp_path, model_name_or_path=source, overwrite_output_dir=True)
    assert (source / "model.safetensors").is_file()
