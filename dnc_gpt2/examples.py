"""From a row of tokens to examples and batches: which tokens a model reads together, and in which order.

`ExampleDataset` cuts the row into examples; `StreamBatchSampler` for training and `evaluation_rows` for evaluation say
which of them a batch holds. Token t predicts token t + 1, so N tokens have N - 1 targets, and every one of them is
scored exactly once.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from losses_dnc_gpt2 import IGNORED

from .data import DataError, require_at_least
from .tokenization import TokenizedText

EMPTY = -1  # index of the empty example: all padding, nothing scored; fills batches up


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
