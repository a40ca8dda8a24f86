"""What libraries expect of every model of transformers, with plain GPT-2 run through the same tests as the control."""

import io

import pytest
import torch
from test_modeling import plain_gpt2, random_tokens
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cache_dnc_gpt2 import DNCGPT2Cache
from dnc_gpt2 import (
    DNCGPT2ForQuestionAnswering,
    DNCGPT2ForSequenceClassification,
    DNCGPT2ForTokenClassification,
    DNCGPT2LMHeadModel,
)

every_addressing = pytest.mark.parametrize("addressing", ["lru", "dnc", "simplified"])


@pytest.fixture(params=["lru", "dnc", "simplified", "gpt2"])
def model(request, tiny_model) -> PreTrainedModel:
    """A model with memory of each addressing, and GPT-2 as the control."""
    if request.param == "gpt2":
        return plain_gpt2(tiny_model())
    return tiny_model(addressing=request.param)


def generated(model: PreTrainedModel, tokens: Tensor, **options) -> Tensor:
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 3, "do_sample": False, **options}
    return model.generate(tokens, eos_token_id=None, pad_token_id=0, **options)


def test_class_promises_what_gpt2_promises():
    for name in (
        "_supports_sdpa",
        "_supports_flash_attn",
        "_supports_attention_backend",
        "_can_compile_fullgraph",
        "_is_stateful",
        "supports_gradient_checkpointing",
        "_tied_weights_keys",
        "_skip_keys_device_placement",
        "main_input_name",
        "base_model_prefix",
        "input_modalities",
    ):
        assert getattr(DNCGPT2LMHeadModel, name) == getattr(GPT2LMHeadModel, name), name
    assert set(DNCGPT2LMHeadModel._no_split_modules) == {"GPT2Block", "DNCMemory"}


def test_every_parameter_has_a_start_value_of_its_own(model):
    """`_init_weights` reaches them all: after it nothing is left of what was there before."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if (parameter == 7.0).any()] == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, reentrant):
    tokens = random_tokens(2, 8)
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=True).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # a reentrant checkpoint needs an input with a gradient
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_whole_model_and_its_cache_survive_torch_save(model):
    tokens = random_tokens(2, 7)
    out = model(tokens, use_cache=True)
    buffer = io.BytesIO()
    torch.save((model, out.past_key_values), buffer)
    buffer.seek(0)
    loaded, cache = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(tokens).logits, out.logits)
    following = random_tokens(2, 1)
    expected = model(following, past_key_values=out.past_key_values, use_cache=True).logits
    assert torch.equal(loaded(following, past_key_values=cache, use_cache=True).logits, expected)


def test_model_is_made_and_run_on_the_meta_device(model):
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    shape = empty(torch.zeros(2, 8, dtype=torch.long, device="meta")).logits.shape
    assert shape == (2, 8, model.config.vocab_size)


@pytest.mark.parametrize("placed", ["auto", "one device", "half on disk"])
def test_device_map_places_the_model(model, tmp_path, placed):
    pytest.importorskip("accelerate")
    model = model.float()
    model.save_pretrained(tmp_path / "model")
    memory = {"transformer.memory": "disk"} if isinstance(model, DNCGPT2LMHeadModel) else {}
    names = ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0", "transformer.ln_f", "lm_head")
    device_map = {
        "auto": "auto",
        "one device": {"": "cpu"},
        "half on disk": {**dict.fromkeys(names, "cpu"), "transformer.h.1": "disk", **memory},
    }[placed]
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded", use_safetensors=True
    )
    tokens = random_tokens(2, 5)
    assert torch.equal(generated(loaded.eval(), tokens), generated(model, tokens))


def test_attention_implementations_agree(model):
    tokens, mask = random_tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[0, :3] = 0
    real = mask.bool()
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    logits = {}
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        assert model.config._attn_implementation == kind
        logits[kind] = model(tokens, **inputs).logits[real]
    torch.testing.assert_close(logits["sdpa"], logits["eager"])


@every_addressing
@pytest.mark.parametrize("padding", [0, 3])
def test_flash_attention_is_given_masks_that_it_takes(tiny_model, monkeypatch, addressing, padding):
    """Flash attention runs on GPUs alone; a stand-in of the same contract takes its place."""
    model, tokens = tiny_model(addressing=addressing), random_tokens(2, 11)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    chunks = 3, 1, 4, 2, 1

    def in_chunks() -> Tensor:
        cache, logits, stop = DNCGPT2Cache(model.config), [], 0
        for size in chunks:
            start, stop = stop, stop + size
            given = {"attention_mask": mask[:, :stop], "past_key_values": cache, "output_hidden_states": True}
            out = model(tokens[:, start:stop], **given)
            assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
            logits.append(out.logits)
        return torch.cat(logits, 1)[mask.bool()]

    options = {"attention_mask": mask, "max_new_tokens": 12}
    expected, expected_chunks = generated(model, tokens, **options), in_chunks()

    def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        assert attention_mask is None or attention_mask.dim() == 2
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        if attention_mask is not None:
            assert attention_mask.shape == (key.shape[0], key.shape[2])
            visible = visible & attention_mask[:, None, None].bool()
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling)
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert torch.equal(generated(model, tokens, **options), expected)
    torch.testing.assert_close(in_chunks(), expected_chunks)
    with pytest.raises(ValueError, match="Flash attention takes no custom 4D attention_mask"):
        model(tokens, attention_mask=torch.ones(2, 1, 11, 11, dtype=torch.bool))


def test_what_is_told_of_flattened_rows_does_not_reach_windows(tiny_model, monkeypatch):
    model, tokens = tiny_model(), random_tokens(1, 22)
    positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
    bounds = torch.tensor([0, 9, 22], dtype=torch.int32)
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 13, "max_length_k": 13}
    seen = []
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(*args, **kwargs):
        seen.append(set(kwargs))
        return attend(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", watched)
    out = model(tokens, position_ids=positions, **told)
    torch.testing.assert_close(out.logits, model(tokens, position_ids=positions).logits)
    assert seen and not any(names & set(told) for names in seen)
    with pytest.raises(ValueError, match=r"cu_seq_lens_.* tell of flattened rows: pass position_ids"):
        model(tokens, **told)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate_with_every_cache(model, dtype):
    model, tokens = model.to(dtype), random_tokens(2, 3)
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}):
        assert generated(model, tokens, **options).shape == (2, 6)


def test_resized_vocabulary_is_generated_from(model):
    model.resize_token_embeddings(90)
    assert model.config.vocab_size == 90 and model.get_input_embeddings().weight.shape[0] == 90
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(torch.tensor([[89, 88]])).logits.shape == (1, 2, 90)
    assert generated(model, torch.tensor([[89, 88]])).shape == (1, 5)


HEADS = {
    "sequence": (DNCGPT2ForSequenceClassification, AutoModelForSequenceClassification),
    "token": (DNCGPT2ForTokenClassification, AutoModelForTokenClassification),
    "question": (DNCGPT2ForQuestionAnswering, AutoModelForQuestionAnswering),
}


@pytest.mark.parametrize("name", HEADS)
def test_other_heads_train_the_memory_and_load_with_their_auto_class(tiny_config, tmp_path, name):
    kind, auto = HEADS[name]
    model = kind(tiny_config(num_labels=3, pad_token_id=0)).eval()
    tokens = torch.randint(1, model.config.vocab_size, (2, 20))
    targets = {
        "sequence": {"labels": torch.tensor([0, 2])},
        "token": {"labels": torch.randint(3, (2, 20))},
        "question": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 19])},
    }[name]
    out = model(tokens, **targets)
    out.loss.backward()
    assert all(parameter.grad.any() for parameter in model.transformer.memory.parameters())
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is kind
    torch.testing.assert_close(loaded(tokens, **targets).loss, out.loss)
