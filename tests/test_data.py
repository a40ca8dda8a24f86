"""The data pipeline: nothing is lost, nothing is scored twice, every split of a batch sees the same text."""

import json
import random

import pytest
import torch
from huggingface_hub import HfFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, GPT2Config, HfArgumentParser

from dnc_gpt2 import data
from dnc_gpt2.data import (
    EMPTY,
    END_OF_TEXT,
    IGNORED,
    DataArguments,
    DataError,
    ExampleDataset,
    StreamBatchSampler,
    TokenizedText,
    collate,
    evaluation_rows,
    load_texts,
    load_tokenizer,
    split_end,
    tokenize_texts,
    train_tokenizer,
)

PHRASES = [
    *("the sea,", "a lamp;", "It's 1984", "über naïve", "日本語 🙂", "don't --", "(old)", "two\tthree", "."),
    *("stone\n", " \n", "= \n\n", ""),
]


def make_text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(PHRASES, k=words))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([make_text(2000)], 300)


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    """Keeps what `datasets` makes of the test files out of the user's cache."""
    monkeypatch.setattr(data.datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def numbered(num_tokens: int, document_starts: tuple[int, ...] = ()) -> TokenizedText:
    """Tokens 0, 1, 2, ...: a token's id is its place in the text."""
    starts = torch.zeros(num_tokens, dtype=torch.bool)
    starts[list((0, *document_starts))] = True
    return TokenizedText(torch.arange(num_tokens), starts, num_bytes=num_tokens, num_words=num_tokens)


def write(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_rows(path, rows: list[dict]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(*files: str, **options) -> list[str]:
    return load_texts(DataArguments(train_file=list(files), **options), ["train"])["train"]


# Options


def test_arguments_parse_from_the_command_line_and_from_a_mapping():
    parser = HfArgumentParser(DataArguments)
    (arguments,) = parser.parse_args_into_dataclasses(["--train_file", "a.txt", "b.txt", "--carry_memory"])
    assert arguments.train_file == ["a.txt", "b.txt"]
    assert arguments.carry_memory
    assert (arguments.seq_len, arguments.windows_per_example, arguments.tokenizer_vocab_size) == (128, 4, 4096)
    (arguments,) = parser.parse_dict({"train_file": "a.txt"})
    assert arguments.train_file == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_len", 1),
        ("windows_per_example", 0),
        ("eval_streams", 0),
        ("tokenizer_vocab_size", 256),
        ("max_train_tokens", 1),
        ("max_eval_tokens", 0),
    ],
)
def test_sizes_that_are_too_small_are_named(name, value):
    with pytest.raises(DataError, match=f"{name}={value} .* at least"):
        DataArguments(**{name: value})


def test_a_data_set_and_files_exclude_each_other():
    with pytest.raises(DataError, match="excludes"):
        DataArguments(dataset_name="wikitext", train_file=["a.txt"])


# Reading records


@pytest.mark.parametrize("suffix", [".txt", ".text", ".md", ".raw", ".TXT"])
def test_a_text_file_is_one_record_as_it_is(tmp_path, suffix):
    text = " \n = A = \n\nünï\r\n  end"
    assert read(write(tmp_path / f"a{suffix}", text)) == [text]


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc")) == ["abc"]


def test_several_files_and_patterns_keep_their_order(tmp_path):
    for name in ("c", "b", "a[1]"):
        write(tmp_path / f"{name}.txt", name)
    write_rows(tmp_path / "d.jsonl", [{"text": "d1"}, {"text": "d2"}])
    named = read(str(tmp_path / "d.jsonl"), str(tmp_path / "a[1].txt"), str(tmp_path / "[bc].txt"))
    assert named == ["d1", "d2", "a[1]", "b", "c"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows[0].csv", "rows.parquet"])
def test_tables_give_one_record_a_row_from_the_named_column(tmp_path, name):
    rows = [{"id": 1, "body": "first\nline"}, {"id": 2, "body": "NA"}, {"id": 3, "body": "007"}, {"id": 4, "body": "é"}]
    path = tmp_path / name
    table = data.datasets.Dataset.from_list(rows)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path)
    assert read(str(path), text_column="body") == [row["body"] for row in rows]
    with pytest.raises(DataError, match=r"no column 'text'.*--text_column: id, body"):
        read(str(path))
    if path.suffix != ".csv":  # where everything is text
        with pytest.raises(DataError, match="holds int64, not text"):
            read(str(path), text_column="id")


def test_records_without_text_are_left_out(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": None}, {"text": "b"}])
    assert read(path) == ["a", "b"]


def test_rows_that_are_lines_are_joined_to_one_record(tmp_path):
    lines = ["", " = Title = \n", "", " Some text . \n"]
    path = write_rows(tmp_path / "lines.jsonl", [{"text": line} for line in lines])
    assert read(path) == ["\n = Title = \n\n Some text . \n"]


def test_rows_of_several_lines_stay_records(tmp_path):
    records = ["one\ntwo\n", "three\n"]
    path = write_rows(tmp_path / "records.jsonl", [{"text": record} for record in records])
    assert read(path) == records


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_folder_is_a_data_set(tmp_path, kind):
    for split, rows in (("train", ["a", "b", "c", "d"]), ("validation", ["v"]), ("test", ["t"])):
        table = data.datasets.Dataset.from_dict({"text": rows})
        path = tmp_path / f"{split}.{kind}"
        table.to_parquet(path) if kind == "parquet" else table.to_json(path)
    name = str(tmp_path)
    assert load_texts(DataArguments(dataset_name=name)) == {"train": ["a", "b", "c", "d"], "validation": ["v"]}
    sliced = DataArguments(dataset_name=name, train_split="train[25%:]", validation_split="train[:25%]")
    assert load_texts(sliced) == {"train": ["b", "c", "d"], "validation": ["a"]}
    with pytest.raises(DataError, match=r"Unknown split \"dev\".*'validation'.*--validation_split"):
        load_texts(DataArguments(dataset_name=name, validation_split="dev"))
    with pytest.raises(DataError, match="dataset_config_name"):
        load_texts(DataArguments(dataset_name=name, dataset_config_name="other"))


def test_a_local_folder_is_read_as_its_files_are(tmp_path):
    path = write(tmp_path / "train.csv", "text\nNA\n007\nnull\n")
    expected = ["NA", "007", "null"]
    assert read(path) == expected
    assert load_texts(DataArguments(dataset_name=str(tmp_path)), ["train"]) == {"train": expected}


def test_text_files_of_a_local_folder_stay_whole(tmp_path):
    write(tmp_path / "train-1.txt", "one\n\ntwo\n")
    write(tmp_path / "train-2.txt", "three")
    assert load_texts(DataArguments(dataset_name=str(tmp_path)), ["train"]) == {"train": ["one\n\ntwo\n", "three"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("latin.txt", "Zürich".encode("latin-1"), r"not UTF-8 text \(byte 1\)"),
        ("binary.txt", b"PK\x00\x01", "not a text file"),
        ("a.pdf", b"x", r"unknown ending '\.pdf'.*\.txt"),
        ("bad.jsonl", b'{"text": "a"\nnonsense', "cannot read .*bad.jsonl as json"),
        ("bad.parquet", b"not a parquet file", "cannot read .*bad.parquet as parquet"),
        ("null.jsonl", b'{"text": ""}\n', "holds no text"),
        ("header.csv", b"text\n", "cannot read .*header.csv as csv"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        read(str(tmp_path / "nowhere.txt"))
    with pytest.raises(DataError, match=r"\*\.txt does not exist"):
        read(str(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"is a folder.*--dataset_name"):
        read(str(tmp_path))
    with pytest.raises(DataError, match=r"no train text.*--train_file"):
        load_texts(DataArguments(), ["train"])
    with pytest.raises(DataError, match=r"no validation text.*--validation_file"):
        load_texts(DataArguments(train_file=[write(tmp_path / "a.txt", "a")]))


def test_an_unknown_data_set_or_an_unreachable_hub_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"cannot load data set .*check the name"):
        load_texts(DataArguments(dataset_name=str(tmp_path / "nowhere")))

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    monkeypatch.setattr(data.datasets, "load_dataset_builder", unreachable)
    with pytest.raises(DataError, match=r"Couldn't reach 'Salesforce/wikitext'.*use --train_file .*local folder"):
        load_texts(DataArguments(dataset_name="Salesforce/wikitext", dataset_config_name="wikitext-2-raw-v1"))

    def without_namespace(name, *args, **kwargs):  # what `datasets` asks of the hub's client for such a name
        HfFileSystem().resolve_path(f"hf://datasets/{name}@main/.huggingface.yaml")

    monkeypatch.setattr(data.datasets, "load_dataset_builder", without_namespace)
    with pytest.raises(DataError, match=r"got 'wikitext'.*name the data set with its namespace"):
        load_texts(DataArguments(dataset_name="wikitext"))


# The tokenizer


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_the_tokenizer_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_reloaded_from_its_folder_with_the_same_ids(tokenizer, tmp_path):
    GPT2Config().save_pretrained(tmp_path)  # as in a checkpoint
    tokenizer.save_pretrained(tmp_path)
    text = make_text(500, seed=1) + END_OF_TEXT + " \x00\r\n"
    for reloaded in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(reloaded) == len(tokenizer)
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert reloaded.decode(reloaded(text)["input_ids"]) == text
        assert reloaded.eos_token_id == tokenizer.eos_token_id


def test_one_token_serves_as_begin_end_and_unknown(tokenizer):
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert ids == {tokenizer.convert_tokens_to_ids(END_OF_TEXT)}


def test_the_vocabulary_has_the_size_asked_for_or_what_the_text_yields(tokenizer):
    assert len(tokenizer) == 300
    assert len(train_tokenizer(["ab ab"], 400)) == 258
    assert len(train_tokenizer(["ab ab"], 257)) == 257


def test_training_a_tokenizer_is_deterministic():
    text = make_text(2000, seed=3)
    first, second = (train_tokenizer([text], 500) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_a_tokenizer_needs_text_and_a_vocabulary():
    with pytest.raises(DataError, match=r"tokenizer_vocab_size=256 .* at least 257"):
        train_tokenizer(["text"], 256)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300)


def test_an_unknown_tokenizer_is_one_clear_error(tmp_path):
    for name in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"cannot load tokenizer .*leave --tokenizer_name out"):
            load_tokenizer(str(name))


# Tokenizing


def test_records_are_joined_with_end_of_text_between(tokenizer):
    texts = ["first record\n", "second\nrecord", "third"]
    text = tokenize_texts(texts, tokenizer)
    assert tokenizer.decode(text.tokens) == END_OF_TEXT.join(texts)
    ids = [tokenizer(record)["input_ids"] for record in texts]
    assert text.tokens.tolist() == [*ids[0], 0, *ids[1], 0, *ids[2]]
    assert text.document_starts.nonzero().flatten().tolist() == [0, len(ids[0]) + 1, len(ids[0]) + len(ids[1]) + 2]


def test_end_of_text_spelled_out_starts_a_document_too(tokenizer):
    text = tokenize_texts([f"one{END_OF_TEXT}two"], tokenizer)
    assert tokenizer.decode(text.tokens[text.document_starts.nonzero()[1].item() :]) == "two"


@settings(deadline=None, max_examples=100)
@given(texts=st.lists(st.text(alphabet=" \n\t\r\x1c\u00a0\u2028a'.é🙂1", max_size=60), min_size=1, max_size=3))
def test_long_texts_are_tokenized_as_a_whole(tokenizer, texts):
    whole = [tokenizer.eos_token_id]
    for text in texts:
        whole += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PIECE_CHARS", 1)
        patch.setattr(data, "BATCH_CHARS", 5)
        try:
            tokens = tokenize_texts(texts, tokenizer).tokens.tolist()
        except DataError:
            tokens = whole[1:-1]
            assert len(tokens) < 2
    assert tokens == whole[1:-1]


def test_neither_truncation_nor_a_length_warning(tokenizer, tmp_path, caplog, recwarn):
    tokenizer.save_pretrained(tmp_path)
    short = AutoTokenizer.from_pretrained(tmp_path, model_max_length=8)
    short.backend_tokenizer.enable_truncation(8)
    text = make_text(100)
    assert tokenizer.decode(tokenize_texts([text], short).tokens) == text
    assert not caplog.records
    assert not recwarn.list


def test_bytes_and_words_are_those_of_the_scored_text(tokenizer):
    text = tokenize_texts(["é one\ntwo  three\n \nfour"], tokenizer)
    first = tokenizer.decode(text.tokens[:1])
    assert first in ("é", "\ufffd")  # the text after it is scored; half a character counts as not read
    assert text.num_words == 4 + 3 + (first != "é")
    assert text.num_bytes == len(" one\ntwo  three\n \nfour") + (2 if first != "é" else 0)
    records = tokenize_texts(["x a b\n", "c"], tokenizer)
    assert (records.num_words, records.num_bytes) == (4, len(" a b\nc"))


@pytest.mark.parametrize("max_tokens", [2, 7, 100])
def test_the_first_tokens_can_be_taken_alone(tokenizer, max_tokens):
    texts = ["one two", "three four\n", make_text(100)]
    whole = tokenize_texts(texts, tokenizer)
    part = tokenize_texts(texts, tokenizer, max_tokens=max_tokens)
    assert torch.equal(part.tokens, whole.tokens[:max_tokens])
    assert torch.equal(part.document_starts, whole.document_starts[:max_tokens])
    scored = tokenizer.decode(part.tokens[1:]).replace(END_OF_TEXT, "")
    assert part.num_bytes == len(scored.encode())
    assert tokenize_texts(texts, tokenizer, max_tokens=10**9).num_bytes == whole.num_bytes


def test_the_end_of_a_text_is_held_out(tokenizer):
    text = tokenize_texts(["the sea, a lamp", "old stone\nroad", "It's 1984"], tokenizer)
    cut = int(text.document_starts.nonzero()[1])
    rest, end = split_end(text, len(text.tokens) - cut, tokenizer)
    assert torch.equal(torch.cat([rest.tokens, end.tokens]), text.tokens)
    assert end.document_starts.nonzero()[:, 0].tolist() == [0, int(text.document_starts.nonzero()[2]) - cut]
    first = tokenizer.decode(end.tokens[:1])
    assert end.num_bytes == len("old stone\nroadIt's 1984") - len(first)
    assert (rest.num_bytes, rest.num_words) == (text.num_bytes - len("old stone\nroadIt's 1984"), 4)


@pytest.mark.parametrize("tokens", [1, 9, 10, 11])
def test_a_part_without_anything_to_predict_is_refused(tokenizer, tokens):
    with pytest.raises(DataError, match=f"held_out_tokens={tokens} .* 10 tokens"):
        split_end(numbered(10), tokens, tokenizer)


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_a_text_that_is_too_short_is_named(tokenizer, texts):
    with pytest.raises(DataError, match=r"the validation text has [01] tokens, at least 2"):
        tokenize_texts(texts, tokenizer, "validation")


def test_token_ids_beyond_the_vocabulary_are_named(tokenizer):
    with pytest.raises(DataError, match=r"token id \d+ .* training text .* beyond the vocabulary of 50"):
        tokenize_texts(["some text"], tokenizer, vocab_size=50)


def test_several_records_need_an_end_of_text_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    bare.eos_token = None
    assert tokenize_texts(["one record"], bare).document_starts.sum() == 1
    with pytest.raises(DataError, match="no end-of-text token"):
        tokenize_texts(["one", "two"], bare)


# Examples


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
def test_a_loader_scores_the_whole_text_once(tokenizer, carry_memory):
    text = tokenize_texts([make_text(300), make_text(50, seed=1)], tokenizer)
    sampler = StreamBatchSampler(
        len(ExampleDataset(text, 8, 2)), batch_size=3, accumulation=2, carry_memory=carry_memory
    )
    dataset = ExampleDataset(text, 8, 2, streams=sampler.rows if carry_memory else None)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate))
    assert all(tensor.shape == (3, 16) for batch in batches for tensor in batch.values())
    scored = torch.cat([batch["shift_labels"].flatten() for batch in batches])
    assert torch.equal(scored[scored != IGNORED].sort().values, text.tokens[1:].sort().values)
