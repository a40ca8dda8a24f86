"""Examples and batches: nothing is scored twice, every split of a batch sees the same text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenization import make_text, numbered
from torch.utils.data import DataLoader

from dnc_gpt2.data import DataError
from dnc_gpt2.examples import EMPTY, ExampleDataset, StreamBatchSampler, collate, evaluation_rows
from dnc_gpt2.tokenization import tokenize_texts, train_tokenizer
from losses_dnc_gpt2 import IGNORED

sizes = st.tuples(st.integers(2, 60), st.integers(2, 5), st.integers(1, 3))


@settings(deadline=None)
@given(size=sizes)
def test_every_target_is_scored_once_after_its_own_input_and_padding_never(size):
    num_tokens, seq_len, windows = size
    dataset = ExampleDataset(numbered(num_tokens), seq_len, windows, pad_token_id=7)
    targets = []
    for index, example in enumerate(dataset):
        real = example["attention_mask"].bool()
        assert all(tensor.shape == (seq_len * windows,) for tensor in example.values())
        assert torch.equal(example["shift_labels"][real], example["input_ids"][real] + 1)
        assert torch.equal(example["labels"][real], example["input_ids"][real])
        for name, padding in (("labels", IGNORED), ("shift_labels", IGNORED), ("input_ids", 7), ("memory_reset", 0)):
            assert (example[name][~real] == padding).all()
        assert real.sum() == real.int().cumprod(0).sum() > 0  # padding on the right, no example without a target
        places = range(*dataset.target_range(index))
        assert [place + 1 for place in places] == example["shift_labels"][real].tolist()
        targets += example["shift_labels"][real].tolist()
    assert targets == list(range(1, num_tokens))
    assert len(targets) == dataset.num_targets


def test_the_empty_example_is_all_padding_and_other_indices_are_errors():
    dataset = ExampleDataset(numbered(10), 2, 2, streams=1, reset_at_documents=True)
    empty = dataset[EMPTY]
    assert not range(*dataset.target_range(EMPTY))
    assert not empty["attention_mask"].any() and not empty["memory_reset"].any()
    assert (empty["labels"] == IGNORED).all() and (empty["shift_labels"] == IGNORED).all()
    assert {name: tensor.dtype for name, tensor in empty.items()} == {n: t.dtype for n, t in dataset[0].items()}
    for index in (len(dataset), -2):
        with pytest.raises(IndexError):
            dataset[index]


def test_the_memory_is_reset_at_stream_starts_and_if_asked_at_documents():
    text = numbered(41, document_starts=(5, 16))

    def resets(**options):
        examples = ExampleDataset(text, 4, 1, **options)
        return torch.cat([example["memory_reset"] for example in examples]).nonzero().flatten().tolist()

    assert resets() == []
    assert resets(reset_at_documents=True) == [0, 5, 16]
    assert resets(streams=1) == [0]
    assert resets(streams=3) == [0, 16, 32]
    assert resets(streams=3, reset_at_documents=True) == [0, 5, 16, 32]


def test_example_sizes_are_checked():
    for sizes_, name in (((1, 1), "seq_len=1"), ((2, 0), "windows_per_example=0")):
        with pytest.raises(DataError, match=name):
            ExampleDataset(numbered(9), *sizes_)
    with pytest.raises(DataError, match="streams=0"):
        ExampleDataset(numbered(9), 2, 1, streams=0)


# Batches


def global_batches(
    num_examples: int, batch_size: int, accumulation: int, world_size: int, **options
) -> list[list[int]]:
    """The rows of every optimizer step, put together from all ranks."""
    samplers = [
        StreamBatchSampler(
            num_examples, batch_size, accumulation=accumulation, world_size=world_size, rank=rank, **options
        )
        for rank in range(world_size)
    ]
    ranks = [list(sampler) for sampler in samplers]
    for sampler, micro_batches in zip(samplers, ranks, strict=True):
        assert len(sampler) == len(micro_batches)
        assert all(len(micro_batch) == batch_size for micro_batch in micro_batches)
    steps = len(ranks[0]) // accumulation
    return [
        [
            index
            for micro_batch in range(accumulation)
            for rank in ranks
            for index in rank[step * accumulation + micro_batch]
        ]
        for step in range(steps)
    ]


splits = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None)
@given(num_examples=st.integers(1, 50), split=splits, carry_memory=st.booleans(), seed=st.integers(0, 5))
def test_any_split_of_the_batch_sees_the_same_global_batches(num_examples, split, carry_memory, seed):
    batch_size, accumulation, world_size = split
    options = {"carry_memory": carry_memory, "seed": seed}
    whole = global_batches(num_examples, batch_size * accumulation * world_size, 1, 1, **options)
    assert global_batches(num_examples, *split, **options) == whole
    assert sorted(index for step in whole for index in step if index != EMPTY) == list(range(num_examples))


@settings(deadline=None)
@given(num_examples=st.integers(1, 50), rows=st.integers(1, 9), carry_memory=st.booleans())
def test_evaluation_takes_every_example_once(num_examples, rows, carry_memory):
    steps = list(evaluation_rows(num_examples, rows if carry_memory else None, batch_size=rows))
    assert all(len(step) == rows for step in steps)
    assert sorted(index for step in steps for index in step if index != EMPTY) == list(range(num_examples))


@settings(deadline=None)
@given(num_examples=st.integers(1, 50), rows=st.integers(1, 9))
def test_a_carried_row_goes_through_contiguous_text_from_a_reset(num_examples, rows):
    seq_len = 3
    dataset = ExampleDataset(numbered(num_examples * seq_len + 1), seq_len, 1, streams=rows)
    training = global_batches(num_examples, rows, 1, 1, carry_memory=True)
    assert training == list(evaluation_rows(num_examples, rows, batch_size=1))
    for stream in zip(*training, strict=True):
        examples = [dataset[index] for index in stream]
        tokens = torch.cat([example["input_ids"][example["attention_mask"].bool()] for example in examples]).tolist()
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens))) if tokens else True
        resets = torch.cat([example["memory_reset"] for example in examples]).nonzero().flatten().tolist()
        assert resets == ([0] if tokens else [])


def test_a_micro_batch_keeps_its_streams():
    sampler = StreamBatchSampler(24, 2, accumulation=2, world_size=2, rank=1, carry_memory=True)
    assert sampler.rows == 8
    assert list(sampler) == [[6, 9], [18, 21], [7, 10], [19, 22], [8, 11], [20, 23]]


def test_evaluation_without_carried_memory_is_in_the_order_of_the_text():
    assert list(evaluation_rows(5, None, 2)) == [[0, 1], [2, 3], [4, EMPTY]]


def test_each_epoch_and_seed_has_its_own_order_unless_memory_is_carried():
    sampler = StreamBatchSampler(40, 4, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(StreamBatchSampler(40, 4, seed=2)) != first
    carried = StreamBatchSampler(40, 4, carry_memory=True)
    first = list(carried)
    carried.set_epoch(1)
    assert list(carried) == first


def test_sampler_sizes_are_checked():
    for name in ("num_examples", "batch_size", "accumulation", "world_size"):
        with pytest.raises(DataError, match=f"{name}=0"):
            StreamBatchSampler(**{"num_examples": 1, "batch_size": 1, name: 0})
    with pytest.raises(DataError, match="rank=2"):
        StreamBatchSampler(1, 1, world_size=2, rank=2)


@pytest.mark.parametrize("carry_memory", [False, True])
def test_a_loader_scores_the_whole_text_once(carry_memory):
    texts = [make_text(300), make_text(50, seed=1)]
    text = tokenize_texts(texts, train_tokenizer(texts, 300))
    sampler = StreamBatchSampler(
        len(ExampleDataset(text, 8, 2)), batch_size=3, accumulation=2, carry_memory=carry_memory
    )
    dataset = ExampleDataset(text, 8, 2, streams=sampler.rows if carry_memory else None)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate))
    assert all(tensor.shape == (3, 16) for batch in batches for tensor in batch.values())
    scored = torch.cat([batch["shift_labels"].flatten() for batch in batches])
    assert torch.equal(scored[scored != IGNORED].sort().values, text.tokens[1:].sort().values)
