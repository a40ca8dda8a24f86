"""How much of a prediction should be left to what slots hold: found on text that the model was not trained on.

What a model was trained on it knows by heart, so that a share learned there would be too small.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from losses_dnc_gpt2 import IGNORED
from pointer_dnc_gpt2 import pointer_mass

from .evaluation import HiddenStates, Runner, evaluate, predictions
from .examples import ExampleDataset
from .models import has_memory

TUNING_TOKENS = 10_000
"""Most held-out tokens that a pointer or a neural cache is tuned on."""
SHARES = tuple(step / 100 for step in range(100))
"""Shares of a prediction, 0 to 0.99, that are tried."""


def best_share(log_model: Tensor, mass: Tensor, total: Tensor) -> tuple[float, float]:
    """The mean log-probability of M targets under the best of `SHARES`, and that share, the smallest of equal ones.

        p = (1 - share * total) p_model + share * mass

    Args:
        log_model: [M] log p_model of the targets.
        mass, total: [M] how much the other distribution gives to the target, and to anything.
    """
    found = []
    for share in SHARES:
        mixture = torch.logaddexp(torch.log1p(-share * total) + log_model, (share * mass).log())
        found.append((float(mixture.mean()), -share))
    likelihood, share = max(found)
    return likelihood, -share


def has_pointer(model: PreTrainedModel) -> bool:
    """Whether the slots of this model hold single tokens, which a prediction can point at."""
    return has_memory(model) and model.config.addressing == "lru"


class _PointerRunner(Runner):
    """Keeps of all targets what the model gives them without pointing, and what pointing would."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.found: list[Tensor] = []  # [3, M] of `best_share`

    def __call__(self, batch: dict[str, Tensor], carry_memory: bool) -> dict[str, Tensor]:
        scored = batch["shift_labels"] != IGNORED
        states, _ = self.hidden_states(batch, carry_memory)
        targets = batch["shift_labels"][scored]
        if len(targets):
            model = -predictions(self.model, HiddenStates(states.hidden[scored]), targets)["nll"]
            pointed = pointer_mass(states.slot_tokens[scored], states.read_weights[scored], targets)
            self.found.append(torch.stack([model.double(), *(x.double() for x in pointed)]).cpu())
        return {}


def tune_pointer(
    model: PreTrainedModel,
    dataset: ExampleDataset,
    *,
    carry_memory: bool = False,
    batch_size: int = 8,
    autocast: Callable = nullcontext,
) -> float:
    """Set the model's `config.pointer_weight` to the one of `SHARES` under which a text is most probable.

    Args:
        model: a causal language model with memory of addressing `"lru"`.
        dataset: the text, which it was not trained on; with `carry_memory` a single stream, so that the memory fills as
            it does in a long one.

    Returns: the weight.
    """
    if not has_pointer(model):
        raise ValueError("This model has no slots that hold single tokens to point at.")
    runner = _PointerRunner(model)
    evaluate(
        model,
        dataset,
        runner=runner,
        carry_memory=carry_memory,
        streams=1,
        batch_size=batch_size,
        autocast=autocast,
        progress=False,
    )
    _, model.config.pointer_weight = best_share(*torch.cat(runner.found, dim=1))
    return model.config.pointer_weight
