"""The tokenizer is lossless, and texts are tokenized whole: nothing is lost."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config

from dnc_gpt2 import tokenization
from dnc_gpt2.data import DataError
from dnc_gpt2.tokenization import END_OF_TEXT, TokenizedText, load_tokenizer, split_end, tokenize_texts, train_tokenizer

PHRASES = [
    *("the sea,", "a lamp;", "It's 1984", "über naïve", "日本語 🙂", "don't --", "(old)", "two\tthree", "."),
    *("stone\n", " \n", "= \n\n", ""),
]


def make_text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(PHRASES, k=words))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([make_text(2000)], 300)


def numbered(num_tokens: int, document_starts: tuple[int, ...] = ()) -> TokenizedText:
    """Tokens 0, 1, 2, ...: a token's id is its place in the text."""
    starts = torch.zeros(num_tokens, dtype=torch.bool)
    starts[list((0, *document_starts))] = True
    return TokenizedText(torch.arange(num_tokens), starts, num_bytes=num_tokens, num_words=num_tokens)


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
        patch.setattr(tokenization, "PIECE_CHARS", 1)
        patch.setattr(tokenization, "BATCH_CHARS", 5)
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
