"""What a scorer sees of one attention layer of one request at an event."""

from dataclasses import dataclass

import torch

__all__ = ["LayerObservation"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerObservation:
    """Everything that one layer holds of one request, tokens sorted by position.

    Scorers must not write to the tensors: they may be views of the cache.

    Attributes:
        keys: [num_kv_heads, num_tokens, head_dim], RoPE applied, in the model's dtype; of an fp8
            cache, float32 after rounding to fp8.
        values: same shape and dtype.
        queries: [num_query_heads, window, head_dim], RoPE applied: the last `window` tokens,
            ending at the last observed token; fewer rows if fewer tokens were observed. Query
            head h reads KV head h // (num_query_heads / num_kv_heads). None unless the scorer
            needs "queries".
        positions: int64 [num_kv_heads, num_tokens], the tokens' positions in the request. None
            unless the scorer needs "positions".
        layer_idx: index of the layer in the model.
        kv_heads: which of the model's KV heads these are, [num_kv_heads]: under tensor parallelism
            a rank's, under a head plan some retrieval heads of a layer, ascending.
        scale: the model's softmax scale, applied to q·k.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor | None
    positions: torch.Tensor | None
    layer_idx: int
    kv_heads: tuple[int, ...]
    scale: float

    @property
    def num_kv_heads(self) -> int:
        """KV heads that are observed together."""
        return self.keys.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens observed."""
        return self.keys.shape[1]
