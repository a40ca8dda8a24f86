"""The configuration: defaults, GPT-2's aliases, what it refuses and how it says so, and its JSON."""

import json
import math
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import GPT2Config

from configuration_dnc_gpt2 import ADDRESSINGS, SCANS, DNCGPT2Config

MEMORY_DEFAULTS = {
    "mem_slots": 64,
    "mem_width": 128,
    "num_reads": 4,
    "memory_layer": None,
    "addressing": "lru",
    "address_width": None,
    "token_shift": True,
    "address_token": True,
    "surprise_weight": 0.5,
    "write_threshold": 0.05,
    "usage_decay": 0.99,
    "read_refresh": 0.0,
    "write_gate_bias": 2.0,
    "allocation_gate_bias": 6.0,
    "erase_gate_bias": 4.0,
    "read_gate_bias": -1.0,
    "read_strength_init": None,
    "read_projection_init": None,
    "pointer_weight": 0.0,
    "temporal_links": True,
    "masked_content": False,
    "erase_on_free": False,
    "sharpen_links": False,
    "scan": "auto",
}
BIASES = ("surprise_weight", "write_gate_bias", "allocation_gate_bias", "erase_gate_bias", "read_gate_bias")


def refusal(**options) -> str:
    """The message of the error that the options raise."""
    with pytest.raises(StrictDataclassError) as error:
        DNCGPT2Config(**options)
    return str(error.value)


def test_defaults():
    config = DNCGPT2Config()
    assert {name: getattr(config, name) for name in MEMORY_DEFAULTS} == MEMORY_DEFAULTS
    assert config.model_type == "dnc_gpt2"


def test_backbone_defaults_are_those_of_gpt2():
    ours, theirs = DNCGPT2Config().to_dict(), GPT2Config().to_dict()
    assert set(ours) - set(theirs) == set(MEMORY_DEFAULTS)
    assert {name: ours[name] for name in theirs if name != "model_type"} == {
        name: value for name, value in theirs.items() if name != "model_type"
    }


def test_aliases_of_gpt2_set_and_read_its_fields():
    config = DNCGPT2Config(hidden_size=96, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=32)
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (96, 3, 6, 32)
    config = DNCGPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=16)
    assert (config.hidden_size, config.num_hidden_layers) == (48, 2)
    assert (config.num_attention_heads, config.max_position_embeddings) == (4, 16)


SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "mem_slots", "mem_width", "num_reads")
REFUSED = [
    *[(name, value, "an integer of at least 1", {}) for name in SIZES for value in (0, -3)],
    ("n_embd", 10, "a multiple of n_head=4", {"n_head": 4}),
    *[
        (name, value, "a number in [0, 1)", {})
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
        for value in (-0.1, 1.0)
    ],
    ("n_inner", 0, "None or an integer of at least 1", {}),
    ("activation_function", "nope", "one of", {}),
    ("layer_norm_epsilon", 0.0, "a finite number above 0", {}),
    ("initializer_range", -0.1, "a finite number of at least 0", {}),
    *[("memory_layer", value, "None or an integer from 1 to n_layer=3", {"n_layer": 3}) for value in (0, -1, 4)],
    ("sharpen_links", True, "false without temporal_links", {"temporal_links": False}),
    *[("addressing", value, f"one of {ADDRESSINGS}", {}) for value in ("", "LRU", "ntm")],
    *[("scan", value, f"one of {SCANS}", {}) for value in ("", "cuda")],
    ("mem_width", 1, "at least 2", {}),
    *[("address_width", value, "from 1 to mem_width - 1 = 7", {"mem_width": 8}) for value in (0, -1, 8, 9)],
    *[
        ("address_width", 8, f'None with addressing="{name}"', {"addressing": name, "mem_width": 8})
        for name in ADDRESSINGS[1:]
    ],
    *[("write_threshold", value, "a number in [0, 1)", {}) for value in (-0.01, 1.0, math.inf, math.nan)],
    *[("pointer_weight", value, "a number in [0, 1)", {}) for value in (-0.01, 1.0, math.inf, math.nan)],
    *[
        ("pointer_weight", 0.1, f'0 with addressing="{name}"', {"addressing": name, "mem_width": 8})
        for name in ADDRESSINGS[1:]
    ],
    *[("usage_decay", value, "a number in (0, 1]", {}) for value in (0.0, -0.5, 1.01, math.inf, math.nan)],
    *[("read_refresh", value, "a finite number of at least 0", {}) for value in (-0.1, math.inf, math.nan)],
    *[(name, value, "a finite number", {}) for name in BIASES for value in (math.inf, -math.inf, math.nan)],
    *[
        ("read_strength_init", value, "a finite number above 1, or a list of num_reads=3 of them", {"num_reads": 3})
        for value in (1.0, 0, -4.0, math.inf, math.nan, [], [4.0, 8.0], [4.0, 8.0, 16.0, 32.0], [4.0, 1.0, 8.0])
    ],
    *[
        ("read_projection_init", value, "one of ('transpose', 'zero', 'normal') or None", {})
        for value in ("", "random")
    ],
]


@pytest.mark.parametrize(
    ("name", "value", "allowed", "others"), REFUSED, ids=[f"{name}={value}" for name, value, _, _ in REFUSED]
)
def test_value_outside_its_range_is_refused_by_name_value_and_what_is_allowed(name, value, allowed, others):
    message = refusal(**{**others, name: value})
    assert f"{name}={value!r} " in message
    assert allowed in message


MISTYPED = [
    *[(name, value, "int") for name in SIZES for value in (2.5, "4", True, None)],
    *[(name, value, "str") for name in ("addressing", "scan") for value in (1, None)],
    *[(name, value, "int") for name in ("address_width", "memory_layer") for value in (2.5, "4", True)],
    *[
        (name, value, "bool")
        for name in (
            "token_shift",
            "address_token",
            "temporal_links",
            "masked_content",
            "erase_on_free",
            "sharpen_links",
        )
        for value in (1, "yes", None)
    ],
    *[
        (name, value, "float")
        for name in ("pointer_weight", "write_threshold", "usage_decay", "read_refresh", *BIASES)
        for value in ("0.5", True, None)
    ],
    *[("read_strength_init", value, "float") for value in ("9", True)],
    ("read_strength_init", ["4", 8, 16, 32], "float"),
    ("read_projection_init", 0, "str"),
]


@pytest.mark.parametrize(
    ("name", "value", "allowed"), MISTYPED, ids=[f"{name}={value!r}" for name, value, _ in MISTYPED]
)
def test_value_of_another_type_is_refused_by_name_value_and_type(name, value, allowed):
    message = refusal(**{name: value})
    assert re.search(rf"\b{name}\b", message)
    assert str(value) in message
    assert allowed in message


def test_every_memory_field_has_a_value_that_is_refused():
    assert set(MEMORY_DEFAULTS) <= {name for name, *_ in REFUSED + MISTYPED}


def test_alias_is_validated_like_its_field():
    assert "n_layer=0 " in refusal(num_hidden_layers=0)
    assert "n_embd=65 " in refusal(hidden_size=65)


@pytest.mark.parametrize(
    "options",
    [
        {"mem_slots": 1, "num_reads": 1},
        {"mem_width": 2},
        {"address_width": 127},
        {"mem_width": 1, "addressing": "dnc"},
        {"mem_width": 1, "addressing": "simplified"},
        {"usage_decay": 1},
        {"write_threshold": 0},
        {"pointer_weight": 0.99},
        {"usage_decay": 1e-3, "read_refresh": 2},
        {"write_gate_bias": -3, "read_gate_bias": 0},
        {"read_strength_init": 2},
        {"read_strength_init": [4, 8.5, 16, 32]},
        {"read_projection_init": "zero"},
        {"attn_pdrop": 0.0},
    ],
    ids=str,
)
def test_values_at_the_edge_of_their_range_are_taken(options):
    config = DNCGPT2Config(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_address_columns_are_half_a_row_unless_said_otherwise():
    assert DNCGPT2Config(mem_width=8).address_columns == 4
    assert DNCGPT2Config(mem_width=7).address_columns == 3
    assert DNCGPT2Config(mem_width=8, address_width=1).address_columns == 1
    for addressing in ("dnc", "simplified"):
        assert DNCGPT2Config(mem_width=8, addressing=addressing).address_columns == 8


def test_read_heads_start_with_distinct_strengths():
    assert DNCGPT2Config(num_reads=1).initial_read_strengths == [9.0]
    assert DNCGPT2Config(num_reads=4).initial_read_strengths == pytest.approx([4, 8, 16, 32])
    assert DNCGPT2Config(num_reads=2, read_strength_init=7).initial_read_strengths == [7.0, 7.0]
    assert DNCGPT2Config(num_reads=2, read_strength_init=[3, 5]).initial_read_strengths == [3.0, 5.0]


def test_read_strengths_start_higher_the_more_slots_there_are():
    assert DNCGPT2Config(num_reads=1, mem_slots=16).initial_read_strengths == [9.0]
    assert DNCGPT2Config(num_reads=1, mem_slots=4096).initial_read_strengths == pytest.approx([18.0])
    assert DNCGPT2Config(num_reads=4, mem_slots=512).initial_read_strengths == pytest.approx([6, 12, 24, 48])
    assert DNCGPT2Config(num_reads=1, mem_slots=4096, read_strength_init=7).initial_read_strengths == [7.0]


def test_read_projection_starts_as_a_cache_only_where_rows_hold_tokens():
    starts = {addressing: DNCGPT2Config(addressing=addressing).initial_read_projection for addressing in ADDRESSINGS}
    assert starts == {"lru": "transpose", "dnc": "normal", "simplified": "normal"}
    assert DNCGPT2Config(read_projection_init="zero").initial_read_projection == "zero"


def test_memory_lies_in_the_middle_unless_it_is_told_where():
    assert [DNCGPT2Config(n_layer=layers).blocks_below_memory for layers in (1, 2, 3, 4, 12)] == [1, 1, 2, 2, 6]
    assert DNCGPT2Config(n_layer=4, memory_layer=4).blocks_below_memory == 4


def test_saved_config_from_before_memory_layers_keeps_its_memory_on_top(tmp_path):
    DNCGPT2Config(n_layer=4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert DNCGPT2Config.from_pretrained(tmp_path).blocks_below_memory == 2
    del saved["memory_layer"]
    path.write_text(json.dumps(saved))
    assert DNCGPT2Config.from_pretrained(tmp_path).blocks_below_memory == 4


@pytest.mark.parametrize("options", [{"n_layer": 3}, {"num_hidden_layers": 3}, {}], ids=str)
def test_plain_gpt2_checkpoint_is_given_a_memory_on_top(tmp_path, options):
    GPT2Config(n_layer=4).save_pretrained(tmp_path)
    assert DNCGPT2Config.from_pretrained(tmp_path, **options).blocks_below_memory == (3 if options else 4)
    assert DNCGPT2Config.from_pretrained(tmp_path, memory_layer=2, **options).blocks_below_memory == 2
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["n_layer"]
    path.write_text(json.dumps(saved))
    assert DNCGPT2Config.from_pretrained(tmp_path).blocks_below_memory == GPT2Config().n_layer


OTHERS = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 32,
    "vocab_size": 101,
    "mem_slots": 5,
    "mem_width": 12,
    "num_reads": 2,
    "memory_layer": 1,
    "address_width": 3,
    "token_shift": False,
    "address_token": False,
    "surprise_weight": 0.25,
    "write_threshold": 0.1,
    "usage_decay": 0.5,
    "read_refresh": 0.25,
    "write_gate_bias": 1.0,
    "allocation_gate_bias": 3.0,
    "erase_gate_bias": -1.0,
    "read_gate_bias": 0.5,
    "read_strength_init": [3.0, 5.0],
    "read_projection_init": "zero",
    "temporal_links": False,
    "masked_content": True,
    "erase_on_free": True,
    "scan": "eager",
}


@pytest.mark.parametrize(
    "options", [{}, OTHERS, {"addressing": "dnc", "sharpen_links": True}], ids=["defaults", "others", "dnc"]
)
def test_saved_configuration_loads_equal(options, tmp_path):
    config = DNCGPT2Config(**options)
    config.save_pretrained(tmp_path)
    loaded = DNCGPT2Config.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in options} == options
    # Where the configuration was read from is no part of it.
    strip = {"_name_or_path": None, "transformers_version": None}
    assert {**loaded.to_dict(), **strip} == {**config.to_dict(), **strip}


def test_loading_validates_the_file_and_the_overrides(tmp_path):
    DNCGPT2Config().save_pretrained(tmp_path)
    assert DNCGPT2Config.from_pretrained(tmp_path, mem_slots=7).mem_slots == 7
    with pytest.raises((StrictDataclassError, ValueError), match="mem_slots=0 is not allowed"):
        DNCGPT2Config.from_pretrained(tmp_path, mem_slots=0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "usage_decay": 2.0}))
    with pytest.raises((StrictDataclassError, ValueError), match=r"usage_decay=2\.0 is not allowed"):
        DNCGPT2Config.from_pretrained(tmp_path)


def test_configuration_of_a_plain_gpt2_gets_a_memory_that_starts_silent(tmp_path):
    GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=16).save_pretrained(tmp_path)
    config = DNCGPT2Config.from_pretrained(tmp_path, mem_slots=9)
    assert config.model_type == "dnc_gpt2"
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (48, 2, 4, 16)
    assert config.mem_slots == 9
    assert config.initial_read_projection == "zero"
    assert config.surprise_weight == 0
