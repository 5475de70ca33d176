"""A scorer from outside, by path; a test says how it misbehaves."""

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Scorer:
    """Minus the norm of the key, until `fault` says otherwise; needs nothing of ours."""

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    scope: ClassVar[str] = "head"
    selects: ClassVar[str] = "tokens"
    query_window: ClassVar[int] = 0
    fault: ClassVar[str] = ""

    def score(self, observation):
        scores = -observation.keys.float().norm(dim=-1)
        if self.fault == "NaN":
            scores[1, 7] = torch.nan
        if self.fault == "NaN in the open block":
            scores[0, -1] = torch.nan
        if self.fault == "every token":
            return scores[:, :-1]
        if self.fault == "wrong kind":
            return scores.double()
        if self.fault == "raises":
            raise RuntimeError("a mistake of the scorer's own")
        return None if self.fault == "no tensor" else scores
