"""A memory within GPT-2's stack: written and read below one of the blocks, so that those above attend to its reads."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class Stack:
    """One pass through the blocks. It is passed to every block as the keyword `stack`: see `read_between`."""

    def __init__(self, layer: int, read: Callable[[Tensor], Tensor], repeatable: bool):
        """
        Args:
            layer: index of the block that the memory lies below.
            read: hidden states of the rows as they are attended to [rows, columns, H] -> what is added to them.
            repeatable: whether `without_read` is to follow.
        """
        self.layer, self.read, self.repeatable = layer, read, repeatable
        self.entered: tuple[tuple, dict[str, Any], tuple | None] | None = None

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the block that the memory lies below is called with."""
        hidden, *others = args
        if self.repeatable:
            # Where there is dropout, both passes are to drop the same.
            self.entered = args, kwargs, _random_state(hidden) if block.training else None
        return (hidden + self.read(hidden).to(hidden.device), *others), kwargs

    def without_read(self, blocks: Iterable[nn.Module]) -> Tensor:
        """The same pass through the blocks from `layer` on, but for the reads: hidden states before the last norm.

        Keys and values are not cached.
        """
        (hidden, _, *others), kwargs, random_state = self.entered
        devices = [hidden.device] if hidden.device.type != "cpu" else []
        with torch.random.fork_rng(devices, enabled=random_state is not None, device_type=hidden.device.type):
            if random_state is not None:
                torch.set_rng_state(random_state[0])
                set_device_states(*random_state[1:])
            for block in blocks:
                hidden = block(hidden, None, *others, **{**kwargs, "use_cache": False})
        return hidden


def _random_state(hidden: Tensor) -> tuple:
    """What dropout of these hidden states is drawn from: the processor's state, devices and theirs."""
    return torch.get_rng_state(), *get_device_states(hidden)


def read_between(blocks: Iterable[nn.Module]) -> None:
    """Let GPT-2's blocks take the keyword `stack`.

    A hook, for what a block's own `forward` computes is computed twice where gradients are checkpointed, and a memory
    has a state.
    """
    for block in blocks:
        block.register_forward_pre_hook(_before_block, with_kwargs=True)


def _before_block(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    stack = kwargs.pop("stack", None)
    if stack is None or block.attn.layer_idx != stack.layer:
        return args, kwargs
    return stack.enter(block, args, kwargs)
