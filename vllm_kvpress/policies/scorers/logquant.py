"""LogQuant: the further back, the fewer tokens keep their precision; position alone decides."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from vllm_kvpress.errors import ScoreError
from vllm_kvpress.policies.observation import LayerObservation
from vllm_kvpress.policies.scorer import Scorer
from vllm_kvpress.policies.scorers.params import STRICT

__all__ = ["LogQuantScorer"]


@dataclass(frozen=True, config=STRICT)
class LogQuantScorer(Scorer):
    """Ranks positions so that the kept ones thin out by half for every window going back.

    LogQuant with a window of W tokens keeps position p, of T, where in chunk k = floor(d / W) back
    from the end, d = T - 1 - p, only every 2**k-th token stays: 2**k divides p. A token therefore
    stays for every W > d / (z + 1), with z the trailing zero bits of p, and

        score = -d / (z + 1)                     float32; z is infinite for p = 0

    ranks by the least window that keeps it: the best n tokens are LogQuant's set for the W that
    has n tokens, about 2 W of them, the newest W among them whole.

    Source: arXiv 2503.19950; Concyclics/LogQuantKV, src/LogQuant.py. Deviations: the chunks end at
    the last token, where the code's move on by whole windows; the first window of a prompt is no
    denser than its place says; more than log2(W) chunks back, where less than a token each is left,
    the power of two decides, in the code the place in a list.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"positions"})

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns the negated window that would just lose the token."""
        positions = observation.positions
        if positions is None:
            raise ScoreError("the scorer 'logquant' needs positions", got="none")
        distance = (positions.amax(dim=1, keepdim=True) - positions).to(torch.float32)
        lowest_bit = (positions & -positions).to(torch.float32)
        # frexp is exact: 2**z is 0.5 * 2**(z + 1).
        return -distance / torch.frexp(lowest_bit).exponent.masked_fill(positions == 0, 2**30)
