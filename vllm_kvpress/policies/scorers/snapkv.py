"""SnapKV: what the end of the prompt attends to is what the answer will need."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch.nn import functional

from vllm_kvpress.errors import ScoreError
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
        """Returns the pooled attention; one KV head's [group, window, num_tokens] at a time."""
        queries = observation.queries
        if queries is None:
            raise ScoreError("the scorer 'snapkv' needs queries", got="none")
        num_kv_heads, num_tokens = observation.num_kv_heads, observation.num_tokens
        window = min(queries.shape[1], num_tokens)
        scores = torch.full(
            (num_kv_heads, num_tokens),
            float("inf"),
            dtype=torch.float32,
            device=observation.keys.device,
        )
        num_rest = num_tokens - window
        if num_rest == 0:
            return scores
        groups = queries[:, -window:].chunk(num_kv_heads)
        for head, group in enumerate(groups):
            attention = _window_attention(group, observation.keys[head], observation.scale)
            pooled = self._pool(attention[..., :num_rest].mean(dim=1))
            scores[head, :num_rest] = pooled.mean(dim=0)
        return scores

    def _pool(self, rows: torch.Tensor) -> torch.Tensor:
        """Pools [group, num_rest] along the tokens, keeping the shape."""
        if self.pooling == "avg":
            # Running sums would lose the small scores next to large ones: add shifted rows.
            padded = functional.pad(rows, (self.pool // 2, self.pool // 2))
            return padded.unfold(1, self.pool, 1).sum(dim=-1) / self.pool
        pooled: torch.Tensor = functional.max_pool1d(
            rows, self.pool, stride=1, padding=self.pool // 2
        )
        return pooled


def _window_attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax of the last queries over all keys, causal: float32 [group, window, num_tokens]."""
    window, num_tokens = queries.shape[1], keys.shape[0]
    logits = (queries.to(torch.float32) * scale) @ keys.to(torch.float32).T
    causal = torch.ones(window, num_tokens, dtype=torch.bool, device=keys.device)
    hidden = ~causal.tril(diagonal=num_tokens - window)
    return logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
