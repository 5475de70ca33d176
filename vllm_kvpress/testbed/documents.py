"""Seeded long documents with hidden facts, and questions about them.

Facts (``the pass code of alice is this: 48213.``) stand between sentences of filler, questions
(``what is the pass code of alice?``) follow the text. Each fact and each question has its own of
several wordings, see `vllm_kvpress.testbed.language`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol, get_args

from vllm_kvpress.testbed.language import (
    ASSIGNMENTS,
    NAMES,
    PASS_CODE_FACTS,
    PASS_CODE_QUESTIONS,
    PASSAGE_FACTS,
    PASSAGE_QUESTIONS,
    VARIABLES,
    chain_facts,
    chain_question,
    count_tokens,
    draw_codes,
    filler_sentence,
    numbered_facts,
    numbered_question,
    passage,
    reword,
)

__all__ = [
    "TASKS",
    "TURNS",
    "Document",
    "Question",
    "Task",
    "Tokenizer",
    "count_tokens",
    "is_correct",
    "make_document",
]

Task = Literal["needle", "multi_key", "multi_value", "chain", "steps", "copy", "multi_turn"]
TASKS: tuple[Task, ...] = get_args(Task)

MULTI_KEY_DISTRACTORS = (8, 32)
MULTI_VALUES = (2, 4)
CHAIN_HOPS = (2, 3)
STEPS_HOPS = (24, 40)
CHAIN_DISTRACTORS = 3
PASSAGE_WORDS = (8, 24)
TURNS = 3
TURN_FACTS = 8
# Room for the sequence-start token and the question at the end, and for a few sentences of filler.
MIN_TOKENS = 128


class Tokenizer(Protocol):
    """What this module needs of a tokenizer: the tokens of a text, special ones included."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the token ids of ``text``."""
        ...


@dataclass(frozen=True)
class Question:
    """A question at the end of a document.

    Attributes:
        text: The question, without the chat template's ``answer:``.
        answer: What the model generates for it.
    """

    text: str
    answer: str


@dataclass(frozen=True)
class Document:
    """A long text with hidden facts.

    Attributes:
        text: The sentences, separated by single spaces.
        questions: Questions that the text answers, in the order in which a chat asks them.
        num_facts: How many facts it hides, distractors included.
    """

    text: str
    questions: tuple[Question, ...]
    num_facts: int

    def message(self, question: Question) -> str:
        """Return the user message of a chat request that asks ``question`` after the document."""
        return f"{self.text} {question.text}"

    def prompt(self, question: Question) -> str:
        """Return the whole prompt for a completion request, as the chat template writes it."""
        return f"{self.message(question)} answer:"

    def chat(self, turn: int = 0) -> list[dict[str, str]]:
        """Return the messages of a chat that has come to a question, counted from 0.

        The questions before stand answered, and rightly, whatever a model would have said: so
        every model and every policy reads the same chat.
        """
        messages = [{"role": "user", "content": self.message(self.questions[0])}]
        for earlier, question in pairwise(self.questions[: turn + 1]):
            messages.append({"role": "assistant", "content": earlier.answer})
            messages.append({"role": "user", "content": question.text})
        return messages


@dataclass(frozen=True)
class _Plot:
    """The facts of a document, the questions about them, and the place of the first one asked for.

    Other questions that the facts answer may be asked besides. Where the order of the facts carries
    meaning, they appear as they stand here.
    """

    facts: tuple[str, ...]
    questions: tuple[Question, ...]
    target: int
    ordered: bool
    others: tuple[Question, ...] = ()


def is_correct(question: Question, generated: str) -> bool:
    """Return whether generated text is the expected answer, whitespace and case aside."""
    return _normalise(generated) == _normalise(question.answer)


def make_document(
    task: Task,
    *,
    num_tokens: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    depth: float | None = None,
    num_questions: int = 1,
) -> Document:
    """Write a document whose prompt fills a token count to within one sentence, never above it.

    Args:
        task: ``needle`` (one fact), ``multi_key`` (one fact among 8 to 32 of the same form),
            ``multi_value`` (2 to 4 facts about one name), ``chain`` (a value over 2 or 3 hops),
            ``steps`` (a value over 24 to 40 hops, all spelled in the answer), ``copy`` (a passage
            of 8 to 24 words) or ``multi_turn`` (3 questions of a chat, one after another, about 8
            facts).
        num_tokens: Upper limit of the whole prompt, question and sequence-start token included; of
            a chat, its prompt at the last question.
        seed: Draws everything; the same arguments give the same document.
        tokenizer: Counts tokens; by default an exact count for the bundled model's tokenizer.
        depth: Where the fact in question stands, 0 for the start and 1 for the end of the text; by
            default facts are spread at random. For a task with several facts in question, their
            first.
        num_questions: Of ``multi_key``: questions about so many of its facts, each to be asked by
            itself; the first one is the same for any number.

    Returns:
        The document with its question, or its questions.

    Raises:
        ValueError: If the task is unknown, the depth is not in [0, 1], the facts do not fit, or
            there are fewer of them than questions.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie between 0 and 1, got {depth}")
    if num_tokens < MIN_TOKENS:
        raise ValueError(f"num_tokens must be at least {MIN_TOKENS}, got {num_tokens}")
    rng = random.Random(f"{task}/{num_tokens}/{seed}")
    count = count_tokens if tokenizer is None else _counter(tokenizer)
    plot = _PLOTS[task](rng, num_tokens)
    asked = [plot.questions]
    if num_questions > 1:
        plot = _ask_more(plot, num_questions, seed)
        asked = [(question,) for question in plot.questions]
    budget = num_tokens - max(_asking_cost(count, questions) for questions in asked)
    filler = _filler(rng, budget - sum(_cost(count, fact) for fact in plot.facts), count)
    sentences = _interleave(rng, plot, filler, depth)
    return Document(" ".join(sentences), plot.questions, len(plot.facts))


def _ask_more(plot: _Plot, num_questions: int, seed: int) -> _Plot:
    """Add questions until there are so many."""
    more = num_questions - len(plot.questions)
    if more > len(plot.others):
        known = len(plot.questions) + len(plot.others)
        raise ValueError(f"the text answers {known} questions, not {num_questions}")
    others = random.Random(seed).sample(plot.others, more)
    return replace(plot, questions=(*plot.questions, *others))


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Return a function that counts with ``tokenizer``, sequence-start token included."""
    return lambda text: len(tokenizer.encode(text))


def _cost(count: Callable[[str], int], sentence: str) -> int:
    """Return the tokens that a sentence adds to a text."""
    return count(sentence) - count("")


def _asking_cost(count: Callable[[str], int], questions: Sequence[Question]) -> int:
    """Return the tokens of a chat's questions and earlier answers, sequence-start token included.

    Each earlier answer ends with an end-of-text token.
    """
    *earlier, last = questions
    asked = [f"{question.text} answer: {question.answer}" for question in earlier]
    return count(" ".join([*asked, f"{last.text} answer:"])) + len(earlier)


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _needle(rng: random.Random, num_tokens: int) -> _Plot:
    """One fact about one name."""
    return _keyed_plot(rng, 1)


def _multi_key(rng: random.Random, num_tokens: int) -> _Plot:
    """One fact in question among others of the same form, as many as a short text has room for."""
    low, high = MULTI_KEY_DISTRACTORS
    room = max(low, min(high, num_tokens // 32))
    return _keyed_plot(rng, 1 + rng.randint(low, room))


def _keyed_plot(rng: random.Random, number: int) -> _Plot:
    """Facts about ``number`` names, one of them in question."""
    facts, questions = _pass_codes(rng, number)
    target = rng.randrange(number)
    others = tuple(question for fact, question in enumerate(questions) if fact != target)
    return _Plot(facts, (questions[target],), target, ordered=False, others=others)


def _multi_turn(rng: random.Random, num_tokens: int) -> _Plot:
    """Facts about several names, some of them in question, one after another."""
    facts, questions = _pass_codes(rng, TURN_FACTS)
    asked = rng.sample(range(TURN_FACTS), TURNS)
    return _Plot(facts, tuple(questions[fact] for fact in asked), asked[0], ordered=False)


def _pass_codes(rng: random.Random, number: int) -> tuple[tuple[str, ...], tuple[Question, ...]]:
    """Return facts about distinct names, and the question about each."""
    names, codes = rng.sample(NAMES, number), draw_codes(rng, number)
    pairs = list(zip(names, codes, strict=True))
    facts = tuple(reword(rng, PASS_CODE_FACTS, name, code) for name, code in pairs)
    questions = (Question(reword(rng, PASS_CODE_QUESTIONS, name), code) for name, code in pairs)
    return facts, tuple(questions)


def _copy(rng: random.Random, num_tokens: int) -> _Plot:
    """A passage of distinct words, to be repeated."""
    name, words = rng.choice(NAMES), passage(rng, rng.randint(*PASSAGE_WORDS))
    fact = reword(rng, PASSAGE_FACTS, name, words)
    question = Question(reword(rng, PASSAGE_QUESTIONS, name), words)
    return _Plot((fact,), (question,), 0, ordered=False)


def _multi_value(rng: random.Random, num_tokens: int) -> _Plot:
    """Several numbered facts about one name, all in question."""
    number = rng.randint(*MULTI_VALUES)
    name, codes = rng.choice(NAMES), draw_codes(rng, number)
    facts = numbered_facts(rng, name, codes)
    question = Question(*numbered_question(rng, name, codes))
    return _Plot(tuple(facts), (question,), 0, ordered=True)


def _chain(rng: random.Random, num_tokens: int) -> _Plot:
    """A value and the few variables that lead to it."""
    return _chain_plot(rng, rng.randint(*CHAIN_HOPS))


def _steps(rng: random.Random, num_tokens: int) -> _Plot:
    """A value and the many variables that lead to it, as many as a short text has room for."""
    low, high = STEPS_HOPS
    return _chain_plot(rng, rng.randint(low, max(low, min(high, num_tokens // 16))))


def _chain_plot(rng: random.Random, hops: int) -> _Plot:
    """A value and variables that point to it in a row, beside other variables with values."""
    variables = rng.sample(VARIABLES, hops + CHAIN_DISTRACTORS)
    chain, others = variables[:hops], variables[hops:]
    code, *other_codes = draw_codes(rng, 1 + CHAIN_DISTRACTORS)
    links = chain_facts(rng, chain, code)
    distractors = [
        reword(rng, ASSIGNMENTS, name, other)
        for name, other in zip(others, other_codes, strict=True)
    ]
    facts, target = _merge_in_order(rng, links, distractors)
    question = Question(*chain_question(rng, chain, code))
    return _Plot(tuple(facts), (question,), target, ordered=True)


def _merge_in_order(
    rng: random.Random, links: list[str], others: list[str]
) -> tuple[list[str], int]:
    """Mix two lists, keeping the order within each; return the mix and the first link's place."""
    places = sorted(rng.sample(range(len(links) + len(others)), len(links)))
    merged = list(others)
    for place, link in zip(places, links, strict=True):
        merged.insert(place, link)
    return merged, places[0]


_PLOTS: dict[str, Callable[[random.Random, int], _Plot]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "chain": _chain,
    "steps": _steps,
    "copy": _copy,
    "multi_turn": _multi_turn,
}


def _filler(rng: random.Random, budget: int, count: Callable[[str], int]) -> list[str]:
    """Write sentences without facts until the next one would exceed the budget."""
    if budget < 0:
        raise ValueError(f"the facts need {-budget} tokens more than the document has")
    sentences: list[str] = []
    while True:
        sentence = filler_sentence(rng)
        budget -= _cost(count, sentence)
        if budget < 0:
            return sentences
        sentences.append(sentence)


def _interleave(
    rng: random.Random, plot: _Plot, filler: list[str], depth: float | None
) -> list[str]:
    """Put the facts between filler sentences, the target at ``depth`` when one is given."""
    last = len(filler)
    placed = sorted(zip(_slots(rng, plot, last, depth), range(len(plot.facts)), strict=True))
    sentences: list[str] = []
    for index in range(last + 1):
        sentences += [plot.facts[fact] for slot, fact in placed if slot == index]
        sentences += filler[index : index + 1]
    return sentences


def _slots(rng: random.Random, plot: _Plot, last: int, depth: float | None) -> list[int]:
    """Draw for each fact the number of filler sentences before it."""
    if depth is None:
        slots = [rng.randint(0, last) for _ in plot.facts]
        return sorted(slots) if plot.ordered else slots
    middle = round(depth * last)
    slots = []
    for fact in range(len(plot.facts)):
        low = middle if plot.ordered and fact > plot.target else 0
        high = middle if plot.ordered and fact < plot.target else last
        slots.append(rng.randint(low, high))
    slots[plot.target] = middle
    if plot.ordered:
        slots.sort()
    return slots
