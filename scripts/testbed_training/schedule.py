"""What happens when: lengths of rows and the learning rate, over the share of training done.

The share is of the minutes granted, so that a slow machine takes fewer steps but sees all lengths;
a number of steps in place of minutes makes a run repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule", "Stage"]

TOKENS_PER_STEP = 4096
WARM_UP_STEPS = 15
CONSTANT_SHARE = 0.5
LAST_RATE = 0.02


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one row length.

    Attributes:
        until: The share of the training at which it ends.
        length: Tokens in a row.
    """

    until: float
    length: int


CURRICULUM = (Stage(0.12, 256), Stage(0.35, 512), Stage(0.70, 1024), Stage(1.0, 2048))


@dataclass(frozen=True)
class Schedule:
    """When a training ends, and what it does before.

    Attributes:
        minutes: Of wall time, counted without interruptions.
        steps: Ends after so many steps instead.
        longest: Rows are never longer than this.
    """

    minutes: float
    steps: int | None = None
    longest: int = 2048
    tokens_per_step: int = TOKENS_PER_STEP

    def share(self, step: int, seconds: float) -> float:
        """Return how much of the training is done, from 0 to 1 and more."""
        return seconds / (60 * self.minutes) if self.steps is None else step / self.steps

    def length(self, share: float) -> int:
        """Return the tokens in a row."""
        found = next((stage for stage in CURRICULUM if share < stage.until), CURRICULUM[-1])
        return min(found.length, self.longest)

    def rate(self, share: float, step: int) -> float:
        """Return the share of the full learning rate."""
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        left = min(1.0, max(0.0, (1 - share) / (1 - CONSTANT_SHARE)))
        return warm * (LAST_RATE + (1 - LAST_RATE) * left)
