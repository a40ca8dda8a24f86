"""Where texts come from: the options that name them, and reading records from files, folders and the Hub.

`load_texts` reads records; `tokenization` makes one long row of tokens of them, `examples` examples and batches. For a
training text that is too large to be held, `stream_records` and `streaming` do this as it comes.
"""

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

logger = logging.getLogger(__name__)

MIN_VOCAB_SIZE = 257  # the 256 bytes and the end-of-text token

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
TABLE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

CHARS_PER_TOKEN = 16  # of a stream so many characters are read for each token wanted; English has four or five
PEEKED_ROWS = 100


class DataError(ValueError):
    """The data, or the options that name it, cannot be used; the message names the culprit and the remedy."""


@dataclass
class DataArguments:
    """Options of the data pipeline, for `transformers.HfArgumentParser`.

    Raises:
        DataError: a size is too small, or a data set and files are both given.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hugging Face hub, or a local folder that `datasets` can read."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, such as wikitext-2-raw-v1."}
    )
    train_split: str = field(
        default="train", metadata={"help": "Split of --dataset_name to train on; slices such as train[5%%:] work."}
    )
    validation_split: str = field(
        default="validation", metadata={"help": "Split of --dataset_name to evaluate on; train[:5%%] works too."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Files or glob patterns to train on: .txt .text .md .raw .json .jsonl .csv .parquet."},
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Files or glob patterns to evaluate on, of the same kinds."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text; text files have none."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer on the hub or in a folder. Without it one is trained on the training text."},
    )
    tokenizer_vocab_size: int = field(
        default=4096, metadata={"help": "Largest vocabulary of the tokenizer that is trained without --tokenizer_name."}
    )
    seq_len: int = field(default=128, metadata={"help": "Tokens in an attention window."})
    windows_per_example: int = field(default=4, metadata={"help": "Attention windows in an example."})
    carry_memory: bool = field(
        default=False,
        metadata={"help": "Train and evaluate on contiguous streams whose memory passes from step to step."},
    )
    reset_at_documents: bool = field(default=False, metadata={"help": "Empty the memory between records."})
    eval_streams: int = field(
        default=4, metadata={"help": "Contiguous streams that evaluation cuts the text into with --carry_memory."}
    )
    held_out_tokens: int = field(
        default=0,
        metadata={
            "help": "Do not train on so many last tokens: the memory's pointer and a neural cache are tuned there."
        },
    )
    max_train_tokens: int | None = field(default=None, metadata={"help": "Train on the first tokens only."})
    max_eval_tokens: int | None = field(default=None, metadata={"help": "Evaluate on the first tokens only."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize the training text while training, and keep none of it: for corpora that do not "
            "fit the disk. Needs --max_steps and --max_eval_tokens."
        },
    )

    def __post_init__(self) -> None:
        # A YAML file may give one file as a plain string.
        if isinstance(self.train_file, str):
            self.train_file = [self.train_file]
        if isinstance(self.validation_file, str):
            self.validation_file = [self.validation_file]
        if self.dataset_name and (self.train_file or self.validation_file):
            raise DataError(
                f"dataset_name={self.dataset_name!r} excludes train_file and validation_file; give one or the other"
            )
        require_at_least("seq_len", self.seq_len, 2)
        require_at_least("windows_per_example", self.windows_per_example, 1)
        require_at_least("eval_streams", self.eval_streams, 1)
        require_at_least("held_out_tokens", self.held_out_tokens, 0)
        require_at_least("tokenizer_vocab_size", self.tokenizer_vocab_size, MIN_VOCAB_SIZE)
        for name in ("max_train_tokens", "max_eval_tokens"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 2)
        if self.streaming:
            if not (self.dataset_name or self.train_file):
                raise DataError("streaming needs a corpus; give --dataset_name or --train_file")
            if self.max_eval_tokens is None:
                raise DataError("streaming needs max_eval_tokens, the tokens of the validation split to read")
            if self.max_train_tokens is not None:
                raise DataError("streaming excludes max_train_tokens; max_steps bounds what is trained on")
            if self.held_out_tokens:
                raise DataError("streaming excludes held_out_tokens; the end of a stream is not known")


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Refuse a size that is too small, by its name."""
    if value < minimum:
        raise DataError(f"{name}={value} is too small; it must be at least {minimum}")


def reason(error: BaseException) -> str:
    """First line of what went wrong; `datasets` wraps the telling error of a reader into a general one."""
    if isinstance(error, datasets.exceptions.DatasetBuildError) and error.__cause__:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_texts(arguments: DataArguments, splits: Sequence[str] = ("train", "validation")) -> dict[str, list[str]]:
    """Reads the records of the named splits ("train", "validation").

    A text file is one record, lines and all. A row of a table is a record, unless every row that is not empty is a
    single line with its line end, as in the hub's WikiText: such rows are the lines of one file and become one record,
    where an empty row stands for a blank line. Records without text are left out.

    With `streaming` only the records that `max_eval_tokens` can need are read.

    Returns:
        Split name -> its records, at least one, none of them empty.

    Raises:
        DataError: no source is given for a split, or it cannot be reached, found or read, or holds no text.
    """
    if arguments.streaming:
        characters = CHARS_PER_TOKEN * arguments.max_eval_tokens
        return {split: first_records(stream_records(arguments, split), characters) for split in splits}
    return {split: _load_split(arguments, split) for split in splits}


def _load_split(arguments: DataArguments, split: str) -> list[str]:
    source = _source(arguments, split)
    if arguments.dataset_name:
        records = _column(_load_dataset(arguments, split), arguments.text_column, source)
    else:
        records = [
            record for path in _split_files(arguments, split) for record in _read_file(path, arguments.text_column)
        ]
    texts = [record for record in records if record]
    if not texts:
        raise DataError(f"{source} holds no text")
    if len(texts) < len(records):
        logger.info("%s: left out %d records without text", source, len(records) - len(texts))
    return texts


def _split_name(arguments: DataArguments, split: str) -> str:
    return {"train": arguments.train_split, "validation": arguments.validation_split}[split]


def _source(arguments: DataArguments, split: str) -> str:
    """What messages call a split's text."""
    if arguments.dataset_name:
        return f"split {_split_name(arguments, split)!r} of data set {arguments.dataset_name!r}"
    return f"--{split}_file {' '.join(getattr(arguments, f'{split}_file') or ())}"


def _load_dataset(
    arguments: DataArguments, split: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    name, config_name = arguments.dataset_name, arguments.dataset_config_name
    try:
        builder = datasets.load_dataset_builder(name, config_name)
        options = _builder_options(builder.name, arguments.text_column)
        split_name = _split_name(arguments, split)
        return datasets.load_dataset(name, config_name, split=split_name, streaming=streaming, **options)
    except Exception as error:  # the hub client, file systems and readers underneath raise errors of a dozen families
        if isinstance(error, ConnectionError):
            remedy = "where the hub cannot be reached, use --train_file and --validation_file, or a local folder"
        elif isinstance(error, FileNotFoundError):
            remedy = "check the name: a data set on the hub, or a local folder with data files"
        elif "namespace/name" in str(error):
            remedy = "name the data set with its namespace, such as Salesforce/wikitext"
        elif "Unknown split" in str(error) or "Bad split" in str(error):  # the latter of a stream
            remedy = f"choose another one with --{split}_split; a stream has no slices"
        else:
            remedy = "check --dataset_name and --dataset_config_name, or use --train_file and --validation_file"
        raise DataError(f"cannot load data set {name!r}: {reason(error)} ({remedy})") from error


def _split_files(arguments: DataArguments, split: str) -> list[Path]:
    """The named files in the order given, those of a glob pattern sorted."""
    patterns = getattr(arguments, f"{split}_file")
    if not patterns:
        raise DataError(f"no {split} text: give --{split}_file, or --dataset_name with a {split} split")
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise DataError(f"file {pattern} does not exist; check the path")
        paths += found
    return paths


def _checked_suffix(path: Path) -> str:
    """The ending that says how to read a file."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path} is a folder; name its files ({path}/*.txt), or give it as --dataset_name")
    if suffix not in TEXT_SUFFIXES and suffix not in TABLE_BUILDERS:
        known = " ".join((*TEXT_SUFFIXES, *TABLE_BUILDERS))
        raise DataError(f"{path} has the unknown ending {suffix!r}; rename or convert it to one of {known}")
    return suffix


def _builder_options(builder: str, text_column: str) -> dict[str, Any]:
    if builder == "text":
        return {"sample_by": "document", "encoding": "utf-8-sig"}
    # Left to itself the CSV reader turns texts such as "NA" into nothing and "007" into the number 7.
    return {"keep_default_na": False, "converters": {text_column: str}} if builder == "csv" else {}


def _read_file(path: Path, text_column: str) -> list[str | None]:
    suffix = _checked_suffix(path)
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; give a file that holds text")
        if suffix in TEXT_SUFFIXES:
            return [_read_text(path)]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error

    builder = TABLE_BUILDERS[suffix]
    options = _builder_options(builder, text_column)
    try:
        table = datasets.load_dataset(builder, data_files=_escaped([path]), split="train", **options)
    except Exception as error:  # as above
        raise DataError(f"cannot read {path} as {builder}: {reason(error)}; repair or convert the file") from error
    return _column(table, text_column, str(path))


def _escaped(paths: Sequence[Path]) -> list[str]:
    # Without this a path with [ or * in it would be taken for a pattern.
    return [glob.escape(str(path)) for path in paths]


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path} is not a text file (NUL at character {text.index(chr(0))}); convert it to UTF-8 text")
    return text


def _column(table: datasets.Dataset, column: str, source: str) -> list[str | None]:
    _require_column(column, table.column_names, source)
    kind = getattr(table.features[column], "dtype", type(table.features[column]).__name__)
    if kind not in ("string", "large_string"):
        raise _not_text(column, kind, source)
    rows = list(table[column])
    if _are_lines(rows):
        return ["".join(row or "\n" for row in rows)] if any(rows) else []
    return rows


def _require_column(column: str, names: Sequence[str], source: str) -> None:
    if column not in names:
        raise DataError(f"{source} has no column {column!r}; choose one with --text_column: {', '.join(names)}")


def _not_text(column: str, kind: str, source: str) -> DataError:
    return DataError(f"column {column!r} of {source} holds {kind}, not text; choose another one with --text_column")


def _are_lines(rows: Sequence[str | None]) -> bool:
    """Whether every row that is not empty is a single line with its line end."""
    return all(row.find("\n") == len(row) - 1 for row in rows if row)


def stream_records(arguments: DataArguments, split: str) -> datasets.IterableDataset:
    """The rows of a split, read as they are asked for: a `datasets.IterableDataset` of the column `text_column`.

    As in `load_texts` a text file and a row of a table are a record each. Rows that are the lines of one file are
    refused: they would be dealt out to different streams.

    Raises:
        DataError: no source is given for the split, or it cannot be reached, found or read, or holds no text.
    """
    column, source = arguments.text_column, _source(arguments, split)
    if arguments.dataset_name:
        stream = _load_dataset(arguments, split, streaming=True)
    else:
        stream = _stream_files(_split_files(arguments, split), column)
    try:
        first = list(islice(stream, PEEKED_ROWS))
    except Exception as error:  # as in `_load_dataset`
        raise DataError(f"cannot read {source}: {reason(error)}; check the connection and the files") from error
    if first:
        _require_column(column, list(first[0]), source)
    rows = [row[column] for row in first]
    for row in rows:
        if not isinstance(row, str | None):
            raise _not_text(column, type(row).__name__, source)
    if any(rows) and _are_lines(rows):
        raise DataError(
            f"the rows of {source} are the lines of a file, which cannot be streamed; leave --streaming out"
        )
    if not first:
        raise DataError(f"{source} holds no text")
    return stream.select_columns(column)


def _stream_files(paths: Sequence[Path], text_column: str) -> datasets.IterableDataset:
    by_builder: dict[str, list[Path]] = {}
    for path in paths:
        by_builder.setdefault(TABLE_BUILDERS.get(_checked_suffix(path), "text"), []).append(path)
    streams = []
    for builder, files in by_builder.items():
        options = _builder_options(builder, text_column)
        streams.append(
            datasets.load_dataset(builder, data_files=_escaped(files), split="train", streaming=True, **options)
        )
    return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)


def first_records(stream: datasets.IterableDataset, characters: int) -> list[str]:
    """The first records of a stream that together have so many characters, or all where they have fewer."""
    records: list[str] = []
    for (record,) in map(dict.values, stream):
        if characters <= 0:
            break
        if record:
            records.append(record)
            characters -= len(record)
    return records
