"""How far a policy's next-token distributions lie from the full cache's, on the same tokens.

Accuracy says nothing where every answer is right. Here each answer token counts: the full cache
answers first; then every policy is given the same prompts and, token by token, the full cache's
answers (`forced.py`), and the two distributions of each of those tokens are compared,

    KL(full || policy) = sum over tokens t of p(t) * (log p(t) - log q(t))     [nats]

Of a vocabulary above `MOST_TOKENS` each side has its likeliest ones; what only one side has is
taken as one token, which makes the sum a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_TOKENS", "Distributions", "compare", "reference_path"]

MOST_TOKENS = 1000
# The least probability of what a side lacks: of so little, float32 leaves nothing.
_LEAST = 1e-9


@dataclass(frozen=True)
class Distributions:
    """Of each token of some answers, the likeliest tokens.

    Attributes:
        answers: The tokens that were given, one sequence a question.
        tokens: int32 [num_answer_tokens, k], ascending in each row.
        logprobs: float32 of the same shape.
    """

    answers: list[list[int]]
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    @classmethod
    def of_outputs(cls, answers: Sequence[Sequence[int]], outputs: Sequence[Any]) -> Distributions:
        """Return those that vLLM reports with its outputs, for the last tokens of each.

        Args:
            answers: The tokens of each answer.
            outputs: vLLM's outputs, each of which ends in its answer.
        """
        rows = [
            dict(sorted((token, entry.logprob) for token, entry in position.items()))
            for answer, output in zip(answers, outputs, strict=True)
            for position in list(output.logprobs)[len(output.token_ids) - len(answer) :]
        ]
        # The token that was given is reported beside the likeliest ones, if it is none of them.
        width = min(map(len, rows))
        rows = [row if len(row) == width else _without_least(row) for row in rows]
        return cls(
            [list(answer) for answer in answers],
            np.array([list(row) for row in rows], dtype=np.int32),
            np.array([list(row.values()) for row in rows], dtype=np.float32),
        )

    def save(self, path: Path) -> None:
        """Write them to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(
            part,
            answers=np.array([token for answer in self.answers for token in answer], np.int32),
            lengths=np.array([len(answer) for answer in self.answers], np.int32),
            tokens=self.tokens,
            logprobs=self.logprobs,
        )
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Distributions:
        """Read what `save` wrote."""
        with np.load(path) as file:
            ends = file["lengths"].cumsum()[:-1]
            answers = [part.tolist() for part in np.split(file["answers"], ends)]
            return cls(answers, file["tokens"], file["logprobs"])


def reference_path(folder: Path, settings_key: str, task: str, length: int) -> Path:
    """Return where an evaluation's folder keeps the full cache's distributions of a cell."""
    return folder / "reference" / f"{task}-{length}-{settings_key}.npz"


def compare(full: Distributions, ours: Distributions) -> dict[str, Any]:
    """Return the part of a record that says how far `ours` is from `full`.

    Returns:
        `kl`: mean over the answer tokens, in nats; `standard_error`: of that mean, from the means
        of the answers; `same_top`: share of the tokens that are our likeliest, too; `tokens`: how
        many there are; `whole`: whether the vocabulary was compared whole.
    """
    assert full.answers == ours.answers, "two engines were given different answers"
    pairs = zip(full.tokens, full.logprobs, ours.tokens, ours.logprobs, strict=True)
    every = np.array([_divergence(*pair) for pair in pairs])
    lengths = [len(answer) for answer in full.answers]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    sums = np.add.reduceat(every, starts)
    mean = float(every.mean())
    # Of a ratio of sums: answers are drawn, their tokens are not independent.
    errors = sums - mean * np.array(lengths)
    error = math.sqrt(float((errors**2).sum())) / len(every)
    given = np.array([token for answer in full.answers for token in answer])
    top = np.take_along_axis(ours.tokens, ours.logprobs.argmax(axis=1)[:, None], axis=1)[:, 0]
    return {
        "kl": float(f"{mean:.4g}"),
        "standard_error": float(f"{error:.2g}"),
        "same_top": round(float((top == given).mean()), 5),
        "tokens": len(every),
        "whole": full.tokens.shape[1] < MOST_TOKENS,
    }


def _divergence(
    full_tokens: NDArray[np.int32],
    full_logprobs: NDArray[np.float32],
    our_tokens: NDArray[np.int32],
    our_logprobs: NDArray[np.float32],
) -> float:
    _, one, two = np.intersect1d(full_tokens, our_tokens, return_indices=True)
    log_p, log_q = full_logprobs[one].astype(float), our_logprobs[two].astype(float)
    p, q = np.exp(log_p), np.exp(log_q)
    seen = p > 0
    total = float((p[seen] * (log_p[seen] - np.maximum(log_q[seen], -1e4))).sum())
    if len(one) < len(full_tokens):
        rest_p, rest_q = max(_LEAST, 1 - float(p.sum())), max(_LEAST, 1 - float(q.sum()))
        total += rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)


def _without_least(row: dict[int, float]) -> dict[int, float]:
    least = min(row, key=row.__getitem__)
    return {token: logprob for token, logprob in row.items() if token != least}
