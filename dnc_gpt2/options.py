"""Command-line options of the scripts: dataclasses, a YAML file of defaults, and what a run remembers of them."""

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, TrainingArguments

from configuration_dnc_gpt2 import DNCGPT2Config

from . import report
from .data import DataArguments
from .opponents import OPPONENTS, opponent_names


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("an empty text has no tokens to show")
    return value


RUN_FILE = "run.json"
INSPECT_OPTION = {
    "--inspect": {"nargs": "*", "default": [], "type": _text, "help": "Texts whose memory writes are shown."}
}
OPPONENTS_OPTION = {
    "--opponents": {
        "default": [],
        "type": opponent_names,
        "help": f"What else to compare with, separated by commas: {','.join(OPPONENTS)}.",
    }
}
DATASET, FILES = ("dataset_name", "dataset_config_name"), ("train_file", "validation_file")
DATA_SOURCES = (*DATASET, *FILES)


@dataclass
class ModelArguments:
    """Sizes of both models and options of the memory; `DNCGPT2Config` says what each means."""

    model: str = field(default="both", metadata={"help": "What to train.", "choices": ["both", "baseline", "dnc"]})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "GPT-2 checkpoint to start both models from; its sizes replace those below."}
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train the memory alone, on the checkpoint of --model_name_or_path."}
    )
    hidden_size: int = field(default=768, metadata={"help": "Width of the backbone (n_embd)."})
    num_layers: int = field(default=6, metadata={"help": "Transformer layers (n_layer)."})
    num_heads: int = field(default=8, metadata={"help": "Attention heads (n_head)."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of the backbone."})
    mem_slots: int = field(default=64, metadata={"help": "Memory rows N."})
    mem_width: int = field(default=128, metadata={"help": "Width W of a memory row."})
    num_reads: int = field(default=4, metadata={"help": "Read heads R."})
    memory_layer: int | None = field(default=None, metadata={"help": "Layers below the memory; default half of them."})
    addressing: str = field(default="lru", metadata={"help": "lru, dnc or simplified."})
    address_width: int | None = field(default=None, metadata={"help": "Address columns of a row (lru)."})
    token_shift: bool = field(default=True, metadata={"help": "Store a token under the context before it (lru)."})
    address_token: bool = field(
        default=True, metadata={"help": "Address by a context's token beside its hidden state (lru)."}
    )
    surprise_weight: float | None = field(
        default=None,
        metadata={"help": "Initial weight of surprise in the write gate (lru); default 0.5, on a GPT-2 checkpoint 0."},
    )
    pointer_weight: float | None = field(
        default=None,
        metadata={"help": "Share of predictions left to what slots hold (lru); tuned with --held_out_tokens, else 0."},
    )
    write_threshold: float = field(default=0.05, metadata={"help": "Sigmoid up to which write gates are shut (lru)."})
    usage_decay: float = field(default=0.99, metadata={"help": "Factor that usage shrinks by at every write (lru)."})
    read_refresh: float = field(default=0.0, metadata={"help": "Share of a read that counts as use (lru)."})
    write_gate_bias: float = field(default=2.0, metadata={"help": "Initial logit of the write gate (lru)."})
    allocation_gate_bias: float = field(default=6.0, metadata={"help": "Initial logit of the allocation gate (lru)."})
    erase_gate_bias: float = field(default=4.0, metadata={"help": "Initial logit of the erase gates (lru)."})
    read_gate_bias: float = field(default=-1.0, metadata={"help": "Initial logit of the read gates (lru)."})
    read_strength_init: float | None = field(default=None, metadata={"help": "Initial read strength (lru)."})
    read_projection_init: str | None = field(default=None, metadata={"help": "transpose, zero or normal."})
    temporal_links: bool = field(default=True, metadata={"help": "Temporal links (dnc)."})
    masked_content: bool = field(default=False, metadata={"help": "Masked content addressing (dnc)."})
    erase_on_free: bool = field(default=False, metadata={"help": "Erase freed rows (dnc)."})
    sharpen_links: bool = field(default=False, metadata={"help": "Sharpen the reads along links (dnc)."})
    scan: str = field(default="auto", metadata={"help": "The recurrence: auto, eager, numba or triton."})

    @property
    def kinds(self) -> list[str]:
        """The models to train, in order."""
        return ["baseline", "dnc"] if self.model == "both" else [self.model]

    def memory_options(self) -> dict[str, Any]:
        """The arguments of `DNCGPT2Config` that describe the memory."""
        known = {f.name for f in fields(DNCGPT2Config)}
        # What is not set must not replace what the configuration of a checkpoint says.
        return {name: value for name, value in asdict(self).items() if name in known and value is not None}


class _Parser(HfArgumentParser):
    def error(self, message: str):
        """As in argparse, but without the usage, which is pages long here."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the options)\n")


def parse(
    dataclasses: Sequence[type],
    arguments: Sequence[str] | None = None,
    default_config: Path | None = None,
    extra: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Read options: the command line over a YAML file (`--config`) over defaults.

    A data set on the command line replaces the files that a YAML file names, and files a data set.

    Args:
        dataclasses: as for `HfArgumentParser`.
        arguments: the command line, by default the process's own.
        default_config: YAML file to read where the command line names neither `--config` nor any data.
        extra: further arguments of the parser, name -> keywords of `add_argument`.
        defaults: option -> value in place of the dataclasses' defaults. Where the user names data, what these say of
            where the data come from does not count.

    Returns:
        An object of each dataclass, then a namespace of the extra arguments if there are any.

    An unknown option, in either place, and a value that is not allowed end the process with a message.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(dataclasses, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of defaults for these options.")
    for name, keywords in (extra or {}).items():
        parser.add_argument(name, **keywords)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config")
    config = first_look.parse_known_args(arguments)[0].config
    flags = {
        argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in arguments if argument[:2] == "--"
    }
    data_named = not flags.isdisjoint(DATA_SOURCES)
    if config is None and not data_named:
        config = default_config
    options = {} if config is None else _read_yaml(parser, Path(config))
    for named, other in ((DATASET, FILES), (FILES, DATASET)):
        if not flags.isdisjoint(named) and flags.isdisjoint(other):
            options = {name: value for name, value in options.items() if name not in other}
    data_named = data_named or any(options.get(name) for name in DATA_SOURCES)
    source = (*DATA_SOURCES, "streaming") if data_named else ()
    parser.set_defaults(**{name: value for name, value in (defaults or {}).items() if name not in source})
    parser.set_defaults(**options)
    try:
        *objects, rest = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return (*objects, rest) if extra else tuple(objects)


def _read_yaml(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(options, dict):
        parser.error(f"--config {path} must hold lines of the form `option: value`.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if unknown := sorted(str(name) for name in options if name not in actions):
        parser.error(f"--config {path} has unknown options: {', '.join(unknown)}")
    try:
        return {name: _checked(parser, actions[name], value) for name, value in options.items()}
    except argparse.ArgumentError as error:
        parser.error(f"--config {path}: {error}")


def _checked(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """A value from YAML, converted and checked as if it stood on the command line: argparse trusts defaults."""
    several = action.nargs in ("*", "+")
    if isinstance(value, list):
        if not several:
            raise argparse.ArgumentError(action, f"takes one value, not the list {value}")
        return [parser._get_value(action, str(item)) for item in value]
    if value is None and action.default is not None:
        raise argparse.ArgumentError(action, "needs a value")
    if isinstance(value, dict) and action.dest not in TrainingArguments._VALID_DICT_FIELDS:
        raise argparse.ArgumentError(action, f"takes one value, not {value}")
    if value is None or isinstance(value, dict):
        return value
    if value is False and "no" in (action.choices or ()):
        value = "no"  # which YAML reads as a truth value
    value = parser._get_value(action, str(value))
    parser._check_value(action, value)
    return [value] if several else value


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the process as Ctrl-C does."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the process with one line where input is refused or a signal ends it; other errors are bugs and keep their
    traceback."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except KeyboardInterrupt as interrupt:
        number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        print(f"{program}: ended by {number.name}; what was saved is intact.", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        signal.signal(signal.SIGTERM, previous)


def remember_run(
    folder: Path, data: DataArguments, seed: int, arguments: Sequence[str] = (), untrained: bool = False
) -> None:
    """Write into a checkpoint what data it was trained on, so that comparing it needs no options, the command line, the
    seed, the versions, and whether it was only copied, with nothing to train.

    Checkpoints may be published: the command line is kept without tokens of the Hub.
    """
    kept, secret = [], False
    for argument in arguments:
        if argument.startswith("--"):
            secret = argument.split("=")[0].endswith(("hub_token", "hub-token"))
        if not secret:
            kept.append(argument)
    run = {"data": asdict(data), "seed": seed, "versions": report.versions(), "arguments": kept}
    run |= {"untrained": True} if untrained else {}
    report.write_text(folder / RUN_FILE, report.to_json(run))


def recall_run(folder: str) -> dict[str, Any] | None:
    """What `remember_run` wrote into a checkpoint; `None` where it wrote nothing.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return {**run, "data": {**run["data"]}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and name the data on the command line.") from error
