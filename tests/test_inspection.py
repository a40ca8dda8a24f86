"""What a memory did with a text, and which tokens its slots and reads are attributed to."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import dnc_gpt2
from dnc_gpt2.attribution import effective_writes, reads_beyond_window, slot_shares
from dnc_gpt2.inspection import inspect_tokens
from dnc_gpt2.tokenization import train_tokenizer

TEXT = "the old king was born in the old town and the river ran by the gate " * 2
WINDOW = 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 270)


@pytest.fixture
def model(tiny_model, tokenizer):
    def make(**options):
        return tiny_model(vocab_size=len(tokenizer), **options)

    return make


def one_hot_writes(slots: list[int | None], number: int) -> torch.Tensor:
    return torch.tensor([[float(n == slot) for n in range(number)] for slot in slots])


def test_a_full_write_takes_the_slot_and_half_a_write_shares_it():
    writes = one_hot_writes([0, 1, 0, None], 2)
    writes[2, 0] = 0.5
    *_, last = (shares.clone() for shares in slot_shares(writes))
    assert last.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]


def test_the_gate_of_the_simplified_memory_counts_and_no_other_is_counted_twice():
    weights, gates = torch.full((1, 2, 4), 0.25), torch.tensor([[0.0, 0.5]])
    assert effective_writes(weights, gates, "simplified")[0, :, 0].tolist() == [0, 0.125]
    assert torch.equal(effective_writes(weights, gates, "lru"), weights)


def test_reads_beyond_the_window_follow_writes_resets_and_what_was_there_before():
    writes = one_hot_writes([0, 1, 0, None, None, None, None], 2)[None]
    reads = one_hot_writes([1, 1, 1, 1, 0, 1, 1], 2)[None, :, None]
    shares = reads_beyond_window(reads, writes, window=2)
    # Slot 1 is filled in the first window; slot 0 anew in the second one.
    assert shares.tolist() == [[0, 0, 1, 1, 1, 1, 1]]
    reset = torch.tensor([[False] * 5 + [True, False]])
    assert reads_beyond_window(reads, writes, 2, reset).tolist() == [[0, 0, 1, 1, 1, 0, 0]]
    filled = torch.tensor([[0.0, 0.75]])
    assert reads_beyond_window(reads, writes, 2, filled=filled).tolist() == [[0.75, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("addressing", ["lru", "dnc", "simplified"])
def test_shares_of_reads_by_token_agree_with_those_by_window(model, tokenizer, addressing):
    model = model(addressing=addressing)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[: 3 * WINDOW + 3]
    found = inspect_tokens(model, tokenizer, ids)
    assert found.read_sources.shape == (len(ids), 2, len(ids))
    # Nothing comes from a later token, and never more than all.
    assert not np.triu(found.read_sources.transpose(1, 0, 2), 1).any()
    total = found.read_sources.sum(-1)
    np.testing.assert_allclose(total, np.einsum("trn,tn->tr", found.read_weights, found.held), atol=1e-5)
    assert total.max() < 1 + 1e-5 and found.held.min() >= 0
    old = [found.read_sources[t, :, : t - t % WINDOW].sum(-1).mean() for t in range(len(ids))]
    by_window = reads_beyond_window(
        torch.tensor(found.read_weights)[None], torch.tensor(found.write_weights)[None], WINDOW
    )
    np.testing.assert_allclose(old, by_window[0], atol=1e-5)


def test_inspection_says_what_the_model_computes(model, tokenizer):
    model = model().train()
    found = dnc_gpt2.inspect(model, tokenizer, TEXT)
    assert model.training
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    out = model.eval()(ids, output_memory=True, output_base_logits=True)
    assert "".join(found.tokens) == TEXT
    np.testing.assert_allclose(found.write_gates, out.write_gates[0].detach(), atol=1e-6)
    np.testing.assert_allclose(found.read_weights, out.read_weights[0].detach(), atol=1e-6)
    with_memory, without = (x[0, :-1].log_softmax(-1).detach() for x in (out.logits, out.base_logits))
    expected = with_memory.gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(found.log_probabilities[1:], expected, atol=1e-5)
    np.testing.assert_allclose(found.gains[1:], expected - without.gather(1, ids[0, 1:, None])[:, 0], atol=1e-5)
    assert math.isnan(found.gains[0]) and math.isnan(found.log_probabilities[0])
    # A document's first token writes nothing.
    assert found.write_slots[0] == -1 and found.write_slots[1:].min() >= 0


def test_sources_are_the_largest_shares_of_the_read_before_the_token(model, tokenizer):
    found = dnc_gpt2.inspect(model(), tokenizer, TEXT)
    assert found.sources(0) == []
    sources = found.sources(20, head=1)
    row = found.read_sources[19, 1]
    assert sources[0] == (int(row.argmax()), float(row.max())) and all(token < 20 for token, _ in sources)
    assert [share for _, share in sources] == sorted((share for _, share in sources), reverse=True)


def test_a_working_cache_reads_the_token_that_followed_the_same_context(tiny_config, tokenizer):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), mem_slots=64, mem_width=16, num_reads=1)
    model = dnc_gpt2.DNCGPT2LMHeadModel(config).eval()
    once = torch.randperm(len(tokenizer))[: 2 * WINDOW]
    found = inspect_tokens(model, tokenizer, once.repeat(2))
    # Windows begin alike, so that each token is predicted in the very context that it stood in two windows before.
    second = range(2 * WINDOW + 1, 4 * WINDOW)
    assert [found.sources(t)[0][0] for t in second] == [t - 2 * WINDOW for t in second]


def test_inspection_as_json_and_of_a_single_token(model, tokenizer):
    found = dnc_gpt2.inspect(model(), tokenizer, "t")
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["tokens"] == ["t"] and stored["gains"] == [None] and stored["sources"] == [[[], []]]


def test_inspection_of_a_memory_that_is_not_finite_is_still_json(model, tokenizer):
    broken = model()
    with torch.no_grad():
        broken.transformer.memory.write_control.weight.fill_(math.nan)
    found = dnc_gpt2.inspect(broken, tokenizer, TEXT)
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["write_gates"] == [None] * len(found.tokens) and None in stored["held"][-1]


def test_nothing_to_inspect_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="empty"):
        dnc_gpt2.inspect(model(), tokenizer, "")
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="gpt2 has no memory"):
        dnc_gpt2.inspect(plain, tokenizer, TEXT)
