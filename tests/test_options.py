"""Options: command line over YAML over defaults, and whatever is not understood is an error that names it."""

from pathlib import Path

import pytest
import yaml

from configuration_dnc_gpt2 import DNCGPT2Config
from dnc_gpt2.data import DataArguments
from dnc_gpt2.options import (
    INSPECT_OPTION,
    OPPONENTS_OPTION,
    ModelArguments,
    one_line_errors,
    parse,
    recall_run,
    remember_run,
)
from dnc_gpt2.trainer import DNCTrainingArguments

ROOT = Path(__file__).parent.parent
ALL = (ModelArguments, DataArguments, DNCTrainingArguments)


@pytest.fixture
def preset(tmp_path):
    """A function that writes options to a YAML file and returns its path."""

    def write(**options) -> str:
        path = tmp_path / "preset.yaml"
        path.write_text(yaml.safe_dump(options))
        return str(path)

    return write


def error_of(capsys, *arguments, **keywords) -> str:
    with pytest.raises(SystemExit) as error:
        parse(ALL, *arguments, **keywords)
    assert error.value.code not in (0, None)
    message = capsys.readouterr().err
    assert message.count("\n") == 1, "one line, without the usage"
    return message


def test_command_line_over_yaml_over_defaults(preset):
    config = preset(hidden_size=32, num_heads=4, seq_len=16, learning_rate=0.5)
    model, data, training = parse(ALL, ["--config", config, "--hidden_size", "64", "--learning_rate=0.25"])
    assert (model.hidden_size, model.num_heads, model.num_layers) == (64, 4, 6)
    assert (data.seq_len, data.windows_per_example) == (16, 4)
    assert training.learning_rate == 0.25
    # It does not matter where --config stands.
    assert parse(ALL, ["--hidden_size", "64", f"--config={config}"])[0].hidden_size == 64


def test_files_on_the_command_line_replace_the_data_set_of_a_preset_and_the_other_way_round(preset):
    config = preset(dataset_name="x", dataset_config_name="y")
    (data,) = parse((DataArguments,), ["--config", config, "--train_file", "a.txt", "--validation_file", "b.txt"])
    assert (data.dataset_name, data.dataset_config_name, data.train_file) == (None, None, ["a.txt"])
    config = preset(train_file="a.txt", validation_file="b.txt")
    (data,) = parse((DataArguments,), ["--config", config, "--dataset_name", "x"])
    assert (data.dataset_name, data.train_file, data.validation_file) == ("x", None, None)


def test_the_origins_flags_with_its_sizes_and_without_its_loss_terms():
    model, data, training = parse(ALL, [])
    assert (model.hidden_size, model.num_layers, model.num_heads) == (768, 6, 8)
    assert (model.mem_slots, model.mem_width, model.num_reads) == (64, 128, 4)
    assert (model.addressing, data.seq_len) == ("lru", 128)
    assert (training.lambda_routing, training.lambda_entropy) == (0, 0)
    assert training.output_dir is None and not training.overwrite_output_dir


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_parse_without_unknown_keys(path):
    model, data, _ = parse(ALL, ["--config", str(path)])
    chosen = yaml.safe_load(path.read_text())
    for options in (model, data):
        for name, value in chosen.items():
            if hasattr(options, name):
                assert getattr(options, name) == value
    config = DNCGPT2Config(n_embd=model.hidden_size, n_head=model.num_heads, **model.memory_options())
    assert config.addressing == model.addressing


def test_origin_preset_has_the_origins_numbers():
    model, data, training = parse(ALL, ["--config", str(ROOT / "configs" / "origin.yaml")])
    assert (model.addressing, model.hidden_size, model.num_layers, model.num_heads) == ("simplified", 768, 6, 8)
    assert (model.mem_slots, model.mem_width, model.num_reads) == (64, 128, 4)
    assert (data.dataset_name, data.dataset_config_name) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (data.seq_len, data.carry_memory) == (128, False)
    assert (training.num_train_epochs, training.max_steps, training.per_device_train_batch_size) == (1, -1, 4)
    assert (training.learning_rate, training.max_grad_norm) == (3e-4, 1.0)
    assert (training.lambda_routing, training.lambda_entropy) == (0.1, 0.05)
    assert (training.logging_steps, training.save_steps, training.eval_steps) == (50, 3000, 3000)


def test_unknown_options_are_errors_that_name_them(capsys, preset):
    assert "--hiden_size" in error_of(capsys, ["--hiden_size", "32"])
    message = error_of(capsys, ["--config", preset(hiden_size=32, mem_slot=3)])
    assert "hiden_size, mem_slot" in message and "preset.yaml" in message
    assert "--hidden" in error_of(capsys, ["--hidden", "32"]), "abbreviations would hide a later option"


@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        ({"hidden_size": "wide"}, ("hidden_size", "wide")),
        ({"hidden_size": 32.5}, ("hidden_size", "32.5")),
        ({"hidden_size": [32, 64]}, ("hidden_size", "[32, 64]")),
        ({"model": "all"}, ("model", "all", "baseline")),
        ({"carry_memory": "perhaps"}, ("carry_memory", "perhaps")),
        ({"eval_strategy": "sometimes"}, ("eval_strategy", "sometimes")),
        ({"seq_len": 1}, ("seq_len=1",)),
        ({"lambda_routing": -1}, ("lambda_routing=-1",)),
        ({"tokenizer_vocab_size": 3}, ("tokenizer_vocab_size=3", "257")),
    ],
)
def test_values_that_are_not_allowed_are_errors_in_yaml_and_on_the_command_line(capsys, preset, options, culprits):
    message = error_of(capsys, ["--config", preset(**options)])
    assert all(culprit in message for culprit in culprits)
    ((name, value),) = options.items()
    if not isinstance(value, list):
        assert culprits[0] in error_of(capsys, [f"--{name}", str(value)])


def test_yaml_values_are_read_as_on_the_command_line(preset):
    options = {
        "learning_rate": "3e-4",  # without a dot YAML reads a word
        "eval_strategy": False,  # how YAML reads `no`
        "train_file": "a.txt",
        "validation_file": ["b.txt", "c.txt"],
        "text_column": 5,
        "max_eval_tokens": None,
        "token_shift": False,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "inspect": "two words",
    }
    model, data, training, rest = parse(ALL, ["--config", preset(**options)], extra=INSPECT_OPTION)
    assert (training.learning_rate, training.eval_strategy) == (3e-4, "no")
    assert (data.train_file, data.validation_file) == (["a.txt"], ["b.txt", "c.txt"])
    assert (data.text_column, data.max_eval_tokens, model.token_shift) == ("5", None, False)
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert rest.inspect == ["two words"]


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words", "a: [", "\tx: 1"])
def test_a_file_that_is_no_preset_is_an_error_that_names_it(capsys, tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    assert "odd.yaml" in error_of(capsys, ["--config", str(path)])
    assert "missing.yaml" in error_of(capsys, ["--config", str(tmp_path / "missing.yaml")])


def test_an_empty_text_to_inspect_is_refused(capsys):
    assert "--inspect" in error_of(capsys, ["--inspect", ""], extra=INSPECT_OPTION)


@pytest.mark.parametrize(
    "arguments", [["--train_file", "a.txt"], ["--train-file=a.txt"], ["--dataset_name", "x"], ["--config", "PRESET"]]
)
def test_the_default_preset_is_for_runs_that_name_no_data_and_no_preset(tmp_path, preset, arguments):
    default = tmp_path / "default.yaml"
    default.write_text("hidden_size: 48\n")
    arguments = [preset(num_layers=2) if word == "PRESET" else word for word in arguments]
    assert parse(ALL, arguments, default)[0].hidden_size == 768
    assert parse(ALL, [], default)[0].hidden_size == 48
    assert parse(ALL, ["--num_layers", "1"], default)[0].hidden_size == 48


def test_remembered_data_give_way_to_data_that_the_user_names(preset):
    remembered = {"dataset_name": "x", "dataset_config_name": "y", "seq_len": 16}
    remembered |= {"streaming": True, "max_eval_tokens": 9}  # how the data set that gives way was read
    (data,) = parse((DataArguments,), [], defaults=remembered)
    assert (data.dataset_name, data.seq_len) == ("x", 16)
    for arguments in (["--validation_file", "v.txt"], ["--config", preset(validation_file="v.txt")]):
        (data,) = parse((DataArguments,), arguments, defaults=remembered)
        assert (data.dataset_name, data.dataset_config_name, data.streaming) == (None, None, False)
        assert (data.validation_file, data.seq_len) == (["v.txt"], 16)


def test_a_checkpoint_remembers_its_data(tmp_path):
    data = DataArguments(train_file=["a.txt"], validation_file=["b.txt"], carry_memory=True)
    remember_run(tmp_path, data, seed=7)
    run = recall_run(str(tmp_path))
    assert run["seed"] == 7
    assert DataArguments(**run["data"]) == data
    assert recall_run(str(tmp_path / "elsewhere")) is None


def test_a_run_remembers_its_command_line_without_tokens_of_the_hub(tmp_path):
    kept = ["--address_token", "false", "--seed", "7", "--train_file", "a", "b"]
    arguments = ["--hub_token", "s3cret", *kept[:4], "--push_to_hub_token=s3cret", *kept[4:]]
    remember_run(tmp_path, DataArguments(), seed=7, arguments=arguments)
    assert recall_run(str(tmp_path))["arguments"] == kept


@pytest.mark.parametrize("source", ["command line", "file"])
def test_opponents_are_named_on_the_command_line_or_in_a_file(tmp_path, source, capsys):
    def read(value: str):
        (tmp_path / "options.yaml").write_text(f"opponents: {value}")
        arguments = ["--opponents", value] if source == "command line" else ["--config", str(tmp_path / "options.yaml")]
        return parse((DataArguments,), arguments, extra=OPPONENTS_OPTION)[1].opponents

    assert read("dnc,widened") == ["dnc", "widened"]
    with pytest.raises(SystemExit):
        read("dnc,wide")
    assert "unknown wide (choose from widened," in capsys.readouterr().err
    assert parse((DataArguments,), [], extra=OPPONENTS_OPTION)[1].opponents == []


def test_memory_options_leave_out_what_is_not_set():
    options = ModelArguments(mem_slots=5, address_width=None, read_projection_init=None).memory_options()
    assert options["mem_slots"] == 5
    assert not {"address_width", "read_projection_init", "surprise_weight"} & set(options)
    assert not {"model", "hidden_size", "dropout"} & set(options)


def test_every_memory_option_of_the_configuration_is_an_option():
    own = set(DNCGPT2Config().to_dict()) - set(DNCGPT2Config.__mro__[1]().to_dict())
    assert own - {"auto_map"} <= set(ModelArguments.__dataclass_fields__)


@pytest.mark.parametrize("error", [ValueError("a\n  b"), OSError("a b"), FileNotFoundError("a b")])
def test_refused_input_ends_in_one_line(error):
    with pytest.raises(SystemExit) as end, one_line_errors("train.py"):
        raise error
    assert end.value.code == "train.py: a b"


def test_an_invalid_configuration_ends_in_one_line_and_a_bug_in_a_traceback():
    with pytest.raises(SystemExit) as end, one_line_errors("train.py"):
        DNCGPT2Config(addressing="foo")
    assert "addressing='foo'" in end.value.code and "\n" not in end.value.code
    with pytest.raises(KeyError), one_line_errors("train.py"):
        raise KeyError("bug")


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as end:
        parse(ALL, ["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--hidden_size", "--seq_len", "--lambda_routing", "--config"))


@pytest.mark.parametrize("content", ["", "{", '{"data": 3}', "[]", "{}"])
def test_a_damaged_run_file_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged .*remove it"):
        recall_run(str(tmp_path))
