"""Accuracies and paired differences, each with its own standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SURE", "Estimate", "estimate_difference", "estimate_mean", "wilson_interval"]

# A difference counts from so many standard errors on.
SURE = 2.0


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, over `n` items."""

    mean: float
    standard_error: float
    n: int


def estimate_mean(scores: Sequence[float]) -> Estimate:
    """Return the mean of scores in [0, 1].

    Where every score is 0 or 1 the standard error is half the width of Wilson's interval at one
    standard deviation: unlike that of the plain formula it is not 0 where all scores are equal.
    Else it is that of the mean, with one score of 0 and one of 1 added for the same reason.

    Raises:
        ValueError: There are no scores.
    """
    n = len(scores)
    if n == 0:
        raise ValueError("a mean of no scores")
    mean = sum(scores) / n
    if all(score in (0, 1) for score in scores):
        low, high = wilson_interval(sum(scores), n, 1.0)
        return Estimate(mean, (high - low) / 2, n)
    return Estimate(mean, _error_with_two_more(scores, 0.0, 1.0), n)


def wilson_interval(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of `right` successes out of `n`.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference
    (1927).
    """
    share = right / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def estimate_difference(
    ours: Sequence[float], theirs: Sequence[float], step: float = 1.0
) -> Estimate:
    """Return the mean of `ours - theirs`, item by item, with the error of the paired difference.

    The least possible difference is added to the items once each way before the error is taken, so
    that equal results on a few items do not claim to be certain.

    Args:
        ours: A score for each item.
        theirs: Of the same items.
        step: The least difference that two scores of an item can have: 1 over its answers.

    Raises:
        ValueError: The two are not of the same items.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError("paired scores must be of the same items")
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    mean = sum(differences) / len(differences)
    return Estimate(mean, _error_with_two_more(differences, -step, step), len(differences))


def _error_with_two_more(values: Sequence[float], low: float, high: float) -> float:
    """Return the standard error of the mean of the values and two more."""
    more = [*values, low, high]
    mean = sum(more) / len(more)
    variance = sum((value - mean) ** 2 for value in more) / (len(more) - 1)
    return math.sqrt(variance / len(more))
