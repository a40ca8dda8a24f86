"""From data sets to token windows and streams.

`load_texts` reads records, `tokenize_texts` joins them to one long row of tokens, `ExampleDataset` cuts that row into
examples, `StreamBatchSampler` (training) and `evaluation_rows` (evaluation) say which examples a batch holds. Token t
predicts token t + 1, so N tokens have N - 1 targets, and every one of them is scored exactly once.

For a training text that is too large to be held, `stream_records` and `streaming.StreamedExamples` do this as it comes.
"""

import glob
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
EMPTY = -1  # index of the empty example: all padding, nothing scored; fills batches up
IGNORED = -100  # label that cross-entropy skips
MIN_VOCAB_SIZE = 257  # the 256 bytes and the end-of-text token

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
TABLE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

PIECE_CHARS = 2**16
WORD_CHARS = 2**10  # that a tokenizer learns from at a time
BATCH_CHARS = 2**21

TOKENIZER_CHARS = 2**26  # what a tokenizer is trained on where the training text is a stream
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


def _reason(error: BaseException) -> str:
    """First line of what went wrong; `datasets` wraps the telling error of a reader into a general one."""
    if isinstance(error, datasets.exceptions.DatasetBuildError) and error.__cause__:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Reading records


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
        raise DataError(f"cannot load data set {name!r}: {_reason(error)} ({remedy})") from error


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
        raise DataError(f"cannot read {path} as {builder}: {_reason(error)}; repair or convert the file") from error
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
        raise DataError(f"cannot read {source}: {_reason(error)}; check the connection and the files") from error
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


# Tokenizing


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by its hub name or from a folder; code that it brings along runs only if it is trusted.

    Raises:
        DataError: there is none, or the hub cannot be reached.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # depends on the files: OSError, ValueError, KeyError, the reader's bare Exception
        raise DataError(
            f"cannot load tokenizer {name!r}: {_reason(error)} (give a folder with a saved tokenizer, "
            "or leave --tokenizer_name out to train one on the training text)"
        ) from error


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> GPT2Tokenizer:
    """Trains a byte-level BPE of GPT-2's kind: lossless, with `<|endoftext|>` as begin, end and unknown token.

    The vocabulary is smaller than asked for where no pair occurs twice any more: `len(tokenizer)` tells.

    Raises:
        DataError: `vocab_size` is below 257, or there is no text.
    """
    require_at_least("tokenizer_vocab_size", vocab_size, MIN_VOCAB_SIZE)
    if not any(texts):
        raise DataError("there is no text to train a tokenizer on; give text, or a tokenizer with --tokenizer_name")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once would be a token that is never trained
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for piece in _pieces(text) for part in _parts(piece)), trainer)
    if backend.get_vocab_size() < vocab_size:
        logger.info("The tokenizer has %d tokens: the text yields no more.", backend.get_vocab_size())
    # GPT2Tokenizer, not the anonymous class around `backend`: its folder loads in every version of transformers.
    model = json.loads(backend.to_str())["model"]
    return GPT2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """One long row of N tokens.

    Attributes:
        tokens: Long [N], an end-of-text token between records.
        document_starts: bool [N], True at the first token and at every token that follows an end-of-text token (also
            where the text itself spells that token out).
        num_bytes: UTF-8 bytes of the scored text: all but the first token's. Separators between records count nothing.
        num_words: its words between whitespace plus one for every line end, the WikiText convention.
    """

    tokens: Tensor
    document_starts: Tensor
    num_bytes: int
    num_words: int


def tokenize_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    what: str = "training",
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> TokenizedText:
    """Tokenizes records whole, without truncation, and joins them with end-of-text tokens between them.

    Args:
        texts: the records.
        tokenizer: any tokenizer; several records need one with an end-of-text token (`eos_token`).
        what: names the text in messages and on the progress bar.
        max_tokens: keep only so many tokens from the start. Bytes and words are then those of the text kept, to within
            a character that the cut may divide.
        vocab_size: of the model that is to read the tokens; `len(tokenizer)` by default.

    Raises:
        DataError: fewer than 2 tokens, no end-of-text token to separate records, or a token id beyond the vocabulary.
    """
    separator = tokenizer.eos_token_id
    if len(texts) > 1 and separator is None:
        raise DataError(
            f"the {what} text has {len(texts)} records, but the tokenizer has no end-of-text token to separate them; "
            "set its eos_token or choose another tokenizer"
        )
    limit = sys.maxsize if max_tokens is None else max_tokens
    chunks: list[Tensor] = []
    total = num_bytes = num_words = 0
    characters = sum(map(len, texts))
    with tqdm(desc=f"Tokenizing {what} text", total=characters, unit="char", disable=None, leave=False) as bar:
        for batch in _batches(texts, _cuts_at_spaces(tokenizer)):
            pieces = [piece for piece, _ in batch]
            encoded = _encode(pieces, tokenizer)
            chunk: list[int] = []
            for (piece, separated), ids in zip(batch, encoded, strict=True):
                bar.update(len(piece))
                room = limit - total - len(chunk)
                if len(ids) > room:
                    ids = ids[:room]
                    piece = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                if ids and total + len(chunk) == 0:  # the very first token is an input only
                    piece = piece.removeprefix(tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False))
                num_bytes += len(piece.encode())
                num_words += len(piece.split()) + piece.count("\n")
                chunk += ids
                if separated and len(ids) < room:
                    chunk.append(separator)
            chunks.append(torch.tensor(chunk, dtype=torch.long))
            total += len(chunk)
            if total >= limit:
                break
    tokens = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.long)
    if len(tokens) < 2:
        raise DataError(f"the {what} text has {len(tokens)} tokens, at least 2 are needed; give more text")
    _require_known(int(tokens.max()), tokenizer, what, len(tokenizer) if vocab_size is None else vocab_size)
    return TokenizedText(tokens, document_starts(tokens, separator), num_bytes, num_words)


def encode_record(
    record: str, tokenizer: PreTrainedTokenizerBase, what: str = "training", vocab_size: int | None = None
) -> Tensor:
    """Tokens [n] of one record and the end-of-text token after it; arguments and errors as in `tokenize_texts`."""
    pieces = list(_pieces(record)) if _cuts_at_spaces(tokenizer) else [record]
    ids = [token for piece in _encode(pieces, tokenizer) for token in piece] + [tokenizer.eos_token_id]
    _require_known(max(ids), tokenizer, what, len(tokenizer) if vocab_size is None else vocab_size)
    return torch.tensor(ids)


def document_starts(tokens: Tensor, separator: int | None) -> Tensor:
    """bool [N], True at the first of the tokens [N] and wherever one follows an end-of-text token."""
    starts = torch.zeros(len(tokens), dtype=torch.bool)
    starts[0] = True
    if separator is not None:
        starts[1:] = tokens[:-1] == separator
    return starts


def _encode(pieces: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(pieces, add_special_tokens=False, truncation=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _require_known(token: int, tokenizer: PreTrainedTokenizerBase, what: str, vocab_size: int) -> None:
    if token >= vocab_size:
        raise DataError(
            f"token id {token} ({tokenizer.convert_ids_to_tokens(token)!r}) of the {what} text lies beyond the "
            f"vocabulary of {vocab_size}; choose the tokenizer that belongs to the model"
        )


def split_end(
    text: TokenizedText, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenizedText, TokenizedText]:
    """A text without its last tokens, and these, `tokens` of them.

    Bytes and words are those of the parts, to within a character or a word that the cut may divide.

    Raises:
        DataError: a part would have fewer than 2 tokens.
    """
    rest = len(text.tokens) - tokens
    if rest < 2 or tokens < 2:
        raise DataError(
            f"held_out_tokens={tokens} is not possible with a training text of {len(text.tokens)} tokens: what is held "
            "out and what is left need at least 2 each"
        )
    end, starts = text.tokens[rest:], text.document_starts

    def size(ids: Tensor) -> tuple[int, int]:
        part = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        records = part.split(tokenizer.eos_token) if tokenizer.eos_token else [part]
        return sum(len(r.encode()) for r in records), sum(len(r.split()) + r.count("\n") for r in records)

    num_bytes, num_words = size(end)
    return (
        TokenizedText(text.tokens[:rest], starts[:rest], text.num_bytes - num_bytes, text.num_words - num_words),
        TokenizedText(end, starts[rest:], *size(end[1:])),
    )


def _batches(texts: Sequence[str], cut: bool) -> Iterator[list[tuple[str, bool]]]:
    """Yields lists of (text to encode, whether a separator follows), about BATCH_CHARS characters each."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for number, text in enumerate(texts, start=1):
        pieces = list(_pieces(text)) if cut else [text]
        for place, piece in enumerate(pieces, start=1):
            batch.append((piece, place == len(pieces) and number < len(texts)))
            size += len(piece)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text where GPT-2's pre-tokenizer always begins a new word: before whitespace after something else.

    Encoded piece by piece the text has the tokens that it has as a whole, for a small part of the memory.
    """
    start = 0
    for boundary in re.finditer(r"(?<=\S)[ \t\r\n]", text):
        if boundary.start() - start >= PIECE_CHARS:
            yield text[start : boundary.start()]
            start = boundary.start()
    yield text[start:]


def _parts(piece: str) -> list[str]:
    """The piece, cut where a word never ends: the time to learn from a word grows with its length squared."""
    if not re.search(rf"\S{{{WORD_CHARS}}}", piece):
        return [piece]
    return re.findall(rf"\s*\S{{1,{WORD_CHARS}}}|\s+", piece)


def _cuts_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `_pieces` is exact for this tokenizer: GPT-2's pre-tokenizer with nothing around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pre_tokenizer = getattr(backend, "pre_tokenizer", None)
    return (
        isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
        and pre_tokenizer.use_regex
        and not pre_tokenizer.add_prefix_space
        and backend.normalizer is None
        and not any(
            token.lstrip or token.rstrip or re.search(r"\s", token.content)
            for token in tokenizer.added_tokens_decoder.values()
        )
    )


# Examples and batches


class ExampleDataset(torch.utils.data.Dataset):
    """Examples of X = seq_len * windows_per_example tokens; example i has the inputs [i X, (i + 1) X) of the text.

    The N - 1 targets make ceil((N - 1) / X) examples; the last one is padded on the right. An example is a dictionary:

    - input_ids, long [X]: tokens, then padding.
    - attention_mask, long [X]: 1 for tokens, 0 for padding.
    - labels, long [X]: input_ids, -100 on padding (for models that shift labels themselves).
    - shift_labels, long [X]: the token after each input, across windows and examples, -100 on padding; what is scored.
    - memory_reset, bool [X]: True where the memory must be emptied before the token is read: at the first token of the
      first example of each stream, and with `reset_at_documents` at every document's first token.

    `dataset[EMPTY]` is the empty example: all padding.

    Args:
        text: the tokens.
        seq_len: tokens in an attention window, at least 2.
        windows_per_example: at least 1.
        streams: contiguous streams that carry the memory, stream s beginning at example s * stream_length; None: no
            stream starts are marked.
        reset_at_documents: empty the memory at documents' starts.
        pad_token_id: what input_ids hold on padding (any valid id: it is masked).

    Raises:
        DataError: a size is too small.
    """

    def __init__(
        self,
        text: TokenizedText,
        seq_len: int,
        windows_per_example: int,
        *,
        streams: int | None = None,
        reset_at_documents: bool = False,
        pad_token_id: int = 0,
    ) -> None:
        require_at_least("seq_len", seq_len, 2)
        require_at_least("windows_per_example", windows_per_example, 1)
        self.text = text
        self.example_length = seq_len * windows_per_example
        self.stream_length = None if streams is None else stream_length(len(self), streams)
        self.reset_at_documents = reset_at_documents
        self.pad_token_id = pad_token_id

    @property
    def num_targets(self) -> int:
        """N - 1."""
        return len(self.text.tokens) - 1

    @property
    def memory_runs(self) -> np.ndarray:
        """[N] which run of the memory reads each token in evaluation, 0, 1, ...: each begins with an empty memory."""
        starts = np.arange(len(self.text.tokens)) % (self.example_length * (self.stream_length or 1)) == 0
        if self.reset_at_documents:
            starts = starts | self.text.document_starts.numpy()
        return starts.cumsum() - 1

    def __len__(self) -> int:
        return math.ceil(self.num_targets / self.example_length)

    def target_range(self, index: int) -> tuple[int, int]:
        """Start and stop of the example's targets in an array of all N - 1 targets in text order; (0, 0) for EMPTY."""
        if index == EMPTY:
            return 0, 0
        start = index * self.example_length
        return start, min(start + self.example_length, self.num_targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self.example_length
        example = {
            "input_ids": torch.full((length,), self.pad_token_id),
            "attention_mask": torch.zeros(length, dtype=torch.long),
            "labels": torch.full((length,), IGNORED),
            "shift_labels": torch.full((length,), IGNORED),
            "memory_reset": torch.zeros(length, dtype=torch.bool),
        }
        if index == EMPTY:
            return example
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is not in 0..{len(self) - 1}")
        start, stop = self.target_range(index)
        inputs = self.text.tokens[start:stop]
        count = len(inputs)
        example["input_ids"][:count] = inputs
        example["attention_mask"][:count] = 1
        example["labels"][:count] = inputs
        example["shift_labels"][:count] = self.text.tokens[start + 1 : stop + 1]
        if self.reset_at_documents:
            example["memory_reset"][:count] = self.text.document_starts[start:stop]
        if self.stream_length is not None and index % self.stream_length == 0:
            example["memory_reset"][0] = True
        return example


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks B examples: every tensor [X] becomes [B, X]."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def stream_length(num_examples: int, streams: int) -> int:
    """Examples in each of `streams` contiguous streams; the last streams may be shorter, or empty."""
    require_at_least("streams", streams, 1)
    return math.ceil(num_examples / streams)


def evaluation_rows(num_examples: int, streams: int | None, batch_size: int) -> Iterator[list[int]]:
    """Yields the example indices of each evaluation step, EMPTY where there are no more.

    With `streams` a step has that many rows, whatever the batch size: row s goes through the stream of examples from
    s * stream_length(num_examples, streams), one a step. Without (None) a step takes the next `batch_size` examples.
    """
    return _steps(range(num_examples), batch_size if streams is None else streams, contiguous=streams is not None)


def _steps(order: Sequence[int], rows: int, contiguous: bool) -> Iterator[list[int]]:
    steps = stream_length(len(order), rows)
    for step in range(steps):
        places = [row * steps + step if contiguous else step * rows + row for row in range(rows)]
        yield [order[place] if place < len(order) else EMPTY for place in places]


class StreamBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of example indices for one rank: `accumulation` micro-batches of `batch_size` for every optimizer step.

    The global batch of a step has S = batch_size * accumulation * world_size rows. Micro-batch m of rank r owns the
    `batch_size` rows from (m * world_size + r) * batch_size, so that any split of S sees the same global batches.

    With `carry_memory`, row s goes through stream s of S contiguous streams of the text, in every epoch alike, and
    micro-batch m of a step goes on where micro-batch m of the step before ended; its data set is
    `ExampleDataset(..., streams=sampler.rows)`. Otherwise each epoch has a permutation of its own, the same on all
    ranks. EMPTY fills the last batches up.

    The loader that uses it must not be sharded again.

    Raises:
        DataError: a size is too small, or the rank is not below `world_size`.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        carry_memory: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("num_examples", num_examples),
            ("batch_size", batch_size),
            ("accumulation", accumulation),
            ("world_size", world_size),
        ):
            require_at_least(name, value, 1)
        if not 0 <= rank < world_size:
            raise DataError(f"rank={rank} is not in 0..{world_size - 1}")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.world_size = world_size
        self.rank = rank
        self.carry_memory = carry_memory
        self.seed = seed
        self.epoch = 0

    @property
    def rows(self) -> int:
        """S, the rows of the global batch."""
        return self.batch_size * self.accumulation * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next pass; has no effect on carried streams."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch: a whole number of optimizer steps."""
        return stream_length(self.num_examples, self.rows) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order: Sequence[int] = range(self.num_examples)
        if not self.carry_memory:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_examples, generator=generator).tolist()
        for batch in _steps(order, self.rows, contiguous=self.carry_memory):
            for micro_batch in range(self.accumulation):
                first = (micro_batch * self.world_size + self.rank) * self.batch_size
                yield batch[first : first + self.batch_size]
