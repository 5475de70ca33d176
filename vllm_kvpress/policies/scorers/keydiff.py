"""KeyDiff: keys that resemble the average key are redundant."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch.nn import functional

from vllm_kvpress.policies.observation import LayerObservation
from vllm_kvpress.policies.scorer import Scorer
from vllm_kvpress.policies.scorers.params import STRICT

__all__ = ["KeyDiffScorer"]


@dataclass(frozen=True, config=STRICT)
class KeyDiffScorer(Scorer):
    """Scores a token by how little its key resembles the others: -cos(k_j, mean_i k_i/|k_i|).

    The mean runs over all tokens observed of that KV head. A zero key scores 0.

    Source: arXiv 2504.15364; kvpress, presses/keydiff_press.py. Deviation: the paper evicts block
    by block during prefill; here all observed tokens are ranked at once.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns -cos(k_j, anchor), in float32."""
        units = functional.normalize(observation.keys.to(torch.float32), dim=-1)
        anchor = functional.normalize(units.mean(dim=1, keepdim=True), dim=-1)
        return -(units * anchor).sum(dim=-1)
