"""From texts to one long row of tokens: loading or training a tokenizer, tokenizing, cutting off an end."""

import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from .data import MIN_VOCAB_SIZE, DataError, reason, require_at_least

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CHARS = 2**26  # what a tokenizer is trained on where the training text is a stream

PIECE_CHARS = 2**16
WORD_CHARS = 2**10  # that a tokenizer learns from at a time
BATCH_CHARS = 2**21


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by its hub name or from a folder; code that it brings along runs only if it is trusted.

    Raises:
        DataError: there is none, or the hub cannot be reached.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # depends on the files: OSError, ValueError, KeyError, the reader's bare Exception
        raise DataError(
            f"cannot load tokenizer {name!r}: {reason(error)} (give a folder with a saved tokenizer, "
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
