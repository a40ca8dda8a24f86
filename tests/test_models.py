"""Making and loading models: equal backbones, shorter windows, and clear words where there is no model."""

import shutil

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dnc_gpt2 import DNCGPT2Config
from dnc_gpt2.models import (
    backbone_inputs,
    count_parameters,
    has_memory,
    load_model,
    new_models,
    require_checkpoint,
    shorten_positions,
    window_size,
)

KINDS = ["baseline", "dnc"]
GPT2 = {"vocab_size": 67, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0}


@pytest.fixture
def gpt2_folder(tmp_path):
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=0)).save_pretrained(folder)
    return str(folder)


def test_both_models_start_from_bit_equal_backbones(tiny_config):
    models = new_models(tiny_config(), KINDS, seed=3)
    baseline, dnc = models["baseline"].state_dict(), models["dnc"].state_dict()
    assert type(models["baseline"]) is GPT2LMHeadModel
    assert {name for name in dnc if ".memory." not in name} == set(baseline)
    assert all(torch.equal(tensor, dnc[name]) for name, tensor in baseline.items())
    shared = {tensor.data_ptr() for tensor in baseline.values()} & {tensor.data_ptr() for tensor in dnc.values()}
    assert not shared  # training one leaves the other alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_alone_starts_as_it_does_beside_the_other(tiny_config, kind):
    both, alone = new_models(tiny_config(), KINDS, seed=3), new_models(tiny_config(), [kind], seed=3)
    assert list(alone) == [kind]
    for name, tensor in alone[kind].state_dict().items():
        assert torch.equal(tensor, both[kind].state_dict()[name]), name


def test_the_seed_decides_the_weights(tiny_config):
    first, second = (new_models(tiny_config(), ["baseline"], seed)["baseline"].lm_head.weight for seed in (1, 2))
    assert not torch.equal(first, second)


def test_has_memory_and_parameter_counts(tiny_config):
    models = new_models(tiny_config(), KINDS, seed=0)
    assert [has_memory(models[kind]) for kind in KINDS] == [False, True]
    extra = sum(p.numel() for p in models["dnc"].transformer.memory.parameters())
    assert count_parameters(models["dnc"]) == count_parameters(models["baseline"]) + extra
    tied = models["baseline"]
    assert count_parameters(tied) < sum(tensor.numel() for tensor in tied.state_dict().values())


def test_pretrained_models_start_with_the_logits_of_the_checkpoint(gpt2_folder):
    config = AutoConfig.from_pretrained(gpt2_folder)
    reference = load_model(gpt2_folder).eval()
    memory = DNCGPT2Config.from_pretrained(gpt2_folder, mem_slots=5, mem_width=6)
    models = new_models(memory, KINDS, seed=0, pretrained=gpt2_folder)
    tokens = torch.randint(0, config.vocab_size, (2, 16))
    for model in models.values():
        assert torch.equal(model.eval()(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_from_a_checkpoint_of_any_dtype_are_trained_in_one(gpt2_folder, tmp_path, dtype):
    load_model(gpt2_folder).to(dtype).save_pretrained(tmp_path)
    memory = DNCGPT2Config.from_pretrained(tmp_path, mem_slots=5, mem_width=6)
    models = new_models(memory, KINDS, seed=0, pretrained=str(tmp_path))
    assert {parameter.dtype for model in models.values() for parameter in model.parameters()} == {torch.float32}


def test_a_window_shorter_than_the_checkpoints_drops_the_later_positions(gpt2_folder):
    memory = DNCGPT2Config.from_pretrained(gpt2_folder, mem_slots=5, mem_width=6, n_positions=8)
    models = new_models(memory, KINDS, seed=0, pretrained=gpt2_folder)
    reference = load_model(gpt2_folder).eval()
    tokens = torch.randint(0, 67, (2, 8))
    for model in models.values():
        assert model.config.n_positions == model.transformer.wpe.num_embeddings == 8
        assert torch.equal(model.eval()(tokens).logits, reference(tokens).logits)


def test_a_window_longer_than_the_checkpoints_is_refused(gpt2_folder):
    with pytest.raises(ValueError, match=r"seq_len=32 .*16"):
        shorten_positions(load_model(gpt2_folder), 32)


def test_starting_from_a_model_with_memory_is_refused(tiny_config, tmp_path):
    config = tiny_config()
    new_models(config, ["dnc"], seed=0)["dnc"].save_pretrained(tmp_path / "dnc")
    with pytest.raises(ValueError, match="already has a memory"):
        new_models(config, KINDS, seed=0, pretrained=str(tmp_path / "dnc"))


def test_window_size_is_the_models_or_the_examples(tiny_config):
    model = new_models(tiny_config(), ["baseline"], seed=0)["baseline"]  # n_positions 8
    assert [window_size(model, length) for length in (6, 8, 24)] == [6, 8, 8]
    with pytest.raises(ValueError, match=r"20 tokens.*n_positions=8"):
        window_size(model, 20)


def test_backbone_inputs_are_windows_as_rows_in_text_order(tiny_config):
    model = new_models(tiny_config(), ["baseline"], seed=0)["baseline"]
    batch = {name: torch.arange(48).reshape(2, 24) for name in ("input_ids", "labels", "shift_labels")}
    inputs = backbone_inputs(model, {**batch, "attention_mask": torch.ones(2, 24)})
    assert set(inputs) == set(batch)
    assert all(torch.equal(rows, torch.arange(48).reshape(6, 8)) for rows in inputs.values())


# What is no model


def test_a_folder_without_a_model_is_refused_with_the_folders_inside_it(gpt2_folder, tmp_path):
    for check in (require_checkpoint, load_model):
        with pytest.raises(ValueError, match=r"no config\.json.*gpt2"):
            check(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a checkpoint.*save_pretrained"):
        load_model(str(tmp_path / "empty"))


def test_a_file_is_no_checkpoint(gpt2_folder):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file"):
        load_model(f"{gpt2_folder}/model.safetensors")


@pytest.mark.parametrize("damage", ["missing", "cut", "noise", "pickle"])
def test_missing_or_corrupt_weights_are_refused_by_name(gpt2_folder, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(gpt2_folder, folder)
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "noise":
        weights.write_bytes(b"\xff" * 1000)
    else:
        weights.unlink()
        torch.save(load_model(gpt2_folder).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"damaged.*model\.safetensors as save_pretrained"):
        load_model(str(folder))


def test_an_unreachable_model_names_the_connection():
    with pytest.raises(ValueError, match=r"(?s)nobody/nothing.*check the name and the connection"):
        load_model("nobody/nothing")


def test_a_model_of_another_family_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=67, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama, not a GPT-2"):
        load_model(str(tmp_path))
