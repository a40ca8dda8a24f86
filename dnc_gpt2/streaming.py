"""Training examples from a corpus that is never held: read, tokenized and dealt out to rows while training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import DataError, require_at_least
from .tokenization import document_starts, encode_record


class Place(NamedTuple):
    """Where a process stands in a stream."""

    rows: list[tuple[Tensor, Tensor]]  # of each row what it has not given yet: tokens, and where documents start
    passes: int  # that are over
    records: dict[str, Any]  # state of the records' iterator


class StreamedExamples(torch.utils.data.IterableDataset):
    """Endless examples of one process: the next one of each of its R rows in turn.

    The process reads its own part of the records: whole shards (files) where their number is a multiple of
    `world_size`, otherwise every `world_size`-th record. A row is a contiguous stream of tokens with an end-of-text
    token after each record; the row that runs short takes the next record. So in a pass over the corpus every record is
    in one row of one process, once. When the part ends the next pass begins, and the rows go on.

    An example is a dictionary as that of `ExampleDataset`, without padding. The next one of its row goes on where it
    ends, so that memory can be carried. `memory_reset` marks documents' starts with `reset_at_documents`.

    Args:
        records: rows of one column of text, as `stream_records` gives.
        tokenizer: any with an end-of-text token.
        seq_len: tokens in an attention window, at least 2.
        windows_per_example: at least 1.
        rows: R, the examples of this process in an optimizer step.
        rank, world_size: this process and the number of processes.
        reset_at_documents: empty the memory at documents' starts.
        vocab_size: of the model that is to read the tokens; `len(tokenizer)` by default.

    Raises:
        DataError: a size is too small or the tokenizer has no end-of-text token; while reading, a token id lies beyond
            the vocabulary or the part of this process holds no text.
    """

    def __init__(
        self,
        records: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        windows_per_example: int,
        *,
        rows: int,
        rank: int = 0,
        world_size: int = 1,
        reset_at_documents: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        require_at_least("seq_len", seq_len, 2)
        require_at_least("windows_per_example", windows_per_example, 1)
        require_at_least("rows", rows, 1)
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token to separate the records of a stream; set its eos_token or "
                "choose another tokenizer"
            )
        self.records = split_dataset_by_node(records, rank, world_size)
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.example_length = seq_len * windows_per_example
        self.rank, self.world_size = rank, world_size
        self.reset_at_documents = reset_at_documents
        self.passes = 0
        # What each row has not given yet: tokens, and where documents start.
        self._rows = [(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.bool))] * rows
        self._documents = self._read()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            for row in range(len(self._rows)):
                yield self._next_example(row)

    def _next_example(self, row: int) -> dict[str, Tensor]:
        length = self.example_length
        held = [self._rows[row]]
        while sum(len(tokens) for tokens, _ in held) <= length:
            held.append(next(self._documents))
        tokens, starts = (torch.cat(parts) for parts in zip(*held, strict=True))
        self._rows[row] = tokens[length:], starts[length:]  # the last target is the next input
        return {
            "input_ids": tokens[:length],
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": tokens[:length],
            "shift_labels": tokens[1 : length + 1],
            "memory_reset": starts[:length] & self.reset_at_documents,
        }

    def _read(self, resumed: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and documents' starts of each record; the first pass may be `resumed` at its very end."""
        while True:
            self.records.set_epoch(self.passes)
            empty = not resumed
            for (record,) in map(dict.values, self.records):
                if record:
                    empty = False
                    tokens = encode_record(record, self.tokenizer, vocab_size=self.vocab_size)
                    yield tokens, document_starts(tokens, self.tokenizer.eos_token_id)
            if empty:
                raise DataError(
                    f"process {self.rank} of {self.world_size} finds no training text in its part of the corpus; use "
                    "fewer processes or more records"
                )
            self.passes, resumed = self.passes + 1, False

    def place(self) -> Place:
        """Where this process stands."""
        return Place(list(self._rows), self.passes, self.records.state_dict())

    def go_to(self, place: Place) -> None:
        """Go on from where `place` was called."""
        self._rows, self.passes = list(place.rows), place.passes
        self.records.load_state_dict(place.records)
        self._documents = self._read(resumed=True)

    def save(self, path: Path) -> None:
        """Write where this process stands."""
        here = self.place()
        rows = {str(i): torch.stack([tokens, starts.long()]) for i, (tokens, starts) in enumerate(here.rows)}
        facts = {"world_size": self.world_size, "passes": here.passes, "records": here.records}
        save_file(rows, path, metadata={name: json.dumps(value) for name, value in facts.items()})

    def load(self, path: Path) -> None:
        """Go on from where `save` was called.

        Raises:
            DataError: that was with other numbers of rows or processes.
        """
        with safe_open(path, framework="pt") as file:
            facts = {name: json.loads(value) for name, value in file.metadata().items()}
            rows = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        if (facts["world_size"], len(rows)) != (self.world_size, len(self._rows)):
            raise DataError(
                f"{path} is of {facts['world_size']} processes with {len(rows)} rows each, not of {self.world_size} "
                f"with {len(self._rows)}: resume with the processes, batch size and accumulation that wrote it"
            )
        self.go_to(Place([(tokens, starts.bool()) for tokens, starts in rows], facts["passes"], facts["records"]))
