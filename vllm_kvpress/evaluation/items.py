"""The questions of a cell as prompts, and what counts as a right answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from vllm_kvpress.testbed import MODEL_NAME
from vllm_kvpress.testbed.documents import (
    TASKS,
    TURNS,
    Document,
    Question,
    Task,
    is_correct,
    make_document,
)

__all__ = [
    "ALL_TASKS",
    "DEPTHS",
    "LATE",
    "Item",
    "answer_tokens",
    "is_right",
    "make_items",
    "num_prompts",
    "room_tokens",
]

# The same task, but the question comes when the document's cache is compressed already.
LATE = "late_"
# Many questions about one document, each in a prompt of its own.
SURVEY = "survey"
SURVEY_QUESTIONS = 8
ALL_TASKS = (*TASKS, SURVEY, *(LATE + task for task in TASKS if task != "multi_turn"))

# Where needles stand: the field's grid, visited in an order that spreads over it early.
DEPTHS = tuple(step * 4 % 11 / 10 for step in range(11))
# Documents of one seed and of the next never meet.
_SEED_STRIDE = 1_000_003
_ANSWER_TOKENS: dict[str, int] = {"multi_value": 48, "chain": 24, "steps": 96, "copy": 32}
_SHORT_ANSWER_TOKENS = 12
# Other models answer in sentences, and in more tokens a word.
_WORDY = 4
_TEMPLATE_TOKENS = 64
_INSTRUCTION = "Answer with nothing but what is asked for."


@dataclass(frozen=True)
class Item:
    """One document of a cell.

    Attributes:
        document: The text with its questions.
        prompts: Token ids, one prompt a question; of a chat, a later one is what has grown so far.
        depth: Where the fact in question stands, from 0 to 1; None where facts are spread.
        late: Token ids that follow a late question's prompt: they are given as outputs.
    """

    document: Document
    prompts: tuple[tuple[int, ...], ...]
    depth: float | None
    late: tuple[int, ...] = ()


def make_items(
    task: str, length: int, *, limit: int, seed: int, tokenizer: Any, model: str
) -> list[Item]:
    """Return the documents of a cell, the same for every policy.

    Args:
        task: One of `ALL_TASKS`.
        length: Tokens of a prompt; the template and an instruction of other models come on top.
        limit: Number of documents.
        seed: Draws them.
        tokenizer: The model's, as transformers loads it.
        model: The model's name.
    """
    items = []
    survey = task == SURVEY
    base = cast(Task, "multi_key" if survey else task.removeprefix(LATE))
    for index in range(limit):
        depth = DEPTHS[index % len(DEPTHS)] if base == "needle" else None
        document = make_document(
            base,
            num_tokens=length,
            seed=seed * _SEED_STRIDE + index,
            tokenizer=tokenizer,
            depth=depth,
            num_questions=SURVEY_QUESTIONS if survey else 1,
        )
        chats = [
            [{"role": "user", "content": document.message(question)}]
            if survey
            else document.chat(turn)
            for turn, question in enumerate(document.questions)
        ]
        prompts = tuple(_encode(chat, tokenizer, model) for chat in chats)
        late: tuple[int, ...] = ()
        if task.startswith(LATE):
            before, late = _split(document, prompts[0], tokenizer, model)
            prompts = (before,)
        items.append(Item(document, prompts, depth, late))
    return items


def _split(
    document: Document, prompt: tuple[int, ...], tokenizer: Any, model: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what a prompt has before its question, and the rest."""
    other = replace(document, questions=(Question("?", ""),))
    unlike = zip(prompt, _encode(other.chat(), tokenizer, model), strict=False)
    length = next(index for index, (one, two) in enumerate(unlike) if one != two)
    return prompt[:length], prompt[length:]


def _encode(messages: list[dict[str, str]], tokenizer: Any, model: str) -> tuple[int, ...]:
    if model != MODEL_NAME:
        first = messages[0]["content"]
        messages = [{"role": "user", "content": f"{first} {_INSTRUCTION}"}, *messages[1:]]
    if not getattr(tokenizer, "chat_template", None):
        return tuple(tokenizer.encode(_completion(messages)))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _completion(messages: list[dict[str, str]]) -> str:
    """Return a chat as one text to be completed."""
    return " ".join(
        f"{message['content']} answer:" if message["role"] == "user" else message["content"]
        for message in messages
    )


def num_prompts(task: str) -> int:
    """Return how many prompts a document of a task has."""
    return {"multi_turn": TURNS, SURVEY: SURVEY_QUESTIONS}.get(task, 1)


def answer_tokens(task: str, model: str) -> int:
    """Return how many tokens a model may generate for an answer."""
    tokens = _ANSWER_TOKENS.get(task.removeprefix(LATE), _SHORT_ANSWER_TOKENS)
    return tokens if model == MODEL_NAME else _WORDY * tokens


def room_tokens(tasks: Sequence[str], model: str) -> int:
    """Return the tokens that must fit into a sequence beside a prompt's length."""
    template = 0 if model == MODEL_NAME else _TEMPLATE_TOKENS
    return template + max(answer_tokens(task, model) for task in tasks)


def is_right(question: Question, text: str, model: str) -> bool:
    """Return whether a generated text answers a question.

    The bundled model must give the expected text and nothing else. Other models were not trained on
    its form: there the values asked for must stand in the text, in their order.
    """
    if model == MODEL_NAME:
        return is_correct(question, text)
    values = re.findall(r"\d+", question.answer)
    if not values:  # a passage to repeat
        return question.answer in " ".join(re.findall(r"\w+", text.lower()))
    found = iter(re.findall(r"\d+", text))
    return all(value in found for value in values)
