"""Training rows: texts dense with facts, and a question about every one of them.

The sentences are those of `vllm_kvpress.testbed.language`. An evaluation document asks one
question about a few facts; a row here hides as many facts as it has room for and asks about each,
at the end as in a chat of many turns, or right between the sentences. Rows are drawn from strings
that no evaluation seed spells, so no document is ever seen in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from testbed_training.vocabulary import END, PAD, START, encode, token_ids
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
    draw_code,
    draw_codes,
    filler_sentence,
    numbered_facts,
    numbered_question,
    passage,
    reword,
)

__all__ = ["Batch", "make_batch", "make_row"]

ANSWER_WEIGHT, FILLER_WEIGHT, QUESTION_WEIGHT = 1.0, 0.05, 0.02
# Tokens of little weight are learned from a sample of them, which counts for all.
SAMPLED_SHARE = 1 / 8
SHARES = {"needle": 0.36, "chain": 0.18, "steps": 0.10, "multi_value": 0.27, "copy": 0.09}
LARGEST_FILLER_SHARE = 0.75
QUESTIONS_LAST_SHARE = 0.5
JUMPING_SHARE = 0.45
MOST_JUMPS = 4
_DIGITS = "0123456789"

# A question and its answer.
_Asked = tuple[str, str]
_Group = tuple[list[str], list[_Asked]]


@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    Attributes:
        ids: Tokens, [num_rows, length].
        positions: Of the tokens, [num_rows, length].
        weights: What predicting a token counts in the loss, [num_rows, length]; the first column is
            0, nothing comes before it.
        is_answer: Whether a token belongs to an answer, its end included, [num_rows, length].
    """

    ids: Tensor
    positions: Tensor
    weights: Tensor
    is_answer: Tensor

    def to(self, device: str) -> Batch:
        """Return the batch on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass
class _Row:
    """Tokens of a row as they are written, and where its sentences begin."""

    ids: list[int] = field(default_factory=lambda: [START])
    weights: list[float] = field(default_factory=lambda: [0.0])
    starts: list[int] = field(default_factory=list)

    def add(self, ids: list[int], weights: list[float]) -> None:
        """Append a sentence."""
        self.starts.append(len(self.ids))
        self.ids += ids
        self.weights += weights


class _Keys:
    """Names and variables that a row has not used yet."""

    def __init__(self, rng: random.Random) -> None:
        self.names = rng.sample(NAMES, len(NAMES))
        self.variables = rng.sample(VARIABLES, len(VARIABLES))

    def take_variables(self, number: int) -> list[str]:
        """Return up to ``number`` variables, never to be returned again."""
        taken, self.variables = self.variables[:number], self.variables[number:]
        return taken


def make_batch(seed: str, num_rows: int, length: int, max_positions: int) -> Batch:
    """Return rows that the seed alone determines."""
    rng = random.Random(f"training/{seed}")
    ids = token_ids()
    rows = [make_row(rng, length, max_positions, ids) for _ in range(num_rows)]
    tokens, positions, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Batch(tokens, positions, _sampled(weights, seed), weights == ANSWER_WEIGHT)


def make_row(
    rng: random.Random, length: int, max_positions: int, ids: dict[str, int]
) -> tuple[list[int], list[int], list[float]]:
    """Return tokens, positions and weights of one row of ``length`` tokens."""
    groups, room = _draw_groups(rng, length, ids)
    timed = [item for group in groups for item in _place(rng, group)]
    while True:
        sentence = filler_sentence(rng)
        tokens = encode(sentence, ids)
        room -= len(tokens)
        if room < 0:
            break
        timed.append((rng.random(), tokens, [FILLER_WEIGHT] * len(tokens)))
    row = _Row()
    for _, tokens, weights in sorted(timed, key=lambda item: item[0]):
        row.add(tokens, weights)
    missing = length - len(row.ids)
    row.add([PAD] * missing, [0.0] * missing)
    return row.ids, _positions(rng, row.starts, length, max_positions), row.weights


_Sentence = tuple[list[int], list[float]]
_Encoded = tuple[list[_Sentence], list[_Sentence]]


def _draw_groups(
    rng: random.Random, length: int, ids: dict[str, int]
) -> tuple[list[_Encoded], int]:
    """Return facts with their questions, encoded, and how many tokens are left for filler."""
    keys = _Keys(rng)
    room = length - 1
    goal = room * rng.uniform(0.0, LARGEST_FILLER_SHARE)
    groups: list[_Encoded] = []
    tries = 0
    while room > goal and tries < 4:
        (task,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
        group = _GROUPS[task](rng, keys, room)
        encoded = None if group is None else _encode_group(group, ids)
        size = 0 if encoded is None else sum(len(s[0]) for part in encoded for s in part)
        if encoded is None or size > room:
            tries += 1
            continue
        groups.append(encoded)
        room -= size
    return groups, room


def _encode_group(group: _Group, ids: dict[str, int]) -> _Encoded:
    facts, questions = group
    return [_fact(fact, ids) for fact in facts], [_question(asked, ids) for asked in questions]


def _fact(text: str, ids: dict[str, int]) -> _Sentence:
    """Return a fact's tokens and weights: nobody can guess its digits."""
    digits = {ids[digit] for digit in _DIGITS}
    tokens = encode(text, ids)
    return tokens, [0.0 if token in digits else FILLER_WEIGHT for token in tokens]


def _question(asked: _Asked, ids: dict[str, int]) -> _Sentence:
    question = encode(f"{asked[0]} answer:", ids)
    answer = [*encode(f" {asked[1]}", ids), END]
    weights = [QUESTION_WEIGHT] * len(question) + [ANSWER_WEIGHT] * len(answer)
    return question + answer, weights


def _place(rng: random.Random, group: _Encoded) -> list[tuple[float, list[int], list[float]]]:
    """Give the sentences of a group a time from 0 to 2: facts in order, questions after them."""
    facts, questions = group
    times = sorted(rng.random() for _ in facts)
    last = rng.random() < QUESTIONS_LAST_SHARE
    asked = [1 + rng.random() if last else rng.uniform(times[-1], 1.0) for _ in questions]
    sentences = zip([*times, *asked], [*facts, *questions], strict=True)
    return [(time, tokens, weights) for time, (tokens, weights) in sentences]


def _needle(rng: random.Random, keys: _Keys, room: int) -> _Group | None:
    if not keys.names:
        return None
    name, code = keys.names.pop(), draw_code(rng)
    fact = reword(rng, PASS_CODE_FACTS, name, code)
    return [fact], [(reword(rng, PASS_CODE_QUESTIONS, name), code)]


def _multi_value(rng: random.Random, keys: _Keys, room: int) -> _Group | None:
    if not keys.names:
        return None
    name, codes = keys.names.pop(), draw_codes(rng, rng.randint(2, 4))
    return numbered_facts(rng, name, codes), [numbered_question(rng, name, codes)]


def _copy(rng: random.Random, keys: _Keys, room: int) -> _Group | None:
    if not keys.names:
        return None
    name, words = keys.names.pop(), passage(rng, rng.randint(4, 24))
    fact = reword(rng, PASSAGE_FACTS, name, words)
    return [fact], [(reword(rng, PASSAGE_QUESTIONS, name), words)]


def _chain(rng: random.Random, keys: _Keys, room: int) -> _Group | None:
    return _links(rng, keys, rng.randint(1, 4))


def _steps(rng: random.Random, keys: _Keys, room: int) -> _Group | None:
    """A long chain, as long as the row has room for: a link costs six tokens with its answer."""
    return _links(rng, keys, rng.randint(4, max(4, min(44, room // 8))))


def _links(rng: random.Random, keys: _Keys, hops: int) -> _Group | None:
    """A chain and a variable beside it; sometimes a second question starts inside the chain."""
    variables = keys.take_variables(hops)
    if not variables:
        return None
    code = draw_code(rng)
    facts, questions = chain_facts(rng, variables, code), [chain_question(rng, variables, code)]
    if len(variables) > 1 and rng.random() < 0.3:
        part = variables[: rng.randint(1, min(4, len(variables) - 1))]
        questions.append(chain_question(rng, part, code))
    for other in keys.take_variables(rng.randint(0, 2)):
        place = rng.randint(0, len(facts))
        facts.insert(place, reword(rng, ASSIGNMENTS, other, draw_code(rng)))
    return facts, questions


_GROUPS: dict[str, Callable[[random.Random, _Keys, int], _Group | None]] = {
    "needle": _needle,
    "chain": _chain,
    "steps": _steps,
    "multi_value": _multi_value,
    "copy": _copy,
}


def _positions(rng: random.Random, starts: list[int], length: int, max_positions: int) -> list[int]:
    """Return positions, in some rows with jumps between sentences: far distances in short rows."""
    positions = list(range(length))
    spare = max_positions - length
    inner = [start for start in starts if 0 < start < length]
    if rng.random() >= JUMPING_SHARE or spare <= 0 or not inner:
        return positions
    jumps = rng.sample(inner, min(len(inner), rng.randint(1, MOST_JUMPS)))
    for start in jumps:
        jump = rng.randint(0, spare // len(jumps))
        positions[start:] = [position + jump for position in positions[start:]]
    return positions


def _sampled(weights: Tensor, seed: str) -> Tensor:
    """Return the weights with most of the small ones 0, and the others of them raised for it."""
    generator = torch.Generator().manual_seed(random.Random(f"sample/{seed}").getrandbits(63))
    kept = torch.rand(weights.shape, generator=generator) < SAMPLED_SHARE
    small = weights < ANSWER_WEIGHT
    return torch.where(small, torch.where(kept, weights / SAMPLED_SHARE, 0.0), weights)
