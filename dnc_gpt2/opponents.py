"""What a GPT-2 with memory is compared with beside the plain GPT-2 of its run.

Two opponents are other ways to score a text with the plain GPT-2 and need no training: `neural_cache` and `overlapping`
(runners for `evaluation.evaluate`). The others are models that train.py trains on the same data, with the same seed,
optimizer and number of steps: `widened`, `long_window`, `simplified` and `dnc`.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GPT2LMHeadModel, PreTrainedModel

from configuration_dnc_gpt2 import DNCGPT2Config
from losses_dnc_gpt2 import IGNORED
from pointer_dnc_gpt2 import mix

from .evaluation import TOKENS_PER_CHUNK, HiddenStates, Runner, prediction_columns, predictions, split_tokens
from .examples import ExampleDataset, collate, evaluation_rows
from .models import count_parameters, gpt2_config, new_models, window_size
from .pointing import best_share

SCORED = ("neural_cache", "overlapping")
"""Opponents that score the plain GPT-2's checkpoint in another way."""

TRAINED = {"widened": "widened", "long_window": "long_window", "simplified": "simplified", "dnc": "dnc_addressing"}
"""Opponents that are trained -> their folder in the run, which names them in the comparison: `dnc` is taken there."""

OPPONENTS = ("widened", "neural_cache", "overlapping", "long_window", "simplified", "dnc")

STRENGTHS = (0.0, *(2 ** (step / 2) for step in range(17)))
"""theta times the mean squared norm of the hidden states, 0 to 256: what the neural cache tries."""


def opponent_names(text: str) -> list[str]:
    """Names separated by commas, each once, as `--opponents` takes them.

    Raises:
        argparse.ArgumentTypeError: a name is unknown.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in OPPONENTS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)} (choose from {','.join(OPPONENTS)})")
    return names


# Trained opponents


def check_opponents(names: list[str], config: DNCGPT2Config, example_length: int, pretrained: str | None) -> None:
    """Refuse opponents that cannot be had for this model.

    Args:
        config: of the model with memory.
        example_length: tokens in an example.
        pretrained: the checkpoint that the run starts from, if any.

    Raises:
        ValueError: naming the opponent and the remedy.
    """
    reasons = {config.addressing: "is the addressing of the model itself: leave it out"}
    if example_length <= config.n_positions:
        reasons["long_window"] = "needs examples of several windows: raise --windows_per_example or leave it out"
    if pretrained:
        reasons["widened"] = f"cannot start from {pretrained}, which has its own width: leave it out"
    if pretrained and "long_window" in names:
        positions = AutoConfig.from_pretrained(pretrained).n_positions
        if positions < example_length:
            reasons["long_window"] = (
                f"needs windows of {example_length} tokens, but {pretrained} has {positions} positions: leave it out"
            )
    for name in names:
        if name in reasons:
            raise ValueError(f"--opponents {name} {reasons[name]}.")


def opponent_model(
    name: str, config: DNCGPT2Config, *, example_length: int, parameters: int, seed: int, pretrained: str | None = None
) -> PreTrainedModel:
    """A new model of one of the `TRAINED` opponents.

    Args:
        config: of the model with memory.
        example_length: tokens in an example, which the long window spans.
        parameters: number of parameters of the model with memory, which the widened GPT-2 comes near to.
        seed, pretrained: as for `new_models`.
    """
    if name in ("simplified", "dnc"):
        # Both look at whole rows; every other field of the memory stays, but that the origin's is read at the top.
        kind, changes = "dnc", {"addressing": name, "address_width": None, "pointer_weight": 0.0}
        if name == "simplified":
            changes["memory_layer"] = config.n_layer
    else:
        kind = "baseline"
        changes = {"n_positions": example_length} if name == "long_window" else widened_sizes(config, parameters)
    config = DNCGPT2Config.from_dict({**config.to_dict(), **changes})
    return new_models(config, [kind], seed, pretrained)[kind]


def widened_sizes(config: DNCGPT2Config, parameters: int) -> dict[str, int]:
    """`n_embd` and `n_inner` of the GPT-2 whose number of parameters comes nearest to `parameters`.

    `n_embd` is a multiple of `n_head`; neither is below that of `config`. The distance is at most half the parameters
    of a unit of `n_inner`: n_layer * (2 n_embd + 1) / 2.
    """
    smallest = 4 * config.n_embd if config.n_inner is None else config.n_inner
    candidates = []
    n_embd, fewest = config.n_embd, 0
    while fewest <= parameters:
        fewest, more = (_gpt2_parameters(config, n_embd, smallest + extra) for extra in (0, 1))
        extra = max(0, round((parameters - fewest) / (more - fewest)))
        candidates.append((abs(fewest + extra * (more - fewest) - parameters), n_embd, smallest + extra))
        n_embd += config.n_head
    _, n_embd, n_inner = min(candidates)
    return {"n_embd": n_embd, "n_inner": n_inner}


def _gpt2_parameters(config: DNCGPT2Config, n_embd: int, n_inner: int) -> int:
    with torch.device("meta"):
        return count_parameters(GPT2LMHeadModel(gpt2_config(config, n_embd=n_embd, n_inner=n_inner)))


# Overlapping windows


class OverlappingRunner(Runner):
    """Scores each token with at least half a window before it, where the stream or the example has as much.

    Attention windows of the plain GPT-2 move by half their length; each scores the tokens of its second half. With
    carried memory they reach back into the stream's example before, otherwise they begin with the example.
    """

    def stride(self, example_length: int) -> int:
        """Tokens from one window to the next."""
        return max(1, window_size(self.model, example_length) // 2)

    def hidden_states(self, batch: dict[str, Tensor], carry_memory: bool) -> tuple[HiddenStates, dict[str, Tensor]]:
        inputs = batch["input_ids"]
        length, device = inputs.shape[1], inputs.device
        window, stride = window_size(self.model, length), self.stride(length)
        text = inputs if self.state is None or not carry_memory else torch.cat([self.state, inputs], dim=1)
        before = text.shape[1] - length
        # Window j scores tokens j * stride to (j + 1) * stride of the example.
        starts = (before + torch.arange(0, length, stride, device=device) - (window - stride)).clamp_min(0)
        # What lies beyond the text's end stands to the right of every scored token: none looks at it.
        places = (starts[:, None] + torch.arange(window, device=device)).clamp_max(text.shape[1] - 1)
        hidden = self.model.transformer(text[:, places].flatten(0, 1), use_cache=False).last_hidden_state
        hidden = hidden.unflatten(0, (len(inputs), len(starts)))
        tokens = torch.arange(length, device=device)
        self.state = text[:, -(window - stride) :]
        return HiddenStates(hidden[:, tokens // stride, before + tokens - starts[tokens // stride]]), {}


# Neural cache


@dataclass(frozen=True)
class NeuralCache:
    """The cache of Grave et al. 2017, with p_cache(v) proportional to sum_i exp(theta h_t . h_i) [x_i+1 = v]:

        p = (1 - lambda) p_model + lambda p_cache

    The sum runs over the last `entries` pairs of a hidden state h_i and the token x_i+1 that followed it. Where there
    is none, p = p_model.
    """

    entries: int
    theta: float
    share: float  # lambda


class _Entries:
    """The last pairs of hidden state and next token of each row of a batch, handed on from batch to batch."""

    def __init__(self, entries: int):
        self.entries = entries
        self.state: tuple[Tensor, Tensor, Tensor] | None = None

    def attend(
        self, hidden: Tensor, batch: dict[str, Tensor], carry: bool
    ) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
        """What the scored tokens of hidden states [B, X, H] find in the cache, some c tokens of a row at a time.

        Yields:
            The row; its tokens; h_t . h_i [c, K]; whether token t may look at entry i, bool [c, K]; x_i+1 [K], any
            token where nothing may look.
        """
        keys = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        words, runs = batch["shift_labels"], batch["memory_reset"].cumsum(-1)
        counts = (words != IGNORED).sum(-1).tolist()  # padding stands at the end
        before = 0
        if carry and self.state is not None:
            before = self.state[0].shape[1]
            runs = runs + self.state[2][:, -1:]
            keys, words, runs = (torch.cat(pair, 1) for pair in zip(self.state, (keys, words, runs), strict=True))
        self.state = tuple(x[:, -self.entries :] for x in (keys, words, runs))
        places = torch.arange(keys.shape[1], device=keys.device)
        for row, count in enumerate(counts):
            for start in range(0, count, TOKENS_PER_CHUNK):
                stop = min(start + TOKENS_PER_CHUNK, count)
                asking = slice(before + start, before + stop)
                asked = slice(max(0, before + start - self.entries), before + stop)
                age = places[asking, None] - places[asked]
                visible = (age >= 1) & (age <= self.entries) & (runs[row, asking, None] == runs[row, asked])
                with torch.autocast(keys.device.type, enabled=False):
                    scores = keys[row, asking] @ keys[row, asked].mT
                yield row, slice(start, stop), scores, visible, words[row, asked].clamp_min(0)


def _weights(scores: Tensor, visible: Tensor, theta: float) -> Tensor:
    """Softmax over the visible entries of [c, K]; zeros where there is none."""
    weights = (theta * scores).masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.where(visible.any(-1, keepdim=True), weights, 0)


class NeuralCacheRunner(Runner):
    """Scores with a plain GPT-2 and a neural cache.

    The cache is carried where memory is, empty at an example's start otherwise, and emptied where memory is.
    """

    def __init__(self, model: PreTrainedModel, cache: NeuralCache):
        super().__init__(model)
        self.cache, self.entries = cache, _Entries(cache.entries)

    def __call__(self, batch: dict[str, Tensor], carry_memory: bool) -> dict[str, Tensor]:
        hidden = self.hidden_states(batch, carry_memory)[0].hidden
        chunks = []
        for row, tokens, scores, visible, words in self.entries.attend(hidden, batch, carry_memory):
            weights = _weights(scores, visible, self.cache.theta)
            logits, targets = self.model.lm_head(hidden[row, tokens]), batch["shift_labels"][row, tokens]
            for piece, piece_weights, piece_targets in split_tokens(logits, weights, targets):
                tokens_held = (words + 1).expand_as(piece_weights)
                mixture = mix(piece, tokens_held, self.cache.share * piece_weights)
                chunks.append(prediction_columns(mixture, piece_targets))
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}


@torch.no_grad()
def tune_neural_cache(
    model: PreTrainedModel,
    dataset: ExampleDataset,
    entries: int,
    *,
    carry_memory: bool = False,
    batch_size: int = 8,
    autocast: Callable = nullcontext,
) -> NeuralCache:
    """The theta and lambda, among `STRENGTHS` and `pointing.SHARES`, under which a text is most probable.

    Args:
        model: a plain GPT-2.
        dataset: the text; with `carry_memory` a single stream, so that the cache fills as it does in a long one.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    runner, cache = Runner(model), _Entries(entries)
    with autocast():
        passes = []
        for rows in evaluation_rows(len(dataset), 1 if carry_memory else None, batch_size):
            batch = {name: x.to(device) for name, x in collate([dataset[row] for row in rows]).items()}
            passes.append((batch, runner.hidden_states(batch, carry_memory)[0].hidden))
        states = torch.cat([hidden[batch["shift_labels"] != IGNORED] for batch, hidden in passes])
        targets = torch.cat([batch["shift_labels"][batch["shift_labels"] != IGNORED] for batch, _ in passes])
        log_model = -predictions(model, HiddenStates(states), targets)["nll"].double().cpu()
    scale = float(states.double().square().sum(-1).mean())
    thetas = [strength / scale for strength in STRENGTHS]
    found: list[Tensor] = []  # probability of the target in the cache, [thetas, c]
    filled: list[Tensor] = []
    for batch, hidden in passes:
        for row, tokens, scores, visible, words in cache.attend(hidden, batch, carry_memory):
            right = words == batch["shift_labels"][row, tokens][:, None]
            found.append(torch.stack([(_weights(scores, visible, theta) * right).sum(-1) for theta in thetas]))
            filled.append(visible.any(-1))
    cached, any_entry = torch.cat(found, dim=1).double().cpu(), torch.cat(filled).double().cpu()
    best = (-math.inf, 0.0, 0.0)
    for theta, mass in zip(thetas, cached, strict=True):
        likelihood, share = best_share(log_model, mass, any_entry)
        best = max(best, (likelihood, -theta, -share))  # of equal ones the smaller theta
    model.train(was_training)
    return NeuralCache(entries, theta=-best[1], share=-best[2])


def trained_folder(name: str, checkpoints: list[str]) -> str | None:
    """The finished opponent beside one of these checkpoints, the first of them that has it beside it."""
    for checkpoint in checkpoints:
        folder = Path(checkpoint).parent / TRAINED[name]
        if (folder / "config.json").is_file():
            return str(folder)
    return None
