"""Options of the data and reading of records: a text is taken as it is, what cannot be used is named."""

import json

import pytest
from huggingface_hub import HfFileSystem
from transformers import HfArgumentParser

from dnc_gpt2 import data
from dnc_gpt2.data import DataArguments, DataError, load_texts


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    """Keeps what `datasets` makes of the test files out of the user's cache."""
    monkeypatch.setattr(data.datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


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
