"""SnapKV: what the end of the prompt attends to is what the answer will need."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from vllm_kvpress.errors import ScoreError
from vllm_kvpress.kernels.window_scores import window_scores
from vllm_kvpress.policies.observation import LayerObservation
from vllm_kvpress.policies.scorer import Scorer
from vllm_kvpress.policies.scorers.params import STRICT

__all__ = ["SnapKVScorer"]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("an odd number, so that the pooling has a middle")
    return value


@dataclass(frozen=True, config=STRICT)
class SnapKVScorer(Scorer):
    """Scores a token by the pooled attention that the last `window` queries pay to it.

    For the w last queries, T tokens, and j < T - w, with KV head c and its query heads h:

        A[h,i,j] = softmax_j(scale * q[h,i] · k[c,j])   float32, over all T keys, causal
        a[h,j]   = mean over the w queries of A[h,i,j]
        p[h,:]   = pool(a[h,:])                         stride 1, over j in [0, T - w) only
        score[c,j] = mean over the query heads h of c of p[h,j]

    The w window tokens score +inf. At the two ends `avg` pools over zeros and still divides by
    `pool` (kvpress's avg_pool1d with padding = pool // 2); `max` pools over what is there.

    Source: arXiv 2404.14469; FasterDecoding/SnapKV, snapkv_utils.py; kvpress, snapkv_press.py.
    Deviation from the former, as in kvpress: one choice per KV head, not per query head, so that a
    GQA cache does not grow; mean in place of sum over the queries (the ranking is the same).

    Attributes:
        window: last queries that are looked at, in tokens.
        pool: width of the pooling, odd, in tokens; 1 for none.
        pooling: "avg" or "max".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})

    window: Annotated[int, Field(ge=1, le=4096)] = 32
    pool: Annotated[int, Field(ge=1, le=1023), AfterValidator(_odd)] = 5
    pooling: Literal["avg", "max"] = "avg"

    @property
    def query_window(self) -> int:
        """How many of the last queries `score` reads, in tokens."""
        return self.window

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns the pooled attention: by kernel on CUDA, in PyTorch on CPU."""
        queries, keys = observation.queries, observation.keys
        if queries is None:
            raise ScoreError("the scorer 'snapkv' needs queries", got="none")
        num_tokens = observation.num_tokens
        places = torch.arange(num_tokens, dtype=torch.int32, device=keys.device)
        scores: torch.Tensor = window_scores(
            _dense(queries.to(keys.dtype)).transpose(0, 1)[None],
            _dense(keys).transpose(0, 1)[:, None],  # as blocks of one token
            places[None],
            torch.full_like(places[:1], num_tokens),
            observation.scale,
            pool=self.pooling,
            pool_size=self.pool,
        )
        return scores[0]


def _dense(vectors: torch.Tensor) -> torch.Tensor:
    """Returns vectors whose elements lie side by side."""
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()
