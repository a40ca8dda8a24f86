"""Several processes: two that train together on the processor equal one, with whole and with sharded parameters."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin

from dnc_gpt2.evaluation import evaluate

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A function that gives what a process found, by name and rank. All checks share one start of two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    worker.write_records(folder)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [sys.executable, *command, worker.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert "find_unused_parameters" not in result.stderr
    return lambda name, rank=0: torch.load(folder / f"{name}_{rank}.pt", weights_only=False)


def trained_alone(case: str):
    """The model after the same steps on whole batches, in one process."""
    model = worker.make(case).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens in worker.batches():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same_weights(weights, expected, atol: float = 1e-6) -> None:
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("case", worker.CASES)
def test_two_accelerate_processes_train_as_one(found, case):
    expected = trained_alone(case).state_dict()
    for rank in range(2):
        result = found(f"accelerate_{case}", rank)
        assert result["processes"] == 2
        assert_same_weights(result["weights"], expected)


@pytest.mark.parametrize("case", worker.CASES)
def test_a_fully_sharded_model_trains_evaluates_and_gathers_as_one(found, case):
    model = trained_alone(case)
    results = [found(f"sharded_{case}", rank) for rank in range(2)]
    size = sum(parameter.numel() for parameter in model.parameters())
    layers = model.config.n_layer
    for result, tokens in zip(results, worker.batches()[0].chunk(2), strict=True):
        assert result["units"] == layers + (case != "gpt2"), "each block, and the memory"
        assert result["held"] < 0.6 * size
        assert_same_weights(result["weights"], model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(result["logits"], model(tokens).logits, rtol=1e-4, atol=1e-5)
    columns = evaluate(model, worker.held_out(), batch_size=3, progress=False).columns
    for name, column in columns.items():
        np.testing.assert_allclose(results[0]["columns"][name], column, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", worker.TRAINER_CASES)
def test_the_trainer_gives_the_same_with_the_configured_sharding(found, case):
    whole, sharded = found(f"trainer_{case}"), found(f"sharded_trainer_{case}")
    assert not whole["sharded"]
    assert {"FSDPGPT2Block"} | ({"FSDPDNCMemory"} if case != "gpt2" else set()) <= sharded["sharded"]
    first, resumed = whole["histories"]
    assert first == resumed
    for history in sharded["histories"]:
        assert history == pytest.approx(first, rel=1e-4)
    tied = sharded["weights"].pop("lm_head.weight")  # which the library writes out twice
    assert torch.equal(tied, sharded["weights"]["transformer.wte.weight"])
    # Adam makes steps of rounding errors where a gradient is near 0.
    assert_same_weights(sharded["weights"], whole["weights"], atol=2e-3)


def test_processes_stream_different_records_and_resume_each_at_its_own_place(found):
    unbroken = [found("stream_unbroken", rank) for rank in range(2)]
    resumed = [found("stream_resumed", rank) for rank in range(2)]
    for whole, again in zip(unbroken, resumed, strict=True):
        assert len(whole["losses"]) == 6
        assert again["losses"] == whole["losses"]
        assert torch.equal(again["read"], whole["read"][3:])
        assert all(torch.equal(x, y) for x, y in zip(whole["state"], again["state"], strict=True))
        assert all(torch.equal(again["weights"][name], x) for name, x in whole["weights"].items())
    first, second = (result["read"].flatten(1).tolist() for result in unbroken)
    assert not [row for row in first if row in second]


# configs/accelerate


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration_as_it_is_meant(path):
    config = load_config_from_file(str(path))  # unknown keys are errors
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(path), "--num_processes", "4", str(ROOT / "train.py"), "--bf16"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == 4
    assert arguments.training_script_args == ["--bf16"]
    kind = config.distributed_type.value
    assert [arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed] == [
        kind == name for name in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    ]
    if kind == "FSDP":
        options = {name: value for name, value in config.fsdp_config.items() if name.startswith("fsdp_")}
        assert options["fsdp_version"] == 2
        assert "fsdp_transformer_layer_cls_to_wrap" not in options, "what to wrap, each model says itself"
        for case, units in (("gpt2", {"GPT2Block"}), ("lru", {"GPT2Block", "DNCMemory"})):
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
            plugin.set_auto_wrap_policy(worker.make(case))
            policy = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
            assert {cls.__name__ for cls in policy} == units


def test_every_configuration_says_what_it_is_for_and_whether_it_was_tried():
    assert {path.stem for path in CONFIGS} == {"ddp", "fsdp2", "deepspeed_zero2"}
    for path in CONFIGS:
        comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any("accelerate launch --config_file configs/accelerate/" + path.name in line for line in comment)
        assert any("Tried" in line or "Untried" in line for line in comment)
        assert "mixed_precision" not in yaml.safe_load(path.read_text()), "the options of train.py say that"
