"""Value-key ratio: a large value behind a small key matters."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from vllm_kvpress.policies.observation import LayerObservation
from vllm_kvpress.policies.scorer import Scorer
from vllm_kvpress.policies.scorers.params import STRICT

__all__ = ["ValueKeyNormScorer"]

_TINY = 1e-12


@dataclass(frozen=True, config=STRICT)
class ValueKeyNormScorer(Scorer):
    """Scores a token by the ratio of its L2 norms: |v_j| / |k_j|.

    Key norms below 1e-12 count as 1e-12, so that a zero key gives a large score, not NaN.

    Source: arXiv 2509.04377 (PagedEviction). Deviation: the paper averages the ratio over the heads
    of a layer, so that all heads drop the same tokens; here each KV head ranks its own.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns |v_j| / |k_j|, in float32."""
        key_norms = torch.linalg.vector_norm(observation.keys.to(torch.float32), dim=-1)
        value_norms = torch.linalg.vector_norm(observation.values.to(torch.float32), dim=-1)
        ratio: torch.Tensor = value_norms / key_norms.clamp_min(_TINY)
        return ratio
