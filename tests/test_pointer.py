"""Predictions that point at what slots hold: which token that is, the mixture, and the share found on held-out text."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import tiny_run
from torch import Tensor

from dnc_gpt2 import DNCGPT2LMHeadModel, pointing
from dnc_gpt2.evaluation import evaluate
from dnc_gpt2.examples import ExampleDataset
from dnc_gpt2.pointing import tune_pointer
from dnc_gpt2.tokenization import TokenizedText
from memory_dnc_gpt2 import MemoryState
from pointer_dnc_gpt2 import mix, pointer_mass, slot_tokens

VOCABULARY = 67
SHARE = 0.3


@pytest.fixture
def pointing_model(tiny_config):
    """A function that makes a model whose memory starts as a working cache and whose predictions point at it."""

    def make(**options) -> DNCGPT2LMHeadModel:
        return DNCGPT2LMHeadModel(tiny_config(**{"pointer_weight": SHARE, **options})).double().eval()

    return make


def tokens_of(rows: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length))


# What slots hold


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_a_slot_holds_the_last_token_of_whose_write_it_took_more_than_half(batch, tokens, slots, seed, resets, named):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch, tokens, slots, generator=generator)
    ids = torch.randint(0, 9, (batch, tokens), generator=generator)
    before = torch.randint(0, 9, (batch, slots), generator=generator)
    reset = torch.rand(batch, tokens, generator=generator) < 0.2 if resets else None
    expected = torch.empty(batch, tokens, slots, dtype=torch.long)
    for b in range(batch):
        held = before[b].tolist()
        for t in range(tokens):
            if reset is not None and reset[b, t]:
                held = [0] * slots
            for n in range(slots):
                if weights[b, t, n] > 0.5:
                    held[n] = int(ids[b, t]) + 1 if named else 0
            expected[b, t] = torch.tensor(held)
    given_ids = ids if named else None
    assert torch.equal(slot_tokens(given_ids, weights, before, reset, every=True), expected)
    assert torch.equal(slot_tokens(given_ids, weights, before, reset, every=False), expected[:, -1:])


def test_tokens_in_slots_pass_from_call_to_call_and_stay_integers(pointing_model):
    model, tokens = pointing_model(), tokens_of(2, 13)
    whole = model(tokens, output_memory=True)
    first = model(tokens[:, :6])
    second = model(tokens[:, 6:], memory_state=first.memory_state)
    assert whole.slot_tokens.shape == (2, 13, 6)
    assert torch.equal(second.memory_state.slot_tokens, whole.memory_state.slot_tokens)
    assert torch.equal(whole.slot_tokens[:, -1], whole.memory_state.slot_tokens)
    # A token is written with the one after it as its context, so that the slots hold the last ones.
    for row, held in zip(tokens.tolist(), whole.memory_state.slot_tokens.tolist(), strict=True):
        assert sorted(held) == sorted(token + 1 for token in row[-6:])
    assert whole.memory_state.to(torch.bfloat16).slot_tokens.dtype == torch.int64


def test_a_saved_state_keeps_its_tokens(pointing_model, tmp_path):
    state = pointing_model()(tokens_of(2, 9)).memory_state
    state.save(str(tmp_path / "state.safetensors"))
    assert torch.equal(MemoryState.load(str(tmp_path / "state.safetensors")).slot_tokens, state.slot_tokens)


@pytest.mark.parametrize("wrong", [-1, VOCABULARY + 1])
def test_a_state_with_tokens_beyond_the_vocabulary_is_refused(pointing_model, wrong):
    model = pointing_model()
    state = model(tokens_of(2, 9)).memory_state
    state.slot_tokens[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"memory_state\.slot_tokens hold {wrong}"):
        model(tokens_of(2, 3), memory_state=state)


def test_a_state_whose_tokens_are_no_integers_is_refused(pointing_model):
    model = pointing_model()
    state = model(tokens_of(2, 9)).memory_state
    with pytest.raises(ValueError, match=r"memory_state\.slot_tokens of type torch\.float64"):
        model(tokens_of(2, 3), memory_state=state._replace(slot_tokens=state.slot_tokens.double()))


# The mixture


def mixture(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Probabilities [V] of one token, slot by slot."""
    known = [(int(token) - 1, weight) for token, weight in zip(tokens, weights, strict=True) if token > 0]
    probabilities = (1 - sum(weight for _, weight in known)) * logits.softmax(-1)
    for token, weight in known:
        probabilities = probabilities + weight * torch.nn.functional.one_hot(torch.tensor(token), len(logits))
    return probabilities


@pytest.mark.parametrize("tokens", [[3, 5, 1, 2], [3, 3, 0, 3], [0, 0, 0, 0]], ids=["apart", "alike", "unknown"])
def test_a_mixture_has_the_probabilities_of_both_and_their_gradients(tokens):
    tokens = torch.tensor([tokens])
    logits = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    weights = (0.4 * torch.rand(1, 4, dtype=torch.float64).softmax(-1)).requires_grad_()
    mixed = mix(logits, tokens, weights)
    torch.testing.assert_close(mixed[0].exp(), mixture(logits[0], tokens[0], weights[0]))
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, w: mix(x, tokens, w), (logits, weights))


def test_small_probabilities_of_the_model_stay():
    logits = torch.tensor([[0.0, -300.0, -300.0]])
    mixed = mix(logits, torch.tensor([[1, 3]]), torch.tensor([[0.5, 0.0]]))
    assert mixed[0, 1] == pytest.approx(np.log(0.5) - 300)
    assert mixed[0, 2] == pytest.approx(np.log(0.5) - 300), "a slot that is not read adds nothing"


def test_half_precision_is_mixed_in_float32():
    logits, weights = torch.randn(2, 9), 0.2 * torch.rand(2, 3)
    tokens = torch.tensor([[1, 2, 2], [0, 9, 4]])
    half = mix(logits.bfloat16(), tokens, weights)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, mix(logits.bfloat16().float(), tokens, weights))


def test_pointer_mass_is_what_points_at_the_target_and_at_anything():
    tokens, weights = torch.tensor([[4, 0, 4, 2]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    mass, total = pointer_mass(tokens, weights, torch.tensor([3]))
    torch.testing.assert_close((mass, total), (torch.tensor([0.4]), torch.tensor([0.8])))


# The model


def test_logits_outside_of_training_are_those_of_the_mixture(pointing_model):
    model, tokens = pointing_model(), tokens_of(2, 20)
    out = model(tokens, output_memory=True)
    plain = model.lm_head(model.transformer(tokens).last_hidden_state)
    for b in range(2):
        for t in range(20):
            expected = mixture(plain[b, t], out.slot_tokens[b, t], SHARE * out.read_weights[b, t].mean(0))
            torch.testing.assert_close(out.logits[b, t].softmax(-1), expected)
    assert not torch.allclose(out.logits.softmax(-1), plain.softmax(-1))
    assert torch.equal(model.train()(tokens).logits, plain)
    model.config.pointer_weight = 0.0
    assert torch.equal(model.eval()(tokens).logits, plain)


@pytest.mark.parametrize("keep", [1, torch.tensor([3, 7]), torch.tensor([[0, 5], [2, 2]])], ids=["int", "1D", "2D"])
def test_a_few_logits_are_those_among_all(pointing_model, keep):
    model, tokens = pointing_model(), tokens_of(2, 11)
    places = torch.tensor([[10], [10]]) if isinstance(keep, int) else keep.expand(2, 2)
    few, whole = model(tokens, logits_to_keep=keep).logits, model(tokens).logits
    torch.testing.assert_close(few, whole.take_along_dim(places[..., None], dim=1))


def test_the_loss_is_that_of_the_logits_and_needs_none(pointing_model):
    model, tokens = pointing_model(), tokens_of(2, 20)
    labels = tokens.masked_fill(tokens % 5 == 0, -100)
    out = model(tokens, labels=labels, output_base_logits=True)
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)
    without = model(tokens, labels=labels, output_logits=False, output_divergence=True)
    torch.testing.assert_close(without.loss, out.loss)
    assert without.logits is None
    assert torch.equal(without.correct, out.logits.argmax(-1) == targets)
    p, q = out.logits.log_softmax(-1), out.base_logits.log_softmax(-1)
    torch.testing.assert_close(without.divergence, (targets != -100) * (p.exp() * (p - q)).sum(-1))
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        model(tokens, output_logits=False)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_points_as_one_pass_does(pointing_model, options):
    model, prompt = pointing_model(), tokens_of(2, 5)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    found = model.generate(prompt, **options)
    assert torch.equal(found, model.generate(prompt, **options))
    if "num_beams" in options:
        assert torch.equal(found, model.generate(prompt, **options, use_cache=False))
    else:
        assert torch.equal(found[:, 5:], model(found).logits[:, 4:-1].argmax(-1))


def test_tokens_without_ids_are_not_pointed_at(pointing_model):
    model, tokens = pointing_model(), tokens_of(2, 11)
    embedded = model(inputs_embeds=model.transformer.wte(tokens), output_memory=True)
    assert (embedded.slot_tokens == 0).all()
    plain = model.lm_head(model.transformer(tokens).last_hidden_state)
    torch.testing.assert_close(embedded.logits.softmax(-1), plain.softmax(-1))


def test_pointing_makes_what_was_just_seen_more_probable(pointing_model):
    model = pointing_model(mem_slots=16)
    phrase = tokens_of(1, 5)
    text = phrase.repeat(1, 3)
    found = model(text).logits.log_softmax(-1)
    model.config.pointer_weight = 0.0
    plain = model(text).logits.log_softmax(-1)
    targets = text[:, 6:, None]
    assert (found[:, 5:-1].gather(-1, targets) > plain[:, 5:-1].gather(-1, targets)).all()


# The share


def repeating_text(tokens: int) -> TokenizedText:
    return TokenizedText(
        tokens_of(1, 7)[0].repeat(tokens // 7 + 1)[:tokens], torch.zeros(tokens, dtype=torch.bool), tokens, tokens
    )


@pytest.mark.parametrize("carry_memory", [True, False])
def test_tuning_finds_the_best_of_the_grid(pointing_model, monkeypatch, carry_memory):
    model = pointing_model(pointer_weight=0.0, mem_slots=16).train()
    monkeypatch.setattr(pointing, "SHARES", (0.0, 0.2, 0.6, 0.9))
    dataset = ExampleDataset(repeating_text(90), 8, 2, streams=1 if carry_memory else None)
    options = {"carry_memory": carry_memory, "batch_size": 3}
    found = tune_pointer(model, dataset, **options)
    assert model.training and model.config.pointer_weight == found
    losses = {}
    for share in pointing.SHARES:
        model.config.pointer_weight = share
        losses[share] = evaluate(model, dataset, streams=1, progress=False, **options).columns["nll"].mean()
    assert found == min(losses, key=losses.get)
    assert found > 0, "pointing helps on a text that repeats itself"


def test_where_nothing_comes_again_nothing_is_pointed_at(pointing_model):
    model = pointing_model()
    ids = torch.arange(VOCABULARY)
    text = TokenizedText(ids, torch.zeros(VOCABULARY, dtype=torch.bool), VOCABULARY, VOCABULARY)
    assert tune_pointer(model, ExampleDataset(text, 8, 1)) == 0


def test_a_memory_without_single_tokens_in_its_slots_cannot_be_tuned(tiny_config):
    model = DNCGPT2LMHeadModel(tiny_config(addressing="dnc"))
    with pytest.raises(ValueError, match="no slots that hold single tokens"):
        tune_pointer(model, ExampleDataset(repeating_text(20), 8, 1))


def saved_share(folder) -> float:
    return json.loads((folder / "run" / "dnc" / "config.json").read_text())["pointer_weight"]


def test_train_tunes_on_held_out_text_and_keeps_what_is_given(tmp_path, monkeypatch):
    shares = itertools.count(0.1, 0.01)
    monkeypatch.setattr(pointing, "best_share", lambda *_: (0.0, next(shares)))
    options = {"model": "dnc", "held_out_tokens": 60}
    for name in ("tuned", "given", "nothing"):
        (tmp_path / name).mkdir()
    tiny_run(tmp_path / "tuned", **options)
    tuned = saved_share(tmp_path / "tuned")
    assert tuned >= 0.1
    comparison = json.loads((tmp_path / "tuned" / "run" / "comparison.json").read_text())
    assert comparison["models"]["dnc"]["scoring"] == {"pointer weight": tuned}
    assert f"pointer_weight | {tuned}" in (tmp_path / "tuned" / "run" / "dnc" / "README.md").read_text()
    tiny_run(tmp_path / "given", **options, pointer_weight=0.05)
    assert saved_share(tmp_path / "given") == 0.05
    tiny_run(tmp_path / "nothing", model="dnc")
    assert saved_share(tmp_path / "nothing") == 0
    tiny_run(tmp_path / "tuned", **options, resume_from_checkpoint="true")
    assert saved_share(tmp_path / "tuned") > tuned, "a finished model that is loaded again is tuned again"
