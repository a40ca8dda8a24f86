"""Generation: with and without a cache, beyond the window, from states and caches, in beams and padded batches."""

import pytest
import torch
from test_modeling import plain_gpt2, random_tokens
from torch import Tensor
from transformers.generation import stopping_criteria
from transformers.generation.streamers import BaseStreamer

from dnc_gpt2 import DNCGPT2LMHeadModel
from modeling_dnc_gpt2 import DNCGPT2Cache

WINDOW, VOCABULARY = 8, 67  # those of `tiny_config`
NEW = 2 * WINDOW + 3  # tokens generated: they cross two windows


def prompt(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length))


def generate(model: DNCGPT2LMHeadModel, tokens: Tensor, **options):
    """Generate NEW tokens, or as many as `max_new_tokens` says, whatever they are."""
    torch.manual_seed(1)  # sampling draws the same
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    if "inputs_embeds" not in options:
        options.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, **settings | options)


def greedy_by_hand(model: DNCGPT2LMHeadModel, tokens: Tensor, **options) -> Tensor:
    for _ in range(NEW):
        following = model(tokens, **options).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], 1)
    return tokens


def test_greedy_takes_the_likeliest_token_with_and_without_a_cache(tiny_model, memory):
    model, tokens = tiny_model(**memory), prompt()
    expected = greedy_by_hand(model, tokens)
    for use_cache in (True, False):
        assert torch.equal(generate(model, tokens, use_cache=use_cache), expected)


def test_sampling_draws_the_same_with_and_without_a_cache(tiny_model, memory):
    model, tokens = tiny_model(**memory), prompt()
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "num_return_sequences": 2}
    cached, uncached = (generate(model, tokens, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.shape == (4, tokens.shape[1] + NEW)
    assert torch.equal(cached, uncached) and not torch.equal(cached[0], cached[1])


def test_beams_with_a_cache_equal_those_without(tiny_model, memory):
    model, tokens = tiny_model(**memory), prompt(rows=6)
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    cached, uncached = (generate(model, tokens, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores)
    # Beams must have changed places, or nothing was tested.
    assert (cached.beam_indices[:, :NEW] != cached.beam_indices[:, :1]).any()


def test_scores_equal_the_logits_of_one_pass(tiny_model, memory):
    model, tokens = tiny_model(**memory), prompt()
    out = generate(model, tokens, return_dict_in_generate=True, output_logits=True)
    whole = model(out.sequences).logits[:, tokens.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_prompt_may_end_anywhere_in_a_window(tiny_model, length):
    model, tokens = tiny_model(), prompt(length=length)
    assert torch.equal(generate(model, tokens), greedy_by_hand(model, tokens))


def test_generation_goes_on_past_the_window_in_constant_memory(tiny_model, monkeypatch):
    model, held = tiny_model(), []
    forward = DNCGPT2LMHeadModel.forward

    def watched(*args, **kwargs):
        out = forward(*args, **kwargs)
        held.append({layer.keys.shape[2] for layer in out.past_key_values.layers})
        return out

    monkeypatch.setattr(DNCGPT2LMHeadModel, "forward", watched)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    generate(model, prompt(), max_new_tokens=6 * WINDOW, attention_mask=mask)
    assert len(held) == 6 * WINDOW
    assert max(max(columns) for columns in held) <= WINDOW


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_row_of_a_left_padded_batch_is_generated_as_if_alone(tiny_model, memory, use_cache):
    model, lengths = tiny_model(**memory), [11, 7, 1]
    tokens, mask = prompt(3, 11), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 11 - length :] = 1
    together = generate(model, tokens, attention_mask=mask, use_cache=use_cache)
    for row, length in enumerate(lengths):
        alone = generate(model, tokens[row : row + 1, 11 - length :])
        assert torch.equal(together[row, 11 - length :], alone[0])


def test_row_that_has_ended_does_not_disturb_the_others(tiny_model):
    model, tokens = tiny_model(), prompt(3)
    free = generate(model, tokens)
    end = int(free[1, 8])
    stopped = generate(model, tokens, eos_token_id=end)
    for row in range(3):
        generated = free[row, 5:].tolist()
        kept = generated.index(end) + 1 if end in generated else NEW
        length = min(kept, stopped.shape[1] - 5)
        assert torch.equal(stopped[row, 5 : 5 + length], free[row, 5 : 5 + length])
        assert not stopped[row, 5 + length :].any()


@pytest.mark.parametrize("first", [3, WINDOW - 5, 7, 2 * WINDOW])
def test_generation_goes_on_from_a_returned_cache(tiny_model, memory, first):
    model, tokens = tiny_model(**memory), prompt()
    expected = generate(model, tokens, max_new_tokens=first + 9)
    begun = generate(model, tokens, max_new_tokens=first, return_dict_in_generate=True)
    assert isinstance(begun.past_key_values, DNCGPT2Cache)
    continued = generate(model, begun.sequences, max_new_tokens=9, past_key_values=begun.past_key_values)
    assert torch.equal(continued, expected)


def test_generation_goes_on_from_the_cache_of_a_forward_pass(tiny_model):
    model, tokens = tiny_model(), prompt(length=13)
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    assert torch.equal(generate(model, tokens, past_key_values=cache), generate(model, tokens))


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_starts_from_a_given_memory_state(tiny_model, memory, use_cache):
    model, tokens = tiny_model(**memory), prompt(length=2 * WINDOW + 3)
    state = model(tokens[:, : 2 * WINDOW]).memory_state
    continued = generate(model, tokens[:, 2 * WINDOW :], memory_state=state, use_cache=use_cache)
    assert torch.equal(continued, generate(model, tokens)[:, 2 * WINDOW :])


def test_given_memory_state_is_shared_by_the_beams_of_its_row(tiny_model, memory):
    model, tokens = tiny_model(**memory), prompt(length=WINDOW + 3)
    state = model(tokens[:, :WINDOW]).memory_state
    options = {"num_beams": 3, "num_return_sequences": 2}
    continued = generate(model, tokens[:, WINDOW:], memory_state=state, **options)
    assert torch.equal(continued, generate(model, tokens, **options)[:, WINDOW:])


def test_generation_does_not_change_the_given_memory_state(tiny_model):
    model, tokens = tiny_model(), prompt()
    state = model(prompt(length=WINDOW)).memory_state
    before = state.map(lambda x: x.clone())
    generate(model, tokens, memory_state=state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True) if a is not None)


def test_embeddings_given_as_inputs_generate_as_their_tokens(tiny_model):
    model, tokens = tiny_model(), prompt()
    embeds = model.transformer.wte(tokens)
    generated = generate(model, None, inputs_embeds=embeds)
    assert torch.equal(generated, generate(model, tokens)[:, 5:])


def test_float32_model_of_the_default_start_generates_alike_with_and_without_a_cache(tiny_config):
    model, tokens = DNCGPT2LMHeadModel(tiny_config(addressing="lru", initializer_range=0.2)).eval(), prompt(3, 4)
    assert torch.equal(generate(model, tokens), generate(model, tokens, use_cache=False))


def test_cache_that_cannot_hold_a_memory_is_refused(tiny_model):
    with pytest.raises(ValueError, match='cache_implementation="quantized" cannot hold a memory'):
        generate(tiny_model(), prompt(), cache_implementation="quantized")


def left_padded(rows: int = 3, length: int = 11) -> tuple[Tensor, Tensor]:
    """Tokens, and a mask under which each row has fewer real ones than the row before."""
    padding = torch.arange(rows)[:, None] * (length - 1) // max(1, rows - 1)
    return prompt(rows, length), (torch.arange(length) >= padding).long()


def test_static_cache_generates_as_the_dynamic_one(tiny_model, memory):
    model = tiny_model(**memory)
    tokens, mask = left_padded()
    for given in (torch.ones_like(mask), mask):
        static, dynamic = (
            generate(model, tokens, attention_mask=given, cache_implementation=kind) for kind in ("static", None)
        )
        assert torch.equal(static, dynamic)


def test_static_cache_follows_the_beams(tiny_model):
    model, tokens = tiny_model(), prompt()
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(
        generate(model, tokens, cache_implementation="static", **beams), generate(model, tokens, **beams)
    )


@pytest.mark.parametrize("length", [1, 5, WINDOW, 11])
@pytest.mark.parametrize("candidates", ["itself", "a smaller model", "prompt lookup"])
def test_assisted_decoding_equals_greedy_decoding(tiny_model, memory, length, candidates):
    model, tokens = tiny_model(**memory), prompt(1, 3).repeat(1, 4)[:, :length]
    if candidates == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 4}
    else:
        smaller = {"n_layer": 1, "n_positions": 5}  # its windows end elsewhere
        options = {"assistant_model": model if candidates == "itself" else tiny_model(**smaller)}
    assert torch.equal(generate(model, tokens, **options), generate(model, tokens))


def test_assisted_decoding_begins_with_a_padded_prompt(tiny_model):
    model, tokens = tiny_model(), prompt(1, 11)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    expected = generate(model, tokens[:, 4:])
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": model}):
        assert torch.equal(generate(model, tokens, attention_mask=mask, **options)[:, 4:], expected)


def test_a_cache_records_no_past_after_assisted_decoding_unless_it_did_before(tiny_model):
    model, tokens = tiny_model(), prompt(1, 3).repeat(1, 4)
    expected = generate(model, tokens)
    for recording in (False, True):
        cache = DNCGPT2Cache(model.config)
        if recording:
            cache.activate_past_recording()
        first = generate(model, tokens, past_key_values=cache, prompt_lookup_num_tokens=4, max_new_tokens=6)
        assert cache.is_recording == recording
        assert torch.equal(generate(model, first, past_key_values=cache, max_new_tokens=NEW - 6), expected)


def test_assisted_sampling_draws_valid_tokens(tiny_model):
    model, tokens = tiny_model(), prompt(1)
    out = generate(model, tokens, assistant_model=tiny_model(n_layer=1), do_sample=True, num_assistant_tokens=4)
    assert out.shape == (1, 5 + NEW) and (out < VOCABULARY).all()


def test_beam_sampling_draws_the_same_with_and_without_a_cache(tiny_model, memory):
    model, tokens = tiny_model(**memory), prompt()
    options = {"num_beams": 3, "do_sample": True, "top_k": 20, "num_return_sequences": 2}
    cached, uncached, static = (
        generate(model, tokens, **options, **cache)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    )
    assert cached.shape == (4, tokens.shape[1] + NEW)
    assert torch.equal(cached, uncached) and torch.equal(cached, static)


def test_beams_of_a_padded_batch_are_those_of_each_row_alone(tiny_model, memory):
    model = tiny_model(**memory)
    tokens, mask = left_padded()
    together = generate(model, tokens, attention_mask=mask, num_beams=3)
    for row, real in enumerate(mask.bool()):
        alone = generate(model, tokens[row : row + 1, real], num_beams=3)
        assert torch.equal(together[row, int((~real).sum()) :], alone[0])


def both(model: DNCGPT2LMHeadModel) -> list:
    """The model and, as the control, GPT-2 of the same backbone."""
    return [model, plain_gpt2(model)]


def test_streamer_gets_every_token_as_it_comes(tiny_model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.chunks, self.ended = [], False

        def put(self, value):
            self.chunks.append(value.flatten())

        def end(self):
            self.ended = True

    tokens = prompt(1, 3)
    for model in both(tiny_model()):
        for options in ({}, {"prompt_lookup_num_tokens": 2}):
            streamer = Collect()
            expected = generate(model, tokens, max_new_tokens=5, streamer=streamer, **options)
            assert torch.equal(torch.cat(streamer.chunks), expected[0]) and streamer.ended
            assert torch.equal(streamer.chunks[0], tokens[0])


def test_what_generation_returns_is_shaped_as_gpt2s(tiny_model):
    model, tokens = tiny_model(), prompt(2, 3)
    model.set_attn_implementation("eager")
    wanted = ("scores", "logits", "attentions", "hidden_states")
    options = {f"output_{name}": True for name in wanted} | {"return_dict_in_generate": True, "max_new_tokens": 5}
    ours, stock = (generate(kind, tokens, **options) for kind in both(model))
    for name in wanted:
        for step, expected in zip(getattr(ours, name), getattr(stock, name), strict=True):
            if isinstance(step, Tensor):
                assert step.shape == expected.shape
            else:
                assert [x.shape for x in step] == [x.shape for x in expected]
    assert len(ours.attentions[0]) == model.config.n_layer
    assert len(ours.hidden_states[0]) == model.config.n_layer + 1
    assert len(ours.past_key_values) == len(stock.past_key_values) == model.config.n_layer


@pytest.mark.parametrize("cache", [None, "static"])
def test_prompt_in_chunks_generates_as_in_one(tiny_model, cache):
    model = tiny_model()
    tokens, mask = left_padded()
    for given in (torch.ones_like(mask), mask):
        options = {"attention_mask": given, "cache_implementation": cache}
        assert torch.equal(generate(model, tokens, prefill_chunk_size=4, **options), generate(model, tokens, **options))


def test_given_positions_are_generated_on_from(tiny_model):
    tokens = prompt(2, 3)
    positions = torch.tensor([[0, 1, 2], [2, 3, 4]])
    for model in both(tiny_model()):
        cached, uncached = (
            generate(model, tokens, max_new_tokens=3, position_ids=positions, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached)


def test_only_the_last_logits_of_the_prompt_are_computed(tiny_model, monkeypatch):
    lengths = []
    for model in both(tiny_model()):
        model.lm_head.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
        generate(model, prompt(2, 5), max_new_tokens=3)
    assert lengths == [1] * 6


def test_modes_that_transformers_loads_as_remote_code_are_named_as_for_gpt2(tiny_model):
    for model in both(tiny_model()):
        for options in ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, {"penalty_alpha": 0.6}):
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                generate(model, prompt(), max_new_tokens=3, top_k=4, **options)


def test_the_window_is_no_maximum_length(tiny_model, monkeypatch):
    said = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", said.append)
    model, tokens = tiny_model(), prompt(1, 2 * WINDOW)
    assert generate(model, tokens).shape[1] == 2 * WINDOW + NEW
    assert model.generate(tokens, eos_token_id=None, pad_token_id=0).shape[1] == 2 * WINDOW + 20
    assert said == []
    with pytest.raises(IndexError):
        generate(plain_gpt2(model), prompt(1, 2))
    assert "maximum length" in said[0]  # what was listened for


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_prompt_may_empty_the_memory_in_its_middle(tiny_model, use_cache):
    model, prompt = tiny_model(), random_tokens(2, 12)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, 11] = True
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "return_dict_in_generate": True}
    out = model.generate(prompt, memory_reset=reset, output_logits=True, **options)
    later = torch.zeros(2, out.sequences.shape[1] - 1, dtype=torch.bool)
    later[:, 11] = True
    expected = model(out.sequences[:, :-1], memory_reset=later).logits[:, 11:]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected.float())


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 3}, {"cache_implementation": "static"}, {"embedded": True}])
def test_where_the_prompt_empties_the_memory_is_the_same_for_every_way_to_read_it(tiny_model, options):
    model, prompt = tiny_model(), random_tokens(2, 12)
    options = {"output_logits": True, "return_dict_in_generate": True, **options}
    for place in (6, 11):
        reset = torch.zeros(2, 12, dtype=torch.bool)
        reset[:, place] = True
        expected = generate(model, prompt, memory_reset=reset, output_logits=True, return_dict_in_generate=True)
        given = dict(options)
        if given.pop("embedded", False):
            given["inputs_embeds"] = model.transformer.wte(prompt)
        out = generate(model, None if "inputs_embeds" in given else prompt, memory_reset=reset, **given)
        assert torch.equal(out.sequences[:, -NEW:], expected.sequences[:, -NEW:])
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits))


def test_a_reset_that_does_not_cover_the_prompt_is_refused(tiny_model):
    model, tokens = tiny_model(), prompt(2, 9)
    cache = model(tokens[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"memory_reset has shape \[2, 4\]; for this input it must be \[2, 9\]"):
        generate(model, tokens, past_key_values=cache, memory_reset=torch.zeros(2, 4, dtype=torch.bool))


def test_an_assistant_has_a_memory_of_its_own_or_none(tiny_model):
    model, tokens = tiny_model(), prompt(1, 5)
    state = model(random_tokens(1, WINDOW)).memory_state
    reset = torch.zeros(1, 5, dtype=torch.bool)
    reset[:, 2] = True
    for given in ({"memory_state": state}, {"memory_reset": reset}):
        expected = generate(model, tokens, **given)
        for assistant in (model, tiny_model(mem_slots=3), plain_gpt2(model)):
            longest = WINDOW - 5 if assistant.config.model_type == "gpt2" else NEW  # where plain GPT-2 ends
            found = generate(model, tokens, assistant_model=assistant, **given, max_new_tokens=longest)
            assert torch.equal(found, expected[:, : 5 + longest])


def test_continuous_batching_is_refused(tiny_model):
    with pytest.raises(ValueError, match="Continuous batching has no place for a memory: use generate"):
        tiny_model().generate_batch([[1, 2, 3]])
