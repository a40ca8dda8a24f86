"""The model: GPT-2's backbone in windows, the memory across them, and the rules of what goes in and comes out."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderModel, GPT2Config, GPT2LMHeadModel

from dnc_gpt2 import DNCGPT2Config, DNCGPT2LMHeadModel, MemoryState
from modeling_dnc_gpt2 import DNCGPT2Cache, DNCGPT2ModelOutput

ADDRESSINGS = ["lru", "dnc", "simplified"]

WINDOW, VOCABULARY = 8, 67  # those of `tiny_config`


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length))


def assert_states_close(actual: MemoryState, expected: MemoryState, **tolerance: float) -> None:
    for name, a, b in zip(MemoryState._fields, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_states_equal(actual: MemoryState, expected: MemoryState) -> None:
    assert_states_close(actual, expected, rtol=0, atol=0)


def plain_gpt2(model: DNCGPT2LMHeadModel) -> GPT2LMHeadModel:
    """A stock GPT-2 with the backbone weights of `model`."""
    names = [name for name in GPT2Config().to_dict() if name not in ("model_type", "architectures", "dtype")]
    gpt2 = GPT2LMHeadModel(GPT2Config(**{name: getattr(model.config, name) for name in names})).to(model.dtype)
    missing, _ = gpt2.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    gpt2.set_attn_implementation(model.config._attn_implementation)
    return gpt2.eval()


def silent(model: DNCGPT2LMHeadModel) -> DNCGPT2LMHeadModel:
    """The model with a read projection of zero."""
    with torch.no_grad():
        for parameter in model.transformer.memory.read_projection.parameters():
            parameter.zero_()
    return model


def what_the_memory_sees(model: DNCGPT2LMHeadModel, out: DNCGPT2ModelOutput) -> Tensor:
    """Its input [B, T, H], from an output with all hidden states and the one without any read."""
    if not model.transformer.mid_stack:
        return out.base_hidden_state
    return model.transformer.ln_f(out.hidden_states[model.config.blocks_below_memory])


def run_in_chunks(model: DNCGPT2LMHeadModel, tokens: Tensor, sizes: list[int], mask: Tensor | None = None, **options):
    """Feed [B, T] in chunks of these sizes through a cache. Returns the logits and the last output."""
    cache, logits, start = None, [], 0
    for size in sizes:
        stop = start + size
        chunk = {name: value[:, start:stop] for name, value in options.items()}
        out = model(
            tokens[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
            **chunk,
        )
        cache, start = out.past_key_values, stop
        logits.append(out.logits)
    assert start == tokens.shape[1]
    return torch.cat(logits, 1), out


def test_backbone_parameters_are_named_as_in_gpt2(tiny_config, memory):
    config = tiny_config(**memory)
    ours = {name: value.shape for name, value in DNCGPT2LMHeadModel(config).state_dict().items()}
    stock = {name: value.shape for name, value in plain_gpt2(DNCGPT2LMHeadModel(config)).state_dict().items()}
    assert {name: shape for name, shape in ours.items() if not name.startswith("transformer.memory.")} == stock


@pytest.fixture
def gpt2_folder(tiny_config, tmp_path):
    """A plain GPT-2 and the folder that it was saved to."""
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "bos_token_id", "eos_token_id")
    model = GPT2LMHeadModel(GPT2Config(**{name: getattr(tiny_config(), name) for name in names})).eval()
    model.save_pretrained(tmp_path / "gpt2")
    return model, str(tmp_path / "gpt2")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_layer": 1},
        {"addressing": "lru", "mem_slots": 5, "mem_width": 6, "address_width": 2, "num_reads": 1},
        {"addressing": "dnc", "mem_slots": 5, "mem_width": 6, "temporal_links": False, "masked_content": True},
        {"addressing": "dnc", "sharpen_links": True},
        {"addressing": "simplified", "mem_slots": 7},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()) or "defaults",
)
def test_plain_gpt2_checkpoint_keeps_its_logits_under_a_new_silent_memory(gpt2_folder, options):
    gpt2, folder = gpt2_folder
    model, loading = DNCGPT2LMHeadModel.from_pretrained(folder, **options, scan="eager", output_loading_info=True)
    model.eval()
    assert {name: getattr(model.config, name) for name in options} == options
    memory = model.transformer.memory
    new = {f"transformer.memory.{name}" for name in memory.state_dict()}
    assert set(loading["missing_keys"]) == new and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert not any(parameter.any() for parameter in memory.read_projection.parameters())
    assert all(weight.any() for name, weight in memory.named_parameters() if name.endswith("_key.weight"))

    tokens = random_tokens(3, WINDOW)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, gpt2(tokens).logits)
        for positions in ([0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [0, 2, 3, 6, 7]):
            given = {"input_ids": tokens[:, :5], "position_ids": torch.tensor([positions])}
            mask = torch.ones_like(given["input_ids"])  # keeps GPT-2 from taking a gap for packed sequences
            expected = gpt2(**given, attention_mask=mask).logits
            assert torch.equal(model(**given).logits, expected)


def test_plain_gpt2_checkpoint_keeps_its_logits_on_a_left_padded_batch(gpt2_folder):
    gpt2, folder = gpt2_folder
    model = DNCGPT2LMHeadModel.from_pretrained(folder, scan="eager").eval()
    tokens, mask = random_tokens(3, WINDOW), torch.ones(3, WINDOW, dtype=torch.long)
    mask[1, :3], mask[2, :6] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = gpt2(tokens, attention_mask=mask, position_ids=positions).logits
        for given in ({"position_ids": positions}, {}):
            actual = model(tokens, attention_mask=mask, **given).logits
            torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])


def test_residual_projections_start_scaled_by_depth_as_in_gpt2(tiny_config):
    model = DNCGPT2LMHeadModel(tiny_config(n_layer=8, n_embd=64))
    std = model.config.initializer_range
    for block in model.transformer.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            assert projection.weight.std().item() == pytest.approx(std / (2 * 8) ** 0.5, rel=0.1)
        assert block.attn.c_attn.weight.std().item() == pytest.approx(std, rel=0.1)


def test_read_heads_with_distinct_starts_differ_after_training(tiny_config):
    model = DNCGPT2LMHeadModel(tiny_config(num_reads=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = random_tokens(2, 2 * WINDOW)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    keys = model.transformer.memory.read_key.weight.unflatten(0, (3, -1))
    read_weights = model(tokens, output_memory=True).read_weights[:, WINDOW:]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(keys[one], keys[other], atol=1e-6)
        assert not torch.allclose(read_weights[:, :, one], read_weights[:, :, other], atol=1e-3)


@pytest.fixture
def no_pickle(monkeypatch):
    """A function after whose call nothing can be unpickled."""

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    def forbid() -> None:
        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
            monkeypatch.setattr(module, name, refuse)

    return forbid


@pytest.mark.parametrize(
    "options",
    [*({"addressing": addressing} for addressing in ADDRESSINGS), {"addressing": "dnc", "sharpen_links": True}],
    ids=[*ADDRESSINGS, "dnc-sharpen-links"],
)
@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
def test_saved_model_loads_equal_and_nothing_is_pickled(tiny_model, tmp_path, no_pickle, options, shard_size):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    names = [path.name for path in Path(tmp_path).iterdir()]
    assert sum(name.endswith(".safetensors") for name in names) >= (1 if shard_size == "1GB" else 2)
    assert all(name.endswith((".safetensors", ".json", ".py")) for name in names)

    no_pickle()
    loaded, loading = DNCGPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    tokens = random_tokens(2, 20)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_pickled_weights_are_not_loaded(tiny_model, tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        DNCGPT2LMHeadModel.from_pretrained(tmp_path)


def test_embeddings_stay_tied_through_resizing_and_saving(tiny_model, tmp_path):
    model = tiny_model()

    def tied(model) -> bool:
        return model.lm_head.weight is model.transformer.wte.weight

    assert tied(model)
    model.resize_token_embeddings(VOCABULARY + 5)
    assert tied(model) and model.config.vocab_size == VOCABULARY + 5
    tokens = torch.tensor([[VOCABULARY + 4, 1, VOCABULARY]])
    out = model(tokens, labels=tokens)
    assert out.logits.shape == (1, 3, VOCABULARY + 5) and out.loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = DNCGPT2LMHeadModel.from_pretrained(tmp_path)
    assert tied(loaded) and torch.equal(loaded(tokens).logits, out.logits)


def test_untied_embeddings_are_an_option(tiny_config, tmp_path):
    model = DNCGPT2LMHeadModel(tiny_config(tie_word_embeddings=False)).eval()
    assert model.lm_head.weight is not model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    loaded = DNCGPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)


def test_loss_is_cross_entropy_alone(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 20)
    out = model(tokens, labels=tokens)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)
    assert model(tokens).loss is None


def test_labels_of_minus_100_are_ignored(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 20)
    labels = tokens.clone()
    labels[0, 3:9], labels[1, :15] = -100, -100
    out = model(tokens, labels=labels)
    scored = labels[:, 1:] != -100
    expected = F.cross_entropy(out.logits[:, :-1][scored], tokens[:, 1:][scored])
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)


def test_shift_labels_are_the_targets_of_their_own_tokens(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 21)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    out = model(inputs, shift_labels=targets)
    expected = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(model(inputs, labels=torch.zeros_like(inputs), shift_labels=targets).loss, out.loss)


@pytest.mark.parametrize("make", [int, torch.tensor], ids=["int", "tensor"])
def test_loss_is_the_sum_divided_by_num_items_in_batch(tiny_model, make):
    model, tokens = tiny_model(), random_tokens(2, 20)
    mean = model(tokens, labels=tokens).loss
    out = model(tokens, labels=tokens, num_items_in_batch=make(100))
    torch.testing.assert_close(out.loss, mean * (2 * 19 / 100))


def test_base_logits_are_those_of_the_backbone_without_any_read(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 20)
    out = model(tokens, output_base_logits=True)
    assert not torch.allclose(out.logits, out.base_logits)
    assert model(tokens).base_logits is None
    torch.testing.assert_close(silent(model)(tokens).logits, out.base_logits, rtol=0, atol=0)


def test_base_logits_share_the_dropout_of_the_logits(tiny_config, memory):
    model = DNCGPT2LMHeadModel(tiny_config(**memory, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    model = silent(model).train()
    out = model(random_tokens(2, 20), output_base_logits=True)
    torch.testing.assert_close(out.logits, out.base_logits)


def test_logits_to_keep_gives_the_last_or_the_chosen_tokens(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 20)
    whole = model(tokens, output_base_logits=True)
    for keep, places in ((1, [19]), (3, [17, 18, 19]), (torch.tensor([2, 11]), [2, 11])):
        out = model(tokens, logits_to_keep=keep, output_base_logits=True)
        torch.testing.assert_close(out.logits, whole.logits[:, places])
        torch.testing.assert_close(out.base_logits, whole.base_logits[:, places])
        assert_states_equal(out.memory_state, whole.memory_state)


def test_embeddings_given_as_inputs_equal_token_ids(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 20)
    out = model(inputs_embeds=model.transformer.wte(tokens))
    assert torch.equal(out.logits, model(tokens).logits)


def test_outputs_can_be_a_tuple(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 5)
    loss, logits, *_ = model(tokens, labels=tokens, return_dict=False)
    out = model(tokens, labels=tokens)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)


def test_output_memory_gives_gates_and_weights(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 20)
    out = model(tokens, output_memory=True)
    slots, heads = model.config.mem_slots, model.config.num_reads
    assert out.write_gates.shape == (2, 20)
    assert out.write_weights.shape == (2, 20, slots)
    assert out.read_weights.shape == (2, 20, heads, slots)
    for x in (out.write_gates, out.write_weights, out.read_weights):
        assert (x >= 0).all() and (x <= 1).all()
    assert out.read_strengths.shape == (2, 20, heads)
    assert (out.read_strengths >= (0 if memory.get("addressing") == "simplified" else 1)).all()
    assert torch.equal(out.write_weights[:, -1], out.memory_state.write_weights)
    assert torch.equal(out.read_weights[:, -1], out.memory_state.read_weights)
    silent_out = model(tokens)
    for name in ("write_gates", "write_weights", "read_weights", "read_strengths"):
        assert getattr(silent_out, name) is None


@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_one_window_is_exactly_gpt2_plus_a_memory_on_top(tiny_model, addressing):
    model, tokens = tiny_model(addressing=addressing, memory_layer=2), random_tokens(3, WINDOW)
    expected = plain_gpt2(model).transformer(tokens, output_hidden_states=True)
    out = model.transformer(tokens, output_hidden_states=True, output_base_hidden_state=True)
    assert torch.equal(out.base_hidden_state, expected.last_hidden_state)
    for ours, stock in zip(out.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        assert torch.equal(ours, stock)
    memory = model.transformer.memory(expected.last_hidden_state, model.transformer.wte(tokens))
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state + memory.hidden_states)


def test_two_windows_are_gpt2_on_folded_rows(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(3, 2 * WINDOW)
    folded = plain_gpt2(model)(tokens.view(-1, WINDOW)).logits
    actual = model(tokens, output_base_logits=True).base_logits
    torch.testing.assert_close(actual, folded.view(3, 2 * WINDOW, -1))


def test_token_types_are_embedded_as_in_gpt2(tiny_model):
    model, tokens, types = tiny_model(), random_tokens(2, 2 * WINDOW), random_tokens(2, 2 * WINDOW)
    folded = plain_gpt2(model)(tokens.view(-1, WINDOW), token_type_ids=types.view(-1, WINDOW)).logits
    actual = model(tokens, token_type_ids=types, output_base_logits=True).base_logits
    torch.testing.assert_close(actual, folded.view(2, 2 * WINDOW, -1))


@pytest.mark.parametrize("cuts", [[8, 8, 8, 5], [16, 13], [8, 21]], ids=str)
def test_document_in_pieces_cut_at_window_boundaries_gives_what_one_pass_gives(tiny_model, memory, cuts):
    model, tokens = tiny_model(**memory), random_tokens(3, 29)
    whole = model(tokens)
    state, logits = None, []
    for piece in tokens.split(cuts, dim=1):
        out = model(piece, memory_state=state)
        state = out.memory_state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits)
    assert_states_close(state, whole.memory_state)


def test_piece_with_its_true_positions_goes_on_with_the_document(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 29)
    whole = model(tokens)
    state = model(tokens[:, :16]).memory_state
    out = model(tokens[:, 16:], memory_state=state, position_ids=torch.arange(16, 29)[None])
    torch.testing.assert_close(out.logits, whole.logits[:, 16:])


def test_saved_state_goes_on_with_the_document(tiny_model, tmp_path):
    model, tokens = tiny_model(addressing="dnc"), random_tokens(2, 16)
    whole = model(tokens)
    model(tokens[:, :8]).memory_state.save(tmp_path / "state.safetensors")
    state = MemoryState.load(tmp_path / "state.safetensors")
    torch.testing.assert_close(model(tokens[:, 8:], memory_state=state).logits, whole.logits[:, 8:])


def test_memory_reaches_beyond_the_attention_window(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(1, 3 * WINDOW)
    other = tokens.clone()
    other[0, 2] = tokens[0, 2] % (VOCABULARY - 1) + 1
    one, two = (model(x, output_base_logits=True) for x in (tokens, other))
    assert torch.equal(one.base_logits[:, WINDOW:], two.base_logits[:, WINDOW:])
    assert (one.logits[:, 2 * WINDOW :] - two.logits[:, 2 * WINDOW :]).abs().amax() > 1e-9


def test_inputs_far_longer_than_the_window_work(tiny_model, memory):
    out = tiny_model(**memory)(random_tokens(1, 12 * WINDOW + 3))
    assert out.logits.shape == (1, 12 * WINDOW + 3, VOCABULARY) and out.logits.isfinite().all()


def test_later_tokens_change_no_earlier_logits(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 20)
    other = tokens.clone()
    other[:, 11:] = random_tokens(2, 9)
    assert torch.equal(model(tokens).logits[:, :11], model(other).logits[:, :11])


@pytest.mark.parametrize("left, right", [(3, 0), (0, 3), (11, 0), (0, 11), (5, 6)])
def test_padding_changes_neither_the_state_nor_the_logits_of_real_tokens(tiny_model, memory, left, right):
    model, tokens = tiny_model(**memory), random_tokens(3, 29)
    expected = model(tokens)
    padded = torch.cat([random_tokens(3, left), tokens, random_tokens(3, right)], 1)
    mask = F.pad(torch.ones_like(tokens), (left, right))
    out = model(padded, attention_mask=mask)
    torch.testing.assert_close(out.logits[:, left : left + 29], expected.logits, rtol=1e-10, atol=1e-12)
    assert_states_close(out.memory_state, expected.memory_state, rtol=1e-10, atol=1e-12)
    others = torch.where(mask.bool(), padded, random_tokens(*padded.shape))
    again = model(others, attention_mask=mask)
    assert torch.equal(again.logits[:, left : left + 29], out.logits[:, left : left + 29])
    assert_states_equal(again.memory_state, out.memory_state)


def test_padding_alone_leaves_the_state_bit_equal(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 13)
    before = model(tokens, use_cache=True)
    blank = torch.zeros(2, 5, dtype=torch.long)
    after = model(random_tokens(2, 5), attention_mask=blank, memory_state=before.memory_state)
    assert_states_equal(after.memory_state, before.memory_state)
    state = before.memory_state.map(torch.clone)
    cached = model(random_tokens(2, 5), attention_mask=F.pad(blank, (13, 0)), past_key_values=before.past_key_values)
    assert_states_equal(cached.memory_state, state)


def test_holes_in_a_row_count_for_nothing(tiny_model, memory):
    model = tiny_model(**memory)
    tokens, mask = random_tokens(4, 31), torch.rand(4, 31) > 0.4
    mask[3] = False
    mask[3, 17] = True
    together = model(tokens, attention_mask=mask.long())
    chunked, last = run_in_chunks(model, tokens, [3, 1, 1, 9, 4, 1, 12], mask.long())
    for row in range(4):
        alone = model(tokens[row, mask[row]][None])
        for logits, out in ((together.logits, together), (chunked, last)):
            torch.testing.assert_close(logits[row, mask[row]], alone.logits[0])
            assert_states_close(out.memory_state.index_select(torch.tensor([row])), alone.memory_state)


def test_row_does_not_depend_on_its_neighbours(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(3, 20)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    other_tokens, other_mask = random_tokens(3, 20), torch.ones_like(tokens)
    other_mask[1:, :9], other_mask[2] = 0, 0
    other_tokens[0], other_mask[0] = tokens[0], mask[0]
    one, two = (model(x, attention_mask=m, output_memory=True) for x, m in ((tokens, mask), (other_tokens, other_mask)))
    assert torch.equal(one.logits[0], two.logits[0])
    assert torch.equal(one.write_weights[0], two.write_weights[0])
    first = torch.tensor([0])
    assert_states_equal(one.memory_state.index_select(first), two.memory_state.index_select(first))
    alone = model(tokens[:1], attention_mask=mask[:1])
    torch.testing.assert_close(alone.logits[0, 4:], one.logits[0, 4:])


def test_padding_gets_no_gradient(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[1, 12:] = 0, 0
    embeds = model.transformer.wte(tokens).detach().requires_grad_()
    model(inputs_embeds=embeds, attention_mask=mask, labels=tokens.where(mask.bool(), -100)).loss.backward()
    assert not embeds.grad[~mask.bool()].any() and embeds.grad[mask.bool()].any()


@pytest.mark.parametrize("sizes", [[1] * 29, [5, 1, 1, 1, 9, 12], [20, 9], [8, 8, 13], [28, 1]], ids=str)
def test_cached_passes_equal_the_uncached_one(tiny_model, memory, sizes):
    model, tokens = tiny_model(**memory), random_tokens(3, 29)
    whole = model(tokens)
    logits, out = run_in_chunks(model, tokens, sizes)
    torch.testing.assert_close(logits, whole.logits)
    assert_states_close(out.memory_state, whole.memory_state)
    assert isinstance(out.past_key_values, DNCGPT2Cache) and out.past_key_values.get_seq_length() == 29


@pytest.mark.parametrize("sizes", [[1] * 29, [20] + [1] * 9, [3, 3, 3, 20], [13, 16]], ids=str)
def test_left_padded_rows_cross_their_windows_at_different_steps(tiny_model, memory, sizes):
    model, lengths = tiny_model(**memory), [29, 17, 10, 1]
    tokens, mask = random_tokens(4, 29), torch.zeros(4, 29, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 29 - length :] = 1
    logits, out = run_in_chunks(model, tokens, sizes, mask)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, 29 - length :])
        torch.testing.assert_close(logits[row, 29 - length :], alone.logits[0])
        assert_states_close(out.memory_state.index_select(torch.tensor([row])), alone.memory_state)


def test_cache_never_holds_more_than_a_window_between_calls(tiny_model):
    model, tokens, cache = tiny_model(), random_tokens(2, 30), None
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    for t in range(30):
        out = model(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert all(layer.keys.shape[2] <= WINDOW and layer.values.shape[2] <= WINDOW for layer in cache.layers)
    assert model(tokens, attention_mask=mask, use_cache=True).past_key_values.layers[0].keys.shape[2] <= WINDOW


def test_cache_reorders_repeats_and_selects_rows_with_their_memory(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 13)
    following = random_tokens(4, 3)

    def cache() -> DNCGPT2Cache:
        return model(tokens, use_cache=True).past_key_values

    def continued(cache: DNCGPT2Cache, rows: list[int]) -> None:
        new = following[: len(rows)]
        expected = model(torch.cat([tokens[rows], new], 1)).logits[:, 13:]
        torch.testing.assert_close(model(new, past_key_values=cache, use_cache=True).logits, expected)

    reordered, repeated, selected = cache(), cache(), cache()
    reordered.reorder_cache(torch.tensor([1, 1]))
    continued(reordered, [1, 1])
    repeated.batch_repeat_interleave(2)
    continued(repeated, [0, 0, 1, 1])
    selected.batch_select_indices(torch.tensor([1]))
    continued(selected, [1])


def test_reset_cache_starts_a_new_document(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 5)
    cache = model(random_tokens(2, 13), use_cache=True).past_key_values
    cache.reset()
    out = model(tokens, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits, model(tokens).logits)


def test_given_cache_is_gone_on_from_even_without_use_cache(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 13)
    cache = model(tokens[:, :10], use_cache=True).past_key_values
    out = model(tokens[:, 10:], past_key_values=cache, use_cache=False)
    torch.testing.assert_close(out.logits, model(tokens).logits[:, 10:])


def test_empty_foreign_cache_is_replaced(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 5)
    out = model(tokens, past_key_values=DynamicCache(), use_cache=True)
    assert isinstance(out.past_key_values, DNCGPT2Cache)
    assert torch.equal(out.logits, model(tokens).logits)


@pytest.mark.parametrize("lengths", [[13, 16], [1, 8, 20], [24, 5], [3, 3, 3]], ids=str)
def test_packed_documents_equal_separate_ones(tiny_model, memory, lengths):
    model, tokens = tiny_model(**memory), random_tokens(2, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    separate = [model(document) for document in tokens.split(lengths, dim=1)]
    expected = torch.cat([out.logits for out in separate], 1)
    whole = model(tokens, position_ids=positions)
    logits, last = run_in_chunks(model, tokens, [2, 1, sum(lengths) - 3], position_ids=positions)
    for actual, state in ((whole.logits, whole.memory_state), (logits, last.memory_state)):
        torch.testing.assert_close(actual, expected)
        assert_states_close(state, separate[-1].memory_state)


def test_memory_reset_at_a_window_starts_a_new_document(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 3 * WINDOW)
    reset = torch.zeros(2, 3 * WINDOW, dtype=torch.bool)
    reset[0, WINDOW] = True
    out, without = model(tokens, memory_reset=reset), model(tokens)
    new = model(tokens[:, WINDOW:])
    torch.testing.assert_close(out.logits[0, WINDOW:], new.logits[0])
    first = torch.tensor([0])
    assert_states_close(out.memory_state.index_select(first), new.memory_state.index_select(first))
    assert torch.equal(out.logits[1], without.logits[1])
    assert torch.equal(out.logits[0, :WINDOW], without.logits[0, :WINDOW])


def test_memory_reset_inside_a_window_empties_the_memory_but_not_the_attention(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 20)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 11] = True
    asked = {"output_base_hidden_state": True, "output_hidden_states": True}
    out, whole = model.transformer(tokens, memory_reset=reset, **asked), model.transformer(tokens, **asked)
    assert torch.equal(out.base_hidden_state, whole.base_hidden_state)
    seen = what_the_memory_sees(model, out)[:, 11:]
    assert torch.equal(seen, what_the_memory_sees(model, whole)[:, 11:])
    second = tokens[:, 11:]
    fresh = model.transformer.memory(seen, model.transformer.wte(second), input_ids=second)
    assert_states_close(out.memory_state, fresh.state)
    chunked, _ = run_in_chunks(model, tokens, [9, 4, 7], memory_reset=reset)
    torch.testing.assert_close(chunked, model(tokens, memory_reset=reset).logits)


@pytest.mark.parametrize("detached", [True, False])
def test_detached_state_cuts_the_gradient_and_an_attached_one_lets_it_through(tiny_model, memory, detached):
    model = tiny_model(**memory)
    embeds = model.transformer.wte(random_tokens(2, WINDOW)).detach().requires_grad_()
    state = model(inputs_embeds=embeds).memory_state
    second = random_tokens(2, WINDOW)
    out = model(second, labels=second, memory_state=state.detach() if detached else state)
    out.loss.backward()
    assert embeds.grad is None if detached else embeds.grad.abs().amax() > 0


def test_hidden_states_end_with_the_read_added(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 20)
    out = model.transformer(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.n_layer + 1
    assert all(x.shape == (2, 20, model.config.n_embd) for x in out.hidden_states)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    places = torch.arange(20) % WINDOW
    torch.testing.assert_close(out.hidden_states[0], model.transformer.wte(tokens) + model.transformer.wpe(places))
    head = model(tokens, output_hidden_states=True)
    torch.testing.assert_close(model.lm_head(head.hidden_states[-1]), head.logits)
    assert model(tokens).hidden_states is None


def test_hidden_states_and_attentions_of_real_tokens_do_not_see_padding(tiny_model):
    model = tiny_model()
    model.set_attn_implementation("eager")
    tokens, mask = random_tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[0, :5], mask[1, 13:] = 0, 0
    out = model(tokens, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for row, real in enumerate(mask.bool()):
        alone = model(tokens[row, real][None], output_hidden_states=True, output_attentions=True)
        for ours, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, real], expected[0])
        for ours, expected in zip(out.attentions, alone.attentions, strict=True):
            torch.testing.assert_close(ours[row][:, real][:, :, real], expected[0])
            assert not ours[row][:, real][:, :, ~real].any()


def test_attentions_are_those_of_gpt2_within_windows_and_zero_between(tiny_model):
    model, tokens = silent(tiny_model()), random_tokens(2, 20)
    model.set_attn_implementation("eager")
    gpt2 = plain_gpt2(model)
    attentions = model(tokens, output_attentions=True).attentions
    assert len(attentions) == model.config.n_layer
    for layer, attention in enumerate(attentions):
        assert attention.shape == (2, model.config.n_head, 20, 20)
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
        inside = torch.zeros_like(attention)
        for window in torch.arange(20).split(WINDOW):
            expected = gpt2(tokens[:, window], output_attentions=True).attentions[layer]
            inside[:, :, window[0] : window[-1] + 1, window[0] : window[-1] + 1] = expected
        torch.testing.assert_close(attention, inside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_run_and_the_state_is_float32(tiny_config, memory, dtype):
    model = DNCGPT2LMHeadModel(tiny_config(**memory)).to(dtype).eval()
    tokens = random_tokens(2, 20)
    out = model(tokens, labels=tokens, use_cache=True)
    following = model(random_tokens(2, 3), past_key_values=out.past_key_values, use_cache=True)
    carried = model(random_tokens(2, 3), memory_state=out.memory_state)
    for result in (out, following, carried):
        assert result.logits.dtype == dtype and result.logits.isfinite().all()
        floats = result.memory_state._replace(slot_tokens=None)  # these are token ids
        assert {x.dtype for x in floats if x is not None} == {torch.float32}
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_gets_a_gradient(tiny_model, memory):
    model, tokens = tiny_model(**memory), random_tokens(2, 3 * WINDOW)
    model(tokens, labels=tokens).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, memory):
    model, tokens = tiny_model(**memory).train(), random_tokens(2, 20)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert model.transformer.gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_gradient_checkpointing_leaves_an_empty_cache_empty_and_refuses_a_full_one(tiny_model):
    model, tokens = tiny_model().train(), random_tokens(2, 5)
    full = model(tokens, use_cache=True).past_key_values
    expected = model(tokens, labels=tokens).loss
    model.gradient_checkpointing_enable()
    for cache in (DNCGPT2Cache(model.config), DynamicCache(config=model.config)):
        out = model(tokens, labels=tokens, past_key_values=cache)
        torch.testing.assert_close(out.loss, expected)
        assert out.past_key_values is None and cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="Gradient checkpointing cannot go on from past_key_values"):
        model(tokens, past_key_values=full)


def test_compiled_model_equals_the_eager_one(tiny_model):
    model, tokens = tiny_model(n_positions=2, n_layer=1), random_tokens(2, 4)
    expected = model(tokens, labels=tokens)
    expected.loss.backward()
    gradient = model.transformer.wte.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(model.transformer.wte.weight.grad, gradient)


@pytest.mark.parametrize("token", [VOCABULARY, 50256, -1])
def test_token_beyond_the_vocabulary_is_refused_with_the_range(tiny_model, token):
    tokens = random_tokens(2, 5)
    tokens[1, 3] = token
    with pytest.raises(ValueError, match=rf"input_ids hold {token}.*0 to {VOCABULARY - 1}.*tokenizer"):
        tiny_model()(tokens)


def test_exactly_one_of_ids_and_embeddings_is_taken(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 5)
    for both in ({}, {"input_ids": tokens, "inputs_embeds": model.transformer.wte(tokens)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**both)


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 5), (2, 1, 4, 5), (3, 1, 5, 5), (5,), (3, 5), (1, 5)], ids=str)
def test_attention_mask_of_another_shape_is_refused(tiny_model, shape):
    with pytest.raises(ValueError, match=rf"attention_mask has shape \({', '.join(map(str, shape))},?\)"):
        tiny_model()(random_tokens(2, 5), attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("field", ["memory", "usage", "read_weights", "previous_hidden"])
def test_memory_state_of_another_shape_is_refused_by_its_field(tiny_model, field):
    model = tiny_model()
    state = model(random_tokens(2, 5)).memory_state
    state = state._replace(**{field: getattr(state, field)[..., :-1]})
    with pytest.raises(ValueError, match=rf"memory_state\.{field} has shape .* need"):
        model(random_tokens(2, 5), memory_state=state)


def test_memory_state_of_another_batch_size_is_refused(tiny_model):
    model = tiny_model()
    state = model(random_tokens(3, 5)).memory_state
    with pytest.raises(ValueError, match=r"memory_state\.memory has shape \(3, .* need \(2, "):
        model(random_tokens(2, 5), memory_state=state)


def test_memory_state_of_another_addressing_is_refused(tiny_model):
    state = tiny_model(addressing="dnc")(random_tokens(2, 5)).memory_state
    with pytest.raises(ValueError, match=r"memory_state\.link"):
        tiny_model(addressing="lru")(random_tokens(2, 5), memory_state=state)


@pytest.mark.parametrize("kind", [tuple, list, lambda state: state._asdict(), lambda state: "state.safetensors"])
def test_what_is_no_memory_state_is_refused_with_what_to_pass(tiny_model, kind):
    model, tokens = tiny_model(), random_tokens(2, 5)
    state = kind(model(tokens).memory_state)
    with pytest.raises(ValueError, match=rf"memory_state is a {type(state).__name__}: pass the memory_state"):
        model(tokens, memory_state=state)


def test_positions_below_zero_are_refused_but_of_padding(tiny_model):
    model, tokens, positions = tiny_model(), random_tokens(2, 5), torch.arange(5).repeat(2, 1) - 1
    with pytest.raises(ValueError, match="position_ids hold -1"):
        model(tokens, position_ids=positions)
    mask = (positions >= 0).long()
    out = model(tokens, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(out.logits[:, 1:], model(tokens[:, 1:]).logits)


def test_what_is_refused_leaves_the_cache_as_it_was(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 5)
    cache = model(tokens, use_cache=True).past_key_values
    unknown = torch.full((2, 5), VOCABULARY)
    for targets in ({"labels": unknown}, {"shift_labels": unknown}):
        with pytest.raises(ValueError, match="labels hold"):
            model(tokens, past_key_values=cache, **targets)
    chosen = {"labels": tokens, "output_logits": False, "output_divergence": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"output_divergence has shape \[2, 3\]"):
        model(tokens, past_key_values=cache, **chosen)
    with pytest.raises(ValueError, match=r"output_divergence of type torch\.float32"):
        model(tokens, past_key_values=cache, **{**chosen, "output_divergence": torch.ones(2, 5)})
    assert cache.get_seq_length() == 5


def test_targets_may_be_a_slice(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 9)
    inputs, targets = tokens[:, 2:6], tokens[:, 3:7]
    expected = model(inputs.clone(), shift_labels=targets.clone()).loss
    for output_logits in (True, False):
        loss = model(inputs, shift_labels=targets, output_logits=output_logits).loss
        torch.testing.assert_close(loss, expected, check_dtype=False)


def test_a_configuration_without_a_memory_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"A GPT2Config says nothing of a memory: .*DNCGPT2Config\.from_pretrained"):
        DNCGPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    plain_gpt2(tiny_model()).save_pretrained(tmp_path)
    assert DNCGPT2LMHeadModel(DNCGPT2Config.from_pretrained(tmp_path)).config.n_embd == tiny_model().config.n_embd


def test_cache_without_a_memory_is_refused(tiny_model):
    model, tokens = tiny_model(), random_tokens(2, 5)
    foreign = plain_gpt2(model)(tokens, use_cache=True).past_key_values
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="DynamicCache without a memory state"):
            model(tokens, past_key_values=foreign, use_cache=use_cache)


def test_cache_of_another_batch_size_is_refused(tiny_model):
    model = tiny_model()
    cache = model(random_tokens(3, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="batch size 3, the input of 2"):
        model(random_tokens(2, 1), past_key_values=cache, use_cache=True)


def test_pickled_weights_are_refused(tiny_model, tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="use_safetensors=False is not allowed"):
        DNCGPT2LMHeadModel.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(OSError, match="safetensors"):
        DNCGPT2LMHeadModel.from_pretrained(tmp_path)


def test_cross_attention_works_within_one_window_and_is_refused_beyond(tiny_config):
    model = DNCGPT2LMHeadModel(tiny_config(add_cross_attention=True)).eval()
    encoded, mask = torch.randn(2, 5, model.config.n_embd), torch.tensor([[1, 1, 1, 1, 0]] * 2)
    encoder = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}
    tokens = random_tokens(2, WINDOW)
    expected = model(tokens, **encoder).logits
    hidden = {**encoder, "encoder_hidden_states": encoded + 100 * (1 - mask[..., None])}
    torch.testing.assert_close(model(tokens, **hidden).logits, expected)
    assert not torch.allclose(model(tokens).logits, expected)
    with pytest.raises(ValueError, match="Cross-attention works within one attention window"):
        model(random_tokens(2, 2 * WINDOW), **encoder)


def test_an_encoder_is_attended_to_as_by_gpt2(tiny_config):
    torch.manual_seed(0)
    model = DNCGPT2LMHeadModel(tiny_config(add_cross_attention=True)).eval()
    model.set_attn_implementation("eager")
    encoder = {"encoder_hidden_states": torch.randn(2, 5, model.config.n_embd)}
    out = model(random_tokens(2, 4), output_attentions=True, **encoder)
    assert [x.shape for x in out.cross_attentions] == [(2, model.config.n_head, 4, 5)] * model.config.n_layer
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = random_tokens(2, 3)
    expected = tokens
    for _ in range(4):
        following = model(expected, **encoder).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], 1)
    assert torch.equal(model.generate(tokens, **encoder, **options), expected)
    both = EncoderDecoderModel(encoder=plain_gpt2(model).transformer, decoder=model)
    assert both(input_ids=tokens, decoder_input_ids=tokens).logits.shape == (2, 3, VOCABULARY)
    assert both.generate(tokens, decoder_start_token_id=0, **options).shape == (2, 5)
