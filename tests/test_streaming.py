"""Streaming: what is read is what the files hold, no record twice, and a resumed run goes on at the same place."""

import json
import random
from collections import Counter
from itertools import islice

import pytest
import torch
from tiny_runs import command_line, tiny_options, tiny_run
from transformers import TrainerCallback

import train
from dnc_gpt2 import data
from dnc_gpt2.data import DataArguments, DataError, load_texts, stream_records
from dnc_gpt2.models import new_models
from dnc_gpt2.streaming import StreamedExamples
from dnc_gpt2.tokenization import train_tokenizer
from dnc_gpt2.trainer import DNCTrainer, DNCTrainingArguments

WINDOW, WINDOWS = 4, 2
EXAMPLE = WINDOW * WINDOWS


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of different lengths that begin with their own number."""
    rng = random.Random(seed)
    return [f"{i}:" + "".join(rng.choices("abcdefgh \n", k=rng.randint(1, 60))) for i in range(count)]


def write_shards(folder, texts: list[str], shards: int) -> list[str]:
    """JSON lines files; text i is in file i % shards."""
    paths = [folder / f"{shard}.jsonl" for shard in range(shards)]
    for shard, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts[shard::shards]))
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(200), 300)


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    """Keeps what `datasets` makes of the test files out of the user's cache."""
    monkeypatch.setattr(data.datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def streamed(files: list[str], tokenizer, rows: int = 2, **options) -> StreamedExamples:
    arguments = DataArguments(train_file=files, streaming=True, max_eval_tokens=100)
    return StreamedExamples(stream_records(arguments, "train"), tokenizer, WINDOW, WINDOWS, rows=rows, **options)


def records_of(tokens: list[int], separator: int) -> list[tuple[int, ...]]:
    """The records in a row of tokens, each of which a separator ends."""
    found, current = [], []
    for token in tokens:
        current.append(token)
        if token == separator:
            found.append(tuple(current))
            current = []
    assert not current, "the last record is whole"
    return found


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pass_gives_every_record_as_it_is_to_one_row(tmp_path, tokenizer, shards):
    texts = documents(40)
    examples = streamed(write_shards(tmp_path, texts, shards), tokenizer, rows=3)
    rows: list[list[int]] = [[], [], []]
    for i, example in enumerate(examples):
        rows[i % 3] += example["input_ids"].tolist()
        if examples.passes:
            break
    for row, (tokens, _) in zip(rows, examples._rows, strict=True):
        row += tokens.tolist()  # what it has not given yet
    records = Counter(record for row in rows for record in records_of(row, tokenizer.eos_token_id))
    once = Counter(record_of(text, tokenizer) for text in texts)
    assert len(once) == len(texts)
    assert (records - once).total() == 1, "the record that began the next pass"
    assert not once - records


def record_of(text: str, tokenizer) -> tuple[int, ...]:
    return (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)


def test_examples_of_a_row_go_on_where_the_last_one_ended(tmp_path, tokenizer):
    examples = streamed(write_shards(tmp_path, documents(40), 1), tokenizer, reset_at_documents=True)
    steps = list(islice(examples, 40))
    for row in (steps[0::2], steps[1::2]):
        tokens = torch.cat([example["input_ids"] for example in row])
        starts = torch.cat([example["memory_reset"] for example in row])
        targets = torch.cat([example["shift_labels"] for example in row])
        assert torch.equal(targets[:-1], tokens[1:])
        assert torch.equal(starts[1:], tokens[:-1] == tokenizer.eos_token_id)
        assert starts[0]
    assert all(example["attention_mask"].all() and len(example["labels"]) == EXAMPLE for example in steps)
    plain = streamed(write_shards(tmp_path, documents(40), 1), tokenizer)
    assert not any(example["memory_reset"].any() for example in islice(plain, 10))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_two_ranks_see_disjoint_records_and_together_all(tmp_path, tokenizer, shards):
    texts = documents(40)
    files = write_shards(tmp_path, texts, shards)
    first, second = (
        [row["text"] for row in streamed(files, tokenizer, rank=rank, world_size=2).records] for rank in range(2)
    )
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(texts)
    # And each reads its own.
    for rank, part in enumerate((first, second)):
        examples = streamed(files, tokenizer, rank=rank, world_size=2, rows=1)
        tokens = torch.cat([example["input_ids"] for example in islice(examples, 20)]).tolist()
        found = tokenizer.decode(tokens).split(tokenizer.eos_token)[:-1]
        assert len(found) > 3
        assert found == part[: len(found)]


def test_a_stream_begins_again_when_it_ends(tmp_path, tokenizer):
    examples = streamed(write_shards(tmp_path, documents(5), 1), tokenizer, rows=1)
    tokens = torch.cat([example["input_ids"] for example in islice(examples, 100)])
    assert examples.passes > 1
    once = [token for text in documents(5) for token in record_of(text, tokenizer)]
    assert tokens[: 2 * len(once)].tolist() == once + once


@pytest.mark.parametrize("steps", [3, 25, 60])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_place_is_gone_on_from(tmp_path, tokenizer, shards, steps):
    def start() -> StreamedExamples:
        return streamed(files, tokenizer, rank=1, world_size=2, reset_at_documents=True)

    files = write_shards(tmp_path, documents(40), shards)
    examples = start()
    list(islice(examples, 2 * steps))
    examples.save(tmp_path / "place.safetensors")
    expected = list(islice(examples, 60))
    again = start()
    again.load(tmp_path / "place.safetensors")
    assert examples.passes >= 1 or steps < 60
    for one, other in zip(expected, islice(again, 60), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for options in ({"rows": 3}, {"world_size": 3}):
        other = streamed(files, tokenizer, **{"rank": 1, "world_size": 2, **options})
        with pytest.raises(DataError, match=r"place.* 2 processes with 2 rows .*resume with"):
            other.load(tmp_path / "place.safetensors")


def test_text_files_and_tables_and_a_folder_are_streamed_alike(tmp_path, tokenizer):
    texts = ["\ufefffirst\nfile", "second"]
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    (tmp_path / "b.csv").write_text("text,n\nsecond,1\n,2\nNA,3\n", encoding="utf-8")
    arguments = DataArguments(train_file=[str(tmp_path / "*.[tc]*")], streaming=True, max_eval_tokens=100)
    assert load_texts(arguments, ["train"])["train"] == ["first\nfile", "second", "NA"]
    folder = tmp_path / "folder"
    folder.mkdir()
    write_shards(folder, documents(5), 1)
    arguments = DataArguments(dataset_name=str(folder), streaming=True, max_eval_tokens=100)
    assert load_texts(arguments, ["train"])["train"] == documents(5)


def test_no_more_of_the_validation_split_is_read_than_its_tokens_need(tmp_path):
    texts = documents(500)
    (file,) = write_shards(tmp_path, texts, 1)
    arguments = DataArguments(train_file=[file], validation_file=[file], streaming=True, max_eval_tokens=50)
    records = load_texts(arguments, ["validation"])["validation"]
    assert records == texts[: len(records)]
    assert 50 * 16 <= sum(map(len, records)) < 50 * 16 + 100


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_eval_tokens": 9}, "streaming needs a corpus; give --dataset_name or --train_file"),
        ({"train_file": ["a.txt"]}, "streaming needs max_eval_tokens"),
        ({"train_file": ["a.txt"], "max_eval_tokens": 9, "max_train_tokens": 9}, "streaming excludes max_train_tokens"),
    ],
)
def test_options_that_streaming_needs_or_excludes_are_named(options, message):
    with pytest.raises(DataError, match=message):
        DataArguments(streaming=True, **options)


def test_text_that_cannot_be_streamed_is_one_clear_error(tmp_path):
    def opened(name: str, content: str, **options):
        (tmp_path / name).write_text(content)
        path = str(tmp_path / name)
        return stream_records(DataArguments(train_file=[path], streaming=True, max_eval_tokens=9, **options), "train")

    with pytest.raises(DataError, match=r"no column 'text'; choose one with --text_column: body"):
        opened("a.jsonl", '{"body": "x"}\n')
    with pytest.raises(DataError, match=r"column 'n' .* holds int, not text"):
        opened("b.jsonl", '{"n": 1}\n', text_column="n")
    with pytest.raises(DataError, match="the lines of a file, which cannot be streamed"):
        opened("c.jsonl", "".join(json.dumps({"text": f"line {i}\n"}) + "\n" for i in range(9)))
    with pytest.raises(DataError, match="unknown ending"):
        opened("d.pdf", "x")
    with pytest.raises(DataError, match=r"cannot read --train_file .*e\.jsonl"):
        opened("e.jsonl", "{broken")


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'corpus' on the Hub")

    monkeypatch.setattr(data.datasets, "load_dataset_builder", unreachable)
    arguments = DataArguments(dataset_name="corpus", streaming=True, max_eval_tokens=9)
    with pytest.raises(DataError, match=r"Couldn't reach 'corpus'.*use --train_file .*local folder"):
        stream_records(arguments, "train")


def test_a_rank_without_text_and_a_foreign_token_are_named(tmp_path, tokenizer):
    files = write_shards(tmp_path, documents(1), 1)
    with pytest.raises(DataError, match="process 1 of 2 finds no training text"):
        next(iter(streamed(files, tokenizer, rank=1, world_size=2)))
    with pytest.raises(DataError, match="beyond the vocabulary of 3"):
        next(iter(streamed(files, tokenizer, vocab_size=3)))


# Training


class _Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["baseline", "dnc"])
def test_a_resumed_run_on_a_stream_equals_an_unbroken_one(tmp_path, tokenizer, tiny_config, kind):
    files = write_shards(tmp_path, documents(40), 3)

    def run(name: str, resume: bool = False, callbacks=None) -> DNCTrainer:
        config = tiny_config(vocab_size=len(tokenizer), n_positions=WINDOW, resid_pdrop=0.1)
        training = DNCTrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=7,
            learning_rate=0.01,
            logging_steps=1,
            save_steps=3,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = DNCTrainer(
            new_models(config, [kind], seed=0)[kind],
            training,
            streamed(files, tokenizer, rows=4),
            carry_memory=True,
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    unbroken = run("unbroken")
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[_Interrupt()])
    resumed = run("broken", resume=True)
    rows, resumed_rows = ([row for row in t.state.log_history if "loss" in row] for t in (unbroken, resumed))
    assert len(rows) == 7
    assert rows == resumed_rows
    for (name, p), q in zip(unbroken.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_train_py_streams_both_models_and_resumes(tmp_path):
    options = {"streaming": True, "max_eval_tokens": 60, "carry_memory": True, "reset_at_documents": True}
    comparison = tiny_run(tmp_path, **options)
    assert comparison["data"]["scored_tokens"] == 59
    histories = {}
    for kind in ("baseline", "dnc"):
        assert (tmp_path / "run" / kind / "checkpoint-3" / "data_state_0.safetensors").is_file()
        state = json.loads((tmp_path / "run" / kind / "trainer_state.json").read_text())
        histories[kind] = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert len(histories["dnc"]) == 4
    # Go on from step 3 for two steps more than the first run had.
    tiny_run(tmp_path, **options, max_steps=5, resume_from_checkpoint="true")
    state = json.loads((tmp_path / "run" / "dnc" / "trainer_state.json").read_text())
    assert [row["loss"] for row in state["log_history"] if "loss" in row][:4] == histories["dnc"]
    assert state["global_step"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_steps": -1}, "--streaming needs --max_steps"), ({"dataloader_num_workers": 1}, "dataloader_num_workers=1")],
)
def test_train_py_names_what_streaming_needs(tmp_path, options, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        train.main(command_line(tiny_options(tmp_path, streaming=True, max_eval_tokens=60, **options)))
