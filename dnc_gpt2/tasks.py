"""Generated texts that only a memory can go on with: the corpus of the embedded default, and the DNC paper's tasks.

A document of the embedded corpus is a register of short biographies. Its people have a home, a year of birth and a
trade, drawn anew for every document, so that nothing but the text before can tell them. Every round goes through all
facts in a new order; the first mention of a fact states it, every later one asks for it and states it again:

    born Mira 1643. They say home Toro Pelaford. The bells rang at noon. Ask again home Toro Pelaford.

The kind comes first and the name directly before its value: where an attention window happens to begin at the name,
only the kind is cut off. (With "Toro of Pelaford" a window that begins at "of" would know nobody.)
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def _invented_words(label: str, count: int, endings: Sequence[str]) -> tuple[str, ...]:
    rng = random.Random(label)
    words: dict[str, None] = {}  # an ordered set
    while len(words) < count:
        stem = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(2))
        words[stem.capitalize() + rng.choice(endings)] = None
    return tuple(words)


NAMES = _invented_words("names", 48, ("n", "s", "l", "r"))
VALUES = {
    "home": _invented_words("towns", 32, ("ford", "by", "ton", "wick")),
    "born": tuple(str(year) for year in range(1601, 1661)),
    "trade": (
        *("baker", "barber", "brewer", "carver", "cooper", "dyer", "farmer", "fisher", "fletcher", "glazier", "hatter"),
        *("hunter", "joiner", "mason", "miller", "miner", "painter", "piper", "potter", "sailor", "scribe", "singer"),
        *("smith", "tailor", "tanner", "thatcher", "tiler", "weaver"),
    ),
}
_OPENERS = ("They say", "We note", "Ask again", "Remember")
_FILLER = (
    "Rain fell on the old road.",
    "The bells rang at noon.",
    "A cart stood by the gate.",
    "Snow lay on every roof.",
    "Nobody spoke for a while.",
    "Smoke rose from the hill.",
    "Two dogs slept in the shade.",
    "The river ran high that year.",
)
_OPENER_RATE, _FILLER_RATE, _ECHO_RATE = 0.3, 0.2, 0.3


@dataclass(frozen=True)
class Question:
    """A place in a document where a fact that was stated before is asked for.

    Attributes:
        document: index of the document.
        start, end: characters [start, end) of the answer in the document.
        fact_end: character after the latest earlier mention of the answer as this fact's value.
        kind: "home", "born" or "trade".
        answer: the answer itself.
    """

    document: int
    start: int
    end: int
    fact_end: int
    kind: str
    answer: str


@dataclass(frozen=True)
class RecallText:
    """Documents and the questions in them, in text order."""

    documents: list[str]
    questions: list[Question]


def biographies(num_documents: int, seed: int, *, people: int = 7, rounds: int = 5) -> RecallText:
    """Registers of short biographies, the same for the same arguments.

    Names and values come from fixed lists; who has which value is drawn per document, and neighbouring documents share
    no name. With the defaults a document has about 760 tokens (words and full stops), and most questions come 5 to 280
    of them after the latest mention of the fact.

    Args:
        num_documents: how many documents, at least 1.
        seed: seed of the draws. Other seeds tell of other facts.
        people: biographies a document, 1 to half the number of names.
        rounds: how often a document goes through its facts; the first time states them.

    Raises:
        ValueError: an argument outside its range.
    """
    most = len(NAMES) // 2
    for name, value, allowed in (
        ("num_documents", num_documents, num_documents >= 1),
        ("people", people, 1 <= people <= most),
        ("rounds", rounds, rounds >= 1),
    ):
        if not allowed:
            limit = f"from 1 to {most}" if name == "people" else "at least 1"
            raise ValueError(f"biographies: {name}={value!r} is not allowed; it must be {limit}.")
    rng = random.Random(seed)
    documents: list[str] = []
    questions: list[Question] = []
    cast: list[str] = []
    for document in range(num_documents):
        cast = rng.sample([name for name in NAMES if name not in cast], people)
        values = {(kind, name): rng.choice(VALUES[kind]) for name in cast for kind in VALUES}
        text = rng.choice(_FILLER)
        mentioned: dict[tuple[str, str], int] = {}  # fact -> end of its latest mention, oldest first
        for fact in _order_of_mentions(list(values), rounds, rng):
            if fact is None:
                text += " " + rng.choice(_FILLER)
                continue
            kind, name = fact
            opener = rng.choice(_OPENERS) + " " if rng.random() < _OPENER_RATE else ""
            text += f" {opener}{kind} {name} "
            start, end = len(text), len(text) + len(values[fact])
            if fact in mentioned:
                questions.append(Question(document, start, end, mentioned[fact], kind, values[fact]))
            mentioned[fact] = end
            text += values[fact] + "."
        documents.append(text)
    return RecallText(documents, questions)


def distant_questions(
    num_documents: int, seed: int, *, distance: int, facts: int = 8, distractors: int = 0, ask_all: bool = False
) -> RecallText:
    """Registers that state some facts, speak of something else for long, and then ask for all of them.

    The facts and the questions are sentences of `biographies`, without openers. Between them stands filler, and spread
    evenly through it other facts, about other people. A document has 4 words and full stops a fact, `distance` in
    between, and 4 a question.

    Args:
        num_documents: how many documents, at least 1.
        seed: seed of the draws.
        distance: words and full stops between the last fact and the first question.
        facts: facts asked for, 1 to 72: three of each of up to half the names.
        distractors: other facts in between, of 4 words and full stops each. They fit into `distance`. Where they are
            more than the names have facts, a fact is stated again, with another value.
        ask_all: ask for the other facts too, those first stated and those in between in one order, so that a model
            which is trained on it cannot tell by its place which fact it will need.

    Raises:
        ValueError: an argument outside its range.
    """
    people = -(-facts // len(VALUES))
    for name, value, allowed, limit in (
        ("num_documents", num_documents, num_documents >= 1, "at least 1"),
        ("facts", facts, 1 <= people <= len(NAMES) // 2, f"from 1 to {len(NAMES) // 2 * len(VALUES)}"),
        ("distance", distance, distance >= 0, "at least 0"),
        ("distractors", distractors, 0 <= 4 * distractors <= distance, f"from 0 to a quarter of distance={distance}"),
    ):
        if not allowed:
            raise ValueError(f"distant_questions: {name}={value!r} is not allowed; it must be {limit}.")
    rng = random.Random(seed)
    documents: list[str] = []
    questions: list[Question] = []
    for document in range(num_documents):
        names = rng.sample(NAMES, len(NAMES))
        first = rng.sample([(kind, name) for name in names[:people] for kind in VALUES], facts)
        others = [(kind, name) for name in names[people:] for kind in VALUES]
        text, stated = "", {}
        for sentence, fact in chain(
            ((_statement(fact, rng), fact) for fact in first), _between(others, distance, distractors, rng)
        ):
            text += sentence + " "
            if fact is not None:
                stated[fact] = len(text) - 2, sentence.split()[-1][:-1]
        asked = list(stated) if ask_all else first
        for fact in rng.sample(asked, len(asked)):
            fact_end, answer = stated[fact]
            text += " ".join(fact) + " "
            questions.append(Question(document, len(text), len(text) + len(answer), fact_end, fact[0], answer))
            text += f"{answer}. "
        documents.append(text.rstrip())
    return RecallText(documents, questions)


def _statement(fact: tuple[str, str], rng: random.Random) -> str:
    return f"{' '.join(fact)} {rng.choice(VALUES[fact[0]])}."


def _between(
    others: list[tuple[str, str]], distance: int, distractors: int, rng: random.Random
) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Yield sentences of `distance` words and full stops, the last one cut off where need be, and their facts.

    The other facts stand evenly spread between sentences of filler, whose fact is None.
    """
    others = rng.sample(others, len(others))
    written = stated = 0
    while written < distance:
        room = distance - written - 4 * (distractors - stated)  # for filler
        if stated < distractors and (room == 0 or written * (distractors + 1) >= (stated + 1) * distance):
            fact = others[stated % len(others)]
            yield _statement(fact, rng), fact
            stated, written = stated + 1, written + 4
        else:
            words = rng.choice(_FILLER).removesuffix(".").split()
            whole = len(words) < room
            yield " ".join(words[:room]) + "." * whole, None
            written += min(len(words) + 1, room)


def _order_of_mentions(
    facts: list[tuple[str, str]], rounds: int, rng: random.Random
) -> Iterator[tuple[str, str] | None]:
    """Yield every fact once a round, now and then filler (None) or one of the latest facts again.

    Shuffled rounds make the gaps spread evenly around one round; the repetitions add short ones.
    """
    latest: list[tuple[str, str]] = []
    for _ in range(rounds):
        for fact in rng.sample(facts, len(facts)):
            mentions: list[tuple[str, str] | None] = [fact]
            latest = [*(other for other in latest if other != fact), fact]
            if rng.random() < _FILLER_RATE:
                mentions.append(None)
            if rng.random() < _ECHO_RATE and len(latest) > 2:
                echo = rng.choice(latest[-4:-1])
                mentions.append(echo)
                latest = [*(other for other in latest if other != echo), echo]
            yield from mentions


@dataclass(frozen=True)
class LocatedQuestion:
    """A question in a sequence of tokens.

    Attributes:
        answer_start, answer_end: tokens [answer_start, answer_end) are the answer.
        statement: the last token of the latest earlier mention.
        kind, answer: as in `Question`.
    """

    answer_start: int
    answer_end: int
    statement: int
    kind: str
    answer: str


def locate(
    questions: Sequence[Question], offsets: Sequence[Sequence[tuple[int, int]]], document_starts: Sequence[int]
) -> list[LocatedQuestion]:
    """Find the tokens of each question in the joined sequence.

    Args:
        questions: of one `RecallText`.
        offsets: for each document, the characters [start, end) of each of its tokens; whether a token's range holds the
            space before a word does not matter.
        document_starts: for each document, the position of its first token in the joined sequence.

    Raises:
        ValueError: offsets or starts of another number of documents, or offsets that miss an answer.
    """
    if len(offsets) != len(document_starts):
        raise ValueError(f"locate: offsets of {len(offsets)} documents, but {len(document_starts)} document_starts.")
    ends = [np.array([end for _, end in document]) for document in offsets]
    located = []
    for question in questions:
        if question.document >= len(ends):
            raise ValueError(
                f"locate: a question about document {question.document}, but offsets of only {len(ends)} documents; "
                "pass those of every document."
            )
        # Tokens tile the text, so that the token of a character is the first one that ends after it.
        characters = (question.start, question.end - 1, question.fact_end - 1)
        first, last, statement = np.searchsorted(ends[question.document], characters, side="right").tolist()
        if last >= len(ends[question.document]):
            raise ValueError(f"locate: the offsets of document {question.document} end before {question}.")
        base = int(document_starts[question.document])
        located.append(LocatedQuestion(base + first, base + last + 1, base + statement, question.kind, question.answer))
    return located


def window_distances(
    questions: Sequence[LocatedQuestion], window_of: np.ndarray, stream_of: np.ndarray | None = None
) -> np.ndarray:
    """How many attention windows before each question its fact was last mentioned; 0 is inside the window.

    Args:
        questions: Q located questions.
        window_of: [N] index of the attention window in which the model reads each token, counting upwards.
        stream_of: [N] index of the memory's run over the text to which each token belongs: an evaluation stream, or an
            example where no state is carried. `None` means one run over everything.

    Returns:
        int [Q]; -1 where the mention belongs to another stream, which no model has seen.
    """
    if not questions:
        return np.zeros(0, dtype=np.int64)
    # The answer's first token is predicted from the token before it, and the window is that token's.
    asked = np.array([question.answer_start - 1 for question in questions])
    stated = np.array([question.statement for question in questions])
    distances = np.asarray(window_of)[asked].astype(np.int64) - np.asarray(window_of)[stated]
    if stream_of is not None:
        distances[np.asarray(stream_of)[asked] != np.asarray(stream_of)[stated]] = -1
    return distances


def recall(
    ranks: np.ndarray,
    questions: Sequence[LocatedQuestion],
    window_of: np.ndarray,
    stream_of: np.ndarray | None = None,
) -> dict[str, float | int | dict[str, float] | dict[str, int] | None]:
    """Share of the questions answered right: every token of the answer is the most probable one given the true text.

    Args:
        ranks: [N - 1] rank (1 = best) of targets 1 to N - 1 in text order: `ranks[t - 1]` is that of token t.
        questions, window_of, stream_of: as in `window_distances`. Questions at -1 are not counted.

    Returns:
        recall_inside_window, recall_outside_window (None where there is no question), recall_by_distance {"1": ...} in
        windows, and the numbers of questions behind them: questions_inside_window, questions_outside_window,
        questions_by_distance.

    Raises:
        ValueError: not one rank for every token of `window_of` but the first.
    """
    if len(ranks) != len(window_of) - 1:
        raise ValueError(
            f"recall: {len(ranks)} ranks for {len(window_of)} tokens; every token but the first needs one."
        )
    distances = window_distances(questions, window_of, stream_of)
    right = np.array([np.all(ranks[q.answer_start - 1 : q.answer_end - 1] == 1) for q in questions], dtype=bool)
    inside, outside = right[distances == 0], right[distances > 0]
    by_distance = {str(d): right[distances == d] for d in np.unique(distances[distances > 0])}
    return {
        "recall_inside_window": _share(inside),
        "recall_outside_window": _share(outside),
        "recall_by_distance": {distance: float(answers.mean()) for distance, answers in by_distance.items()},
        "questions_inside_window": len(inside),
        "questions_outside_window": len(outside),
        "questions_by_distance": {distance: len(answers) for distance, answers in by_distance.items()},
    }


def recall_by_guessing(
    questions: Sequence[LocatedQuestion], window_of: np.ndarray, stream_of: np.ndarray | None = None
) -> dict[str, float | None]:
    """What `recall` gives to whoever answers every question with the most frequent answer of its kind.

    Returns:
        recall_inside_window and recall_outside_window, None where there is no question.
    """
    distances = window_distances(questions, window_of, stream_of)
    levels = {}
    for name, chosen in (("recall_inside_window", distances == 0), ("recall_outside_window", distances > 0)):
        answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question in (questions[i] for i in np.flatnonzero(chosen)):
            answers[question.kind][question.answer] += 1
        guessed = sum(counter.most_common(1)[0][1] for counter in answers.values())
        levels[name] = guessed / int(chosen.sum()) if chosen.any() else None
    return levels


def _share(right: np.ndarray) -> float | None:
    return float(right.mean()) if len(right) else None


NUM_SYMBOLS = 8
START, RECALL, SEPARATOR, STOP, PADDING, FIRST_COUNT = range(NUM_SYMBOLS, NUM_SYMBOLS + 6)
MOST_REPEATS = 8
TASK_VOCABULARY = FIRST_COUNT + MOST_REPEATS
"""Ids of the paper's tasks: the symbols, the marks, then the counts from 1 to `MOST_REPEATS`."""


def copy_task(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random symbols, a mark, the same symbols: `START x1 .. xL RECALL x1 .. xL`.

    Args:
        rng: source of the draws.
        rows: number of sequences.
        length: number of symbols L, at least 1; a symbol may come several times.

    Returns:
        Token ids [rows, T], and bool [rows, T] that is True at the answers: the tokens that the ones before determine.
    """
    symbols = rng.integers(0, NUM_SYMBOLS, (rows, length))
    return _answered([_column(rows, START), symbols, _column(rows, RECALL)], [symbols])


def repeat_copy_task(
    rng: np.random.Generator, rows: int, length: int, repeats: int | None = None, *, most: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Random symbols, a count n, then n times the symbols: `START x1 .. xL n x1 .. xL SEPARATOR .. x1 .. xL STOP`.

    Whether a separator or the stop follows a repetition is among the answers, and nothing but the count tells it.

    Args:
        rng, rows, length: as in `copy_task`.
        repeats: the count, the same in all rows, 1 to `MOST_REPEATS`. `None` draws it from 1 to `most`.

    Returns:
        As `copy_task`.
    """
    repeats = int(rng.integers(1, most + 1)) if repeats is None else repeats
    symbols = rng.integers(0, NUM_SYMBOLS, (rows, length))
    answers = [symbols, _column(rows, SEPARATOR)] * repeats
    answers[-1] = _column(rows, STOP)
    return _answered([_column(rows, START), symbols, _column(rows, FIRST_COUNT + repeats - 1)], answers)


def associative_recall_task(
    rng: np.random.Generator, rows: int, length: int, *, item: int = 2, most_queries: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """A list of items of several symbols, then queries: which item followed this one?

    `a1 a2 SEPARATOR b1 b2 SEPARATOR ..` and, for a query, `a1 a2 RECALL b1 b2 SEPARATOR`. Items differ, but share
    symbols. No item is both asked for and answered, so that each is followed by one other throughout.

    Args:
        rng, rows: as in `copy_task`.
        length: number of items, at least 2.
        item: symbols an item.
        most_queries: how many queries follow, at most; of n items at most n // 2 are asked for.

    Returns:
        As `copy_task`; the answers are the symbols of the items asked for.
    """
    codes = np.stack([rng.choice(NUM_SYMBOLS**item, length, replace=False) for _ in range(rows)])
    items = codes[..., None] // NUM_SYMBOLS ** np.arange(item) % NUM_SYMBOLS  # [rows, length, item]
    first = int(rng.integers(0, 2)) if length > 2 else 0
    asked = rng.permuted(np.tile(np.arange(first, length - 1, 2), (rows, 1)), axis=1)[:, :most_queries]
    mark = _column(rows, SEPARATOR)
    parts, answers = [], []
    for place in range(length):
        parts += [items[:, place], mark]
        answers += [False] * (item + 1)
    for query in asked.T:
        parts += [items[np.arange(rows), query], _column(rows, RECALL), items[np.arange(rows), query + 1], mark]
        answers += [False] * (item + 1) + [True] * item + [False]
    tokens = np.concatenate(parts, axis=1)
    return tokens, np.tile(np.array(answers), (rows, 1))


def _column(rows: int, token: int) -> np.ndarray:
    return np.full((rows, 1), token)


def _answered(given: list[np.ndarray], answers: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([*given, *answers], axis=1)
    is_answer = np.zeros(tokens.shape, dtype=bool)
    is_answer[:, sum(part.shape[1] for part in given) :] = True
    return tokens, is_answer
