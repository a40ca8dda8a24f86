"""The benchmarks run, and compare equals with equals. What they measure here, on tiny sizes, means nothing."""

import functools
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "quality"))

import associative_recall
import decoding
import dnc_tasks
import long_examples
import origin_loop
import other_dnc
import peak_memory
import pretrained
import real_text
import recall_distance
import scaling
import scan
import training_step
from origin_loop import OriginMemory, OriginModel, origin_trainer
from tiny_runs import write_text
from training_step import SIZES, dnc_trainer

import compare
import train
from dnc_gpt2.data import DataArguments
from dnc_gpt2.models import new_models
from dnc_gpt2.options import ModelArguments, parse
from dnc_gpt2.trainer import DNCTrainingArguments

TINY = SIZES["tiny"]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture
def run(tmp_path):
    """A function that runs a benchmark once on one thread and returns the rows of its JSON file."""
    threads = torch.get_num_threads()

    def run(main, command: str = "") -> list[dict]:
        output = tmp_path / "output.json"
        main([*command.split(), "--threads", "1", "--repeats", "1", "--output", str(output)])
        return json.loads(output.read_text())["rows"]

    yield run
    torch.set_num_threads(threads)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter moved away from its special start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_the_origins_loop_gives_the_logits_of_the_simplified_addressing():
    models = new_models(TINY.config(addressing="simplified", scan="eager"), ["baseline", "dnc"], seed=0)
    ours = shaken(models["dnc"]).double().eval()
    origin = OriginModel(models["baseline"], ours.config).double().eval()
    origin.backbone.load_state_dict(ours.state_dict(), strict=False)
    origin.memory.load_state_dict(ours.transformer.memory.state_dict())
    input_ids = TINY.inputs()["input_ids"]
    output, expected = origin(input_ids), ours(input_ids, output_memory=True)
    for name in ("logits", "write_gates", "write_weights"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=0, atol=1e-10)
    base = origin.backbone(input_ids).logits
    assert (output.logits - base).abs().max() > 0.1, "the memory changes nothing here: the comparison says nothing"


def test_the_origins_memory_is_ours_from_a_used_state():
    # From an empty memory all slots stay alike, and how the weights are made is not seen.
    config = TINY.config(addressing="simplified", scan="eager")
    ours = shaken(new_models(config, ["dnc"], seed=0)["dnc"].transformer.memory).double()
    origin = OriginMemory(config).double()
    origin.load_state_dict(ours.state_dict())
    empty = ours.initial_state(2, torch.device("cpu"), torch.float64)
    state = empty._replace(memory=torch.randn_like(empty.memory), usage=torch.rand_like(empty.usage))
    hidden = torch.randn(2, 5, config.n_embd, dtype=torch.float64)
    expected = ours(hidden, torch.zeros_like(hidden), state)
    memory, usage, results = state.memory, state.usage, []
    for t in range(5):
        *result, memory, usage = origin(hidden[:, t], memory, usage)
        results.append(result)
    reads, gates, weights = (torch.stack(values, 1) for values in zip(*results, strict=True))
    actual = {"hidden_states": reads, "write_gates": gates, "write_weights": weights}
    for name, value in actual.items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=0, atol=1e-10)
    torch.testing.assert_close((memory, usage), (expected.state.memory, expected.state.usage), rtol=0, atol=1e-10)
    gradients = []
    for module, read in ((origin, reads), (ours, expected.hidden_states)):
        parameters = dict(module.named_parameters())
        gradients.append(torch.autograd.grad(read.square().sum(), [parameters[name] for name in sorted(parameters)]))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-8)


def test_the_origins_composite_loss_and_gradients_are_those_of_our_trainer(tmp_path):
    options = {"addressing": "simplified", "scan": "eager", **NO_DROPOUT}
    arguments = {"lambda_routing": 0.7, "lambda_entropy": 0.3}  # so large that a wrong term shows
    ours = dnc_trainer(str(tmp_path), TINY, "dnc", options, **arguments)
    origin = origin_trainer(str(tmp_path), TINY, options, **arguments)
    shaken(ours.model).double()
    origin.model.double()
    origin.model.backbone.load_state_dict(ours.model.state_dict(), strict=False)
    origin.model.memory.load_state_dict(ours.model.transformer.memory.state_dict())
    inputs = TINY.inputs()
    num_items = torch.tensor(inputs["input_ids"].numel())
    losses = [trainer.training_step(trainer.model, dict(inputs), num_items) for trainer in (ours, origin)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)  # transformers computes cross-entropy in float32
    expected = dict(ours.model.transformer.memory.named_parameters())
    for name, parameter in origin.model.memory.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-7)


def test_origin_loop_compares_its_step_with_gpt2s_and_ours(run):
    rows = run(origin_loop.main, "--sizes tiny --addressings lru")
    assert [row["system"] for row in rows] == ["GPT-2", "origin's loop", "ours, lru"]
    assert rows[0]["ratio to GPT-2"] == rows[1]["origin's loop / this"] == 1
    assert rows[1]["ratio to GPT-2"] == pytest.approx(rows[1]["ms a step"] / rows[0]["ms a step"])


def test_training_step_prints_the_target_next_to_each_ratio(run, monkeypatch, capsys):
    monkeypatch.setitem(training_step.TARGETS, ("tiny", 0.5), 1.5)
    rows = run(training_step.main, "--sizes tiny --addressings lru --routing_sample 1 0.5 0 --on_top")
    assert [(row["addressing"], row["routing sample"], row["target, at most"]) for row in rows] == [
        ("lru", 1.0, None),
        ("lru", 0.5, 1.5),
        ("lru", 0.0, None),
    ]
    assert all(row["ratio"] == pytest.approx(row["with memory ms"] / row["GPT-2 ms"]) for row in rows)
    table = capsys.readouterr().out.splitlines()
    assert [line.rsplit("| ", 1)[1] for line in table[-3:]] == ["- |", "1.5 |", "- |"]


def test_scan_compares_the_fused_scan_with_the_recurrence(run, monkeypatch):
    monkeypatch.setitem(scan.TARGETS, (2, 8, 6, 8, 2), 7.0)
    rows = run(scan.main, "--shapes 1,8,6,8,2 2,8,6,8,2 --addressings lru")
    assert [row["target, at least"] for row in rows] == [None, 7.0]
    assert all(row["eager / fused"] == pytest.approx(row["eager ms"] / row["fused ms"]) for row in rows)


def test_scan_refuses_a_shape_that_is_none(capsys):
    with pytest.raises(SystemExit):
        scan.main(["--shapes", "4,128,64"])
    assert "argument --shapes: invalid shape value: '4,128,64'" in capsys.readouterr().err


def test_scaling_gives_the_time_a_token_along_each_size(run, monkeypatch):
    monkeypatch.setattr(scaling, "BASE", {"batch": 2, "tokens": 4, "slots": 6, "width": 8, "heads": 2})
    sizes = "--tokens 4 8 --slots 3 6 --width 4 8 --heads 1 2 --batch 1 2"
    rows = run(scaling.main, f"--scan eager --addressings lru simplified {sizes}")
    varied = [
        (name, size)
        for name in scaling.RANGES
        for size in {"slots": (3, 6), "heads": (1, 2), "batch": (1, 2)}.get(name, (4, 8))
    ]
    assert [(row["addressing"], row["varied"], row["size"]) for row in rows] == [
        (addressing, name, size) for addressing in ("lru", "simplified") for name, size in varied
    ]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["ratio to the first"] == 1
        assert second["ratio to the first"] == pytest.approx(second["us a token"] / first["us a token"])


def test_other_dnc_compares_the_package_with_our_scan(run):
    pytest.importorskip("dnc")
    rows = run(other_dnc.main, "--shape 2,4,6,8,2")
    assert len(rows) == 5 and rows[0]["target, at least"] == 30
    for row, addressing in zip(rows[-2:], ("dnc", "lru"), strict=True):
        assert addressing in row["implementation"] and row[f"times our fused {addressing}"] == 1


def test_other_dnc_names_the_command_that_installs_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "dnc", None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps dnc==1\.1\.0$"):
        other_dnc.main(["--shape", "2,4,6,8,2"])


def test_peak_memory_is_that_of_a_fresh_process():
    ballast = torch.ones(2**28)  # 1 GiB, which no system measured here comes near
    before, peak = peak_memory.peak_memory("eager", TINY, {"addressing": "lru"}, 1, 1)
    assert 1024 * peak_memory.MIB == ballast.nbytes < peak_memory.process_memory()[1]
    assert 0 < before < peak < 1024


def test_peak_memory_compares_every_system_with_gpt2(run, monkeypatch):
    def measure(system, sizes, options, repeats, threads):
        return 1.0, {"gpt2": 100.0, "baseline": 80.0, "dnc": 90.0}[system] + len(options)

    monkeypatch.setattr(peak_memory, "peak_memory", measure)
    monkeypatch.setattr(peak_memory, "compile_kernels", lambda addressings: None)
    rows = run(peak_memory.main, "--sizes tiny --systems dnc baseline --addressings lru simplified")
    columns = ("addressing", "peak MiB", "ratio to GPT-2", "target, at most")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        (None, 100.0, 1.0, None),
        ("lru", 91.0, 0.91, 1.0),
        ("simplified", 91.0, 0.91, 1.0),
        (None, 80.0, 0.8, None),
    ]


@pytest.mark.parametrize("system", peak_memory.SYSTEMS)
def test_every_system_makes_a_step(system, tmp_path):
    step = peak_memory.system_step(system, TINY, {"addressing": "lru", "scan": "eager"}, str(tmp_path))
    trainer = inspect.getclosurevars(step).nonlocals["trainer"]
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    step()
    after = list(trainer.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.isfinite().all() for parameter in after)


def test_long_examples_give_time_and_memory_a_token(run, monkeypatch):
    monkeypatch.setattr(long_examples, "compile_kernels", lambda addressings: None)
    monkeypatch.setattr(long_examples, "peak_memory", lambda system, sizes, *_: (1.0, 2.0 + sizes.tokens / 512))
    rows = run(long_examples.main, "--sizes tiny --tokens 8 16 64")
    assert [row["tokens"] for row in rows] == [8, 16, 64]
    assert [row["KiB a further token"] for row in rows] == [None, 2.0, 2.0]
    for row in rows:
        assert row["us a token"] == pytest.approx(1000 * row["ms a step"] / row["tokens"])
        assert row["ratio to the first"] == pytest.approx(row["us a token"] / rows[0]["us a token"])


def test_long_examples_refuses_a_length_that_is_no_multiple_of_the_window(capsys):
    with pytest.raises(SystemExit):
        long_examples.main(["--sizes", "tiny", "--tokens", "9"])
    assert "--tokens 9 is not a multiple of the attention window 8" in capsys.readouterr().err


def test_decoding_counts_the_tokens_of_both_models(run):
    rows = run(decoding.main, "--sizes tiny --batches 1 2")
    assert [(row["window"], row["batch"]) for row in rows] == [("inside", 1), ("inside", 2), ("past", 1), ("past", 2)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["with memory tokens/s"] / row["GPT-2 tokens/s"])
    assert decoding.models(TINY, 0, pointer_weight=0.1)["dnc"].points


def test_long_generation_is_watched_at_eight_moments(run):
    rows = run(decoding.main, "--sizes tiny --tokens 40")
    assert [row["tokens"] for row in rows] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert all(row["resident MiB"] > 0 and row["tokens per second"] > 0 for row in rows)


@pytest.mark.parametrize("study", [associative_recall, dnc_tasks, pretrained, real_text, recall_distance])
def test_a_study_finds_what_it_needs_from_any_folder(study, tmp_path):
    # In a process of its own, for this one has found all modules already.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, study.__file__, "--help"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and "--folder" in ended.stdout, ended.stderr


def test_real_text_makes_every_model_once_and_compares_it_with_gpt2(tmp_path, monkeypatch):
    calls = []

    def run(script, arguments, log):
        calls.append(script)
        if script == "train.py":  # every option is one of train.py's
            _, _, training = parse((ModelArguments, DataArguments, DNCTrainingArguments), arguments)
            folder, models, differences = Path(training.output_dir), {"baseline": {"metrics": {"ppl": 100.0}}}, {}
            looks = [{"eval_ppl": 90.0, "step": 10}, {"loss": 1.0, "step": 15}, {"eval_ppl": 100.0, "step": 20}]
            for kind in ("baseline", "dnc"):
                (folder / kind).mkdir()
                (folder / kind / "trainer_state.json").write_text(json.dumps({"log_history": looks}))
        else:
            folder = Path(arguments[arguments.index("--output_dir") + 1])
            name, ratio, metrics = "dnc", 0.8, {"ppl": 80.0, "avg_gate": 0.5}
            if "--opponents" in arguments:
                name, ratio, metrics = arguments[arguments.index("--opponents") + 1], 0.9, {"ppl": 90.0}
            models = {"baseline": {"metrics": {"ppl": 100.0}}, name: {"metrics": metrics}}
            differences = {name: {"ppl_ratio": ratio, "ppl_ratio_interval": [0.75, 0.85]}}
        (folder / "comparison.json").write_text(json.dumps({"models": models, "differences": differences}))

    monkeypatch.setattr(real_text, "run", run)
    output, names = tmp_path / "table.json", [*real_text.MODELS, *real_text.SCORED]
    files = ["--train_file", "a.txt", "--validation_file", "b.txt", "--folder", str(tmp_path), "--output", str(output)]
    for _ in range(2):
        real_text.main([*files, "--seeds", "0", "1"])
        rows = {row["model"]: row for row in json.loads(output.read_text())["rows"]}
        assert list(rows) == names and rows["gpt2"]["ratio to GPT-2"] == 1
        assert rows["lru-64"]["ratio to GPT-2"] == 0.8
        assert rows["cache-64"]["ratio to GPT-2"] == rows["overlapping"]["ratio to GPT-2"] == 0.9
        assert rows["lru-64"]["95 % interval of each seed"] == "0.750-0.850 0.750-0.850"
        assert calls.count("train.py") == 2 * len(real_text.MODELS)
        assert calls.count("compare.py") == 2 * (len(names) - 1)
    looks = ["--models", "lru-64", "cache-64", "--eval_steps", "10"]
    with pytest.raises(SystemExit, match="holds results with --eval_steps None, not 10: choose another --folder"):
        real_text.main([*files, *looks])
    real_text.main([*files, *looks, "--folder", str(tmp_path / "looks")])
    best = [row["best step of each seed"] for row in json.loads(output.read_text())["rows"]]
    assert best == ["90.0 at 10", None]


@pytest.fixture
def counted(monkeypatch):
    """The loss functions that the studies of recall trained with, each as long as its training."""
    fits = []
    for study in (recall_distance, associative_recall):
        fit = study.fit
        monkeypatch.setattr(study, "fit", lambda *arguments, fit=fit: (fits.append(arguments), fit(*arguments)))
    return fits


def test_recall_distance_trains_once_and_asks_at_every_distance(tmp_path, monkeypatch, counted):
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "mem_slots": 8, "mem_width": 8, "address_width": 4}
    monkeypatch.setattr(recall_distance, "SETTING", {**recall_distance.SETTING, **small, "scan": "eager"})
    for name, value in (("GIVEN_UP", 0.0), ("BATCH", 2), ("TRAINED_DISTANCES", (1, 2))):
        monkeypatch.setattr(recall_distance, name, value)
    output, figure = tmp_path / "table.json", tmp_path / "figure.png"
    command = f"--steps 2 --documents 2 --distances 1 2 3 --every 0 1 --folder {tmp_path} --output {output}"
    for _ in range(2):
        recall_distance.main([*command.split(), "--models", "lru-32", "--figure", str(figure)])
        rows = json.loads(output.read_text())["rows"]
        assert [row["other facts"] for row in rows] == ["never", "every window"]
        assert all(0 <= row[distance] <= 1 for row in rows for distance in "123")
        assert rows[0]["gate at values"] is None and 0 < rows[1]["gate at values"] < 1
        assert figure.stat().st_size > 0
        assert len(counted) == 1
    recall_distance.main([*command.split(), "--models", "lru-32", "--slots", "8", "16"])
    named = {row["model"] for row in json.loads(output.read_text())["rows"]}
    assert named == {"lru-32 with 8 slots", "lru-32 with 16 slots"}
    assert len(counted) == 1


def test_the_share_of_a_row_left_is_what_the_memory_itself_leaves(monkeypatch):
    """Facts whose row nothing was written to stay whole; where every token writes to the only slot, nothing stays."""
    tokenizer = recall_distance.word_tokenizer()
    left = {}
    for bias in (-30.0, 30.0):
        options = {**recall_distance.SETTING, "mem_slots": 1, "scan": "eager", "write_gate_bias": bias}
        config = recall_distance.DNCGPT2Config(vocab_size=tokenizer.get_vocab_size(), **options, surprise_weight=0.0)
        monkeypatch.setattr(recall_distance, "GIVEN_UP", 0.0)
        model = recall_distance.DNCGPT2LMHeadModel(config)
        left[bias] = recall_distance.recall_at(model, tokenizer, 0, [1, 2], 1)
    assert left[-30.0]["row_left"] == pytest.approx([1, 1]) and left[-30.0]["overwritten"] == [0, 0]
    # The last fact's row is overwritten by the full stop after it at the latest.
    assert left[30.0]["row_left"] == pytest.approx([0, 0], abs=0.05) and left[30.0]["overwritten"] == [1, 1]
    assert left[30.0]["other_gate"] == pytest.approx(1)


@pytest.mark.parametrize("pairs", associative_recall.PAIRS)
def test_associative_recall_asks_for_every_pair_once(pairs):
    tokens, queries, values = associative_recall.examples(pairs, 3, torch.Generator().manual_seed(1))
    assert tokens.shape == (3, max(64, 4 * pairs)) and (queries >= 2 * pairs).all()
    for row, places, expected in zip(tokens.tolist(), queries.tolist(), values.tolist(), strict=True):
        stated = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(stated) == len(set(stated.values())) == len(set(places)) == pairs
        assert [stated[row[place]] for place in places] == expected
        assert all(row.count(key) == 2 for key in stated)


def test_associative_recall_trains_once_and_leaves_out_what_is_not_installed(tmp_path, monkeypatch, counted, capsys):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    for name, value in (("PAIRS", (4, 16)), ("BATCH", 2), ("SLOTS", 8), ("WIDTH", 8), ("LEARNING_RATES", (1, 2))):
        monkeypatch.setattr(associative_recall, name, value)
    eager = functools.partial(associative_recall.with_memory, scan="eager")
    monkeypatch.setattr(associative_recall, "with_memory", eager)
    output = tmp_path / "table.json"
    command = f"--steps 2 --trial_steps 1 --queries 10 --folder {tmp_path} --output {output} --models gpt2 lru titans"
    for _ in range(2):
        associative_recall.main(command.split())
        rows = json.loads(output.read_text())["rows"]
        assert [row["model"] for row in rows] == ["gpt2", "lru"]
        assert rows[0]["state"] == 0 and rows[1]["state"] > 8 * 8
        assert all(0 <= row["4 pairs"] <= 1 and 0 <= row["16 pairs"] <= 1 for row in rows)
        assert "titans is left out" in capsys.readouterr().out
        assert len(counted) == 2 * (len(associative_recall.LEARNING_RATES) + 1)


@pytest.mark.parametrize("name", associative_recall.SYSTEMS)
def test_every_system_of_associative_recall_learns_and_sees_nothing_that_comes_later(name, monkeypatch):
    """A token changes no logits before it, and in a later window those of the models that carry a state alone."""
    eager = functools.partial(associative_recall.with_memory, scan="eager")
    monkeypatch.setattr(associative_recall, "with_memory", eager)
    try:
        system = associative_recall.SYSTEMS[name]()
    except ImportError as error:
        pytest.skip(str(error))
    system.model.eval()
    tokens = torch.randint(associative_recall.VOCABULARY, (1, 96))
    other = tokens.clone()
    other[0, 40] = (tokens[0, 40] + 1) % associative_recall.VOCABULARY
    with torch.no_grad():
        change = (system.logits(tokens) - system.logits(other)).abs().amax(-1)[0]
    assert change[:40].max() < 1e-5 and change[40] > 1e-4
    system.logits(tokens).square().mean().backward()
    torch.optim.AdamW(system.model.parameters()).step()  # refuses parameters that share their memory
    assert (change[64:].max() > 1e-7) == (system.state > 0)


def test_dnc_tasks_trains_each_model_once_and_scores_it_with_more_slots(tmp_path, monkeypatch):
    tasks = {
        name: replace(task, longest=2, slots=4 + place) for place, (name, task) in enumerate(dnc_tasks.TASKS.items())
    }
    monkeypatch.setattr(dnc_tasks, "TASKS", tasks)
    monkeypatch.setattr(dnc_tasks, "build", partial(build_eager, dnc_tasks.build))
    output, table = tmp_path / "table.json", []
    command = ["--steps", "2", "--batches", "1", "--models", "gpt2", "all-three", "--output", str(output)]
    for _ in range(2):
        dnc_tasks.main([*command, "--folder", str(tmp_path / "runs")])
        table.append(json.loads(output.read_text())["rows"])
    assert table[0] == table[1], "a finished model was trained again"
    assert [(row["task"], row["model"]) for row in table[0]] == [(t, m) for t in tasks for m in ("gpt2", "all-three")]
    assert all(row["steps"] == 2 and 0 <= row["answers % at 4x"] <= 100 for row in table[0])
    dnc_tasks.main([*command, "--folder", str(tmp_path / "runs"), "--steps", "3"])
    assert all(row["steps"] == 3 for row in json.loads(output.read_text())["rows"])


def build_eager(build, *arguments):
    model = build(*arguments)
    model.config.scan = "eager"
    return model


def test_a_solved_task_ends_its_training(monkeypatch):
    monkeypatch.setattr(dnc_tasks, "LOOK_EVERY", 1)
    looks = iter([1.0, 0.5, 0.99, 1.0, 1.0])
    monkeypatch.setattr(dnc_tasks, "score", lambda *_: (1.0, next(looks)))
    _, history = dnc_tasks.train(dnc_tasks.TASKS["copy"], "gpt2", seed=0, steps=50)
    assert history["steps_to_target"] == 3 and len(history["losses"]) == 5


def test_pretrained_fine_tunes_once_and_checks_that_a_new_memory_changes_nothing(tmp_path, monkeypatch):
    for name, seed in (("a.txt", 0), ("b.txt", 1)):
        write_text(tmp_path / name, 12, seed)
    files = ["--train_file", str(tmp_path / "a.txt"), "--validation_file", str(tmp_path / "b.txt")]
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "seq_len": 8, "tokenizer_vocab_size": 280}
    sizes |= {"windows_per_example": 2, "held_out_tokens": 20, "warmup_steps": 0, "scan": "eager"}
    sizes |= {"mem_width": 8, "address_width": 4, "mem_slots": 4}
    for module, settings in ((real_text, "SETTING"), (pretrained, "FINE_TUNING"), (pretrained, "MEMORY")):
        changed = {**getattr(module, settings), **sizes}
        names = [*pretrained.MEMORY, "scan"] if settings == "MEMORY" else list(changed)
        monkeypatch.setattr(module, settings, {name: changed[name] for name in names})
    calls = []

    def run(script, arguments, log):
        calls.append(script)
        {"train.py": train, "compare.py": compare}[script].main(list(map(str, arguments)))

    for module in (real_text, pretrained):
        monkeypatch.setattr(module, "run", run)
    folders = ["--folder", str(tmp_path / "runs"), "--pretrained_folder", str(tmp_path / "gpt2")]
    output = tmp_path / "table.json"
    command = [*files, *folders, "--pretraining_steps", "2", "--steps", "1", "--output", str(output)]
    for _ in range(2):
        pretrained.main([*command, "--models", "gpt2", "attached", "frozen"])
        assert calls.count("train.py") == 3 and calls.count("compare.py") == 3
    rows = {row["model"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["gpt2"]["ratio to GPT-2 fine-tuned"] == 1 != rows["gpt2"]["ratio to GPT-2 before"]
    assert rows["attached"]["ratio to GPT-2 before"] == pytest.approx(1, abs=1e-5)
    assert rows["frozen"]["write gate"] > 0
    monkeypatch.setattr(pretrained, "UNCHANGED", -1.0)
    with pytest.raises(SystemExit, match="changes its loss"):
        pretrained.main([*command, "--models", "attached"])
