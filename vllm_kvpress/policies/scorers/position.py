"""StreamingLLM: the position alone decides."""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass

from vllm_kvpress.policies.observation import LayerObservation
from vllm_kvpress.policies.scorer import Scorer
from vllm_kvpress.policies.scorers.params import STRICT

__all__ = ["PositionScorer"]


@dataclass(frozen=True, config=STRICT)
class PositionScorer(Scorer):
    """Keeps sinks and recent tokens only, which the retention plan does without a score.

    Source: arXiv 2309.17453; mit-han-lab/streaming-llm, streaming_llm/kv_cache.py. Deviations: the
    window moves in whole blocks, and keys keep the RoPE of their true position.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    selects: ClassVar[Literal["tokens", "window"]] = "window"

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns the token's index: the newest are the best. The engine never asks."""
        keys = observation.keys
        indices = torch.arange(observation.num_tokens, dtype=torch.float32, device=keys.device)
        return indices.repeat(observation.num_kv_heads, 1)
