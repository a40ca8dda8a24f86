"""The texts of a run: the user's, or the embedded corpus with its questions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .data import DataArguments, load_texts
from .examples import ExampleDataset
from .tasks import LocatedQuestion, Question, biographies, locate, recall, recall_by_guessing

EMBEDDED_DOCUMENTS = {"train": 600, "validation": 40}
EMBEDDED_SEEDS = {"train": 0, "validation": 1}
FEWEST_QUESTIONS = 20


@dataclass(frozen=True)
class Corpus:
    """Texts by split, and what is asked in the validation text, if anything.

    Attributes:
        texts: split ("train", "validation") -> documents.
        questions: of the validation documents; only the embedded corpus has any.
        description: where the texts come from, for the record.
    """

    texts: dict[str, list[str]]
    description: dict[str, Any]
    questions: list[Question] = field(default_factory=list)


def is_embedded(data: DataArguments) -> bool:
    """Whether the options name no data, so that the embedded corpus is meant."""
    return not (data.dataset_name or data.train_file or data.validation_file)


def load_corpus(data: DataArguments, splits: Sequence[str] = ("train", "validation")) -> Corpus:
    """The texts that the options name, or the embedded corpus where they name none.

    Raises:
        DataError: a split cannot be had; see `load_texts`.
    """
    if not is_embedded(data):
        names = ("dataset_name", "dataset_config_name", "train_file", "validation_file")
        description = {name: getattr(data, name) for name in names if getattr(data, name)}
        return Corpus(load_texts(data, splits), description)
    generated = {split: biographies(EMBEDDED_DOCUMENTS[split], EMBEDDED_SEEDS[split]) for split in splits}
    return Corpus(
        texts={split: text.documents for split, text in generated.items()},
        description={"corpus": "embedded biographies"},
        questions=generated["validation"].questions if "validation" in generated else [],
    )


@dataclass(frozen=True)
class Exam:
    """The questions of a corpus in the tokens of its validation split.

    Attributes:
        questions: where they are asked, answered and stated.
        streams: [N] which run of the memory each token belongs to.
    """

    questions: list[LocatedQuestion]
    streams: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, dataset: ExampleDataset, tokenizer: PreTrainedTokenizerBase) -> "Exam":
        """Find the questions; those that `max_eval_tokens` cut away are left out."""
        text = dataset.text
        documents = corpus.texts["validation"]
        encoded = tokenizer(documents, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        lengths = [len(ids) + 1 for ids in encoded["input_ids"]]  # an end-of-text token follows each
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        located = locate(corpus.questions, encoded["offset_mapping"], starts)
        return cls([q for q in located if q.answer_end <= len(text.tokens)], dataset.memory_runs)

    def _windows(self, window: int) -> np.ndarray:
        return np.arange(len(self.streams)) // window

    def recall(self, ranks: np.ndarray, window: int) -> dict[str, Any]:
        """Recall of a model with attention windows of so many tokens, from the ranks [N - 1] of its targets.

        A distance with fewer than `FEWEST_QUESTIONS` questions says nothing alone: it counts in the whole only.
        """
        if not self.questions:
            return {}
        results = recall(ranks, self.questions, self._windows(window), self.streams)
        counts = results["questions_by_distance"]
        enough = {d: r for d, r in results["recall_by_distance"].items() if counts[d] >= FEWEST_QUESTIONS}
        return results | {"recall_by_distance": enough}

    def guessing(self, window: int) -> dict[str, Any]:
        """What always naming the most frequent candidate recalls outside such windows."""
        if not self.questions:
            return {}
        levels = recall_by_guessing(self.questions, self._windows(window), self.streams)
        return {"recall_by_guessing": levels["recall_outside_window"]}
