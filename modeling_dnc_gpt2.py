"""GPT-2 with a differentiable external memory that reaches beyond the attention window.

The backbone attends within windows of `n_positions` tokens: position p lives in window p // n_positions at place
p % n_positions. The memory runs over all of them. Windows are attended to as rows of their own, their tokens packed to
the left, so that plain causal attention is right for every padding and packing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import GPT2Model, GPT2PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

try:
    from .configuration_dnc_gpt2 import DNCGPT2Config
    from .memory_dnc_gpt2 import DNCMemory, MemoryState
except ImportError:
    from configuration_dnc_gpt2 import DNCGPT2Config
    from memory_dnc_gpt2 import DNCMemory, MemoryState


class DNCGPT2Cache(DynamicCache):
    """Keys and values of each row's current window, and the memory state.

    Columns that no row needs any more are dropped, so that it never holds more than a window and the last call.

    Attributes:
        memory_state: the state after the last token; `None` before the first.
        current: [B, K] bool, whether a cached column is a real token of its row's current window.
        last_positions: [B], position of each row's last real token, -1 before the first.
        seen_tokens: number of columns (padding included) that have passed through.
    """

    def __init__(self, config: DNCGPT2Config):
        super().__init__(config=config)
        self._forget()

    def _forget(self) -> None:
        self.memory_state: MemoryState | None = None
        self.current: Tensor | None = None
        self.last_positions: Tensor | None = None
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, not tokens held: `generate` counts in these."""
        return self.seen_tokens

    def keep(self, columns: Tensor | slice) -> None:
        """Keep these columns of the keys and values: a slice, or [B, K] an index a row."""
        for layer in self.layers:
            if isinstance(columns, slice):
                layer.keys, layer.values = layer.keys[:, :, columns], layer.values[:, :, columns]
            else:
                index = columns[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
                layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)

    def _map_rows(self, function) -> None:
        if self.memory_state is not None:
            self.memory_state = self.memory_state.map(function)
            self.current = function(self.current)
            self.last_positions = function(self.last_positions)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("The memory cannot take tokens back: go on from a cache of before these tokens.")


class WindowLayout(NamedTuple):
    """Where each token of a [B, T] batch is attended to. Values at masked tokens mean nothing."""

    windows: Tensor  # [B, T], 0 for the row's first window (or the one it continues), then 1, 2, ...
    columns: Tensor  # [B, T], how many tokens of the same window come before it in this call
    positions: Tensor  # [B, T]
    restarts: Tensor | None  # [B, T] bool, tokens whose position does not follow on: a new document begins


def locate(
    mask: Tensor, position_ids: Tensor | None, window_size: int, last_positions: Tensor | None = None
) -> WindowLayout:
    """Lay out the real tokens (`mask` [B, T] bool) in attention windows.

    Args:
        position_ids: [B, T]; `None` counts the real tokens on from `last_positions`.
        last_positions: [B], position of the last token of an earlier call, -1 for none.
    """
    counts = mask.long().cumsum(-1)
    if last_positions is None:
        last_positions = torch.full_like(counts[:, 0], -1)
    if position_ids is None:
        positions, restarts = last_positions[:, None] + counts, None
        windows = positions // window_size - last_positions.clamp_min(0)[:, None] // window_size
        begins = positions % window_size == 0
    else:
        positions = position_ids.expand(mask.shape)
        before = previous_real(positions, mask, last_positions)
        restarts = mask & (positions <= before)
        crossed = positions // window_size != before // window_size
        begins = mask & (before >= 0) & (restarts | crossed)
        windows = begins.long().cumsum(-1)
        begins = begins | (mask & (before < 0))
    # The count of real tokens where the current window began, -1 + count so that the first column is 0.
    start = torch.where(begins & mask, counts - 1, 0).cummax(-1).values
    return WindowLayout(windows, counts - 1 - start, positions, restarts)


def previous_real(values: Tensor, mask: Tensor, first: Tensor) -> Tensor:
    """For each token the value [B, T] of the real token before it, `first` [B] where there is none."""
    index = torch.arange(1, values.shape[1] + 1, device=values.device) * mask
    latest = nn.functional.pad(index, (1, 0)).cummax(-1).values[:, :-1]
    return torch.cat([first[:, None], values], dim=1).gather(1, latest)


def last_real(values: Tensor, mask: Tensor, default: Tensor) -> Tensor:
    """The value [B, T] of each row's last real token, `default` [B] where it has none."""
    index = (torch.arange(1, values.shape[1] + 1, device=values.device) * mask).amax(-1, keepdim=True)
    return torch.cat([default[:, None], values], dim=1).gather(1, index)[:, 0]


class Folding:
    """Moves tokens between a batch [B, T] and its windows as rows [B * windows, columns] of their own."""

    def __init__(self, layout: WindowLayout, mask: Tensor, window_size: int, num_windows: int):
        self.batch, self.tokens = mask.shape
        self.num_windows, self.size = num_windows, min(window_size, self.tokens)
        rows = torch.arange(self.batch, device=mask.device)[:, None]
        index = (rows * num_windows + layout.windows) * self.size + layout.columns
        self.trash = self.batch * num_windows * self.size  # where masked tokens go and come from
        self.index = torch.where(mask, index, self.trash)

    def fold(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B * windows, columns, ...], zero where no token lives."""
        folded = x.new_zeros((self.trash + 1, *x.shape[2:]))
        # Masked tokens all land in the last place, which is cut off.
        folded = folded.index_copy(0, self.index.flatten(), x.flatten(0, 1))
        return folded[:-1].unflatten(0, (-1, self.size))

    def unfold(self, x: Tensor) -> Tensor:
        """[B * windows, columns, ...] -> [B, T, ...], zero at masked tokens."""
        flat = torch.cat([x.flatten(0, 1), x.new_zeros((1, *x.shape[2:]))])
        return flat[self.index]

    def unfold_attention(self, x: Tensor) -> Tensor:
        """[B * windows, heads, columns, columns] -> [B, heads, T, T], zero between windows."""
        queries = self.unfold(x.transpose(1, 2))  # [B, T, heads, columns]
        columns = (self.index % self.size)[:, None, None].expand(-1, *queries.shape[1:3], -1)
        window = torch.where(self.index == self.trash, -1, self.index // self.size)
        same = (window[:, :, None] == window[:, None]) & (window[:, None] >= 0)
        return (queries.gather(-1, columns) * same[:, :, None]).transpose(1, 2)


@dataclass
class DNCGPT2ModelOutput(ModelOutput):
    """Output of `DNCGPT2Model`.

    Attributes:
        last_hidden_state: [B, T, H], the backbone's final hidden state plus what was read.
        base_hidden_state: [B, T, H], the same without the read.
        past_key_values: `DNCGPT2Cache` with `use_cache`.
        hidden_states, attentions: as GPT-2's; the last of `hidden_states` is `last_hidden_state`.
        memory_state: `MemoryState` after the last token.
        write_gates [B, T], write_weights [B, T, N], read_weights [B, T, R, N]: with `output_memory`.
    """

    last_hidden_state: Tensor | None = None
    base_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    memory_state: MemoryState | None = None
    write_gates: Tensor | None = None
    write_weights: Tensor | None = None
    read_weights: Tensor | None = None


@dataclass
class DNCGPT2CausalLMOutput(ModelOutput):
    """Output of `DNCGPT2LMHeadModel`: see `DNCGPT2ModelOutput` for the fields of the same name.

    Attributes:
        loss: cross-entropy alone, whatever else a trainer adds.
        logits: [B, T, V].
        base_logits: [B, T, V] with `output_base_logits`: of the same hidden states without the read.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    base_logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    memory_state: MemoryState | None = None
    write_gates: Tensor | None = None
    write_weights: Tensor | None = None
    read_weights: Tensor | None = None


class DNCGPT2PreTrainedModel(GPT2PreTrainedModel):
    """Loading, saving and initialisation."""

    config: DNCGPT2Config
    config_class = DNCGPT2Config
    _no_split_modules = ["GPT2Block", "DNCMemory"]
    _can_compile_fullgraph = False

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


class DNCGPT2Model(DNCGPT2PreTrainedModel, GPT2Model):
    """GPT-2's backbone with a memory at its top. Parameters are named as in `GPT2Model`, plus `memory.*`."""

    def __init__(self, config: DNCGPT2Config):
        GPT2Model.__init__(self, config)
        self.memory = DNCMemory(config)
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
        use_cache: bool | None = None,
        memory_state: MemoryState | None = None,
        memory_reset: Tensor | None = None,
        output_memory: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> DNCGPT2ModelOutput:
        """Attend within windows, then write to and read from the memory once a token.

        Args:
            input_ids: [B, T], any T.
            attention_mask: [B, T], or [B, past + T] with a cache; 0 marks padding, anywhere in a row.
            position_ids: [B, T]. Without them the real tokens of each row are counted. Where a position does not
                exceed the one before, a new document begins, with an empty memory.
            past_key_values: a cache that this model returned, to go on inside a window.
            memory_state: the state that this model returned for the same rows, to go on with the next window.
            memory_reset: [B, T] bool, tokens before which the memory is emptied.
            output_memory: also return gates and weights.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            self._check_token_ids(input_ids)
            inputs_embeds = self.wte(input_ids)
        batch, tokens, _ = inputs_embeds.shape
        mask = self._real_tokens(attention_mask, batch, tokens)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        # A cache that is given is gone on from, whether or not a new one would be made.
        cache = self._cache(past_key_values) if use_cache or past_key_values is not None else None
        options = {
            "output_attentions": self.config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": (
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            **kwargs,
        }
        continued = cache is not None and cache.seen_tokens > 0
        attend = self._attend_onward if continued else self._attend_in_windows
        output, restarts = attend(inputs_embeds, token_type_ids, mask, position_ids, cache, options)
        if restarts is not None:
            memory_reset = restarts if memory_reset is None else memory_reset | restarts

        hidden = output.last_hidden_state
        state = cache.memory_state if continued else memory_state
        memory = self.memory(hidden, inputs_embeds, state, mask, memory_reset)
        last_hidden_state = hidden + memory.hidden_states
        if cache is not None:
            cache.memory_state = memory.state
            cache.seen_tokens += tokens
        hidden_states = output.hidden_states
        return DNCGPT2ModelOutput(
            last_hidden_state=last_hidden_state,
            base_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=None if hidden_states is None else (*hidden_states[:-1], last_hidden_state),
            attentions=output.attentions,
            memory_state=memory.state,
            write_gates=memory.write_gates if output_memory else None,
            write_weights=memory.write_weights if output_memory else None,
            read_weights=memory.read_weights if output_memory else None,
        )

    def _check_token_ids(self, input_ids: Tensor) -> None:
        # Elsewhere the check would wait for the device; there the data pipeline has made it.
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or input_ids.numel() == 0:
            return
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.wte.num_embeddings:
            raise ValueError(
                f"input_ids hold {low if low < 0 else high}, but the vocabulary has the ids 0 to "
                f"{self.wte.num_embeddings - 1}: use the tokenizer that was saved with this model."
            )

    @staticmethod
    def _real_tokens(attention_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        if attention_mask is None:
            return None
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < tokens:
            raise ValueError(
                f"attention_mask has shape {shape}; it must be [batch, tokens] with batch = {batch} and cover all "
                f"{tokens} tokens."
            )
        return attention_mask[:, -tokens:].bool()

    def _cache(self, past_key_values: Cache | None) -> DNCGPT2Cache:
        if isinstance(past_key_values, DNCGPT2Cache):
            return past_key_values
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__} without a memory state; pass the "
                "past_key_values that this model returned, or None."
            )
        return DNCGPT2Cache(self.config)

    def _attend_in_windows(self, embeds, token_type_ids, mask, position_ids, cache, options):
        """The backbone over whole windows, from the start of one; fills the (empty) cache with the last of each row."""
        batch, tokens, _ = embeds.shape
        size = self.config.n_positions
        if mask is None and position_ids is None and tokens <= size:
            layout, folding = None, None
            inputs = {"inputs_embeds": embeds, "token_type_ids": token_type_ids}
        else:
            real = embeds.new_ones((batch, tokens), dtype=torch.bool) if mask is None else mask
            layout = locate(real, position_ids, size)
            # Positions counted from 0 bound the number of windows by the shape alone.
            bound = -(-tokens // size)
            num_windows = bound if position_ids is None else 1 + int((layout.windows * real).amax())
            folding = Folding(layout, real, size, num_windows)
            inputs = {
                "inputs_embeds": folding.fold(embeds),
                "token_type_ids": None if token_type_ids is None else folding.fold(token_type_ids),
            }
            if position_ids is not None:
                # Given positions may leave gaps. The mask keeps the backbone from taking gaps for packed sequences; its
                # first column stays visible where a row has no such window, for attention needs something to look at.
                visible = folding.fold(real)
                visible[:, 0] = True
                inputs |= {"position_ids": folding.fold(layout.positions % size), "attention_mask": visible}
        output = super().forward(past_key_values=cache, use_cache=cache is not None, **inputs, **options)
        if folding is not None:
            output.last_hidden_state = folding.unfold(output.last_hidden_state)
            if output.hidden_states is not None:
                output.hidden_states = tuple(folding.unfold(x) for x in output.hidden_states)
            if output.attentions is not None:
                output.attentions = tuple(folding.unfold_attention(x) for x in output.attentions)
        if cache is not None:
            if folding is None:
                cache.current = torch.ones(batch, tokens, dtype=torch.bool, device=embeds.device)
                cache.last_positions = torch.full((batch,), tokens - 1, device=embeds.device)
            else:
                self._keep_last_windows(cache, layout, real, num_windows)
        return output, None if layout is None else layout.restarts

    @staticmethod
    def _keep_last_windows(cache: DNCGPT2Cache, layout: WindowLayout, real: Tensor, num_windows: int) -> None:
        """Of keys and values [B * windows, ...] keep each row's last window, aligned to the right."""
        last_window = (layout.windows * real).amax(-1)
        rows = torch.arange(real.shape[0], device=real.device) * num_windows + last_window
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
        lengths = (real & (layout.windows == last_window[:, None])).sum(-1)
        longest = int(lengths.amax())
        columns = torch.arange(-longest, 0, device=real.device) + lengths[:, None]
        cache.keep(columns.clamp_min(0))
        cache.current = columns >= 0
        cache.last_positions = last_real(layout.positions, real, torch.full_like(last_window, -1))

    def _attend_onward(self, embeds, token_type_ids, mask, position_ids, cache, options):
        """The backbone over tokens that go on from a cache: each sees its own window's tokens alone."""
        batch, tokens, _ = embeds.shape
        size = self.config.n_positions
        if cache.last_positions.shape[0] != batch:
            raise ValueError(f"past_key_values is of batch size {cache.last_positions.shape[0]}, the input of {batch}.")
        real = embeds.new_ones((batch, tokens), dtype=torch.bool) if mask is None else mask
        layout = locate(real, position_ids, size, cache.last_positions)
        windows = layout.windows
        among_new = (windows[:, :, None] == windows[:, None]) & real[:, None]
        among_new = among_new & torch.ones(tokens, tokens, dtype=torch.bool, device=embeds.device).tril()
        to_cached = (windows == 0)[:, :, None] & cache.current[:, None]
        visible = torch.cat([to_cached, among_new], dim=-1)[:, None]
        bias = torch.zeros(visible.shape, dtype=embeds.dtype, device=embeds.device)
        output = super().forward(
            inputs_embeds=embeds,
            token_type_ids=token_type_ids,
            position_ids=torch.where(real, layout.positions % size, 0),
            attention_mask=bias.masked_fill(~visible, torch.finfo(embeds.dtype).min),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        last_window = (windows * real).amax(-1, keepdim=True)
        cache.current = torch.cat([cache.current & (last_window == 0), real & (windows == last_window)], dim=-1)
        cache.last_positions = last_real(layout.positions, real, cache.last_positions)
        if cache.current.shape[1] > size:
            first = int(cache.current.any(0).to(torch.uint8).argmax())
            cache.keep(slice(first, None))
            cache.current = cache.current[:, first:]
        return output, layout.restarts


class DNCGPT2LMHeadModel(DNCGPT2PreTrainedModel, GenerationMixin):
    """`DNCGPT2Model` with GPT-2's language-modelling head, tied to the token embeddings."""

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
        output_memory: bool = False,
        output_base_logits: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> DNCGPT2CausalLMOutput:
        """See `DNCGPT2Model.forward` for the inputs it shares.

        Args:
            labels: [B, T] token ids, shifted inside, or -100 to ignore.
            shift_labels: [B, T], the target of each token, ready made; `labels` are then not looked at.
            num_items_in_batch: the number that the summed cross-entropy is divided by, the count of targets by default.
            output_base_logits: also return the logits of the same hidden states without the read.
            logits_to_keep: compute the logits of the last so many tokens (or these positions) alone; 0 is all.
        """
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
            output_memory=output_memory,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        base_logits = None
        if output_base_logits:
            base_logits = self.lm_head(slice_logits_to_keep(outputs.base_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return DNCGPT2CausalLMOutput(
            loss=loss,
            logits=logits,
            base_logits=base_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory_state=outputs.memory_state,
            write_gates=outputs.write_gates,
            write_weights=outputs.write_weights,
            read_weights=outputs.read_weights,
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args, **kwargs) -> tuple[Tensor, dict[str, Any]]:
        # Transformers expands tensors alone.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if model_kwargs.get("memory_state") is not None:
            model_kwargs["memory_state"] = model_kwargs["memory_state"].map(
                lambda x: x.repeat_interleave(expand_size, dim=0)
            )
        return input_ids, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold a memory; leave it out."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if type(cache) is DynamicCache:
            model_kwargs["past_key_values"] = self.transformer._cache(cache)


DNCGPT2Model.register_for_auto_class("AutoModel")
DNCGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "DNCGPT2Cache",
    "DNCGPT2CausalLMOutput",
    "DNCGPT2LMHeadModel",
    "DNCGPT2Model",
    "DNCGPT2ModelOutput",
    "DNCGPT2PreTrainedModel",
]
