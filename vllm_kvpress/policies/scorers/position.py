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

    Attributes:
        prefill: What the prompt's own queries see: "exact" every token before them; "windowed"
            sinks and a window, as generated tokens do. The engine runs the latter as a head plan
            whose heads all stream.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    prefill: Literal["exact", "windowed"] = "exact"

    @property
    def selects(self) -> Literal["window", "streaming"]:
        """Whether the rule holds from the prompt's end on, or in the prompt, too."""
        return "window" if self.prefill == "exact" else "streaming"

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns the token's index: the newest are the best. The engine never asks."""
        keys = observation.keys
        indices = torch.arange(observation.num_tokens, dtype=torch.float32, device=keys.device)
        return indices.repeat(observation.num_kv_heads, 1)
