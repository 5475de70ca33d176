"""Knorm: keys with a small norm draw attention."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from vllm_kvpress.policies.observation import LayerObservation
from vllm_kvpress.policies.scorer import Scorer
from vllm_kvpress.policies.scorers.params import STRICT

__all__ = ["KnormScorer"]


@dataclass(frozen=True, config=STRICT)
class KnormScorer(Scorer):
    """Scores a token by the negated L2 norm of its key: -|k_j|.

    Source: arXiv 2406.11430. Deviation: the paper leaves the first two layers whole.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns -|k_j|, in float32."""
        norms: torch.Tensor = torch.linalg.vector_norm(observation.keys.to(torch.float32), dim=-1)
        return -norms
