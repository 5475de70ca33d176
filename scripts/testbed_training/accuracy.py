"""How often the written model answers right: Hugging Face's Llama, bfloat16, the whole cache.

Teacher forcing stands in for generating: greedy generation gives the expected answer, its end
included, exactly if every one of its tokens is the most likely one after the ones before. A sample
is generated as well, and must agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from testbed_training.vocabulary import END, PAD
from vllm_kvpress.testbed.documents import TASKS, Document, Task, is_correct, make_document

__all__ = ["BARS", "Cell", "Item", "generation_agrees", "load", "make_items", "measure", "missed"]

# Seeds of no record, test or demo.
FIRST_SEED = 900_000_000
# Documents by length: enough to tell 98 % from 95 %, few where a row costs a second.
NUMBERS = {1024: 100, 2048: 200, 4096: 50}
BARS = {
    (2048, "needle"): 0.98,
    (2048, "multi_key"): 0.95,
    (2048, "multi_value"): 0.90,
    (2048, "chain"): 0.90,
    (4096, "needle"): 0.90,
}
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Item:
    """A chat with its right answers, as one sequence.

    Attributes:
        ids: Tokens, the last one the end of the last answer.
        answers: First and last token (exclusive) of each answer.
        document: Where it comes from.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    document: Document


@dataclass(frozen=True)
class Cell:
    """Right answers of one task at one length; a chat is right if all of its answers are."""

    task: str
    length: int
    number: int
    right: int

    @property
    def share(self) -> float:
        """Right answers as a share."""
        return self.right / self.number

    @property
    def error(self) -> float:
        """The standard error, with one right and one wrong answer added: never 0."""
        shrunk = (self.right + 1) / (self.number + 2)
        return math.sqrt(shrunk * (1 - shrunk) / (self.number + 2))


def load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Return model and tokenizer as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def make_items(
    task: Task, length: int, number: int, tokenizer: Any, first_seed: int = FIRST_SEED
) -> list[Item]:
    """Return documents of a task with their questions and answers."""
    items = []
    for seed in range(first_seed, first_seed + number):
        document = make_document(task, num_tokens=length, seed=seed)
        text, answers, ids = document.text, [], []
        for question in document.questions:
            text = f"{text} {question.text} answer:"
            start = len(tokenizer.encode(text))
            text = f"{text} {question.answer}</s>"
            ids = tokenizer.encode(text)
            answers.append((start, len(ids)))
        assert ids[-1] == END
        items.append(Item(ids, answers, document))
    return items


@torch.no_grad()
def hits(model: Any, items: Sequence[Item], **options: Any) -> list[Tensor]:
    """Return for every item whether each token of its answers is the most likely one."""
    device = next(model.parameters()).device
    longest = max(len(item.ids) for item in items)
    rows = [item.ids + [PAD] * (longest - len(item.ids)) for item in items]
    ids = torch.tensor(rows, device=device)
    # Padding stands behind everything that is looked at.
    states = model.model(ids, use_cache=False, **options).last_hidden_state
    found = []
    for row, item in enumerate(items):
        places = [place for start, end in item.answers for place in range(start, end)]
        at = torch.tensor(places, device=device)
        found.append(model.lm_head(states[row, at - 1]).argmax(-1) == ids[row, at])
    return found


def _groups(items: Sequence[Item], length: int) -> Iterator[Sequence[Item]]:
    size = max(1, _TOKENS_AT_ONCE // length)
    for start in range(0, len(items), size):
        yield items[start : start + size]


def measure(
    model: Any, tokenizer: Any, numbers: Mapping[int, int] = NUMBERS, known: Path | None = None
) -> list[Cell]:
    """Return the right answers of every task at every length.

    Args:
        model: As `load` returns it.
        tokenizer: As `load` returns it.
        numbers: Documents of a cell, by length.
        known: A file of this model's cells: those it has are not measured again, others are added.
    """
    cells = _read_cells(known)
    found = {(cell.task, cell.length, cell.number) for cell in cells}
    wanted = [(task, length, number) for length, number in numbers.items() for task in TASKS]
    missing = [cell for cell in wanted if cell not in found]
    with tqdm(total=sum(cell[2] for cell in missing), desc="accuracy", unit="document") as bar:
        for task, length, number in missing:
            items = make_items(task, length, number, tokenizer)
            right = 0
            for group in _groups(items, length):
                right += sum(bool(hit.all()) for hit in hits(model, group))
                bar.update(len(group))
            cells.append(Cell(task, length, number, right))
            bar.write(f"{task} at {length}: {right} of {number}")
            if known is not None:
                write_whole(known, json.dumps([asdict(cell) for cell in cells], indent=1))
    by_place = {(cell.task, cell.length, cell.number): cell for cell in cells}
    return [by_place[cell] for cell in wanted]


def _read_cells(path: Path | None) -> list[Cell]:
    if path is None or not path.exists():
        return []
    return [Cell(**cell) for cell in json.loads(path.read_text(encoding="utf-8"))]


def write_whole(path: Path, text: str) -> None:
    """Write a file; an interruption never leaves half of one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def generation_agrees(model: Any, tokenizer: Any, number: int = 2, length: int = 1024) -> bool:
    """Return whether generating gives a right answer exactly where teacher forcing says so."""
    for task in TASKS:
        for item in make_items(task, length, number, tokenizer):
            start, end = item.answers[0]
            prompt = torch.tensor([item.ids[:start]], device=model.device)
            given = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, start:]
            text = tokenizer.decode(given, skip_special_tokens=True)
            is_right = given[-1] == END and is_correct(item.document.questions[0], text)
            first = Item(item.ids[:end], item.answers[:1], item.document)
            if bool(is_right) != bool(hits(model, [first])[0].all()):
                return False
    return True


def missed(cells: Sequence[Cell]) -> list[str]:
    """Return which bars the model misses, in sentences."""
    found = {(cell.length, cell.task): cell for cell in cells}
    return [
        f"{task} at {length} tokens: {found[length, task].share:.1%}, the bar is {bar:.0%}"
        for (length, task), bar in BARS.items()
        if (length, task) in found and found[length, task].share < bar
    ]
