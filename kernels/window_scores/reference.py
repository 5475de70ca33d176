"""Window scores in PyTorch: one request and one KV head at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["window_scores"]


def window_scores(
    query: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    num_tokens: Tensor,
    scale: float,
    *,
    pool: str,
    pool_size: int,
    reduce: str,
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the scores; arguments as in the public operation.

    Args:
        query: [num_reqs, window, num_q_heads, head_size].
        keys: [num_blocks, block_size, num_kv_heads, head_size].
        block_tables: int32 [num_reqs, num_columns].
        num_tokens: int32 [num_reqs].
        scale: What logits are multiplied by.
        pool: "avg" or "max".
        pool_size: In tokens.
        reduce: "mean" or "max".
        max_tokens: Width of the scores.
        dtype: What everything is computed in, and the scores'.

    Raises:
        ValueError: A request has more than `max_tokens` tokens.
    """
    longest = int(num_tokens.max()) if len(num_tokens) else 0
    if longest > max_tokens:
        raise ValueError(f"num_tokens: got {longest}; allowed: at most {max_tokens}, max_tokens")
    block_size, num_kv_heads = keys.shape[1:3]
    shape = (len(query), num_kv_heads, max_tokens)
    scores = torch.full(shape, -torch.inf, dtype=dtype, device=query.device)
    for request, length in enumerate(num_tokens.tolist()):
        rest = max(0, length - query.shape[1])
        scores[request, :, rest:length] = torch.inf
        if rest == 0:
            continue
        blocks = block_tables[request, : -(-length // block_size)].long()
        own = keys[blocks].flatten(0, 1)[:length].to(dtype)  # [length, num_kv_heads, head_size]
        groups = query[request].to(dtype).transpose(0, 1).chunk(num_kv_heads)
        for head, group in enumerate(groups):
            attention = _attention(group, own[:, head], scale)  # [group, window, length]
            pooled = _pooled(attention[..., :rest].mean(dim=1), pool, pool_size)
            reduced = pooled.mean(dim=0) if reduce == "mean" else pooled.amax(dim=0)
            scores[request, head, :rest] = reduced
    return scores


def _attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Returns the causal softmax over [length, head_size] of the last queries."""
    window, length = queries.shape[1], keys.shape[0]
    logits = (queries * scale) @ keys.T
    seen = torch.ones(window, length, dtype=torch.bool, device=keys.device)
    seen = seen.tril(diagonal=length - window)
    return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def _pooled(rows: Tensor, pool: str, pool_size: int) -> Tensor:
    """Pools [group, rest] along the tokens, keeping the shape."""
    half = pool_size // 2
    if pool == "avg":
        windows = functional.pad(rows, (half, half)).unfold(1, pool_size, 1)
        return windows.sum(dim=-1) / pool_size
    return functional.max_pool1d(rows, pool_size, stride=1, padding=half)
