"""A memory within the stack: read below one of the blocks, and what the backbone says without it."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cache import LEFT, padded
from test_modeling import plain_gpt2, random_tokens, run_in_chunks, silent
from torch import Tensor

from dnc_gpt2 import DNCGPT2LMHeadModel

WINDOW = 8  # that of `tiny_config`
LAYERS = 3

every_layer = pytest.mark.parametrize("layer", range(1, LAYERS + 1))
every_addressing = pytest.mark.parametrize("addressing", ["lru", "dnc", "simplified"])


def told_by_hand(model: DNCGPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Logits of whole windows of tokens, block by block with a stock GPT-2's blocks."""
    stack, layer = plain_gpt2(model).transformer, model.config.blocks_below_memory
    rows, embeds = tokens.view(-1, WINDOW), stack.wte(tokens)
    hidden = stack.wte(rows) + stack.wpe(torch.arange(WINDOW))
    for index, block in enumerate(stack.h):
        if index == layer:
            seen = stack.ln_f(hidden).view_as(embeds)
            hidden = hidden + model.transformer.memory(seen, embeds, input_ids=tokens).hidden_states.view_as(hidden)
        causal = torch.full((WINDOW, WINDOW), -torch.inf, dtype=hidden.dtype).triu(1)
        hidden = block(hidden, attention_mask=causal[None, None])
    return model.lm_head(stack.ln_f(hidden)).view(*tokens.shape, -1)


@every_addressing
@pytest.mark.parametrize("layer", range(1, LAYERS))
@pytest.mark.parametrize("windows", [1, 3])
def test_what_is_read_is_added_below_the_blocks_above(tiny_model, addressing, layer, windows):
    model = tiny_model(addressing=addressing, n_layer=LAYERS, memory_layer=layer)
    tokens = random_tokens(2, windows * WINDOW)
    torch.testing.assert_close(model(tokens).logits, told_by_hand(model, tokens))


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_every_gradient_flows_as_by_hand(tiny_model, layer):
    model, tokens = tiny_model(n_layer=LAYERS, memory_layer=layer), random_tokens(2, 2 * WINDOW)
    memory = dict(model.transformer.memory.named_parameters())
    actual = torch.autograd.grad(model(tokens).logits.square().sum(), memory.values(), allow_unused=True)
    expected = torch.autograd.grad(told_by_hand(model, tokens).square().sum(), memory.values(), allow_unused=True)
    for name, one, other in zip(memory, actual, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_memory_sees_what_the_blocks_below_say_and_they_do_not_see_it(tiny_model):
    model, tokens = tiny_model(n_layer=LAYERS, memory_layer=2), random_tokens(2, 20)
    out = model(tokens, output_hidden_states=True)
    without = silent(copy.deepcopy(model))(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    for below in range(3):
        assert torch.equal(out.hidden_states[below], without.hidden_states[below])
    assert not torch.allclose(out.hidden_states[3], without.hidden_states[3])


@every_layer
@pytest.mark.parametrize("sizes", [[1] * 29, [5, 1, 1, 1, 9, 12], [20, 9]], ids=str)
@pytest.mark.parametrize("mask", [None, padded(LEFT, 29)], ids=["alike", "left-padded"])
def test_pieces_give_what_one_pass_gives(tiny_model, layer, sizes, mask):
    model, tokens = tiny_model(n_layer=LAYERS, memory_layer=layer), random_tokens(3, 29)
    expected = model(tokens, attention_mask=mask).logits
    actual, _ = run_in_chunks(model, tokens, sizes, mask)
    real = torch.ones(3, 29, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(actual[real], expected[real])


@every_layer
def test_base_logits_are_those_of_plain_gpt2_whatever_is_asked_beside(tiny_model, layer):
    model, tokens = tiny_model(n_layer=LAYERS, memory_layer=layer), random_tokens(2, 2 * WINDOW)
    expected = plain_gpt2(model)(tokens.view(-1, WINDOW), output_hidden_states=True)
    out = model(tokens, output_base_logits=True, output_hidden_states=True, output_attentions=True, use_cache=True)
    torch.testing.assert_close(out.base_logits, expected.logits.view_as(out.base_logits))
    alone = model(tokens, output_hidden_states=True, output_attentions=True)
    assert torch.equal(out.logits, alone.logits)
    for name in ("hidden_states", "attentions"):
        for one, other in zip(getattr(out, name), getattr(alone, name), strict=True):
            assert torch.equal(one, other)
    assert out.past_key_values.get_seq_length() == 2 * WINDOW
    torch.testing.assert_close(
        model(tokens[:, :1], past_key_values=out.past_key_values).logits,
        model(torch.cat([tokens, tokens[:, :1]], dim=1)).logits[:, -1:],
    )


@every_layer
def test_base_logits_of_padded_and_packed_rows_are_those_of_the_documents_alone(tiny_model, layer):
    model, tokens, mask = tiny_model(n_layer=LAYERS, memory_layer=layer), random_tokens(3, 29), padded(LEFT, 29)
    out = model(tokens, attention_mask=mask, output_base_logits=True)
    for row, real in enumerate(mask.bool()):
        alone = silent(copy.deepcopy(model))(tokens[row : row + 1, real]).logits
        torch.testing.assert_close(out.base_logits[row, real], alone[0])
    positions = torch.cat([torch.arange(13), torch.arange(16)])[None]
    out = model(tokens[:1], position_ids=positions, output_base_logits=True)
    alone = [silent(copy.deepcopy(model))(part).logits for part in tokens[:1].split([13, 16], dim=1)]
    torch.testing.assert_close(out.base_logits, torch.cat(alone, dim=1))


def test_base_logits_let_gradients_through(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 20)
    model(tokens, output_base_logits=True).base_logits.square().sum().backward()
    expected = plain_gpt2(model).requires_grad_()
    rows = torch.nn.functional.pad(tokens, (0, 4)).view(-1, WINDOW)
    logits = expected(rows).logits.view(2, 24, -1)[:, :20]
    logits.square().sum().backward()
    for name, parameter in expected.named_parameters():
        ours = model.get_parameter(name).grad
        torch.testing.assert_close(ours, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_divergence_keeps_nothing_of_the_pass_without_reads(tiny_model, memory):
    """Neither the blocks' activations nor gradients: what the comparison costs is the pass alone."""
    model, tokens = tiny_model(**memory), random_tokens(2, 20)
    kept = []
    for asked in ({}, {"output_divergence": True}):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            model(tokens, labels=tokens, output_logits=False, **asked)
        kept.append(sum(sizes))
    assert kept[0] == kept[1] > 0
    asked = {"output_base_hidden_state": True}
    attached, detached = (model.transformer(tokens, **asked, detach_base_hidden_state=flag) for flag in (False, True))
    assert attached.base_hidden_state.requires_grad and not detached.base_hidden_state.requires_grad
    assert torch.equal(attached.base_hidden_state, detached.base_hidden_state)


def test_training_draws_the_same_dropout_with_and_without_base_logits(tiny_config):
    model = DNCGPT2LMHeadModel(tiny_config(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    tokens, outputs = random_tokens(2, 20), []
    for asked in (False, True):
        torch.manual_seed(1)
        outputs.append([model(tokens, output_base_logits=asked).logits, torch.rand(3)])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "asked", [{"output_base_logits": True}, {"output_logits": False, "output_divergence": True}], ids=["logits", "kl"]
)
def test_what_is_cached_cannot_be_told_without_its_reads(tiny_model, asked):
    model, tokens = tiny_model(), random_tokens(2, 5)
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"mid-stack.*output_divergence.*without past_key_values"):
        model(tokens, labels=tokens, past_key_values=cache, **asked)
    on_top = tiny_model(memory_layer=2)
    cache = on_top(tokens, use_cache=True).past_key_values
    assert on_top(tokens, past_key_values=cache, output_base_logits=True).base_logits.shape == (2, 5, 67)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_write_the_memory_once(tiny_model, reentrant):
    model, tokens = tiny_model(n_layer=LAYERS, memory_layer=2).train(), random_tokens(2, 20)
    calls = []
    model.transformer.memory.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        first = model(tokens, labels=tokens)
        model(tokens, labels=tokens, memory_state=first.memory_state).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    assert len(calls) == 4


def test_threads_do_not_meet(tiny_model):
    model = tiny_model(n_layer=LAYERS, memory_layer=2)
    texts = [random_tokens(1, length) for length in (5, 20, 29, 9)] * 4
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [model(text).logits for text in texts]
        for actual, logits in zip(pool.map(lambda text: model(text).logits, texts), expected, strict=True):
            torch.testing.assert_close(actual, logits)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copied_model_reads_its_own_memory(tiny_model, copied):
    model, tokens = tiny_model(), random_tokens(2, 20)
    other = silent(copied(model))
    torch.testing.assert_close(other(tokens).logits, model(tokens, output_base_logits=True).base_logits)
