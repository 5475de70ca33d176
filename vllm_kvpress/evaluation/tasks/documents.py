"""The testbed's questions for lm-eval; named by the YAML files beside this one.

`--metadata '{"num_documents": 500, "seed": 1}'` changes how many are drawn, and which.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from vllm_kvpress.evaluation.items import is_right
from vllm_kvpress.testbed import MODEL_NAME, model_path
from vllm_kvpress.testbed.documents import (
    Document,
    Question,
    Task,
    Tokenizer,
    is_correct,
    make_document,
)

__all__ = ["make_dataset", "process_results"]

_NUM_DOCUMENTS = 200
_TOKENIZER_KEYS = ("tokenizer", "pretrained", "model")
_ANY_OTHER_MODEL = ""


def make_dataset(
    testbed_task: Task,
    num_tokens: int,
    num_documents: int = _NUM_DOCUMENTS,
    seed: int = 0,
    **model_args: Any,
) -> dict[str, Any]:
    """Return the split `test`: a row a question.

    Args:
        testbed_task: A task of the testbed.
        num_tokens: Tokens of a prompt, counted by the model's tokenizer.
        num_documents: How many documents.
        seed: Draws them.
        model_args: What lm-eval was told of the model; its tokenizer is looked for here.
    """
    from datasets import Dataset

    tokenizer = _tokenizer(model_args)
    rows = []
    for index in range(num_documents):
        document = make_document(
            testbed_task,
            num_tokens=num_tokens,
            seed=seed * 1_000_003 + index,
            tokenizer=tokenizer,
        )
        rows += [
            {"prompt": prompt_at(document, turn), "answer": question.answer, "turn": turn}
            for turn, question in enumerate(document.questions)
        ]
    return {"test": Dataset.from_list(rows)}


def prompt_at(document: Document, turn: int) -> str:
    """Return the text of a chat that has come to a question, as one completion prompt."""
    text = document.prompt(document.questions[0])
    for earlier, question in pairwise(document.questions[: turn + 1]):
        text += f" {earlier.answer} {question.text} answer:"
    return text


def process_results(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the scores of one answer: the text itself, and the values anywhere in it."""
    question = Question(row["prompt"], row["answer"])
    return {
        "exact_match": float(is_correct(question, results[0])),
        "contains": float(is_right(question, results[0], _ANY_OTHER_MODEL)),
    }


def _tokenizer(model_args: dict[str, Any]) -> Tokenizer | None:
    """Return the model's tokenizer; None for the bundled model, whose tokens are counted here."""
    names = (model_args.get(key) for key in _TOKENIZER_KEYS)
    name = next((name for name in names if isinstance(name, str) and name), MODEL_NAME)
    if name in (MODEL_NAME, str(model_path())):
        return None
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(name)
    return tokenizer
