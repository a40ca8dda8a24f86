"""The embedded corpus and the paper's tasks: what they promise their readers, and how recall is counted."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer

from dnc_gpt2.tasks import (
    FIRST_COUNT,
    NAMES,
    NUM_SYMBOLS,
    RECALL,
    SEPARATOR,
    START,
    STOP,
    TASK_VOCABULARY,
    VALUES,
    LocatedQuestion,
    Question,
    associative_recall_task,
    biographies,
    copy_task,
    distant_questions,
    locate,
    recall,
    recall_by_guessing,
    repeat_copy_task,
    window_distances,
)

MENTION = re.compile(r"(home|born|trade) ([A-Z]\w+) (\w+)")


@pytest.fixture(scope="module")
def text():
    return biographies(40, seed=3)


@pytest.fixture(scope="module")
def tokenized(text):
    """Token offsets of every document, and where each begins when one separator stands before each of them."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.documents, vocab_size=1024, show_progress=False)
    encodings = tokenizer.encode_batch(text.documents)
    starts = np.cumsum([1] + [len(encoding.ids) + 1 for encoding in encodings])
    return [encoding.offsets for encoding in encodings], starts[:-1].tolist(), int(starts[-1]) - 1


def test_same_seed_same_text_and_other_seed_other_facts(text):
    assert biographies(40, seed=3) == text
    facts, other_facts = (
        {(number, *fact) for number, document in enumerate(documents) for fact in MENTION.findall(document)}
        for documents in (text.documents, biographies(40, seed=4).documents)
    )
    assert len(facts & other_facts) < len(facts) / 20


def test_every_repeated_mention_is_a_question_about_its_latest_mention(text):
    """Independent reading of the text finds the same questions."""
    expected = []
    for number, document in enumerate(text.documents):
        latest = {}
        for match in MENTION.finditer(document):
            kind, name, value = match.groups()
            if (kind, name) in latest:
                assert latest[kind, name][0] == value
                expected.append(Question(number, match.start(3), match.end(3), latest[kind, name][1], kind, value))
            latest[kind, name] = value, match.end(3)
    assert text.questions == expected


def test_people_of_neighbouring_documents_differ_and_all_facts_are_stated(text):
    casts = []
    for document in text.documents:
        mentions = MENTION.findall(document)
        casts.append({name for _, name, _ in mentions})
        assert len(set(mentions)) == len(casts[-1]) * len(VALUES)
    assert all(len(cast) == 7 and cast <= set(NAMES) for cast in casts)
    assert not any(before & after for before, after in pairwise(casts))


def test_values_are_told_by_nothing_but_the_text():
    """Over many documents a name goes with every value about equally often."""
    counts = Counter()
    for document in biographies(300, seed=0).documents:
        counts.update({value for kind, name, value in MENTION.findall(document) if (kind, name) == ("trade", NAMES[0])})
    assert max(counts.values()) / counts.total() < 0.25


def test_facts_come_back_after_zero_to_eight_windows_of_32_tokens(text, tokenized):
    offsets, starts, length = tokenized
    distances = window_distances(locate(text.questions, offsets, starts), np.arange(length) // 32)
    share = np.bincount(distances, minlength=9)[:9] / len(distances)
    assert (share[:8] > 0.04).all() and share[8] > 0.02 and share.sum() > 0.95


def test_a_small_tokenizer_makes_every_answer_one_token(text, tokenized):
    offsets, starts, _ = tokenized
    assert all(q.answer_end - q.answer_start == 1 for q in locate(text.questions, offsets, starts))


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("vocab_size", [300, 1024])
def test_located_tokens_spell_the_answers(text, trim_offsets, vocab_size):
    tokenizer = ByteLevelBPETokenizer(trim_offsets=trim_offsets)
    tokenizer.train_from_iterator(text.documents, vocab_size=vocab_size, show_progress=False)
    encodings = tokenizer.encode_batch(text.documents)
    starts = np.cumsum([0] + [len(encoding.ids) for encoding in encodings])[:-1].tolist()
    ids = [token for encoding in encodings for token in encoding.ids]
    located = locate(text.questions, [encoding.offsets for encoding in encodings], starts)
    for question in located[::7]:
        assert tokenizer.decode(ids[question.answer_start : question.answer_end]).strip() == question.answer
        length = question.answer_end - question.answer_start
        stated = ids[question.statement + 1 - length : question.statement + 1]
        assert tokenizer.decode(stated).strip() == question.answer
        assert question.statement < question.answer_start


def test_recall_counts_whole_answers_by_distance():
    window_of = np.arange(20) // 4
    questions = [
        LocatedQuestion(3, 4, 1, "home", "a"),  # asked in window 0, stated there
        LocatedQuestion(4, 5, 1, "home", "a"),  # predicted from token 3, still window 0
        LocatedQuestion(5, 7, 1, "home", "b"),  # window 1, two tokens
        LocatedQuestion(13, 14, 2, "born", "c"),  # window 3
        LocatedQuestion(14, 15, 2, "born", "c"),
    ]
    ranks = np.ones(19, dtype=int)
    ranks[[4 - 1, 6 - 1, 14 - 1]] = 2
    assert recall(ranks, questions, window_of) == {
        "recall_inside_window": 0.5,
        "recall_outside_window": pytest.approx(1 / 3),
        "recall_by_distance": {"1": 0.0, "3": 0.5},
        "questions_inside_window": 2,
        "questions_outside_window": 3,
        "questions_by_distance": {"1": 1, "3": 2},
    }


def test_facts_of_another_stream_are_not_counted():
    window_of, stream_of = np.arange(20) // 4, np.arange(20) // 8
    questions = [LocatedQuestion(10, 11, 2, "home", "a"), LocatedQuestion(15, 16, 9, "home", "a")]
    assert window_distances(questions, window_of, stream_of).tolist() == [-1, 1]
    scores = recall(np.ones(19), questions, window_of, stream_of)
    assert scores["recall_inside_window"] is None
    assert scores["recall_outside_window"] == 1.0 and scores["questions_outside_window"] == 1


def test_guessing_answers_with_the_most_frequent_candidate_of_each_kind():
    window_of = np.arange(40) // 4
    outside = [("home", "a"), ("home", "a"), ("home", "b"), ("born", "c"), ("born", "d")]
    questions = [LocatedQuestion(20 + i, 21 + i, 1, *pair) for i, pair in enumerate(outside)]
    assert recall_by_guessing(questions, window_of) == {"recall_inside_window": None, "recall_outside_window": 3 / 5}


def test_guessing_on_the_corpus_is_far_from_knowing(text, tokenized):
    offsets, starts, length = tokenized
    levels = recall_by_guessing(locate(text.questions, offsets, starts), np.arange(length) // 32)
    assert 0 < levels["recall_inside_window"] < 0.1 and 0 < levels["recall_outside_window"] < 0.1


@pytest.mark.parametrize("arguments", [{"num_documents": 0}, {"people": 0}, {"people": 25}, {"rounds": 0}])
def test_biographies_refuses_impossible_sizes(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"{name}={arguments[name]} is not allowed"):
        biographies(**{"num_documents": 1, "seed": 0, **arguments})


@pytest.mark.parametrize("distance, distractors", [(0, 0), (1, 0), (37, 3), (40, 10), (992, 16), (3000, 200)])
def test_distant_questions_ask_for_all_facts_after_just_so_much_else(distance, distractors):
    text = distant_questions(3, seed=5, distance=distance, facts=8, distractors=distractors)
    assert len(text.questions) == 3 * 8
    for number, document in enumerate(text.documents):
        words = list(re.finditer(r"\w+|\.", document))
        assert len(words) == 2 * 32 + distance
        mentions = list(MENTION.finditer(document))
        first, others, last = mentions[:8], mentions[8:-8], mentions[-8:]
        assert last[0].start() == words[32 + distance].start() and first[-1].end() == words[30].end()
        assert len(others) == distractors
        assert not {mention[2] for mention in others} & {mention[2] for mention in first}
        facts = {mention.groups()[:2]: (mention[3], mention.end()) for mention in first}
        expected = [
            Question(number, mention.start(3), mention.end(3), facts[mention.groups()[:2]][1], mention[1], mention[3])
            for mention in last
        ]
        assert [question for question in text.questions if question.document == number] == expected
        assert all(facts[mention.groups()[:2]][0] == mention[3] for mention in last) and len(facts) == 8


def test_distant_questions_ask_for_the_facts_in_between_too():
    text = distant_questions(2, seed=5, distance=400, facts=8, distractors=10, ask_all=True)
    for number, document in enumerate(text.documents):
        mentions = list(MENTION.finditer(document))
        stated, asked = ({m.groups() for m in part} for part in (mentions[:18], mentions[18:]))
        assert stated == asked and len(stated) == 18
        expected = {m.groups()[:2]: m.end() for m in mentions[:18]}
        questions = [question for question in text.questions if question.document == number]
        assert sorted(question.fact_end for question in questions) == sorted(expected.values())


def test_distractors_stand_evenly_between_whole_sentences():
    (document,) = distant_questions(1, seed=5, distance=1000, distractors=9).documents
    others = [document[: mention.start()] for mention in MENTION.finditer(document)][8:-8]
    assert all(before.endswith(". ") for before in others)
    words = [len(re.findall(r"\w+|\.", before)) - 32 for before in others]
    assert all(abs(place - 100 * (i + 1)) < 12 for i, place in enumerate(words))


@pytest.mark.parametrize("arguments", [{"num_documents": 0}, {"facts": 73}, {"distance": -1}, {"distractors": 26}])
def test_distant_questions_refuses_impossible_sizes(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"{name}={arguments[name]} is not allowed"):
        distant_questions(**{"num_documents": 1, "seed": 0, "distance": 100, **arguments})


def test_locate_and_recall_refuse_inputs_that_do_not_belong_together(text, tokenized):
    offsets, starts, length = tokenized
    with pytest.raises(ValueError, match="39 document_starts"):
        locate(text.questions, offsets, starts[:-1])
    with pytest.raises(ValueError, match="only 1 documents"):
        locate(text.questions, offsets[:1], starts[:1])
    with pytest.raises(ValueError, match="end before"):
        locate(text.questions, [document[:10] for document in offsets], starts)
    with pytest.raises(ValueError, match="every token but the first"):
        recall(np.ones(length), [], np.arange(length))


TASKS = (copy_task, repeat_copy_task, associative_recall_task)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_the_same_for_the_same_seed_and_other_rows_differ(task):
    (tokens, is_answer), again = (task(np.random.default_rng(3), 5, 4) for _ in range(2))
    np.testing.assert_array_equal(tokens, again[0])
    np.testing.assert_array_equal(is_answer, again[1])
    assert len({tuple(row) for row in tokens.tolist()}) == 5
    assert tokens.min() >= 0 and tokens.max() < TASK_VOCABULARY and is_answer.any()


def test_copy_answers_with_the_symbols_that_were_given():
    for tokens, is_answer in zip(*copy_task(np.random.default_rng(0), 4, 5), strict=True):
        assert tokens[0] == START and tokens[6] == RECALL and np.all(tokens[1:6] < NUM_SYMBOLS)
        np.testing.assert_array_equal(np.flatnonzero(is_answer), np.arange(7, 12))
        np.testing.assert_array_equal(tokens[7:], tokens[1:6])


@pytest.mark.parametrize("repeats", [1, 3])
def test_repeat_copy_answers_as_often_as_the_count_says_and_stops(repeats):
    for tokens, is_answer in zip(*repeat_copy_task(np.random.default_rng(0), 4, 5, repeats), strict=True):
        assert tokens[0] == START and tokens[6] == FIRST_COUNT + repeats - 1
        assert is_answer.tolist() == [False] * 7 + [True] * 6 * repeats
        answers = tokens[7:].reshape(repeats, 6)
        assert np.all(answers[:, :5] == tokens[1:6])
        assert answers[:, 5].tolist() == [SEPARATOR] * (repeats - 1) + [STOP]


def test_repeat_copy_draws_its_count():
    rng = np.random.default_rng(0)
    counts = {int(repeat_copy_task(rng, 1, 2, most=3)[0][0, 3]) - FIRST_COUNT + 1 for _ in range(40)}
    assert counts == {1, 2, 3}


@pytest.mark.parametrize("length", [2, 3, 7])
def test_associative_recall_asks_for_the_item_that_followed(length):
    for tokens, is_answer in zip(*associative_recall_task(np.random.default_rng(length), 20, length), strict=True):
        blocks = tokens.reshape(-1, 3)
        items, queries = [tuple(block[:2]) for block in blocks[:length]], blocks[length:].reshape(-1, 2, 3)
        assert len(set(items)) == length and np.all(blocks[:length, 2] == SEPARATOR) and len(queries) >= 1
        asked, answered = ([tuple(block[:2]) for block in queries[:, place]] for place in (0, 1))
        assert [items[items.index(item) + 1] for item in asked] == answered
        assert np.all(queries[:, 0, 2] == RECALL) and not set(asked) & set(answered)
        expected = np.zeros((len(blocks), 3), dtype=bool)
        expected[length + 1 :: 2, :2] = True
        np.testing.assert_array_equal(is_answer.reshape(-1, 3), expected)
