"""GPT-2 with a differentiable external memory that reaches beyond the attention window.

The backbone attends within windows of `n_positions` tokens: position p lives in window p // n_positions at place
p % n_positions. The memory runs over all of them. Windows are attended to as rows of their own, their tokens packed to
the left, so that plain causal attention is right for every padding and packing.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, GPT2PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationConfig, GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import is_flash_attention_requested

try:
    from .cache_dnc_gpt2 import DNCGPT2Cache, DNCGPT2StaticCache, Folding, Record, Rows, last_real, locate
    from .configuration_dnc_gpt2 import DNCGPT2Config
    from .inputs_dnc_gpt2 import check_choice, check_ids, check_inputs, check_positions, check_state, check_targets
    from .losses_dnc_gpt2 import IGNORED, causal_lm_losses, next_tokens
    from .masks_dnc_gpt2 import Ancestry, branching_memory, visible_tokens
    from .memory_dnc_gpt2 import DNCMemory, MemoryOutput, MemoryState
    from .pointer_dnc_gpt2 import mix
    from .stack_dnc_gpt2 import Stack, read_between
except ImportError:
    from cache_dnc_gpt2 import DNCGPT2Cache, DNCGPT2StaticCache, Folding, Record, Rows, last_real, locate
    from configuration_dnc_gpt2 import DNCGPT2Config
    from inputs_dnc_gpt2 import check_choice, check_ids, check_inputs, check_positions, check_state, check_targets
    from losses_dnc_gpt2 import IGNORED, causal_lm_losses, next_tokens
    from masks_dnc_gpt2 import Ancestry, branching_memory, visible_tokens
    from memory_dnc_gpt2 import DNCMemory, MemoryOutput, MemoryState
    from pointer_dnc_gpt2 import mix
    from stack_dnc_gpt2 import Stack, read_between


logger = logging.get_logger(__name__)

FLATTENED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""What `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` says beside `position_ids`, and no more."""


@dataclass
class DNCGPT2ModelOutput(ModelOutput):
    """Output of `DNCGPT2Model`.

    Attributes:
        last_hidden_state: [B, T, H], the final hidden state.
        base_hidden_state: [B, T, H], with `output_base_hidden_state`: the backbone's without any read.
        past_key_values: `DNCGPT2Cache` with `use_cache`.
        hidden_states, attentions, cross_attentions: as GPT-2's; the last of `hidden_states` is `last_hidden_state`.
            What is read in mid-stack is added after the one at `config.blocks_below_memory`.
        memory_state: `MemoryState` after the last token.
        write_gates [B, T], write_weights [B, T, N], read_weights [B, T, R, N], read_strengths [B, T, R]: with
            `output_memory`.
        slot_tokens: [B, T, N], 1 + id of the token that each slot holds, 0 where there is none: with `output_memory`
            outside of training, of a memory of addressing `"lru"`.
    """

    last_hidden_state: Tensor | None = None
    base_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    memory_state: MemoryState | None = None
    write_gates: Tensor | None = None
    write_weights: Tensor | None = None
    read_weights: Tensor | None = None
    read_strengths: Tensor | None = None
    slot_tokens: Tensor | None = None


@dataclass
class DNCGPT2CausalLMOutput(ModelOutput):
    """Output of `DNCGPT2LMHeadModel`: see `DNCGPT2ModelOutput` for the fields of the same name.

    Attributes:
        loss: cross-entropy alone, whatever else a trainer adds.
        logits: [B, T, V], unless `output_logits=False`.
        base_logits: [B, T, V] with `output_base_logits`: of the backbone without any read.
        correct: [B, T] bool with `output_logits=False`: whether the target is the most probable token.
        divergence: [B, T] with `output_logits=False` and `output_divergence`: KL(p_memory || p_no_memory) in nats of
            the scored tokens that it was asked for, else 0. Detached.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    base_logits: Tensor | None = None
    correct: Tensor | None = None
    divergence: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    memory_state: MemoryState | None = None
    write_gates: Tensor | None = None
    write_weights: Tensor | None = None
    read_weights: Tensor | None = None
    read_strengths: Tensor | None = None
    slot_tokens: Tensor | None = None


class DNCGPT2PreTrainedModel(GPT2PreTrainedModel):
    """Loading, saving and initialisation."""

    config: DNCGPT2Config
    _no_split_modules = ["GPT2Block", "DNCMemory"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but from safetensors only: pickled weights can run code."""
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False is not allowed: save the checkpoint again as safetensors.")
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})

    def _upload_modified_files(self, working_dir: str, *args, **kwargs):
        # Transformers has written a generic card there. Where the model was loaded from a folder whose card tells of
        # it, that one goes with it, with the tags that were asked for.
        folder, target = Path(self.config._name_or_path), Path(working_dir) / "README.md"
        if self._has_card(folder) and not target.samefile(folder / "README.md"):
            card = ModelCard.load(folder / "README.md")
            tags = [*(card.data.tags or []), *(ModelCard.load(target).data.tags or [])]
            card.data.tags = list(dict.fromkeys(tags)) or None
            card.save(target)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _has_card(self, folder: Path) -> bool:
        config = folder / "config.json"
        if not (self.config._name_or_path and config.is_file() and (folder / "README.md").is_file()):
            return False
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == self.config.model_type

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers, modules without parameters of their own are passed over, and with them
        # GPT-2's scaled residual projections and the memory. All of ours initialise parameter by parameter.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DNCMemory):
            module.init_weights()


def _give_peft_defaults() -> None:
    """Let PEFT, where it is imported, adapt the backbone as it adapts GPT-2 if no target modules are named.

    PEFT keeps these defaults in tables by model type, to which there is no other way. It is not imported for this.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and GPT2Config.model_type in table:
            table.setdefault(DNCGPT2Config.model_type, table[GPT2Config.model_type])


class DNCGPT2Model(DNCGPT2PreTrainedModel, GPT2Model):
    """GPT-2's backbone with a memory in or on its stack. Parameters are named as in `GPT2Model`, plus `memory.*`."""

    def __init__(self, config: DNCGPT2Config):
        if not hasattr(config, "addressing"):
            raise ValueError(
                f"A {type(config).__name__} says nothing of a memory: pass a DNCGPT2Config; "
                "DNCGPT2Config.from_pretrained reads one from a GPT-2's folder, too."
            )
        GPT2Model.__init__(self, config)
        self.memory = DNCMemory(config)
        self.mid_stack = config.blocks_below_memory < config.n_layer
        if self.mid_stack:
            read_between(self.h)
        _give_peft_defaults()
        self.post_init()

    @property
    def window_size(self) -> int:
        """Tokens of an attention window."""
        return self.wpe.num_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        memory_state: MemoryState | None = None,
        memory_reset: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_memory: bool = False,
        output_base_hidden_state: bool = False,
        detach_base_hidden_state: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> DNCGPT2ModelOutput:
        """Attend within windows, and write to and read from the memory once a token.

        Args:
            input_ids: [B, T], any T.
            attention_mask: [B, T], or [B, past + T] with a cache; 0 marks padding, anywhere in a row. Or a custom mask
                [B or 1, heads or 1, T, past + T], bool or additive: each token's memory goes on from that after the
                last token before it that it sees, even where several continue the same one.
            position_ids: [B, T]. Without them the real tokens of each row are counted. Where a position does not
                exceed the one before, a new document begins, with an empty memory.
            past_key_values: a cache that this model returned, to go on inside a window.
            memory_state: the state that this model returned for the same rows, to go on with the next window.
            memory_reset: [B, T] bool, tokens before which the memory is emptied.
            encoder_hidden_states, encoder_attention_mask: as GPT-2's, for `add_cross_attention`; within one window.
            output_memory: also return gates and weights.
            output_base_hidden_state: also return the final hidden state of the backbone without any read. Of a memory
                in mid-stack this takes a second pass through the blocks above it, and no cache that holds tokens: what
                those see there has been read.
            detach_base_hidden_state: without gradients, so that the second pass keeps nothing for a backward one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            check_ids(input_ids, self.config.vocab_size, meta=self.device.type == "meta")
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids)
        batch, tokens, _ = inputs_embeds.shape
        check_inputs(batch, tokens, attention_mask, position_ids, memory_reset)
        custom = attention_mask is not None and attention_mask.dim() == 4
        mask = None if custom else self._real_tokens(attention_mask, batch, tokens)
        if position_ids is not None and not custom:
            check_positions(position_ids, mask)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                self._check_nothing_cached(past_key_values)
            past_key_values, use_cache = None, False
        # A cache that is given is gone on from, whether or not a new one would be made.
        cache = self._cache(past_key_values, batch) if use_cache or past_key_values is not None else None
        if output_base_hidden_state and self.mid_stack and cache is not None and cache.has_tokens:
            raise ValueError(
                "What a memory in mid-stack has changed cannot be told from a cache on: for output_base_logits, "
                "output_base_hidden_state or output_divergence pass the whole text, without past_key_values."
            )
        if position_ids is None and not FLATTENED.isdisjoint(kwargs):
            raise ValueError(
                f"{', '.join(FLATTENED & kwargs.keys())} tell of flattened rows: pass position_ids as well."
            )
        # Where these are not given, the config decides. Rows that are attended to begin and end with windows, which
        # what is told of flattened ones does not know.
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        options |= {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        options = {name: option for name, option in options.items() if option is not None}
        options |= {name: option for name, option in kwargs.items() if name not in FLATTENED}
        if not custom and self._needs_mask_of_pairs(cache, mask, position_ids, tokens):
            inputs = {"token_type_ids": token_type_ids, "position_ids": position_ids, "memory_reset": memory_reset}
            tokens_given = {"inputs_embeds": inputs_embeds} if input_ids is None else {"input_ids": input_ids}
            inputs |= {**tokens_given, "attention_mask": mask}
            options |= {"output_memory": output_memory, "output_base_hidden_state": output_base_hidden_state}
            options |= {"detach_base_hidden_state": detach_base_hidden_state}
            return self._one_by_one(inputs, tokens, past_key_values=cache, **options)
        before = cache.snapshot() if cache is not None and cache.is_recording else None
        state = cache.memory_state if cache is not None and cache.has_tokens else memory_state
        if state is not None and state is memory_state:
            check_state(state, MemoryState._fields, self.config.vocab_size)
        ancestry = None
        if custom:
            if is_flash_attention_requested(self.config):
                raise ValueError(
                    "Flash attention takes no custom 4D attention_mask: call `set_attn_implementation('sdpa')` before."
                )
            seen = tokens + (cache.get_seq_length() if cache is not None else 0)
            visible = visible_tokens(attention_mask, batch, tokens, seen)
            ancestry = Ancestry.of(visible)
            mask = ancestry.real
        ids = input_ids, output_memory and not self.training

        def remember(hidden: Tensor, real: Tensor | None, reset: Tensor | None) -> MemoryOutput:
            if ancestry is None or not ancestry.branches:
                return self.memory(hidden, inputs_embeds, state, real, reset, *ids)
            told = ancestry._replace(real=real)
            return branching_memory(self.memory, hidden, inputs_embeds, state, told, reset, *ids)

        recall = Recall(remember, mask, memory_reset, output_base_hidden_state)
        if custom:
            attention = self._attend_as_told(
                inputs_embeds, token_type_ids, attention_mask, visible, ancestry, position_ids, cache, recall, options
            )
        else:
            attention = self._attend(inputs_embeds, token_type_ids, mask, position_ids, cache, recall, options)
        output, memory = attention.output, recall.output
        if isinstance(cache, DNCGPT2StaticCache) and output.attentions is not None:
            # To the columns that the buffers have, as GPT-2's.
            output.attentions = tuple(F.pad(x, (0, max(0, cache.columns - x.shape[-1]))) for x in output.attentions)
        if cache is not None:
            if before is not None:
                attended = [(layer.keys, layer.values) for layer in cache.layers]

                def replay(removed: int) -> None:
                    """What follows, without the last tokens."""
                    cache.restore(before._replace(keys_and_values=attended))
                    attention.keep(removed)
                    real = inputs_embeds.new_ones((batch, tokens), dtype=torch.bool) if mask is None else mask
                    cache.memory_state = recall.again(_without_last(real, removed)).state
                    cache.count(tokens - removed)

                cache.record(Record(before, tokens, replay))
            attention.keep(0)
            cache.memory_state = memory.state
            cache.count(tokens)
        base = None
        if output_base_hidden_state:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_base_hidden_state):
                base = attention.base()
            if detach_base_hidden_state:
                base = base.detach()  # on top of the stack it is one of the first pass
        return DNCGPT2ModelOutput(
            last_hidden_state=output.last_hidden_state,
            base_hidden_state=base,
            past_key_values=cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
            memory_state=memory.state,
            write_gates=memory.write_gates if output_memory else None,
            write_weights=memory.write_weights if output_memory else None,
            read_weights=memory.read_weights if output_memory else None,
            read_strengths=memory.read_strengths if output_memory else None,
            slot_tokens=memory.slot_tokens,
        )

    def _needs_mask_of_pairs(self, cache, mask: Tensor | None, position_ids: Tensor | None, tokens: int) -> bool:
        """Whether these tokens need a mask that flash attention has none for: which new token sees which other."""
        if tokens == 1 or cache is None or not cache.has_tokens or not is_flash_attention_requested(self.config):
            return False
        position = cache.position
        alike = position is not None and mask is None and _counts_on(position_ids, position + 1, tokens)
        return not alike or (position + 1) % self.window_size + tokens > self.window_size

    def _one_by_one(self, inputs: dict[str, Tensor | None], tokens: int, **options) -> DNCGPT2ModelOutput:
        """Each of the tokens in a pass of its own."""
        outputs = [
            self(**{name: None if x is None else x[:, t : t + 1] for name, x in inputs.items()}, **options)
            for t in range(tokens)
        ]

        def joined(name: str) -> Any:
            parts = [getattr(output, name) for output in outputs]
            if parts[0] is None or isinstance(parts[0], Tensor):
                return parts[0] if parts[0] is None else torch.cat(parts, dim=1)
            return tuple(torch.cat(layer, dim=1) for layer in zip(*parts, strict=True))

        along_tokens = ("last_hidden_state", "base_hidden_state", "hidden_states")
        along_tokens += ("write_gates", "write_weights", "read_weights", "read_strengths", "slot_tokens")
        last = {name: getattr(outputs[-1], name) for name in ("past_key_values", "memory_state")}
        return DNCGPT2ModelOutput(**last, **{name: joined(name) for name in along_tokens})

    @staticmethod
    def _real_tokens(attention_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """[B, T] bool, `None` where it is plain that all are real."""
        if attention_mask is None:
            return None
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < tokens:
            raise ValueError(
                f"attention_mask has shape {shape}; it must be [batch, tokens] with batch = {batch} and cover all "
                f"{tokens} tokens."
            )
        mask = attention_mask[:, -tokens:].bool()
        return None if _all(mask) else mask

    @staticmethod
    def _check_nothing_cached(past_key_values: Cache) -> None:
        """Gradient checkpointing computes a block twice, which would fill a cache twice: an empty one stays so."""
        if past_key_values.get_seq_length() > 0:
            raise ValueError(
                "Gradient checkpointing cannot go on from past_key_values while training: pass the memory_state at "
                "the end of a window, or call gradient_checkpointing_disable()."
            )
        logger.warning_once("Gradient checkpointing fills no cache while training: past_key_values stays empty.")

    def _cache(self, past_key_values: Cache | None, batch: int) -> DNCGPT2Cache | DNCGPT2StaticCache:
        if past_key_values is None:
            return DNCGPT2Cache(self.config)
        if isinstance(past_key_values, DNCGPT2Cache | DNCGPT2StaticCache):
            held = past_key_values.layers[0].keys
            fixed = past_key_values.has_tokens or isinstance(past_key_values, DNCGPT2StaticCache)
            if fixed and held is not None and held.shape[0] != batch:
                raise ValueError(f"past_key_values is of batch size {held.shape[0]}, the input of {batch}.")
            return past_key_values
        kind = type(past_key_values).__name__
        if past_key_values.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values is a {kind} without a memory state; pass the past_key_values that this model "
                "returned, or None."
            )
        if type(past_key_values) is StaticCache:
            return DNCGPT2StaticCache(self.config, past_key_values.get_max_length())
        if type(past_key_values) is not DynamicCache:
            logger.warning_once(f"A {kind} cannot hold a memory: a DNCGPT2Cache takes its place.")
        return DNCGPT2Cache(self.config)

    def _attend(self, embeds, token_type_ids, mask, position_ids, cache, recall, options) -> "Attention":
        """The backbone: each token sees its own window."""
        continued = cache is not None and cache.has_tokens
        position = cache.position if continued else -1
        inputs = {"inputs_embeds": embeds, "token_type_ids": token_type_ids, **options}
        alike = position is not None and mask is None and _counts_on(position_ids, position + 1, embeds.shape[1])
        # An exported graph for all lengths folds even what fits one window.
        one_window = not isinstance(embeds.shape[1], torch.SymInt) and embeds.shape[1] <= self.window_size
        if continued:
            attend = self._attend_onward_alike if alike else self._attend_onward
        else:
            right_padded = mask is not None and position_ids is None and _all(mask[:, :-1] | ~mask[:, 1:])
            attend = self._attend_one_window if one_window and (alike or right_padded) else self._attend_in_windows
        return attend(inputs, mask, None if alike else position_ids, cache, recall)

    def _run(
        self,
        inputs: dict[str, Any],
        cache: Cache | None,
        recall: "Recall",
        restarts: Tensor | None = None,
        fold: Callable[[Tensor], Tensor] = lambda x: x,
        unfold: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> tuple[ModelOutput, Callable[[], Tensor]]:
        """GPT-2's stack over rows as they are attended to, and the memory where it lies.

        Args:
            restarts: [B, T] bool, tokens before which a new document begins.
            fold, unfold: [B, T, H] -> rows as they are attended to, and back.

        Returns: GPT-2's output, its hidden states [B, T, H], and what gives the final one without any read.
        """
        stack = None
        if self.mid_stack:
            stack = Stack(
                self.config.blocks_below_memory,
                lambda hidden: fold(recall(unfold(self.ln_f(hidden)), restarts)),
                recall.compares,
            )
            inputs["stack"] = stack
        output = super().forward(past_key_values=cache, use_cache=cache is not None, **inputs)
        final = base = unfold(output.last_hidden_state)
        if stack is None:
            final = base + recall(base, restarts)
        output.last_hidden_state = final
        if output.hidden_states is not None:
            # Of layers that were not asked for there is none.
            below = (x if x is None else unfold(x) for x in output.hidden_states[:-1])
            output.hidden_states = (*below, final)

        def without_read() -> Tensor:
            return base if stack is None else unfold(self.ln_f(stack.without_read(self.h[stack.layer :])))

        return output, without_read

    def _attend_one_window(self, inputs, mask, position_ids, cache, recall) -> "Attention":
        """All rows in their first window, padding last, where no real token sees it: exactly GPT-2."""
        batch, tokens, _ = inputs["inputs_embeds"].shape
        # Zero at padding, as in folded windows.
        padding = {} if mask is None else {"unfold": lambda x: x.masked_fill(~mask[..., None], 0)}
        output, base = self._run(inputs, cache, recall, **padding)

        def keep(removed: int) -> None:
            if mask is None:
                cache.keep_alike(batch, tokens - removed - 1, 0)
            else:
                cache.keep_right_padded(_without_last(mask, removed), tokens - removed)

        return Attention(output, base, keep)

    def _attend_in_windows(self, inputs, mask, position_ids, cache, recall) -> "Attention":
        """Windows as rows of their own, from the start of one."""
        if inputs.get("encoder_hidden_states") is not None:
            raise ValueError(
                f"Cross-attention works within one attention window of n_positions={self.window_size} tokens whose "
                "padding comes last: pass shorter or right-padded inputs."
            )
        embeds, types = inputs["inputs_embeds"], inputs["token_type_ids"]
        batch, tokens, _ = embeds.shape
        size = self.window_size
        real = embeds.new_ones((batch, tokens), dtype=torch.bool) if mask is None else mask
        layout = locate(real, position_ids, size)
        # Positions counted from 0 bound the number of windows by the shape alone.
        bound = -(-tokens // size)
        num_windows = bound if position_ids is None else 1 + int((layout.windows * real).amax())
        folding = Folding(layout, real, size, num_windows)
        inputs |= {
            "inputs_embeds": folding.fold(embeds),
            "token_type_ids": None if types is None else folding.fold(types),
        }
        if position_ids is not None:
            # Given positions may leave gaps. The mask keeps the backbone from taking gaps for packed sequences; its
            # first column stays visible where a row has no such window, for attention needs something to look at.
            visible = folding.fold(real)
            visible[:, 0] = True
            inputs |= {"position_ids": folding.fold(layout.positions % size), "attention_mask": visible}
        output, base = self._run(inputs, cache, recall, layout.restarts, folding.fold, folding.unfold)
        if output.attentions is not None:
            output.attentions = tuple(folding.unfold_attention(x) for x in output.attentions)

        def keep(removed: int) -> None:
            if mask is None and position_ids is None:
                cache.keep_alike(batch, tokens - removed - 1, 0, num_windows)
            else:
                cache.keep_first(layout, _without_last(real, removed), folding, tokens - removed)

        return Attention(output, base, keep)

    def _attend_onward_alike(self, inputs, mask, position_ids, cache, recall) -> "Attention":
        """Rows that all go on from the same position of a cache."""
        batch, tokens, _ = inputs["inputs_embeds"].shape
        device, size, last = inputs["inputs_embeds"].device, self.window_size, cache.position
        place = (last + 1) % size
        if place == 0:  # the windows held are full
            cache.keep(None, slice(0, 0))
        held, seen = cache.held, cache.seen_tokens
        if tokens == 1:
            inputs["position_ids"] = torch.full((1, 1), place, device=device)
        else:
            places = torch.arange(place, place + tokens, device=device)
            inputs["position_ids"] = (places % size)[None]
            if place + tokens > size:
                windows = torch.cat([places.new_zeros(held), places // size])
                visible = (windows[held:, None] == windows).tril(held)
                inputs["attention_mask"] = _bias(visible[None], inputs["inputs_embeds"].dtype)
        output, base = self._run(inputs, cache, recall)
        if output.attentions is not None:
            output.attentions = tuple(F.pad(x, (seen - held, 0)) for x in output.attentions)

        def keep(removed: int) -> None:
            position = last + tokens - removed
            cache.keep_alike(batch, position, held + tokens - removed - (position % size + 1))

        return Attention(output, base, keep)

    def _attend_onward(self, inputs, mask, position_ids, cache, recall) -> "Attention":
        """Rows that go on from a cache, each in its own window."""
        embeds = inputs["inputs_embeds"]
        batch, tokens, _ = embeds.shape
        size, rows = self.window_size, cache.rows
        real = embeds.new_ones((batch, tokens), dtype=torch.bool) if mask is None else mask
        layout = locate(real, position_ids, size, rows.last_positions)
        windows = layout.windows
        inputs["position_ids"] = torch.where(real, layout.positions % size, 0)
        if tokens == 1:
            # A row whose token is not real points somewhere as well, but leaves what is there.
            columns = torch.where(windows[:, 0] > 0, 0, rows.lengths).clamp_max(size - 1)
            width = cache.aim(columns, None if mask is None else mask[:, 0])
            visible = torch.arange(width, device=embeds.device) <= columns[:, None, None]
        else:
            current = cache.current()
            among_new = (windows[:, :, None] == windows[:, None]) & real[:, None]
            to_cached = (windows == 0)[:, :, None] & current[:, None]
            visible = torch.cat([to_cached, among_new.tril()], dim=-1)
        flash = tokens == 1 and is_flash_attention_requested(self.config)
        inputs["attention_mask"] = visible[:, 0] if flash else _bias(visible, embeds.dtype)
        output, base = self._run(inputs, cache, recall, layout.restarts)
        if output.attentions is not None and rows.origins is not None:
            appended = torch.arange(tokens, device=embeds.device).expand(batch, -1) + cache.seen_tokens
            origins = torch.cat([rows.origins, appended], dim=-1)
            if tokens == 1:
                origins = F.pad(rows.origins, (0, width - rows.origins.shape[1])).scatter(1, columns[:, None], appended)
            output.attentions = tuple(_place(x, origins, cache.seen_tokens + tokens) for x in output.attentions)

        def keep(removed: int) -> None:
            if tokens == 1:
                cache.keep_one(rows, columns, real[:, 0], layout.positions[:, 0])
            else:
                cache.keep_onward(rows, current, layout, _without_last(real, removed), tokens - removed)

        return Attention(output, base, keep)

    def _attend_as_told(
        self, embeds, token_type_ids, attention_mask, visible, ancestry, position_ids, cache, recall, options
    ) -> "Attention":
        """A custom mask [B or 1, heads or 1, T, S], within windows; positions are counted unless they are given."""
        batch, tokens, _ = embeds.shape
        device, size = embeds.device, self.window_size
        nothing = torch.zeros(batch, dtype=torch.long, device=device)
        rows, position = Rows(nothing, nothing - 1, nothing[:, None][:, :0]), -1
        current = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        if cache is not None and cache.has_tokens:
            if cache.position is None:
                raise ValueError(
                    "A custom 4D attention_mask goes on only from a dynamic cache whose rows have seen as many tokens."
                )
            rows, current, position = cache.rows, cache.current(), cache.position
        if position_ids is None:
            position_ids = torch.arange(position + 1, position + 1 + tokens, device=device)[None]
        positions = position_ids.expand(batch, -1)
        windows = positions // size - max(position, 0) // size
        places = torch.cat([torch.zeros_like(current, dtype=torch.long), windows], dim=1)
        same = windows[:, :, None] == places[:, None]
        told, visible = attention_mask[..., -same.shape[-1] :], visible[..., -same.shape[-1] :]
        if not told.is_floating_point():
            told = torch.zeros_like(told, dtype=embeds.dtype).masked_fill_(told == 0, torch.finfo(embeds.dtype).min)
        told = told.to(embeds.dtype).masked_fill(~same[:, None], torch.finfo(embeds.dtype).min)
        inputs = {"inputs_embeds": embeds, "token_type_ids": token_type_ids, **options}
        inputs |= {"position_ids": positions % size, "attention_mask": told}
        output, base = self._run(inputs, cache, recall, ancestry.reset)
        seen = 0 if cache is None else cache.get_seq_length()
        if output.attentions is not None:
            output.attentions = tuple(F.pad(x, (seen - current.shape[1], 0)) for x in output.attentions)

        def keep(removed: int) -> None:
            # What each row's last token sees: a following one goes on from there.
            kept_real = _without_last(ancestry.real, removed)
            last = (torch.arange(tokens, device=device) * kept_real).amax(-1)
            kept = (visible & same)[torch.arange(batch, device=device), last]
            kept[:, current.shape[1] :] &= kept_real
            # A row without a new token keeps what it held.
            kept = torch.where(kept_real.any(-1, keepdim=True), kept, F.pad(current, (0, tokens)))
            last_positions = last_real(positions, kept_real, rows.last_positions)
            cache.keep_some(rows, kept, last_positions, tokens - removed)

        return Attention(output, base, keep)


class Attention(NamedTuple):
    """What the stack answers for [B, T] tokens."""

    output: ModelOutput
    base: Callable[[], Tensor]  # gives the final hidden state without any read
    keep: Callable[[int], None]  # lets the cache keep the tokens, but for so many of the last


class Recall:
    """The memory's part in one pass over [B, T] tokens: run when the hidden states that it looks at are known.

    Attributes:
        compares: whether the hidden states without the reads are wanted, too.
        output: of the memory, once it has run.
    """

    def __init__(
        self,
        remember: Callable[[Tensor, Tensor | None, Tensor | None], MemoryOutput],
        real: Tensor | None,
        reset: Tensor | None,
        compares: bool,
    ):
        """
        Args:
            remember: the memory, of hidden states [B, T, H], real tokens and those before which it is emptied.
            real, reset: [B, T] bool.
        """
        self._remember, self._real, self._reset = remember, real, reset
        self.compares = compares
        self.output: MemoryOutput | None = None

    def __call__(self, hidden: Tensor, restarts: Tensor | None) -> Tensor:
        """What is read, to be added: [B, T, H]. `restarts` [B, T] bool empties the memory, too."""
        self._hidden, self._reset = hidden, _either(self._reset, restarts)
        self.output = self.again(self._real)
        return self.output.hidden_states

    def again(self, real: Tensor | None) -> MemoryOutput:
        """The same once more, of these tokens."""
        return self._remember(self._hidden, real, self._reset)


def _either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one | other


def _all(mask: Tensor) -> bool:
    """Whether all is True, as far as can be told without data: compilers cannot branch on these."""
    return not torch.compiler.is_compiling() and bool(mask.all())


def _counts_on(position_ids: Tensor | None, first: int, tokens: int) -> bool:
    """Whether the positions of all rows are first, first + 1, ..."""
    if position_ids is None:
        return True
    expected = first if tokens == 1 else torch.arange(first, first + tokens, device=position_ids.device)
    return _all(position_ids == expected)


def _without_last(real: Tensor, removed: int) -> Tensor:
    """`real` [B, T] with its last columns False."""
    if not removed:
        return real
    return real & (torch.arange(real.shape[1], device=real.device) < real.shape[1] - removed)


def _place(attention: Tensor, origins: Tensor, seen: int) -> Tensor:
    """[B, heads, T, K] -> [B, heads, T, seen]: column k at place `origins[:, k]` [B, K], zero elsewhere."""
    index = origins[:, None, None].expand_as(attention)
    # Columns without a token may claim places of others, but have no attention to add.
    return attention.new_zeros((*attention.shape[:3], seen)).scatter_add(-1, index, attention)


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, S] bool -> [B, 1, T, S], what attention adds to its scores."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


class DNCGPT2LMHeadModel(DNCGPT2PreTrainedModel, GenerationMixin):
    """`DNCGPT2Model` with GPT-2's language-modelling head, tied to the token embeddings.

    Outside of training, `config.pointer_weight` of each prediction goes to the tokens that the memory's slots hold (see
    `pointer_dnc_gpt2`): the logits are then those of the mixture. Trained with it, the memory learns to read less well.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: DNCGPT2Config):
        super().__init__(config)
        self.transformer = DNCGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        memory_state: MemoryState | None = None,
        memory_reset: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_memory: bool = False,
        output_base_logits: bool = False,
        output_logits: bool = True,
        output_divergence: Tensor | bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> DNCGPT2CausalLMOutput:
        """See `DNCGPT2Model.forward` for the inputs it shares.

        Args:
            labels: [B, T] token ids, shifted inside, or -100 to ignore.
            shift_labels: [B, T], the target of each token, ready made; `labels` are then not looked at.
            num_items_in_batch: the number that the summed cross-entropy is divided by, the count of targets by default.
            output_base_logits: also return the logits of the backbone without any read: see
                `output_base_hidden_state` of `DNCGPT2Model.forward`, also for `output_divergence`.
            output_logits: whether to build logits at all. Without them the loss is computed in chunks of tokens, and
                memory does not grow with the vocabulary (but where slots are pointed at).
            output_divergence: with `output_logits=False`, how much the read changes each prediction; [B, T] bool
                chooses the tokens.
            logits_to_keep: compute the logits of the last so many tokens (or these positions) alone; 0 is all.
        """
        # As in GPT-2 it is no name in the signature: `Trainer` would ask every batch for it as for `labels`.
        shift_labels = kwargs.pop("shift_labels", None)
        points = self.points
        compare = not output_logits and (isinstance(output_divergence, Tensor) or output_divergence)
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            self._check_targets(input_ids, inputs_embeds, labels, shift_labels, output_divergence)
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory_state=memory_state,
            memory_reset=memory_reset,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_memory=output_memory or points,
            output_base_hidden_state=output_base_logits or compare,
            detach_base_hidden_state=not output_base_logits,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        loss = logits = base_logits = correct = divergence = None
        if output_logits or points:
            pointed = (outputs.slot_tokens, outputs.read_weights.mean(2)) if points else ()
            parts = (slice_logits_to_keep(x, logits_to_keep) for x in (outputs.last_hidden_state, *pointed))
            logits = self.logits(*parts)
        if output_base_logits:
            base_logits = self.lm_head(slice_logits_to_keep(outputs.base_hidden_state, logits_to_keep))
        if not output_logits and not points:
            loss, correct, divergence = causal_lm_losses(
                self.lm_head,
                outputs.last_hidden_state,
                labels,
                shift_labels,
                num_items_in_batch,
                outputs.base_hidden_state if compare else None,
                output_divergence if isinstance(output_divergence, Tensor) else None,
            )
        elif labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),
            )
        if not output_logits and points:
            targets = next_tokens(labels, shift_labels)
            correct = logits.argmax(-1) == targets
            if compare:
                log_p, log_base = logits.log_softmax(-1), self.lm_head(outputs.base_hidden_state).log_softmax(-1)
                asked = (targets != IGNORED) & output_divergence
                divergence = (asked * (log_p.exp() * (log_p - log_base)).sum(-1)).detach()
            logits = None
        return DNCGPT2CausalLMOutput(
            loss=loss,
            logits=logits,
            base_logits=base_logits,
            correct=correct,
            divergence=divergence,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            memory_state=outputs.memory_state,
            write_gates=outputs.write_gates if output_memory else None,
            write_weights=outputs.write_weights if output_memory else None,
            read_weights=outputs.read_weights if output_memory else None,
            read_strengths=outputs.read_strengths if output_memory else None,
            slot_tokens=outputs.slot_tokens if output_memory else None,
        )

    def _check_targets(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        output_divergence: Tensor | bool,
    ) -> None:
        """Refuse what does not fit the inputs before these are run, for that changes a cache."""
        targets = {"labels": labels, "shift_labels": shift_labels}
        targets = {name: x for name, x in targets.items() if x is not None}
        choice = output_divergence if isinstance(output_divergence, Tensor) else None
        if (input_ids is None) == (inputs_embeds is None) or not (targets or choice is not None):
            return
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size, meta=self.device.type == "meta")
        shape = tuple((inputs_embeds if input_ids is None else input_ids).shape[:2])
        for name, x in targets.items():
            check_targets(name, x, shape, self.config.vocab_size)
        if choice is not None:
            check_choice("output_divergence", choice, shape)

    @property
    def points(self) -> bool:
        """Whether predictions point at slots."""
        return not self.training and self.config.pointer_weight > 0

    def logits(self, hidden: Tensor, slot_tokens: Tensor | None = None, read_weights: Tensor | None = None) -> Tensor:
        """Logits [..., V] of final hidden states [..., H].

        Args: slot_tokens [..., N] and read_weights [..., N], averaged over the heads, for a model that `points`.
        """
        logits = self.lm_head(hidden)
        if not self.points or slot_tokens is None:
            return logits
        return mix(logits, slot_tokens, self.config.pointer_weight * read_weights).to(logits.dtype)

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args, **kwargs) -> tuple[Tensor, dict[str, Any]]:
        # Transformers expands tensors alone.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if model_kwargs.get("memory_state") is not None:
            model_kwargs["memory_state"] = model_kwargs["memory_state"].map(
                lambda x: x.repeat_interleave(expand_size, dim=0)
            )
        return input_ids, model_kwargs

    # n_positions is the length of a window and limits no text: neither the default length nor a warning may stop at it.

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, has_default_max_length: bool, **kwargs
    ) -> GenerationConfig:
        default = generation_config.max_length
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = default + kwargs["input_ids_length"]
        return generation_config

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        if generation_config.cache_implementation == "quantized":
            raise ValueError('cache_implementation="quantized" cannot hold a memory; leave it out, or set "static".')
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if type(cache) is DynamicCache:
            model_kwargs["past_key_values"] = cache = DNCGPT2Cache(self.config, cache.offloading)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def _assisted_decoding(self, *args, inputs_tensor: Tensor | None = None, **kwargs):
        # What comes later takes no tokens back: it is not to pay for that. (`inputs_tensor` is named, for transformers
        # passes it only where the signature has it.)
        cache = kwargs.get("past_key_values")
        recording = getattr(cache, "is_recording", True)  # without a cache that can record, transformers refuses
        output = super()._assisted_decoding(*args, inputs_tensor=inputs_tensor, **kwargs)
        if not recording:
            cache.end_past_recording()
        return output

    def _get_candidate_generator(self, *, model_kwargs, assistant_model=None, **kwargs):
        # An assistant has another memory or none, and prompts of other lengths. It need not guess right.
        dropped = {"memory_reset"} if assistant_model is self else {"memory_reset", "memory_state"}
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in dropped}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Paged caches hold keys and values, and no memory.

        Raises:
            ValueError: always.
        """
        raise ValueError("Continuous batching has no place for a memory: use generate with a padded batch.")

    def _prepare_static_cache(self, cache_implementation, batch_size, max_cache_len, *args, **kwargs) -> Cache:
        # As transformers, a cache as long as the longest before keeps compiled code in use.
        self._previous_max_cache_length = max(max_cache_len, getattr(self, "_previous_max_cache_length", -1))
        offloading = "offloaded" in cache_implementation
        return DNCGPT2StaticCache(self.config, self._previous_max_cache_length, offloading)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> None:
        if (reset := model_kwargs.get("memory_reset")) is not None:  # here, for the prompt's length is known here alone
            check_choice("memory_reset", reset, tuple(inputs_tensor.shape[:2]))
        # The model counts the real tokens itself; given positions would have to be compared with that count.
        return None

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        """The inputs of one pass, as in transformers; 2D masks stay so, and cover the new tokens alone."""
        embedded = inputs_embeds is not None and is_first_iteration
        tokens = inputs_embeds if embedded else input_ids
        if next_sequence_length is not None:
            tokens = tokens[:, -next_sequence_length:]
        tokens = tokens.clone(memory_format=torch.contiguous_format)  # strides that do not change from step to step
        inputs = {"input_ids": None, "inputs_embeds": tokens} if embedded else {"input_ids": tokens}
        along = {"position_ids": kwargs.pop("position_ids", None), "token_type_ids": kwargs.pop("token_type_ids", None)}
        if (reset := kwargs.pop("memory_reset", None)) is not None:  # the prompt's: no later token empties the memory
            start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            end = start + tokens.shape[1]
            if start < reset.shape[1]:
                inputs["memory_reset"] = F.pad(reset, (0, max(0, end - reset.shape[1])))[:, start:end].contiguous()
        if attention_mask is None or attention_mask.dim() == 2:
            along["attention_mask"] = attention_mask
        else:
            inputs["attention_mask"] = attention_mask
        for name, x in along.items():
            if x is not None:
                inputs[name] = x[:, -tokens.shape[1] :].contiguous()
        kwargs.pop("labels", None)
        inputs |= {"past_key_values": past_key_values, **kwargs}
        device = self.device
        return {
            name: x.to(device) if isinstance(x, Tensor) and x.device != device and device.type != "meta" else x
            for name, x in inputs.items()
        }


DNCGPT2Model.register_for_auto_class("AutoModel")
DNCGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "DNCGPT2Cache",
    "DNCGPT2CausalLMOutput",
    "DNCGPT2LMHeadModel",
    "DNCGPT2Model",
    "DNCGPT2ModelOutput",
    "DNCGPT2PreTrainedModel",
    "DNCGPT2StaticCache",
]
