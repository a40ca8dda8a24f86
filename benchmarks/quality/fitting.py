"""What the studies of recall share: one way to train a small model, and results that are made once."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnc_gpt2.report import replacing

WEIGHT_DECAY, MAX_GRAD_NORM, WARMUP_STEPS, MIN_LR_RATE = 0.01, 1.0, 30, 0.05


def fit(parameters: Iterable[nn.Parameter], loss: Callable[[int], Tensor], steps: int, learning_rate: float) -> None:
    """Minimise `loss(step)` with AdamW, clipped gradients and a cosine schedule after a warm-up."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / WARMUP_STEPS) * (MIN_LR_RATE + (1 - MIN_LR_RATE) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What the JSON file `path` holds, made and written there first where it is missing."""
    if not path.is_file():
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Path(temporary).write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(path.read_text())


def settle(folder: Path, options: argparse.Namespace, *names: str) -> None:
    """Note in a folder with which of these options its results are made; end the process where they were others."""
    given = {name: str(getattr(options, name)) for name in names}
    noted = once(folder / "settings.json", lambda: given)
    for name, value in given.items():
        if noted.get(name) != value:
            sys.exit(f"{folder} holds results with --{name} {noted.get(name)}, not {value}: choose another --folder.")
