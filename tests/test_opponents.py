"""Opponents: each against a plain restatement of what it is."""

import json
import math
import shlex
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import command_line, tiny_options, tiny_run
from transformers import GPT2Config, GPT2LMHeadModel

import compare
import train
from dnc_gpt2 import opponents, pointing
from dnc_gpt2.evaluation import LANGUAGE_MODEL_COLUMNS, evaluate
from dnc_gpt2.examples import ExampleDataset
from dnc_gpt2.models import count_parameters, has_memory, load_model, new_models
from dnc_gpt2.opponents import (
    OPPONENTS,
    NeuralCache,
    NeuralCacheRunner,
    OverlappingRunner,
    check_opponents,
    opponent_model,
    opponent_names,
    tune_neural_cache,
    widened_sizes,
)
from dnc_gpt2.options import one_line_errors
from dnc_gpt2.tokenization import TokenizedText, load_tokenizer, split_end, tokenize_texts
from dnc_gpt2.trainer import DNCTrainer

VOCABULARY = 23


@pytest.fixture
def gpt2():
    """A plain GPT-2 in float64, its weights large enough that its predictions differ."""

    def make(n_positions: int = 8) -> GPT2LMHeadModel:
        torch.manual_seed(1)
        sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=n_positions, **sizes)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return model

    return make


def random_text(tokens: int, documents: tuple[int, ...] = ()) -> TokenizedText:
    starts = torch.zeros(tokens, dtype=torch.bool)
    starts[[0, *documents]] = True
    ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return TokenizedText(ids, starts, num_bytes=tokens, num_words=tokens)


def repetitive_text(tokens: int) -> TokenizedText:
    """A phrase again and again: what a cache is for."""
    text = random_text(tokens)
    return TokenizedText(text.tokens[:5].repeat(tokens // 5 + 1)[:tokens], text.document_starts, tokens, tokens)


def runs_of(dataset: ExampleDataset, streams: int | None) -> list[list[int]]:
    """Inputs of each run of the memory over the text: a stream, or an example."""
    targets, length = dataset.num_targets, dataset.example_length
    if streams is not None:
        length *= math.ceil(len(dataset) / streams)
    return [list(range(start, min(start + length, targets))) for start in range(0, targets, length)]


def window_states(model, dataset: ExampleDataset, window: int) -> torch.Tensor:
    """Final hidden state of each input, its attention window alone at a time."""
    tokens = dataset.text.tokens[:-1]
    return torch.cat([model.transformer(part[None]).last_hidden_state[0] for part in tokens.split(window)])


def columns_of(probabilities: torch.Tensor, target: int) -> dict[str, float]:
    """What is measured of one prediction, from its probabilities [V]."""
    right = probabilities[target]
    before = (probabilities > right) | ((probabilities == right) & (torch.arange(len(probabilities)) < target))
    return {
        "nll": float(-right.log()),
        "rank": int(before.sum()) + 1,
        "confidence": float(right),
        "entropy": float(-(probabilities * probabilities.log()).sum()),
    }


LAYOUTS = pytest.mark.parametrize(
    ("streams", "reset"), [(2, False), (3, True), (None, False), (None, True)], ids=lambda value: str(value)
)


# Neural cache


def reference_cache(model, dataset, cache: NeuralCache, streams: int | None) -> dict[str, list[float]]:
    """The neural cache token by token and entry by entry."""
    text = dataset.text
    states = window_states(model, dataset, 8)
    rows = []
    for run in runs_of(dataset, streams):
        stored: list[tuple[torch.Tensor, int]] = []
        for t in run:
            if dataset.reset_at_documents and text.document_starts[t]:
                stored = []
            model_p = model.lm_head(states[t]).softmax(-1)
            target = int(text.tokens[t + 1])
            cache_p = torch.zeros_like(model_p)
            for state, word in stored[-cache.entries :]:
                cache_p[word] += torch.exp(cache.theta * (states[t] @ state))
            if stored:
                model_p = (1 - cache.share) * model_p + cache.share * cache_p / cache_p.sum()
            rows.append(columns_of(model_p, target))
            stored.append((states[t], target))
    return {name: [row[name] for row in rows] for name in LANGUAGE_MODEL_COLUMNS}


@LAYOUTS
@pytest.mark.parametrize("entries", [5, 40])
@torch.no_grad()
def test_the_neural_cache_equals_its_definition(gpt2, monkeypatch, entries, streams, reset):
    model = gpt2()
    # 75 targets: a last example that is not full; documents begin inside windows and at an example's first token.
    dataset = ExampleDataset(random_text(76, (11, 16, 37, 52)), 8, 2, streams=streams, reset_at_documents=reset)
    cache = NeuralCache(entries, theta=0.2, share=0.3)
    expected = reference_cache(model, dataset, cache, streams)
    for chunk in (3, 256):
        monkeypatch.setattr(opponents, "TOKENS_PER_CHUNK", chunk)
        result = evaluate(
            model,
            dataset,
            runner=NeuralCacheRunner(model, cache),
            carry_memory=streams is not None,
            streams=streams or 4,
            batch_size=3,
            progress=False,
        )
        for name in LANGUAGE_MODEL_COLUMNS:
            np.testing.assert_allclose(result.columns[name], expected[name], rtol=1e-10, err_msg=name)


@torch.no_grad()
def test_without_a_share_the_neural_cache_changes_nothing(gpt2):
    model = gpt2()
    dataset = ExampleDataset(random_text(50), 8, 2, streams=2)
    options = {"carry_memory": True, "streams": 2, "progress": False}
    plain = evaluate(model, dataset, **options)
    cached = evaluate(model, dataset, runner=NeuralCacheRunner(model, NeuralCache(9, theta=0.0, share=0.0)), **options)
    for name in LANGUAGE_MODEL_COLUMNS:
        np.testing.assert_allclose(cached.columns[name], plain.columns[name], rtol=1e-12)


def test_what_the_model_rules_out_is_finite_and_in_half_precision_too(gpt2):
    model = gpt2()
    with torch.no_grad():
        model.lm_head.weight *= 400  # probabilities below the smallest float32
    dataset = ExampleDataset(random_text(50), 8, 2, streams=2)
    cache = NeuralCache(9, theta=0.2, share=0.3)
    exact = evaluate(model, dataset, runner=NeuralCacheRunner(model, cache), carry_memory=True, streams=2)
    model.float()
    single = evaluate(model, dataset, runner=NeuralCacheRunner(model, cache), carry_memory=True, streams=2)
    assert exact.columns["nll"].max() > 104
    np.testing.assert_allclose(single.columns["nll"], exact.columns["nll"], rtol=1e-3, atol=1e-3)
    half = evaluate(
        model,
        dataset,
        runner=NeuralCacheRunner(model, cache),
        carry_memory=True,
        streams=2,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert np.isfinite(half.columns["nll"]).all()


@pytest.mark.parametrize("carry_memory", [True, False])
def test_tuning_finds_the_best_of_the_grid(gpt2, monkeypatch, carry_memory):
    model = gpt2()
    monkeypatch.setattr(opponents, "STRENGTHS", (0.0, 2.0, 8.0))
    monkeypatch.setattr(pointing, "SHARES", (0.0, 0.2, 0.6))
    text = repetitive_text(90)
    dataset = ExampleDataset(text, 8, 2, streams=1 if carry_memory else None)
    found = tune_neural_cache(model, dataset, 20, carry_memory=carry_memory, batch_size=3)
    scale = window_states(model, dataset, 8).square().sum(-1).mean().item()
    losses = {}
    for strength in (0.0, 2.0, 8.0):
        for share in (0.0, 0.2, 0.6):
            runner = NeuralCacheRunner(model, NeuralCache(20, strength / scale, share))
            options = {"carry_memory": carry_memory, "streams": 1, "progress": False}
            losses[strength, share] = evaluate(model, dataset, runner=runner, **options).columns["nll"].mean()
    strength, share = min(losses, key=losses.get)
    assert (found.entries, found.share) == (20, share)
    assert found.theta == pytest.approx(strength / scale)
    assert share > 0, "a cache helps on a text that repeats itself"


def test_a_cache_that_does_not_help_is_not_used(gpt2, monkeypatch):
    model = gpt2()
    # No token ever comes again.
    ids = torch.arange(VOCABULARY)
    text = TokenizedText(ids, torch.zeros(VOCABULARY, dtype=torch.bool), VOCABULARY, VOCABULARY)
    found = tune_neural_cache(model, ExampleDataset(text, 8, 1), 8)
    assert (found.theta, found.share) == (0, 0)


# Overlapping windows


@LAYOUTS
@pytest.mark.parametrize("window", [8, 5, 2])
@torch.no_grad()
def test_overlapping_windows_equal_scoring_each_token_alone(gpt2, window, streams, reset):
    model = gpt2(window)
    dataset = ExampleDataset(random_text(77, (11, 40)), window, 3, streams=streams, reset_at_documents=reset)
    tokens, half = dataset.text.tokens, window // 2
    expected = []
    for run in runs_of(dataset, streams):
        for place, t in enumerate(run):
            in_example = place % dataset.example_length
            # The last tokens of the window that ends with this token's half, as far as the run has them.
            first = max(0, place - in_example % half - (window - half))
            context = tokens[run[first] : t + 1]
            assert len(context) <= window and (first == 0 or len(context) > window / 2)
            probabilities = model(context[None]).logits[0, -1].softmax(-1)
            expected.append(columns_of(probabilities, int(tokens[t + 1])))
    result = evaluate(
        model,
        dataset,
        runner=OverlappingRunner(model),
        carry_memory=streams is not None,
        streams=streams or 4,
        batch_size=2,
        progress=False,
    )
    for name in LANGUAGE_MODEL_COLUMNS:
        np.testing.assert_allclose(result.columns[name], [row[name] for row in expected], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("carry_memory", [True, False])
@pytest.mark.parametrize("opponent", ["neural_cache", "overlapping"])
@pytest.mark.parametrize(("tokens", "streams"), [(90, 3), (20, 1)], ids=["text for both", "for one"])
def test_several_processes_score_what_one_does(gpt2, opponent, carry_memory, tokens, streams):
    model = gpt2()
    dataset = ExampleDataset(random_text(tokens), 8, 2, streams=streams if carry_memory else None)

    def columns(**options) -> np.ndarray:
        cache = NeuralCache(9, theta=0.2, share=0.3)
        runner = NeuralCacheRunner(model, cache) if opponent == "neural_cache" else OverlappingRunner(model)
        options |= {"carry_memory": carry_memory, "streams": streams, "batch_size": 4, "progress": False}
        return np.stack([*evaluate(model, dataset, runner=runner, **options).columns.values()])

    # What a process does not score is 0.
    parts = [columns(rank=rank, world_size=2) for rank in range(2)]
    assert (parts[1] == 0).any()
    np.testing.assert_allclose(sum(parts), columns(), rtol=1e-12)


# Trained opponents


@pytest.mark.parametrize("sizes", [{}, {"n_embd": 24, "n_head": 4, "n_layer": 3, "mem_width": 64}, {"n_inner": 20}])
def test_the_widened_gpt2_has_the_parameters_of_the_memory_model(tiny_config, sizes):
    config = tiny_config(**sizes)
    parameters = count_parameters(new_models(config, ["dnc"], 0)["dnc"])
    model = opponent_model("widened", config, example_length=16, parameters=parameters, seed=0)
    assert type(model) is GPT2LMHeadModel
    wide = model.config
    assert wide.n_embd % wide.n_head == 0 and wide.n_embd >= config.n_embd
    assert wide.n_inner >= (config.n_inner or 4 * config.n_embd)
    assert (wide.n_head, wide.n_layer, wide.n_positions) == (config.n_head, config.n_layer, config.n_positions)
    assert abs(count_parameters(model) - parameters) <= config.n_layer * (2 * config.n_embd + 1) / 2


def test_no_other_width_comes_nearer(tiny_config):
    config = tiny_config()
    target = 40_000

    def count(n_embd: int, n_inner: int) -> int:
        attention, mlp = 4 * n_embd**2 + 4 * n_embd, 2 * n_embd * n_inner + n_inner + n_embd
        layers = config.n_layer * (attention + mlp + 4 * n_embd)
        return (config.vocab_size + config.n_positions) * n_embd + layers + 2 * n_embd

    distances = [abs(count(e, i) - target) for e in range(16, 80, 2) for i in range(64, 700)]
    found = widened_sizes(config, target)
    assert abs(count(**found) - target) == min(distances)


def test_the_long_window_spans_the_example(tiny_config):
    model = opponent_model("long_window", tiny_config(), example_length=32, parameters=0, seed=0)
    plain = new_models(tiny_config(), ["baseline"], 0)["baseline"]
    assert model.config.to_dict() == {**plain.config.to_dict(), "n_positions": 32}


@pytest.mark.parametrize("name", ["simplified", "dnc"])
def test_other_addressings_have_the_same_sizes_and_start_from_the_same_backbone(tiny_config, name):
    config = tiny_config(address_width=3)
    model = opponent_model(name, config, example_length=32, parameters=0, seed=4)
    assert has_memory(model)
    changed = {"addressing": name, "address_width": None}
    if name == "simplified":  # the origin's is read at the top
        changed["memory_layer"] = config.n_layer
    for key, value in config.to_dict().items():
        assert getattr(model.config, key) == changed.get(key, value) or key in ("dtype", "architectures"), key
    for key, weights in new_models(config, ["baseline"], 4)["baseline"].state_dict().items():
        assert torch.equal(model.state_dict()[key], weights)


def test_opponents_are_named_with_commas():
    assert opponent_names("dnc, widened,dnc,") == ["dnc", "widened"]
    assert opponent_names("") == []
    with pytest.raises(ArgumentTypeError, match=r"unknown wide, deep \(choose from widened,neural_cache,"):
        opponent_names("wide,dnc,deep")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dnc", {"addressing": "dnc"}, "dnc is the addressing of the model itself"),
        ("long_window", {"example_length": 8}, "long_window needs examples of several windows"),
        ("widened", {"pretrained": "some/gpt2"}, "widened cannot start from some/gpt2"),
    ],
)
def test_opponents_that_make_no_sense_are_refused(tiny_config, name, options, message):
    config = tiny_config(addressing=options.pop("addressing", "lru"))
    arguments = {"example_length": 16, "pretrained": None, **options}
    with pytest.raises(ValueError, match=message):
        check_opponents([name], config, **arguments)
    check_opponents(["widened", "long_window", "simplified", "dnc"], tiny_config(), 16, None)


# The scripts

NAMES = ["baseline", "dnc", "widened", "neural_cache", "overlapping", "long_window", "simplified", "dnc_addressing"]
TRAINED = [name for name in NAMES if name not in ("neural_cache", "overlapping")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("opponents")


@pytest.fixture(scope="module")
def run(folder):
    """A finished run with all opponents: its comparison, and the targets that each model was trained on."""
    targets: dict[str, list[torch.Tensor]] = {}
    with pytest.MonkeyPatch.context() as patch:
        compute_loss = DNCTrainer.compute_loss

        def spy(self, model, inputs, *args, **kwargs):
            targets.setdefault(Path(self.args.output_dir).name, []).append(inputs["shift_labels"])
            return compute_loss(self, model, inputs, *args, **kwargs)

        patch.setattr(DNCTrainer, "compute_loss", spy)
        comparison = tiny_run(folder, **options_of_run())
    return comparison, targets


def options_of_run(**options) -> dict:
    defaults = {"carry_memory": True, "held_out_tokens": 100, "max_steps": 2, "save_strategy": "no"}
    return {**defaults, "opponents": ",".join(OPPONENTS), **options}


@pytest.fixture
def trainings(monkeypatch):
    """The models that are trained, by their folders."""
    trained = []
    train_model = DNCTrainer.train

    def spy(self, *args, **kwargs):
        trained.append(Path(self.args.output_dir).name)
        return train_model(self, *args, **kwargs)

    monkeypatch.setattr(DNCTrainer, "train", spy)
    return trained


def comparable(models: dict) -> dict:
    """Models of a comparison without what differs from time to time."""
    return {
        name: {**model, "metrics": {k: v for k, v in model["metrics"].items() if k != "tokens_per_second"}}
        for name, model in models.items()
    }


def test_a_run_trains_and_scores_all_opponents_under_equal_conditions(folder, run):
    comparison, targets = run
    assert list(comparison["models"]) == NAMES
    assert list(targets) == TRAINED
    for name in TRAINED:
        assert len(targets[name]) == 2
        assert all(torch.equal(x, y) for x, y in zip(targets[name], targets["baseline"], strict=True))
        state = json.loads((folder / "run" / name / "trainer_state.json").read_text())
        assert state["global_step"] == 2
    models = comparison["models"]
    assert [models[name]["window"] for name in NAMES] == [8, 8, 8, 8, 8, 16, 8, 8]
    assert abs(models["widened"]["parameters"] - models["dnc"]["parameters"]) < 33 / 2
    assert models["neural_cache"]["path"] == models["overlapping"]["path"] == models["baseline"]["path"]
    assert models["neural_cache"]["scoring"]["entries"] == 8
    assert models["overlapping"]["scoring"] == {"stride": 4}
    for name in ("simplified", "dnc_addressing"):
        assert name in comparison["memory_writes"]
        assert load_model(str(folder / "run" / name)).config.addressing == name.removesuffix("_addressing")
    losses = {name: model["metrics"]["loss"] for name, model in models.items()}
    assert len(set(losses.values())) == len(NAMES)
    assert json.loads((folder / "run" / "comparison.json").read_text())["models"] == models


def test_every_model_has_a_paired_difference_to_the_reference(run):
    comparison, _ = run
    assert list(comparison["differences"]) == NAMES[1:]
    for name, difference in comparison["differences"].items():
        losses = [comparison["models"][key]["metrics"]["loss"] for key in (name, "baseline")]
        assert difference["loss"] == pytest.approx(losses[0] - losses[1])
        low, high = difference["loss_interval"]
        assert low < difference["loss"] < high
    # Six lines of a file are one document.
    assert comparison["data"]["bootstrap"].startswith("10,000 resamples of 20 blocks of about ")


def test_the_neural_cache_is_tuned_on_what_no_model_was_trained_on(folder, run):
    comparison, targets = run
    tokenizer = load_tokenizer(str(folder / "run" / "baseline"))
    text = tokenize_texts([(folder / "train.txt").read_text()], tokenizer)
    rest, end = split_end(text, 100, tokenizer)
    # Two steps of four streams: the first two examples of each.
    streams = ExampleDataset(rest, 8, 2, streams=4)
    rows = [streams[stream * streams.stream_length]["shift_labels"] for stream in range(4)]
    assert torch.equal(targets["baseline"][0], torch.stack(rows))
    dataset = ExampleDataset(end, 8, 2, streams=1)
    found = tune_neural_cache(load_model(str(folder / "run" / "baseline")), dataset, 8, carry_memory=True)
    scoring = comparison["models"]["neural_cache"]["scoring"]
    assert scoring == {"entries": 8, "theta": pytest.approx(found.theta), "lambda": found.share}


def test_compare_finds_the_opponents_of_a_run_and_gives_its_numbers(folder, run, tmp_path, capsys):
    checkpoints = [str(folder / "run" / kind) for kind in ("baseline", "dnc")]
    arguments = ["--opponents", ",".join(OPPONENTS), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    again = compare.main([*checkpoints, *arguments])
    assert comparable(again["models"]) == comparable(run[0]["models"])
    assert again["differences"] == {name: run[0]["differences"][name] for name in again["differences"]}
    shown = capsys.readouterr().out.splitlines()
    (first,) = [i for i, line in enumerate(shown) if line.startswith("  Against GPT2 Baseline")]
    assert [line.split("  ")[1] for line in shown[first + 1 : first + 8]] == [
        *("GPT2 + DNC", "GPT2 widened", "GPT2 long window", "GPT2 + simplified", "GPT2 + Graves DNC"),
        *("GPT2 + cache", "GPT2 overlapping"),
    ]
    # One that is named as a checkpoint is not compared twice.
    widened = [str(folder / "run" / "widened"), *checkpoints]
    arguments = ["--opponents", "widened", "--output_dir", str(tmp_path / "widened"), "--use_cpu"]
    assert list(compare.main([*widened, *arguments])["models"]) == ["widened", "baseline", "dnc"]


def test_compare_names_what_is_missing_and_the_command_that_makes_it(folder, tmp_path, trainings, capsys):
    tiny_run(folder, **options_of_run(output_dir=tmp_path / "run", opponents=None))
    checkpoints = [str(tmp_path / "run" / kind) for kind in ("baseline", "dnc")]
    arguments = [*checkpoints, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--opponents"]
    arguments += ["widened,overlapping,simplified"]
    with pytest.raises(SystemExit) as end:
        compare.main(arguments)
    message = end.value.code
    assert message.startswith("compare.py: --opponents widened,simplified not found beside ") and "\n" not in message
    assert not (tmp_path / "out").exists()
    command = shlex.split(message.split("train with: ")[1])
    assert command[:2] == ["python", "train.py"]
    assert trainings == ["baseline", "dnc"]
    train.main(command[2:])
    # The models that are finished are not trained again, though the run has kept no checkpoints.
    assert trainings == ["baseline", "dnc", "widened", "simplified"]
    models = compare.main(arguments)["models"]
    assert list(models) == ["baseline", "dnc", "widened", "simplified", "overlapping"]


def test_what_is_finished_is_written_at_once_and_not_trained_again(folder, tmp_path, trainings, monkeypatch):
    options = options_of_run(output_dir=tmp_path, opponents="overlapping,widened,long_window,simplified")
    train_model = DNCTrainer.train

    def interrupted(self, *args, **kwargs):
        if Path(self.args.output_dir).name == "long_window":
            raise KeyboardInterrupt
        return train_model(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DNCTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(folder, **options)
    before = json.loads((tmp_path / "comparison.json").read_text())
    assert list(before["models"]) == ["baseline", "dnc", "overlapping", "widened"]
    assert list(before["differences"]) == ["dnc", "overlapping", "widened"]
    assert "GPT2 widened" in (tmp_path / "comparison.md").read_text()
    assert trainings == ["baseline", "dnc", "widened"]
    tiny_run(folder, **options, resume_from_checkpoint="true")
    assert trainings == ["baseline", "dnc", "widened", "long_window", "simplified"]
    after = json.loads((tmp_path / "comparison.json").read_text())
    assert list(after["models"]) == ["baseline", "dnc", "overlapping", "widened", "long_window", "simplified"]
    assert comparable(before["models"]).items() <= comparable(after["models"]).items()


def test_a_cache_that_is_tuned_on_trained_text_is_mentioned(folder, run, tmp_path, caplog):
    checkpoints = [str(folder / "run" / kind) for kind in ("baseline", "dnc")]
    arguments = ["--opponents", "neural_cache", "--output_dir", str(tmp_path), "--use_cpu"]
    compare.main([*checkpoints, *arguments])
    assert not caplog.records
    compare.main([*checkpoints, *arguments, "--held_out_tokens", "0", "--overwrite_output_dir"])
    (record,) = caplog.records
    assert "--held_out_tokens" in record.getMessage()


def test_the_neural_cache_has_as_many_entries_as_asked_for_without_a_memory(folder, run, tmp_path):
    entries = ["--opponents", "neural_cache", "--cache_entries", "5"]
    baseline = str(folder / "run" / "baseline")
    comparison = compare.main([baseline, *entries, "--output_dir", str(tmp_path), "--use_cpu"])
    assert comparison["models"]["neural_cache"]["scoring"]["entries"] == 5
    assert list(comparison["differences"]) == ["neural_cache"]


@pytest.mark.parametrize(
    ("script", "arguments", "culprits"),
    [
        ("train", {"opponents": "wide"}, ("wide", "widened,neural_cache")),
        ("train", {"opponents": "widened", "model": "dnc"}, ("--opponents widened", "--model both")),
        ("train", {"opponents": "simplified", "addressing": "simplified"}, ("--opponents simplified", "leave it out")),
        ("train", {"opponents": "long_window", "windows_per_example": 1}, ("long_window", "--windows_per_example")),
        (
            "train",
            {"opponents": "long_window", "model_name_or_path": "BASELINE"},
            ("long_window needs windows of 16 tokens", "has 8 positions"),
        ),
        ("train", {"held_out_tokens": 10**6}, ("held_out_tokens=1000000", "training text")),
        ("train", {"held_out_tokens": -1}, ("held_out_tokens=-1",)),
        ("compare", ["DNC", "--opponents", "neural_cache"], ("neural_cache", "plain GPT-2")),
        ("compare", ["BASELINE", "--opponents", "neural_cache"], ("neural_cache", "with memory", "--cache_entries")),
        ("compare", ["BASELINE", "DNC", "--cache_entries", "5"], ("--cache_entries 5", "--opponents neural_cache")),
        ("compare", ["BASELINE", "--opponents", "neural_cache", "--cache_entries", "0"], ("cache_entries=0",)),
        (
            "compare",
            ["BASELINE", "DNC", "--opponents", "neural_cache", "--validation_file", "TEXT"],
            ("no train text",),
        ),
        ("compare", ["BASELINE", "--opponents", "cache"], ("cache", "widened,neural_cache")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict | list) else "",
)
def test_bad_input_is_one_line_before_anything_is_trained_or_evaluated(
    folder, run, tmp_path, trainings, capsys, script, arguments, culprits
):
    out = tmp_path / "out"
    if script == "train":
        arguments = command_line(tiny_options(folder, output_dir=out, **arguments))
    else:
        arguments = [*arguments, "--output_dir", str(out), "--use_cpu"]
    places = {"BASELINE": "run/baseline", "DNC": "run/dnc", "TEXT": "validation.txt"}
    arguments = [str(folder / places[word]) if word in places else word for word in arguments]
    with pytest.raises(SystemExit) as end, one_line_errors(script):
        {"train": train, "compare": compare}[script].main(arguments)
    message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.strip()
    assert "\n" not in message, message
    for culprit in culprits:
        assert culprit in message, message
    assert not out.exists() and not trainings
