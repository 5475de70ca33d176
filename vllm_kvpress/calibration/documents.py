"""Documents with hidden facts, a question and its answer, as token ids of any model."""

from __future__ import annotations

import random
from typing import Any

import torch

from vllm_kvpress.calibration.duo import Sample
from vllm_kvpress.testbed.documents import MIN_TOKENS, Task, make_document

__all__ = ["SHORTEST", "draw_sample"]

TASKS: tuple[Task, ...] = ("multi_key", "multi_value", "chain", "copy")
# Many facts need room: eight distractors and more.
SHORTEST = 4 * MIN_TOKENS
# Apart from the seeds by which models are trained and measured.
_FIRST_SEED = 700_000_000


def draw_sample(tokenizer: Any, *, length: int, seed: int, step: int) -> Sample:
    """Returns the document of a step: a task, a length and facts drawn by seed and step.

    Args:
        tokenizer: of the model.
        length: longest document, in tokens without the answer; the shortest has a quarter.
        seed: of the run.
        step: of the run.
    """
    draw = random.Random(f"duo/{seed}/{step}")
    task = draw.choice(TASKS)
    num_tokens = draw.randint(max(SHORTEST, length // 4), length)
    document = make_document(
        task,
        num_tokens=num_tokens,
        seed=_FIRST_SEED + draw.randrange(2**24),
        tokenizer=tokenizer,
    )
    (question,) = document.questions
    prompt = document.prompt(question)
    asked = tokenizer.encode(prompt)
    ids = tokenizer.encode(f"{prompt} {question.answer}")
    # Where the two part: a tokenizer may join the last token of the prompt with the answer's first.
    same = next(
        (at for at, (one, two) in enumerate(zip(asked, ids, strict=False)) if one != two),
        len(asked),
    )
    end = tokenizer.eos_token_id
    ids = ids[:-1] if ids[-1] == end else ids
    return Sample(torch.tensor([*ids, end] if end is not None else ids), same - 1)
