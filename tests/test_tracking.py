"""What of the memory goes to the logs and to the trackers that `report_to` names."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import tiny_run
from transformers.integrations import integration_utils

from dnc_gpt2.examples import ExampleDataset, collate
from dnc_gpt2.inspection import inspect_tokens
from dnc_gpt2.models import new_models
from dnc_gpt2.tokenization import TokenizedText
from dnc_gpt2.trainer import DNCTrainer, DNCTrainingArguments

WINDOW = 8
STATISTICS = {"write_gate", "write_rate", "slot_use", "read_strength", "reads_beyond_window"}


def examples(count: int, windows: int = 3, **options) -> ExampleDataset:
    tokens = torch.randint(67, (count * windows * WINDOW + 1,), generator=torch.Generator().manual_seed(3))
    starts = torch.zeros(len(tokens), dtype=torch.bool)
    starts[0] = True
    return ExampleDataset(TokenizedText(tokens, starts, len(tokens), len(tokens)), WINDOW, windows, **options)


@pytest.fixture
def train(tiny_config, tmp_path):
    """A function that trains a model with learning rate 0 and returns its trainer."""

    def run(dataset: ExampleDataset, kind: str = "dnc", carry_memory: bool = False, addressing="lru", **options):
        model = new_models(tiny_config(addressing=addressing), ["baseline", "dnc"], seed=0)[kind]
        defaults = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 2, "logging_steps": 1}
        defaults |= {"learning_rate": 0.0, "per_device_train_batch_size": 1, "disable_tqdm": True}
        arguments = DNCTrainingArguments(**(defaults | options))
        trainer = DNCTrainer(model, arguments, dataset, carry_memory=carry_memory)
        trainer.train()
        return trainer

    return run


def logged(trainer: DNCTrainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("addressing", ["lru", "dnc", "simplified"])
def test_statistics_are_those_of_the_batch(train, addressing):
    dataset = examples(1)
    trainer = train(dataset, addressing=addressing, max_steps=1)
    model, batch = trainer.model.eval(), collate([dataset[0]])
    (row,) = logged(trainer)
    out = model(batch["input_ids"], output_memory=True)
    assert row["write_rate"] == pytest.approx((out.write_gates > 0.7).double().mean().item())
    assert row["read_strength"] == pytest.approx(out.read_strengths.mean().item(), rel=1e-5)
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    found = inspect_tokens(model, tokenizer, batch["input_ids"][0])
    beyond = [found.read_sources[t, :, : t - t % WINDOW].sum(-1).mean() for t in range(3 * WINDOW)]
    assert row["reads_beyond_window"] == pytest.approx(sum(beyond) / len(beyond), rel=1e-4)
    share = torch.tensor(found.write_weights).sum(0)
    spread = torch.distributions.Categorical(probs=share).entropy().exp() / len(share)
    assert row["slot_use"] == pytest.approx(spread.item(), rel=1e-4)


def test_a_carried_memory_is_read_beyond_the_window_from_the_first_window_on(train):
    carried = logged(train(examples(2, windows=1, streams=1), carry_memory=True))
    alone = logged(train(examples(2, windows=1)))
    assert [row["reads_beyond_window"] for row in alone] == [0, 0]
    assert carried[0]["reads_beyond_window"] == 0 and 0 < carried[1]["reads_beyond_window"] < 1


def test_what_costs_time_is_worked_out_for_the_steps_that_are_logged_alone(train, monkeypatch):
    steps = []
    add = DNCTrainer._add_memory_statistics
    monkeypatch.setattr(
        DNCTrainer,
        "_add_memory_statistics",
        lambda self, *inputs: (steps.append(self.state.global_step + 1), add(self, *inputs)),
    )
    options = {"max_steps": 5, "logging_steps": 2, "gradient_accumulation_steps": 2}
    rows = logged(train(examples(10), **options))
    assert [row["step"] for row in rows] == [2, 4] and steps == [2, 2, 4, 4]
    assert all(set(row) >= STATISTICS for row in rows)
    rows = logged(train(examples(10), logging_first_step=True, **options))
    assert [row["step"] for row in rows] == [1, 2, 4] and all(set(row) >= STATISTICS for row in rows)
    rows = logged(train(examples(2), logging_strategy="epoch"))
    assert len(rows) == 1 and set(rows[0]) >= STATISTICS


def test_a_model_without_memory_logs_none_of_it(train):
    assert all(STATISTICS.isdisjoint(row) for row in logged(train(examples(2), kind="baseline")))


def test_tensorboard_gets_scalars_and_the_histogram_of_the_gates(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = train(examples(2), report_to=["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board"), {"histograms": 0, "scalars": 0})
    board.Reload()
    assert {f"train/{name}" for name in STATISTICS} <= set(board.Tags()["scalars"])
    values = [event.value for event in board.Scalars("train/slot_use")]
    assert values == pytest.approx([row["slot_use"] for row in logged(trainer)])
    assert board.Tags()["histograms"] == ["train/write_gate_histogram"]
    for event, row in zip(board.Histograms("train/write_gate_histogram"), logged(trainer), strict=True):
        assert event.step == row["step"] and event.histogram_value.num == 3 * WINDOW
        mean = event.histogram_value.sum / event.histogram_value.num
        assert mean == pytest.approx(row["write_gate"], abs=0.03)  # half a bin


class Recorder(ModuleType):
    """A module that records what a tracker's client is called with."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls, self.run, self.config, self.__version__ = [], None, {}, "0.0"
        self.__path__ = []
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))

    def init(self, **options):
        self.calls.append(("init", options.get("name")))
        self.run = SimpleNamespace(summary={}, _label=lambda **_: None)
        self.config = Config()

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self):
        self.calls.append(("finish", None))
        self.run = None

    class Histogram:
        def __init__(self, np_histogram):
            self.counts, self.edges = np_histogram


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    """A stand-in for a tracker's client under its name."""
    module = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        inner = ModuleType(name)
        inner.ConfigError, inner.__path__ = ValueError, []
        monkeypatch.setitem(sys.modules, name, inner)
    monkeypatch.setattr(integration_utils, f"is_{request.param}_available", lambda: True)
    return module


def test_trackers_with_histograms_get_them_beside_the_scalars(train, tracker):
    trainer = train(examples(2), report_to=[tracker.__name__])
    logs = [values for call, values in tracker.calls if call == "log"]
    scalars = [values for values in logs if "train/slot_use" in values]
    assert [values["train/slot_use"] for values in scalars] == [row["slot_use"] for row in logged(trainer)]
    histograms = [values for values in logs if "train/write_gate_histogram" in values]
    assert [values["train/global_step"] for values in histograms] == [1, 2]
    for values in histograms:
        histogram = values["train/write_gate_histogram"]
        assert histogram.counts.sum() == 3 * WINDOW and len(histogram.edges) == len(histogram.counts) + 1 == 21


def test_a_tracker_without_histograms_gets_scalars_alone(train, tracker, monkeypatch):
    monkeypatch.delattr(Recorder, "Histogram")
    train(examples(2), report_to=[tracker.__name__])
    logs = [values for call, values in tracker.calls if call == "log"]
    assert any("train/slot_use" in values for values in logs)
    assert not any("train/write_gate_histogram" in values for values in logs)


def test_each_model_of_a_run_is_a_run_of_the_tracker(tracker, tmp_path):
    tiny_run(tmp_path, report_to=tracker.__name__, max_steps=1)
    calls = [call for call in tracker.calls if call[0] != "log"]
    names = [name for call, name in calls if call == "init"]
    assert names == ["run-baseline", "run-dnc"]
    assert calls[: calls.index(("init", "run-dnc"))][-1] == ("finish", None)
