"""Masks: custom 4D ones, with a memory that follows what each token sees, and documents packed into rows."""

import pytest
import torch
from test_modeling import assert_states_close, plain_gpt2, random_tokens
from torch import Tensor
from transformers import DataCollatorWithFlattening

every_addressing = pytest.mark.parametrize("addressing", ["lru", "dnc", "simplified"])

WINDOW = 8  # that of `tiny_config`


def mask_of_paths(paths: list[list[int]]) -> Tensor:
    """[1, 1, T, T] bool: each token sees those before it on the paths that it lies on, and itself."""
    tokens = 1 + max(max(path) for path in paths)
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for path in paths:
        for place, token in enumerate(path):
            visible[token, path[: place + 1]] = True
    return visible[None, None]


def depths(paths: list[list[int]]) -> Tensor:
    """[1, T]: the place of each token on its paths."""
    positions = torch.zeros(1 + max(max(path) for path in paths), dtype=torch.long)
    for path in paths:
        positions[path] = torch.arange(len(path))
    return positions[None]


# Paths from roots to leaves; a token on several of them is where they part.
TREES = {
    "two endings": [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7]],
    "many endings": [[0, 1, token] for token in range(2, 7)],
    "branches of branches": [[0, 1, 2], [0, 1, 3, 4], [0, 5, 6], [0, 5, 7]],
    "two documents in turn": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "beyond a window": [[*range(9), 9, 10], [*range(9), 11, 12, 13]],
}


@every_addressing
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("additive", [False, True])
def test_branches_give_what_each_path_gives_alone(tiny_model, addressing, tree, additive):
    model, mask = tiny_model(addressing=addressing), mask_of_paths(tree)
    tokens = random_tokens(2, mask.shape[-1])
    if additive:
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    out = model(tokens, attention_mask=mask, position_ids=depths(tree), use_cache=False)
    for path in tree:
        alone = model(tokens[:, path])
        torch.testing.assert_close(out.logits[:, path], alone.logits)
    assert_states_close(out.memory_state, alone.memory_state)  # the last path ends in the last token


@every_addressing
@pytest.mark.parametrize("length", [5, WINDOW, 21])
def test_causal_4d_mask_is_no_mask(tiny_model, addressing, length):
    model, tokens = tiny_model(addressing=addressing), random_tokens(3, length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    expected = model(tokens)
    for mask in (causal, causal.expand(3, 2, -1, -1)):
        out = model(tokens, attention_mask=mask)
        torch.testing.assert_close(out.logits, expected.logits)
        assert_states_close(out.memory_state, expected.memory_state)


@every_addressing
def test_4d_mask_with_padding_equals_the_2d_one(tiny_model, addressing):
    model, tokens = tiny_model(addressing=addressing), random_tokens(3, 13)
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[0, :5], mask[1, 9:], mask[2, 4] = 0, 0, 0
    real = mask.bool()
    visible = (real[:, :, None] & real[:, None] & torch.ones(13, 13, dtype=torch.bool).tril())[:, None]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = model(tokens, attention_mask=mask)
    out = model(tokens, attention_mask=visible, position_ids=positions)
    torch.testing.assert_close(out.logits[real], expected.logits[real])
    assert_states_close(out.memory_state, expected.memory_state)


@every_addressing
def test_block_diagonal_mask_starts_each_document_with_an_empty_memory(tiny_model, addressing):
    model, tokens = tiny_model(addressing=addressing), random_tokens(2, 20)
    documents = [list(range(3)), list(range(3, 14)), list(range(14, 20))]
    out = model(tokens, attention_mask=mask_of_paths(documents), position_ids=depths(documents))
    for document in documents:
        torch.testing.assert_close(out.logits[:, document], model(tokens[:, document]).logits)


def test_attention_under_a_custom_mask_is_that_of_gpt2(tiny_model):
    model, tree = tiny_model(), TREES["branches of branches"]
    mask, tokens = mask_of_paths(tree), random_tokens(2, 8)
    bias = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    expected = plain_gpt2(model)(tokens, attention_mask=bias, position_ids=depths(tree)).logits
    out = model(tokens, attention_mask=mask, position_ids=depths(tree), output_base_logits=True)
    torch.testing.assert_close(out.base_logits, expected)


@every_addressing
@pytest.mark.parametrize("prefix", [3, 6, WINDOW])
def test_branches_go_on_from_a_cache(tiny_model, addressing, prefix):
    model = tiny_model(addressing=addressing)
    tree = [[*range(prefix), *(prefix + token for token in path)] for path in ([0, 1, 2], [0, 3])]
    mask, tokens = mask_of_paths(tree), random_tokens(2, prefix + 4)
    expected = model(tokens, attention_mask=mask, position_ids=depths(tree), use_cache=False)
    cache = model(tokens[:, :prefix], use_cache=True).past_key_values
    given = {"attention_mask": mask[:, :, prefix:], "position_ids": depths(tree)[:, prefix:]}
    cache.activate_past_recording()
    out = model(tokens[:, prefix:], past_key_values=cache, **given)
    torch.testing.assert_close(out.logits, expected.logits[:, prefix:])
    assert_states_close(cache.memory_state, expected.memory_state)
    following = random_tokens(2, 3)

    def continued(path: list[int]) -> None:
        whole = model(torch.cat([tokens[:, path], following], 1)).logits[:, len(path) :]
        torch.testing.assert_close(model(following, past_key_values=cache).logits, whole)
        cache.crop(-3)

    continued(tree[1])  # where the last token is
    cache = model(tokens[:, :prefix], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(tokens[:, prefix:], past_key_values=cache, **given)
    cache.crop(-1)
    continued(tree[0])  # where the last token is now


def test_gradient_of_a_leaf_is_that_of_its_path(tiny_model):
    model, tree = tiny_model(), TREES["two endings"]
    embeds = model.transformer.wte(random_tokens(2, 8)).detach().requires_grad_()
    gradients = []
    for path in tree:
        out = model(inputs_embeds=embeds, attention_mask=mask_of_paths(tree), position_ids=depths(tree))
        (whole,) = torch.autograd.grad(out.logits[:, path[-1]].square().sum(), embeds)
        out = model(inputs_embeds=embeds[:, path])
        (alone,) = torch.autograd.grad(out.logits[:, -1].square().sum(), embeds)
        torch.testing.assert_close(whole, alone)
        gradients.append(whole)
    assert not torch.allclose(*gradients)


def test_token_that_continues_from_inside_an_earlier_call_is_refused(tiny_model):
    model, tokens = tiny_model(), random_tokens(1, 5)
    cache = model(tokens[:, :4], use_cache=True).past_key_values
    mask = torch.tensor([[[[1, 1, 1, 0, 1]]]])
    with pytest.raises(ValueError, match="continue from inside an earlier call"):
        model(tokens[:, 4:], attention_mask=mask, past_key_values=cache)


def test_custom_mask_goes_on_only_from_rows_that_are_alike(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 6)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    cache = model(tokens[:, :5], attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="rows have seen as many tokens"):
        model(tokens[:, 5:], attention_mask=torch.ones(2, 1, 1, 6, dtype=torch.bool), past_key_values=cache)


@every_addressing
def test_flattened_batch_of_the_collator_is_its_documents(tiny_model, addressing):
    model = tiny_model(addressing=addressing)
    documents = [random_tokens(1, length) for length in (3, 11, 1, 8)]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": x[0].tolist()} for x in documents])
    out = model(**batch)
    separate = [model(x) for x in documents]
    torch.testing.assert_close(out.logits, torch.cat([x.logits for x in separate], 1))
    assert_states_close(out.memory_state, separate[-1].memory_state)
    scored = [model(x, labels=x).loss * (x.shape[1] - 1) for x in documents if x.shape[1] > 1]
    torch.testing.assert_close(out.loss, sum(scored) / sum(x.shape[1] - 1 for x in documents))


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4], ids=str)
def test_whatever_additive_value_hides_a_token_hides_it_from_the_memory_too(tiny_model, hidden):
    model, tokens, documents = tiny_model(), random_tokens(2, 8), [[0, 1, 2, 3], [4, 5, 6, 7]]
    mask = mask_of_paths(documents)
    additive = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, hidden)
    out = model(tokens, attention_mask=additive, position_ids=depths(documents))
    for document in documents:
        torch.testing.assert_close(out.logits[:, document], model(tokens[:, document]).logits)


def test_a_row_that_gets_padding_alone_under_a_custom_mask_keeps_its_window(tiny_model):
    model, before, new, last = tiny_model(), random_tokens(2, 4), random_tokens(2, 2), random_tokens(2, 1)
    cache = model(before, use_cache=True).past_key_values
    visible = torch.zeros(2, 1, 2, 6, dtype=torch.bool)
    visible[0] = torch.ones(2, 6, dtype=torch.bool).tril(4)
    model(new, attention_mask=visible, past_key_values=cache)
    out = model(last, past_key_values=cache)
    for row, text in ((0, [before[:1], new[:1], last[:1]]), (1, [before[1:], last[1:]])):
        torch.testing.assert_close(out.logits[row, -1], model(torch.cat(text, dim=1)).logits[0, -1])
