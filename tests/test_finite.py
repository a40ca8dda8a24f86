"""Numbers stay finite whatever comes in; training stops where they do not: with step, batch and term, after saving."""

import math
import sys
from pathlib import Path

import pytest
import torch
from test_trainer import EXAMPLE, arguments, examples, training_rows

from dnc_gpt2.checkpoints import newest_whole
from dnc_gpt2.models import new_models
from dnc_gpt2.trainer import DNCTrainer, NonFiniteError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import endurance

# A million tokens: benchmarks/endurance.py


@pytest.mark.parametrize("kind", endurance.INPUTS)
@pytest.mark.parametrize("dtype", endurance.DTYPES)
@pytest.mark.parametrize("variant", endurance.VARIANTS)
def test_all_invariants_hold_after_many_tokens(variant, dtype, kind):
    # Each kind of adversarial input comes once.
    found = endurance.endure(variant, dtype, kind, tokens=6 * 32, batch=2, length=16, scan="eager")
    assert found["tokens"] == 6 * 32
    assert found["broken invariants"] == []


def test_a_broken_invariant_is_found():
    memory = endurance.make("dnc", "float32", "eager")
    with torch.no_grad():
        output = memory(torch.randn(1, 4, endurance.HIDDEN), torch.randn(1, 4, endurance.HIDDEN))
    assert endurance.violations(output, memory.config) == []
    for changed, name in (
        ({"memory": output.state.memory * math.inf}, "memory finite"),
        ({"usage": output.state.usage + 1.1}, "0 <= usage <= 1"),
        ({"link": output.state.link + 0.6}, "diagonal of link 0"),
        ({"write_weights": output.state.write_weights + 0.3}, "writes sum to at most the gate"),
    ):
        broken = output._replace(state=output.state._replace(**changed))
        assert name in endurance.violations(broken, memory.config)


# Training stops


@pytest.fixture
def trainer(tiny_config, tmp_path):
    """A function that makes a trainer with carried memory, dropout and two micro-batches of two examples a step."""

    def make(**options) -> DNCTrainer:
        model = new_models(tiny_config(scan="eager", resid_pdrop=0.1), ["dnc"], seed=0)["dnc"]
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 5, **options}
        torch.manual_seed(0)
        return DNCTrainer(
            model,
            arguments(tmp_path, logging_steps=3, optim="adamw_torch", **{"learning_rate": 0.01, **options}),
            examples(32 * EXAMPLE + 1, streams=4),
            carry_memory=True,
        )

    return make


def spoil(trainer: DNCTrainer, term: str, step: int, micro_batch: int) -> None:
    """Let one term of one micro-batch be infinite."""
    forward, calls = trainer.model.forward, []

    def spoiled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        calls.append(term)
        if len(calls) == 2 * (step - 1) + micro_batch + 1:
            name = {"L_LM": "loss", "L_routing": "divergence", "L_entropy": "write_weights"}[term]
            outputs[name] = outputs[name] * math.inf
        return outputs

    trainer.model.forward = spoiled


@pytest.mark.parametrize("term", ["L_LM", "L_routing", "L_entropy"])
def test_a_term_that_is_not_finite_ends_training_and_can_be_looked_into(trainer, tmp_path, term):
    spoiled = trainer()
    spoil(spoiled, term, step=4, micro_batch=1)
    # Streams of 8 examples: the fourth step reads the fourth of each, the second micro-batch those of streams 2 and 3.
    with pytest.raises(NonFiniteError) as error:
        spoiled.train()
    message = str(error.value)
    assert message.startswith("step 4: the loss is not finite: ")
    assert f"{term} is " in message and "in micro-batch 1 of process 0" in message
    assert "examples [19, 27] (tokens 304 to 320, 432 to 448 of the training text)" in message
    assert message.count(" is nan") + message.count(" is inf") + message.count(" is -inf") == 1, "one term is to blame"
    checkpoint = tmp_path / "checkpoint-3"
    assert newest_whole(tmp_path) == (checkpoint, {}) and str(checkpoint) in message
    # What was saved is the state before the step, to the bit.
    unbroken = trainer(output_dir=str(tmp_path / "unbroken"))
    unbroken.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert training_rows(resumed) == training_rows(unbroken)
    for (name, x), y in zip(unbroken.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_a_gradient_that_is_not_finite_ends_training_before_the_weights_change(trainer, tmp_path):
    made = trainer()
    parameter = made.model.transformer.memory.erase.weight
    parameter.register_hook(lambda gradient: gradient * math.nan)
    before = {name: x.clone() for name, x in made.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"step 1: .*all loss terms are finite, but the gradient's norm is nan"):
        made.train()
    assert all(torch.equal(x, before[name]) for name, x in made.model.named_parameters())
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-0"
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-0"))


def test_a_learning_rate_far_too_high_ends_training(trainer):
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is not finite.*Lower --learning_rate"):
        trainer(learning_rate=1e30).train()


def test_a_checkpoint_that_is_there_already_is_left_as_it_is(trainer, tmp_path):
    spoiled = trainer(save_strategy="steps", save_steps=3)
    spoil(spoiled, "L_LM", step=4, micro_batch=0)
    saved = []
    close = spoiled._close
    spoiled._close = lambda folder: saved.append(folder.name) or close(folder)
    with pytest.raises(NonFiniteError):
        spoiled.train()
    assert saved == ["checkpoint-3"]
