"""Making, loading and running the two kinds of model that are compared: a stock GPT-2 and one with a memory."""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from configuration_dnc_gpt2 import DNCGPT2Config
from losses_dnc_gpt2 import causal_lm_losses
from modeling_dnc_gpt2 import DNCGPT2CausalLMOutput, DNCGPT2LMHeadModel


def has_memory(model: PreTrainedModel) -> bool:
    """Whether the model is GPT-2 with a memory, from whichever copy of its code it was loaded."""
    return model.config.model_type == DNCGPT2Config.model_type


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def window_size(model: PreTrainedModel, example_length: int) -> int:
    """Attention window of a model on examples of so many tokens.

    Raises:
        ValueError: the window does not divide the example.
    """
    window = min(model.config.n_positions, example_length)
    if example_length % window:
        raise ValueError(
            f"An example of {example_length} tokens (seq_len x windows_per_example) is not a multiple of the attention "
            f"window n_positions={window} of {model.name_or_path or 'the model'}: choose seq_len={window}."
        )
    return window


def backbone_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs for a plain GPT-2 from a batch [B, X]: its attention windows as rows of their own, [B * windows, window].

    Padding stands at the end of a row, where no real token looks at it, so that no mask is needed.
    """
    window = window_size(model, batch["input_ids"].shape[1])
    return {name: batch[name].reshape(-1, window) for name in ("input_ids", "labels", "shift_labels")}


def allow_loss_without_logits(model: PreTrainedModel) -> None:
    """Let a stock GPT-2's `forward` take `output_logits=False`, as that of the model with memory does.

    For the comparison to be fair both must compute their loss in the same way. Class, weights and what is saved stay as
    they are.
    """
    if not has_memory(model):
        model.forward = MethodType(_gpt2_forward, model)


def _gpt2_forward(model: GPT2LMHeadModel, *args: Any, output_logits: bool = True, **inputs: Any) -> Any:
    if output_logits:
        return type(model).forward(model, *args, **inputs)
    targets = [inputs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")]
    hidden = model.transformer(*args, **inputs).last_hidden_state
    losses = causal_lm_losses(model.lm_head, hidden, *targets)
    return DNCGPT2CausalLMOutput(loss=losses.loss, correct=losses.correct)


def new_models(
    config: DNCGPT2Config, kinds: list[str], seed: int, pretrained: str | None = None
) -> dict[str, PreTrainedModel]:
    """The models of the given kinds (`"baseline"`, `"dnc"`), their backbones bit-equal.

    Args:
        config: of the model with memory; the baseline takes its GPT-2 part.
        seed: of the initial weights; the memory's do not disturb the backbone's.
        pretrained: name or folder of a GPT-2 checkpoint to start from, cut to `config.n_positions`.
    """
    plain = gpt2_config(config)
    torch.manual_seed(seed)
    if pretrained is None:
        baseline = GPT2LMHeadModel(plain)
        baseline.loss_type = "ForCausalLM"  # the default, which the library warns about taking
    else:
        baseline = load_model(pretrained).float()  # as the model with memory, whatever the checkpoint was saved in
        if has_memory(baseline):
            raise ValueError(f"{pretrained} already has a memory: start from a plain GPT-2 checkpoint.")
        shorten_positions(baseline, config.n_positions)
    models: dict[str, PreTrainedModel] = {"baseline": baseline} if "baseline" in kinds else {}
    if "dnc" in kinds:
        torch.manual_seed(seed)
        models["dnc"] = DNCGPT2LMHeadModel(config)
        models["dnc"].load_state_dict(baseline.state_dict(), strict=False)
    return models


def freeze_backbone(model: PreTrainedModel) -> None:
    """Leave nothing to train but the memory: of a plain GPT-2 nothing at all."""
    memory = {id(parameter) for parameter in model.transformer.memory.parameters()} if has_memory(model) else set()
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in memory)


def gpt2_config(config: DNCGPT2Config, **changes: Any) -> GPT2Config:
    """The GPT-2 part of a configuration, with these fields changed."""
    saved = config.to_dict()
    names = [name for name in GPT2Config().to_dict() if name in saved and name not in ("model_type", "architectures")]
    return GPT2Config(**{**{name: getattr(config, name) for name in names}, **changes})


def shorten_positions(model: PreTrainedModel, n_positions: int) -> None:
    """Give a GPT-2 a shorter attention window by dropping its later position embeddings.

    Raises:
        ValueError: the window would be longer than the model's.
    """
    old = model.transformer.wpe
    if n_positions > old.num_embeddings:
        raise ValueError(f"seq_len={n_positions} exceeds the attention window {old.num_embeddings} of the checkpoint.")
    if n_positions < old.num_embeddings:
        model.transformer.wpe = nn.Embedding.from_pretrained(old.weight[:n_positions].detach().clone(), freeze=False)
        model.config.n_positions = n_positions


def require_checkpoint(name_or_path: str) -> None:
    """Refuse a local path that is no checkpoint; hub names pass.

    Raises:
        ValueError: naming the path and the remedy.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f" It holds {inner}: name one of these." if inner else " Name a folder that save_pretrained wrote."
        raise ValueError(f"{name_or_path} is not a checkpoint: it has no config.json.{hint}")
    if folder.is_file():
        raise ValueError(f"{name_or_path} is a file; name the checkpoint's folder.")


def load_model(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a GPT-2 with or without memory; checkpoints of this project need no remote code.

    Raises:
        ValueError: there is no loadable model; the message names the folder and the remedy.
    """
    require_checkpoint(name_or_path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # depends on the damage: OSError, SafetensorError, RuntimeError, KeyError, ...
        remedy = (
            "the folder needs config.json and model.safetensors as save_pretrained writes them"
            if Path(name_or_path).is_dir()
            else "it is no local folder, and the hub did not give it: check the name and the connection"
        )
        raise ValueError(f"No model could be loaded from {name_or_path} ({error}): {remedy}.") from error
    if model.config.model_type not in (GPT2Config.model_type, DNCGPT2Config.model_type):
        raise ValueError(f"{name_or_path} is a {model.config.model_type}, not a GPT-2: name a GPT-2 checkpoint.")
    # Old GPT-2 checkpoints hold their causal masks.
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unknown": sorted(name for name in info["unexpected_keys"] if not name.endswith(".attn.masked_bias")),
    }
    if any(wrong.values()):
        reason = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(
            f"The tensors of {name_or_path} are not those of its config.json ({reason}): the folder needs config.json "
            "and model.safetensors as save_pretrained writes them."
        )
    return model
