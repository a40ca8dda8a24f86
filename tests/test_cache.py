"""The caches: what they hold, tokens taken back, rows chosen, tensors that stay where they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_modeling import assert_states_close, assert_states_equal, random_tokens
from torch import Tensor

from cache_dnc_gpt2 import DNCGPT2Cache, DNCGPT2StaticCache
from dnc_gpt2 import DNCGPT2LMHeadModel

WINDOW = 8  # that of `tiny_config`

EQUAL, LEFT, HOLES = "no padding", "left padding", "holes"


def padded(kind: str, tokens: int) -> Tensor:
    """A mask [3, tokens] of this kind."""
    mask = torch.ones(3, tokens, dtype=torch.long)
    if kind == LEFT:
        mask[1, : tokens // 3], mask[2, : tokens // 2] = 0, 0
    if kind == HOLES:
        mask[:, 1::3], mask[1, 2::4] = 0, 0
    return mask


def fill(model: DNCGPT2LMHeadModel, cache, tokens: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """Feed the tokens in chunks of these sizes; the logits."""
    logits, start = [], cache.get_seq_length()
    for size in sizes:
        stop = start + size
        out = model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, 1)


def every_cache(model: DNCGPT2LMHeadModel) -> list[DNCGPT2Cache | DNCGPT2StaticCache]:
    return [DNCGPT2Cache(model.config), DNCGPT2StaticCache(model.config, max_cache_len=100)]


@pytest.mark.parametrize("kind", [EQUAL, LEFT, HOLES])
@pytest.mark.parametrize("sizes", [[1] * 29, [5, 1, 1, 12, 10], [20] + [1] * 9, [7, 1, 8, 8, 5]], ids=str)
def test_both_caches_give_what_one_pass_gives(tiny_model, memory, kind, sizes):
    model, tokens, mask = tiny_model(**memory), random_tokens(3, 29), padded(kind, 29)
    whole = model(tokens, attention_mask=mask)
    for cache in every_cache(model):
        logits = fill(model, cache, tokens, mask, sizes)
        torch.testing.assert_close(logits[mask.bool()], whole.logits[mask.bool()])
        assert_states_close(cache.memory_state, whole.memory_state)
        assert cache.get_seq_length() == 29 and len(cache) == model.config.num_hidden_layers


def test_rows_that_are_alike_take_a_shorter_way_to_the_same_numbers(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(3, 29)
    short, long = DNCGPT2Cache(model.config), DNCGPT2Cache(model.config)
    start = 0
    for size in (3, 1, 1, 1, 1, 1, 1, 13, 1, 1, 5):
        chunk = tokens[:, start : start + size]
        expected = model(chunk, past_key_values=long).logits
        long.set_rows(long.rows)  # spelled out: nothing tells any more that rows are alike
        torch.testing.assert_close(model(chunk, past_key_values=short).logits, expected, rtol=1e-12, atol=1e-12)
        assert short.position == start + size - 1 and long.position is None
        assert_states_close(short.memory_state, long.memory_state, rtol=1e-12, atol=1e-12)
        start += size


@pytest.mark.parametrize("positions", [True, False])
def test_spelled_out_inputs_take_the_shorter_way_too(tiny_model, positions):
    model, tokens = tiny_model(), random_tokens(3, 29)
    cache = DNCGPT2Cache(model.config)
    for t in range(29):
        given = {"position_ids": torch.full((3, 1), t)} if positions else {"attention_mask": torch.ones(3, t + 1)}
        model(tokens[:, t : t + 1], past_key_values=cache, **given)
        assert cache.position == t


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_of_the_first_window_has_columns_as_in_gpt2(tiny_model, padding):
    model, tokens = tiny_model(n_positions=32), random_tokens(1, 13)
    mask = F.pad(torch.ones(1, 10, dtype=torch.long), (3, 0) if padding == "left" else (0, 3))
    tokens = tokens if padding == "left" else tokens.roll(-3, 1)
    out = model(tokens, attention_mask=mask, use_cache=True)
    assert out.past_key_values.layers[0].keys.shape[2] == 13
    tokens = tokens[mask.bool()][None]
    following = random_tokens(1, 1)
    expected = model(torch.cat([tokens, following], 1)).logits[:, -1:]
    torch.testing.assert_close(model(following, past_key_values=out.past_key_values).logits, expected)
    assert out.past_key_values.layers[0].keys.shape[2] == 14


@pytest.mark.parametrize("kind", [EQUAL, LEFT, HOLES])
@pytest.mark.parametrize(
    "sizes, removed", [([29], 13), ([20, 9], 4), ([20, 9], 9), ([13] + [1] * 16, 9), ([13, 1, 1, 14], 15), ([8, 21], 5)]
)
def test_crop_goes_back_to_before_the_last_tokens(tiny_model, memory, kind, sizes, removed):
    model, tokens, mask = tiny_model(**memory), random_tokens(3, 29), padded(kind, 29)
    cache = DNCGPT2Cache(model.config)
    cache.activate_past_recording()
    fill(model, cache, tokens, mask, sizes)
    cache.crop(-removed)
    kept = 29 - removed
    assert cache.get_seq_length() == kept and len(cache) == model.config.num_hidden_layers
    assert_states_close(cache.memory_state, model(tokens[:, :kept], attention_mask=mask[:, :kept]).memory_state)

    others = torch.cat([tokens[:, :kept], random_tokens(3, 12)], 1)
    mask = torch.cat([mask[:, :kept], torch.ones(3, 12, dtype=torch.long)], 1)
    expected = model(others, attention_mask=mask).logits[:, kept:]
    torch.testing.assert_close(fill(model, cache, others, mask, [1, 2, 1, 8]), expected)


def test_crop_of_whole_calls_restores_their_state_bit_for_bit(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 20)
    cache = DNCGPT2Cache(model.config)
    cache.activate_past_recording()
    model(tokens[:, :10], past_key_values=cache)
    state = cache.memory_state.map(torch.clone)
    keys = cache.layers[0].keys.clone()
    for t in range(10, 20):
        model(tokens[:, t : t + 1], past_key_values=cache)
    cache.crop(-10)
    assert_states_equal(cache.memory_state, state)
    assert torch.equal(cache.layers[0].keys, keys)


def test_crop_of_everything_leaves_an_empty_cache(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 13)
    cache = DNCGPT2Cache(model.config)
    cache.activate_past_recording()
    model(tokens, past_key_values=cache)
    cache.crop(-13)
    assert cache.get_seq_length() == 0 and cache.memory_state is None
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_crop_forgets_what_was_recorded(tiny_model):
    model = tiny_model()
    cache = DNCGPT2Cache(model.config)
    cache.activate_past_recording()
    model(random_tokens(2, 5), past_key_values=cache)
    cache.crop(0)
    model(random_tokens(2, 2), past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop\(-3\) goes back behind the 2 tokens"):
        cache.crop(-3)
    assert cache.get_seq_length() == 7


def test_crop_needs_a_recorded_past(tiny_model):
    cache = tiny_model()(random_tokens(2, 5), use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="pass minus their number"):
        cache.crop(1)


def test_static_cache_records_no_past(tiny_model):
    cache = DNCGPT2StaticCache(tiny_model().config, max_cache_len=20)
    with pytest.raises(ValueError, match="static cache records no past"):
        cache.activate_past_recording()


@pytest.mark.parametrize("kind", [EQUAL, LEFT])
def test_both_caches_reorder_repeat_and_select_rows_with_their_memory(tiny_model, memory, kind):
    model, tokens, mask = tiny_model(**memory), random_tokens(3, 13), padded(kind, 13)
    following = random_tokens(6, 3)
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 2]), [2, 0, 2]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([1]), [1]),
    }
    for name, (argument, rows) in changes.items():
        new, ones = following[: len(rows)], torch.ones(len(rows), 3, dtype=torch.long)
        inputs, whole_mask = torch.cat([tokens[rows], new], 1), torch.cat([mask[rows], ones], 1)
        expected = model(inputs, attention_mask=whole_mask).logits[:, 13:]
        for cache in every_cache(model):
            fill(model, cache, tokens, mask, [12, 1])
            getattr(cache, name)(argument)
            actual = [
                model(new[:, t : t + 1], attention_mask=whole_mask[:, : 14 + t], past_key_values=cache).logits
                for t in range(3)
            ]
            torch.testing.assert_close(torch.cat(actual, 1), expected)


def test_reset_caches_start_anew(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 13)
    for cache in every_cache(model):
        model(random_tokens(2, 11), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        logits = fill(model, cache, tokens, torch.ones_like(tokens), [10, 1, 1, 1])
        torch.testing.assert_close(logits, model(tokens).logits)


def test_layers_are_offloaded_and_fetched_with_their_memory(tiny_model):
    model = tiny_model()
    cache = model(random_tokens(2, 5), use_cache=True).past_key_values
    first, last = cache.layers
    before = last.memory_state
    for layer in (first, last):
        layer.offload()
        layer.prefetch()
    assert_states_equal(last.memory_state, before)
    assert first.memory_state is None
    last.device = torch.device("meta")  # as if it had come from there
    last.prefetch()
    assert last.keys.is_meta and all(x is None or x.is_meta for x in last.memory_state)


def test_static_cache_never_moves(tiny_model, memory):
    model, tokens, mask = tiny_model(**memory), random_tokens(3, 40), padded(LEFT, 40)
    cache = DNCGPT2StaticCache(model.config, max_cache_len=40)

    def addresses() -> list[int]:
        held = [x for layer in cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)]
        held += [*cache.rows[:2], *(x for x in cache.memory_state if x is not None)]
        return [x.data_ptr() for x in held]

    fill(model, cache, tokens, mask, [10])
    first = addresses()
    assert all(layer.keys.shape[2] == WINDOW for layer in cache.layers)
    fill(model, cache, tokens, mask, [1, 1, 9, 1, 1])
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    fill(model, cache, tokens, mask, [1, 8, 7])
    cache.reset()
    fill(model, cache, tokens, mask, [12])
    assert addresses() == first


def test_static_cache_has_no_more_columns_than_asked_for(tiny_model):
    model = tiny_model()
    cache = DNCGPT2StaticCache(model.config, max_cache_len=5)
    model(random_tokens(2, 4), past_key_values=cache)
    assert all(layer.keys.shape[2] == layer.get_max_length() == 5 for layer in cache.layers)


@pytest.mark.parametrize("kind", [EQUAL, LEFT])
@pytest.mark.parametrize("sizes", [[11] + [1] * 9, [6, 7, 7]], ids=str)
def test_attentions_of_cached_passes_stand_at_the_places_of_the_tokens(tiny_model, kind, sizes):
    model, tokens, mask = tiny_model(), random_tokens(3, 20), padded(kind, 20)
    model.set_attn_implementation("eager")
    whole = model(tokens, attention_mask=mask, output_attentions=True).attentions
    cache, start = DNCGPT2Cache(model.config), 0
    for size in sizes:
        stop = start + size
        out = model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, output_attentions=True)
        for ours, expected in zip(out.attentions, whole, strict=True):
            real = mask[:, start:stop].bool()
            assert ours.shape == (3, model.config.n_head, size, stop)
            ours, expected = ours.transpose(1, 2)[real], expected[:, :, start:stop, :stop].transpose(1, 2)[real]
            torch.testing.assert_close(ours, expected)
        start = stop


@pytest.mark.parametrize(
    "kind", [DNCGPT2Cache, lambda config: DNCGPT2StaticCache(config, 16)], ids=["dynamic", "static"]
)
@pytest.mark.parametrize(
    "places", [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 4, 6, 7, 8], [10, 11, 12, 13], [7, 9, 10]], ids=str
)
def test_positions_that_begin_or_jump_inside_a_window_go_on_token_by_token(tiny_model, kind, places):
    model, tokens, positions = tiny_model(), random_tokens(2, len(places)), torch.tensor([places])
    cache, expected = kind(model.config), model(tokens, position_ids=positions)
    for t in range(len(places)):
        out = model(tokens[:, t : t + 1], position_ids=positions[:, t : t + 1], past_key_values=cache)
        torch.testing.assert_close(out.logits[:, 0], expected.logits[:, t])
    assert_states_close(out.memory_state, expected.memory_state)


@torch.no_grad()
def test_taking_tokens_back_in_a_copy_leaves_the_original_as_it_is(tiny_model):
    model = tiny_model()
    cache = DNCGPT2Cache(model.config)
    cache.activate_past_recording()
    model(random_tokens(1, 6), past_key_values=cache)
    with pytest.raises(ValueError, match="goes back behind the 0 tokens"):
        copy.deepcopy(cache).crop(-2)
    assert cache.get_seq_length() == 6
    cache.crop(-2)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize(
    "mask", [None, torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])], ids=["alike", "padded"]
)
def test_a_static_cache_without_room_for_a_window_is_refused(tiny_model, mask):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"cache of 4 tokens has no room for the 6 .*max_cache_len=8"):
        model(random_tokens(2, 6), attention_mask=mask, past_key_values=DNCGPT2StaticCache(model.config, 4))


def test_a_static_cache_that_is_full_inside_a_window_is_refused(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 5)
    cache = DNCGPT2StaticCache(model.config, 4)
    model(tokens[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match=r"cache of 4 tokens has no room for the 5 .*max_cache_len=8"):
        model(tokens[:, 4:], past_key_values=cache)


def test_a_static_cache_keeps_its_batch_size_when_it_is_emptied(tiny_model):
    model = tiny_model()
    cache = DNCGPT2StaticCache(model.config, 8)
    model(random_tokens(3, 4), past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match="batch size 3, the input of 2"):
        model(random_tokens(2, 4), past_key_values=cache)
