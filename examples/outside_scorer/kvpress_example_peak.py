"""Peak attention: tokens near one that any of the prompt's last queries singles out."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from vllm_kvpress.policies import LayerObservation, Scorer


@dataclass(frozen=True)
class PeakScorer(Scorer):
    """Scores a token by the highest attention that a token within `reach` of it receives."""

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})

    query_window: int = 32
    reach: int = 6

    def __post_init__(self) -> None:
        if self.query_window < 1 or self.reach < 0:
            raise ValueError("query_window must be at least 1 and reach at least 0")

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns float32 [num_kv_heads, num_tokens], one KV head with its query heads a row."""
        heads = observation.num_kv_heads
        queries = observation.queries.float().unflatten(0, (heads, -1)).flatten(1, 2)
        logits = queries @ observation.keys.float().transpose(1, 2) * observation.scale
        peaks = logits.softmax(dim=-1).amax(dim=1)
        return functional.max_pool1d(peaks, 2 * self.reach + 1, stride=1, padding=self.reach)
