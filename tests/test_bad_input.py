"""Bad input by the hundred: each case is one clear error that names the culprit or a right result, without damage."""

import dataclasses
import math
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from test_trainer import EXAMPLE, arguments, examples

from dnc_gpt2 import DNCGPT2Config, DNCGPT2LMHeadModel, MemoryState
from dnc_gpt2.checkpoints import close
from dnc_gpt2.data import DataArguments, DataError, load_texts
from dnc_gpt2.models import load_model, new_models
from dnc_gpt2.options import ModelArguments, parse
from dnc_gpt2.tokenization import tokenize_texts, train_tokenizer
from dnc_gpt2.trainer import DNCTrainer

FEWEST_CASES = 500
OURS = (DataError, ValueError, StrictDataclassError)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def said(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and len(message) < 3000, "an error is one that can be read"
    return message


# Configurations

MEMORY_FIELDS = [f.name for f in dataclasses.fields(DNCGPT2Config) if f.name in DNCGPT2Config.__annotations__]
SIZE_FIELDS = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "resid_pdrop", "layer_norm_epsilon"]
BAD_VALUES = [-1, 0, 1.5, math.nan, math.inf, -math.inf, "x", "", [], [-1.0], {"a": 1}, True, None, 10**9]
CONFIG_CASES = [
    (name, value)
    for name in (*MEMORY_FIELDS, *SIZE_FIELDS)
    if name not in ("model_type", "keys_to_ignore_at_inference")
    for value in BAD_VALUES
]


@pytest.mark.parametrize(("name", "value"), CONFIG_CASES, ids=lambda value: repr(value))
def test_a_field_of_the_configuration_is_refused_by_its_name_or_kept(tiny_config, name, value):
    try:
        config = tiny_config(**{name: value})
    except (*OURS, TypeError) as error:
        assert name in str(error) or "n_embd" in str(error) or "bos_token_id" in str(error), error
    else:
        again = DNCGPT2Config.from_dict(config.to_dict())
        assert getattr(again, name) == getattr(config, name) == value


# Options and YAML

NUMBERS = [
    (group, f.name)
    for group in (ModelArguments, DataArguments)
    for f in dataclasses.fields(group)
    if f.type in (int, float, bool, "int", "float", "bool") or "int" in str(f.type)
]
OPTION_CASES = [(group, name, value) for group, name in NUMBERS for value in ("x", "1e", "")]


@pytest.mark.parametrize(("group", "name", "value"), OPTION_CASES, ids=lambda value: getattr(value, "__name__", value))
def test_an_option_that_is_no_number_is_refused_by_its_name(group, name, value, capsys):
    with pytest.raises(SystemExit) as end:
        parse((group,), [f"--{name}", value])
    message = capsys.readouterr().err
    assert end.value.code == 2 and len(message.splitlines()) == 1
    assert name in message


YAML = "hidden_size: 64\nnum_layers: 2\nmem_slots: 16\naddressing: lru\ntoken_shift: true\ndropout: 0.1\n"
YAML_CASES = [
    *("", "\n", "- 1\n- 2", "text", "1", "null", "a: b: c", "\t", "{", "[", "!!python/object/apply:os.system [echo]"),
    *(
        "!!python/name:os.system",
        "mem_slots: !!python/object:os.system {}",
        "hidden_size: [1, 2]",
        "hidden_size: {a: 1}",
    ),
    *(
        "hidden_size: x",
        "unknown: 1",
        "1: 2",
        "? [a]\n: b",
        "&a [*a]",
        "hidden_size: .nan",
        "dropout: .inf",
        "---\n---",
    ),
    *("\0", "hidden_size: 1\nhidden_size", "%YAML 9", "@", "`", "hidden_size: 2020-01-01", "mem_slots: 1_000"),
]


def mutated(text: bytes, seed: int) -> bytes:
    """A few bytes changed, removed or added, or the end cut off."""
    rng, content = random.Random(seed), bytearray(text)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content))
        match rng.randrange(4):
            case 0:
                content[place] = rng.randrange(256)
            case 1:
                del content[place]
            case 2:
                content.insert(place, rng.randrange(256))
            case 3:
                del content[max(1, place) :]
    return bytes(content)


YAML_BYTES = [
    *(case.encode() for case in YAML_CASES),
    b"\xff\xfe",
    b"\x80",
    *(mutated(YAML.encode(), i) for i in range(40)),
]


@pytest.mark.parametrize("content", YAML_BYTES)
def test_a_yaml_file_is_refused_by_its_name_or_read(tmp_path, content, capsys, monkeypatch):
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("code was executed"))
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    try:
        (options,) = parse((ModelArguments,), ["--config", str(path)])
    except SystemExit as end:
        message = capsys.readouterr().err
        assert end.code == 2 and len(message.splitlines()) == 1
        assert str(path) in message
    else:
        assert all(isinstance(getattr(options, name), int) for name in ("hidden_size", "num_layers", "mem_slots"))


# Data files

TEXT_CONTENTS = {
    "empty": b"",
    "spaces": b"  \n\n ",
    "binary": bytes(range(256)) * 4,
    "nul": b"text\0text",
    "huge line": b"word " * 200_000,
    "one huge word": b"x" * 300_000,
    "latin-1": "Grüße aus Köln".encode("latin-1"),
    "utf-16": "text and more text".encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbftext and more",
    "cut character": "Grüße".encode()[:3],
    "no newline": b"text and more",
    "carriage returns": b"text\r\nand\rmore\n",
    "surrogate": b"\xed\xa0\x80 text",
    "gzip": b"\x1f\x8b\x08\x00" + b"\0" * 20,
    "control characters": b"text \x1b[31m\x07\x08 more",
    "one byte": b"x",
    "end-of-text": b"<|endoftext|>" * 50,
}
TEXT_CASES = [(name, suffix) for name in TEXT_CONTENTS for suffix in (".txt", ".md", ".raw")]
TABLE_CONTENTS = {
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "brace": b"{",
    "other column": b'{"words": "a b"}\n',
    "numbers": b'{"text": 7}\n',
    "nested": b'{"text": {"a": "b"}}\n',
    "nothing": b'{"text": null}\n',
    "half a row": b'{"text": "a b"}\n{"text": "c',
    "rows that differ": b'{"text": "a b"}\n{"text": ["c"]}\n',
    "a good row": b'{"text": "a b"}\n',
    "open quote": b'text,other\n"a b,c\n',
    "too many cells": b"text\na,b,c\nd\n",
    "heading alone": b"text\n",
    "parquet's magic": b"PAR1" + b"\0" * 30 + b"PAR1",
}
TABLE_CASES = [(name, suffix) for name in TABLE_CONTENTS for suffix in (".jsonl", ".csv", ".parquet")]


@pytest.mark.parametrize(("name", "suffix"), TEXT_CASES)
def test_a_text_file_is_refused_by_its_name_or_read_to_the_letter(tmp_path, name, suffix):
    content, path = TEXT_CONTENTS[name], tmp_path / f"data{suffix}"
    path.write_bytes(content)
    try:
        (text,) = load_texts(DataArguments(train_file=[str(path)], seq_len=8), ["train"])["train"]
        tokens = tokenize_texts([text], train_tokenizer([text], 300)).tokens
    except DataError as error:
        assert str(path) in str(error) or "tokens, at least 2 are needed" in str(error)
    else:
        assert text.encode() == content.removeprefix(b"\xef\xbb\xbf")
        assert len(tokens) >= 2
    assert path.read_bytes() == content


@pytest.mark.parametrize(("name", "suffix"), TABLE_CASES)
def test_a_table_is_refused_by_its_name_or_gives_texts(tmp_path, monkeypatch, name, suffix):
    content, path = TABLE_CONTENTS[name], tmp_path / f"data{suffix}"
    path.write_bytes(content)
    try:
        texts = load_texts(DataArguments(train_file=[str(path)]), ["train"])["train"]
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert texts and all(isinstance(text, str) and text for text in texts)
    assert path.read_bytes() == content


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A saved model, with a memory state beside it, and in run/ a trainer's checkpoint-2 with carried memory."""
    folder = tmp_path_factory.mktemp("saved")
    model = new_models(_tiny(), ["dnc"], seed=0)["dnc"]
    model.save_pretrained(folder / "model")
    model(torch.arange(1, 9)[None]).memory_state.save(str(folder / "state.safetensors"))
    _trainer(folder / "run").train()
    return folder


def _tiny() -> DNCGPT2Config:
    from conftest import TINY

    return DNCGPT2Config(**{**TINY, "n_layer": 1})


def _trainer(folder: Path, **options) -> DNCTrainer:
    training = arguments(folder, **{"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, **options})
    model = new_models(_tiny(), ["dnc"], seed=0)["dnc"]
    return DNCTrainer(model, training, examples(16 * EXAMPLE + 1, streams=4), carry_memory=True)


def _change_tensors(path: Path, change: str) -> None:
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    x = tensors[name]
    match change:
        case "missing tensor":
            del tensors[name]
        case "unknown tensor":
            tensors["unknown"] = x.clone()
        case "renamed tensor":
            tensors["renamed"] = tensors.pop(name)
        case "longer":
            tensors[name] = torch.cat([x, x])
        case "transposed":
            tensors[name] = x.mT.contiguous() if x.dim() > 1 and x.shape[-1] != x.shape[-2] else x[:-1].clone()
        case "flat":
            tensors[name] = x.flatten()
        case "scalar":
            tensors[name] = x.flatten()[0].clone()
        case "no tensors":
            tensors = {}
    save_file(tensors, path, metadata={"format": "pt"})


def _change_bytes(path: Path, change: str) -> None:
    content = path.read_bytes()
    kind, _, number = change.partition(" ")
    match kind:
        case "cut":
            content = content[: int(len(content) * float(number))]
        case "mutated":
            header = struct.unpack("<Q", content[:8])[0] if path.suffix == ".safetensors" else len(content) // 2
            content = mutated(content[: 8 + header], int(number)) + content[8 + header :]
        case "random":
            content = random.Random(int(number)).randbytes(len(content))
        case "text":
            content = b"not a checkpoint"
        case "pickle":
            content = b"cos\nsystem\n(S'touch executed'\ntR."
        case "html":
            content = b"<!DOCTYPE html><html>404</html>"
    path.write_bytes(content)


TENSOR_CHANGES = [
    *("missing tensor", "unknown tensor", "renamed tensor", "longer", "transposed", "flat", "scalar", "no tensors"),
]
BYTE_CHANGES = [
    *("cut 0", "cut 0.001", "cut 0.5", "cut 0.999", "random 0", "text", "pickle", "html"),
    *(f"mutated {seed}" for seed in range(24)),
]


@pytest.mark.parametrize("change", [*TENSOR_CHANGES, *BYTE_CHANGES])
def test_a_damaged_model_is_refused_by_its_folder_or_loads_as_it_was_saved(saved, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(saved / "model", folder)
    (_change_tensors if change in TENSOR_CHANGES else _change_bytes)(folder / "model.safetensors", change)
    before = snapshot(folder)
    try:
        model = load_model(str(folder))
    except ValueError as error:
        assert str(folder) in str(error) and "save_pretrained" in str(error)
    else:
        stored = load_file(folder / "model.safetensors")
        weights = model.state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in stored.items())
        assert set(weights) - set(stored) <= {"lm_head.weight"}
    assert snapshot(folder) == before


CONFIG_FILES = [
    *("", "{", "[]", "null", "7", '"text"', "{}", '{"model_type": "unknown"}', '{"model_type": 7}', "\xff"),
    *('{"model_type": "dnc_gpt2", "mem_slots": 0}', '{"model_type": "dnc_gpt2", "mem_slots": "x"}'),
    *('{"model_type": "dnc_gpt2", "n_embd": 7}', '{"model_type": "bert"}', '{"model_type": "dnc_gpt2", "n_layer": -1}'),
]


@pytest.mark.parametrize("content", CONFIG_FILES)
def test_a_damaged_configuration_is_refused_by_its_folder(saved, tmp_path, content):
    folder = tmp_path / "model"
    shutil.copytree(saved / "model", folder)
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        load_model(str(folder))
    assert str(folder) in said(error)


@pytest.mark.parametrize("change", [*TENSOR_CHANGES, *BYTE_CHANGES])
def test_a_damaged_memory_state_is_refused_by_its_name_or_loads_as_it_was_saved(saved, tmp_path, change):
    path = tmp_path / "state.safetensors"
    shutil.copy(saved / "state.safetensors", path)
    (_change_tensors if change in TENSOR_CHANGES else _change_bytes)(path, change)
    model = DNCGPT2LMHeadModel(_tiny())
    try:
        state = MemoryState.load(str(path))
        logits = model(torch.tensor([[1, 2]]), memory_state=state).logits
    except ValueError as error:
        assert str(path) in str(error) or "memory_state." in str(error)
    else:
        stored = load_file(path)
        assert all(torch.equal(x, getattr(state, name)) for name, x in stored.items())
        assert logits.shape == (1, 2, 67)


TRAINER_FILES = {
    "model.safetensors": TENSOR_CHANGES,
    "memory_state_0.safetensors": ["missing tensor", "renamed tensor", "longer", "flat", "scalar"],
    "log_state_0.safetensors": ["no tensors"],
    "optimizer.pt": ["moments of another shape", "of another model"],
    "scheduler.pt": [],
    "rng_state.pth": [],
    "trainer_state.json": [],
}
TRAINER_CASES = [
    (file, change)
    for file, changes in TRAINER_FILES.items()
    for change in (*changes, "removed", "cut 0", "cut 0.5", "random 0", "text", "pickle")
]


@pytest.mark.parametrize(("file", "change"), TRAINER_CASES)
def test_a_damaged_checkpoint_of_a_run_is_refused_by_its_name(saved, tmp_path, monkeypatch, file, change):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(saved / "run" / "checkpoint-2", checkpoint)
    path = checkpoint / file
    if change == "removed":
        path.unlink()
    elif file == "optimizer.pt" and change in TRAINER_FILES[file]:
        content = torch.load(path, weights_only=True)
        if change == "of another model":
            content["param_groups"][0]["params"].pop()
        else:
            content["state"][0]["exp_avg"] = torch.zeros(3, 5)
        torch.save(content, path)
    else:
        (_change_tensors if change in TENSOR_CHANGES else _change_bytes)(path, change)
    close(checkpoint)  # whole by its sizes
    before = snapshot(tmp_path)
    with pytest.raises(ValueError) as error:
        _trainer(tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    assert str(checkpoint) in said(error)
    assert snapshot(tmp_path) == before, "nothing is damaged or executed"


# Calls of the model

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
CALLS = {
    "input_ids": [
        *(IDS.float(), IDS[0], IDS[None], IDS - 9, IDS + 60, IDS + 10**9, IDS[:, :0], IDS[:0], IDS.bool(), IDS.int()),
        *(IDS.short(), IDS.to("meta"), "text", 7, None),
    ],
    "attention_mask": [
        *(
            torch.ones(2, 3),
            torch.ones(3, 4),
            torch.ones(2),
            torch.ones(2, 4, 1),
            torch.ones(2, 4) / 0,
            torch.zeros(2, 4),
        ),
        *(
            torch.ones(2, 4).bool(),
            torch.ones(2, 4).double(),
            torch.ones(2, 4, dtype=torch.int8),
            torch.ones(2, 9),
            "text",
        ),
        *(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 4, 4), torch.ones(3, 1, 4, 4), torch.full((2, 4), math.nan)),
    ],
    "position_ids": [
        *(torch.arange(4), torch.arange(4)[None], torch.arange(3)[None], torch.arange(5)[None], -torch.arange(4)[None]),
        *(torch.arange(4)[None].float(), torch.full((2, 4), 10**6), torch.zeros(2, 4).long(), torch.zeros(3, 4).long()),
    ],
    "labels": [IDS[:, :3], IDS[:1], IDS.float(), IDS + 90, IDS - 300, IDS[0], torch.full_like(IDS, -100)],
    "shift_labels": [IDS[:, :3], IDS[:1], IDS.float(), IDS + 90, IDS[0], torch.full_like(IDS, -100)],
    "memory_reset": [
        *(
            torch.ones(2, 3).bool(),
            torch.ones(3, 4).bool(),
            torch.ones(2).bool(),
            torch.ones(2, 4),
            torch.ones(2, 4).long(),
        ),
        *(torch.full((2, 4), math.nan), "text"),
    ],
}
CALL_CASES = [(name, index) for name, values in CALLS.items() for index in range(len(values))]


@pytest.mark.parametrize("output_logits", [True, False])
@pytest.mark.parametrize(("name", "index"), CALL_CASES)
def test_an_argument_of_the_model_is_refused_by_its_name_or_gives_finite_numbers(name, index, output_logits):
    torch.manual_seed(0)
    model = DNCGPT2LMHeadModel(_tiny()).eval()
    inputs = {"input_ids": IDS, "labels": IDS, name: CALLS[name][index]}
    try:
        output = model(**inputs, output_logits=output_logits)
    except ValueError as error:
        assert name in str(error)
    else:
        assert output.memory_state.memory.isfinite().all()
        assert output.logits is None or output.logits.isfinite().all()


STATE_CHANGES = {
    "one row": lambda x: x[:1],
    "three rows": lambda x: torch.cat([x, x[:1]]),
    "flat": lambda x: x.flatten(),
    "one more dimension": lambda x: x[..., None],
    "shorter": lambda x: x[..., :-1] if x.dim() > 1 else x[:-1],
    "nothing": lambda x: None,
    "float64": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "whole numbers": lambda x: x.long(),
    "another device": lambda x: x.to("meta"),
    "a list": lambda x: x.tolist(),
}
STATE_FIELDS = ["memory", "usage", "write_weights", "read_weights", "previous_hidden", "started", "previous_embedding"]
STATE_CASES = [
    (name, change) for name in STATE_FIELDS for change in STATE_CHANGES if (name, change) != ("started", "flat")
]
RIGHT = {"float64", "half", "bfloat16", "whole numbers"}


@pytest.mark.parametrize(("name", "change"), STATE_CASES)
def test_a_state_that_does_not_fit_is_refused_by_the_name_of_its_part(name, change):
    torch.manual_seed(0)
    model = DNCGPT2LMHeadModel(_tiny()).eval()
    state = model(IDS).memory_state.detach()
    changed = state._replace(**{name: STATE_CHANGES[change](getattr(state, name))})
    if change in RIGHT:
        converted = state._replace(**{name: getattr(changed, name).to(getattr(state, name).dtype)})
        assert torch.equal(model(IDS, memory_state=changed).logits, model(IDS, memory_state=converted).logits)
    else:
        with pytest.raises(ValueError, match=f"memory_state.{name}"):
            model(IDS, memory_state=changed)


def test_there_are_as_many_cases_as_promised():
    cases = [CONFIG_CASES, OPTION_CASES, YAML_BYTES, TEXT_CASES, TABLE_CASES, CONFIG_FILES, TRAINER_CASES, CALL_CASES]
    cases += [STATE_CASES, 2 * [*TENSOR_CHANGES, *BYTE_CHANGES]]
    assert sum(map(len, cases)) >= FEWEST_CASES
    print(f"bad inputs: {sum(map(len, cases))}")
