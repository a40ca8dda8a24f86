"""Configuration of GPT-2 with a differentiable external memory."""

import math

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config
from transformers.activations import ACT2FN

ADDRESSINGS = ("lru", "dnc", "simplified")
READ_PROJECTION_INITS = ("transpose", "zero", "normal")
SCANS = ("auto", "eager", "numba", "triton")


@strict
class DNCGPT2Config(GPT2Config):
    """GPT-2's configuration plus that of its memory. Every argument and alias of `GPT2Config` works.

    Args:
        mem_slots: number of memory rows N.
        mem_width: width W of a memory row.
        num_reads: number of read heads R.
        memory_layer: number of blocks below the memory, 1 to `n_layer`. Below a block, what is read is added to the
            hidden states that it and those above attend to; at `n_layer`, to the final ones. `None` means half of
            them, rounded up; a plain GPT-2 checkpoint is given a memory on top.
        addressing: `"lru"` (least-recently-used allocation over rows of an address and a value, the default),
            `"dnc"` (Graves et al. 2016) or `"simplified"` (softmax allocation without free gates).
        address_width: leading columns of a row that content addressing looks at (`"lru"` only; the others look at
            whole rows). `None` means half of `mem_width`.
        token_shift: write the token seen now under the context that preceded it (`"lru"`).
        address_token: make addresses of a context's hidden state and of its token, not of the hidden state alone
            (`"lru"`).
        surprise_weight: initial weight of a token's surprise, minus the logit that the backbone gave it, in its write
            gate's logit (`"lru"`).
        write_threshold: sigmoid up to which a write gate is shut, from where it opens to 1, in [0, 1) (`"lru"`). Tokens
            that are not worth a row then write nothing at all, however many they are.
        usage_decay: factor in (0, 1] by which usage shrinks with every whole write (`"lru"`).
        read_refresh: share of a read that counts as use, 0 or more (`"lru"`).
        write_gate_bias, allocation_gate_bias, erase_gate_bias, read_gate_bias: initial logits of these gates (`"lru"`).
        read_strength_init: initial read strength, one number for all heads or one a head (`"lru"`). `None` means 9 for
            one head and 4 to 32, geometrically spaced, for several: heads that start alike stay alike. Beyond 64 slots
            these grow with log(mem_slots), as the softmax has to tell a row from more others.
        read_projection_init: `"transpose"` of the write vector's projection, `"zero"` (the model then starts as its
            backbone) or `"normal"`. `None` means `"transpose"` for `"lru"` and `"normal"` otherwise.
        pointer_weight: share in [0, 1) of a prediction, outside of training, that goes to the tokens in the slots, to
            each as its slot is read (`"lru"`). 0 is none; `train.py` finds the best on held-out text.
        temporal_links: follow the order of writes when reading (`"dnc"`).
        masked_content, erase_on_free, sharpen_links: the three improvements of Csordas and Schmidhuber 2019 (`"dnc"`).
        scan: implementation of the recurrence: `"auto"` (numba on the CPU, Triton on CUDA), `"eager"`, `"numba"` or
            `"triton"`.

    Raises:
        StrictDataclassError: a value outside its range; the message names the field, the value and what is allowed.
    """

    model_type = "dnc_gpt2"
    # What `Trainer` does not gather from predictions.
    keys_to_ignore_at_inference = ["past_key_values", "memory_state"]

    mem_slots: int = 64
    mem_width: int = 128
    num_reads: int = 4
    memory_layer: int | None = None
    addressing: str = "lru"
    address_width: int | None = None
    token_shift: bool = True
    address_token: bool = True
    surprise_weight: float | int = 0.5
    write_threshold: float | int = 0.05
    usage_decay: float | int = 0.99
    read_refresh: float | int = 0.0
    write_gate_bias: float | int = 2.0
    allocation_gate_bias: float | int = 6.0
    erase_gate_bias: float | int = 4.0
    read_gate_bias: float | int = -1.0
    read_strength_init: float | int | list[float | int] | None = None
    read_projection_init: str | None = None
    pointer_weight: float | int = 0.0
    temporal_links: bool = True
    masked_content: bool = False
    erase_on_free: bool = False
    sharpen_links: bool = False
    scan: str = "auto"

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; a plain GPT-2 checkpoint is given a memory that leaves its logits as they are."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # Blocks that have learned without a memory gain no less from one on top. And there it lay in every checkpoint
        # that was saved before the layer was.
        layers = {"n_layer": cls.n_layer, **config, **kwargs}
        on_top = {"memory_layer": layers.get("num_hidden_layers", layers["n_layer"])}
        if config.get("model_type") == GPT2Config.model_type:
            # A backbone that has learned may give all tokens large logits of one sign, which would saturate the gate.
            start = {"read_projection_init": "zero", "surprise_weight": 0.0}
            config = {**config, "model_type": cls.model_type, **start, **on_top}
            config.pop("architectures", None)
        elif config.get("model_type") == cls.model_type:
            config = {**on_top, **config}
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, which sets `kwargs` on the built config: they are validated too."""
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).validate_memory()
        return result

    @property
    def address_columns(self) -> int:
        """Number of leading columns of a row that content addressing looks at."""
        if self.addressing != "lru":
            return self.mem_width
        return self.mem_width // 2 if self.address_width is None else self.address_width

    @property
    def blocks_below_memory(self) -> int:
        """Number of blocks below the memory: `memory_layer`, resolved."""
        return (self.n_layer + 1) // 2 if self.memory_layer is None else self.memory_layer

    @property
    def initial_read_projection(self) -> str:
        """How the read projection starts: `read_projection_init`, resolved."""
        if self.read_projection_init is None:
            return "transpose" if self.addressing == "lru" else "normal"
        return self.read_projection_init

    def validate_memory(self):
        """Part of `@strict`'s validation, which runs when the config is built."""
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "mem_slots", "mem_width", "num_reads"):
            self._require(name, getattr(self, name) >= 1, "an integer of at least 1")
        self._require("n_embd", self.n_embd % self.n_head == 0, f"a multiple of n_head={self.n_head}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._require("n_inner", self.n_inner is None or self.n_inner >= 1, "None or an integer of at least 1")
        self._require("activation_function", self.activation_function in ACT2FN, f"one of {sorted(ACT2FN)}")
        self._require("layer_norm_epsilon", 0 < self.layer_norm_epsilon < math.inf, "a finite number above 0")
        self._require("initializer_range", 0 <= self.initializer_range < math.inf, "a finite number of at least 0")
        allowed = f"None or an integer from 1 to n_layer={self.n_layer}"
        self._require("memory_layer", 1 <= self.blocks_below_memory <= self.n_layer, allowed)
        self._require("addressing", self.addressing in ADDRESSINGS, f"one of {ADDRESSINGS}")
        self._require("scan", self.scan in SCANS, f"one of {SCANS}")
        if self.addressing == "lru":
            self._require("mem_width", self.mem_width >= 2, 'at least 2 with addressing="lru" (an address and a value)')
            allowed = f"None or an integer from 1 to mem_width - 1 = {self.mem_width - 1}"
            self._require("address_width", 1 <= self.address_columns < self.mem_width, allowed)
        else:
            allowed = f'None with addressing="{self.addressing}", which looks at whole rows'
            self._require("address_width", self.address_width is None, allowed)
        allowed = "false without temporal_links, for there are no links to sharpen"
        self._require("sharpen_links", self.temporal_links or not self.sharpen_links, allowed)
        self._require("write_threshold", 0 <= self.write_threshold < 1, "a number in [0, 1)")
        self._require("pointer_weight", 0 <= self.pointer_weight < 1, "a number in [0, 1)")
        allowed = f'0 with addressing="{self.addressing}", whose slots do not hold single tokens'
        self._require("pointer_weight", self.addressing == "lru" or self.pointer_weight == 0, allowed)
        self._require("usage_decay", 0 < self.usage_decay <= 1, "a number in (0, 1]")
        self._require("read_refresh", 0 <= self.read_refresh < math.inf, "a finite number of at least 0")
        biases = ("write_gate_bias", "allocation_gate_bias", "erase_gate_bias", "read_gate_bias")
        for name in ("surprise_weight", *biases):
            self._require(name, math.isfinite(getattr(self, name)), "a finite number")
        initial = self.read_strength_init
        strengths = initial if isinstance(initial, list) else [2.0 if initial is None else initial]
        self._require(
            "read_strength_init",
            all(1 < strength < math.inf for strength in strengths) and len(strengths) in (1, self.num_reads),
            f"None, a finite number above 1, or a list of num_reads={self.num_reads} of them",
        )
        allowed = f"one of {READ_PROJECTION_INITS} or None"
        self._require("read_projection_init", self.initial_read_projection in READ_PROJECTION_INITS, allowed)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"DNCGPT2Config: {name}={getattr(self, name)!r} is not allowed; it must be {allowed}.")

    @property
    def initial_read_strengths(self) -> list[float]:
        """Starting strength of each read head."""
        heads = self.num_reads
        if isinstance(self.read_strength_init, list):
            return [float(strength) for strength in self.read_strength_init * (heads // len(self.read_strength_init))]
        if self.read_strength_init is not None:
            return [float(self.read_strength_init)] * heads
        strengths = [4.0 * 8.0 ** (head / (heads - 1)) for head in range(heads)] if heads > 1 else [9.0]
        growth = max(1.0, math.log(self.mem_slots, 64))
        return [growth * strength for strength in strengths]


DNCGPT2Config.register_for_auto_class()

__all__ = ["DNCGPT2Config"]
