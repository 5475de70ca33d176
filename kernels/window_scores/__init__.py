"""Window scores: the attention that the last queries of each request pay to its tokens, pooled.

`README.md` has the math, the grid and what bounds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from vllm_kvpress.kernels.window_scores import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["window_scores"]

QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_HEAD_SIZE = 256
CHOICES = {"pool": ("avg", "max"), "reduce": ("mean", "max")}


def window_scores(
    query: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    num_tokens: Tensor,
    scale: float,
    *,
    pool: Literal["avg", "max"] = "avg",
    pool_size: int = 5,
    reduce: Literal["mean", "max"] = "mean",
    max_tokens: int | None = None,
) -> Tensor:
    """Returns SnapKV's scores, float32 [num_reqs, num_kv_heads, max_tokens], higher = keep.

    With T tokens and a window of w queries, which are those of the last w tokens, tokens before
    T - w get their mean attention, pooled, then reduced over the query heads that share a KV head;
    the window's own tokens get +inf and places from T on -inf. A NaN or an overflow in queries or
    keys gives NaN. On CUDA nothing waits for the device; the grid depends on shapes only.

    Args:
        query: [num_reqs, window, num_q_heads, head_size] in the model's dtype, dense along the
            last axis; of a request shorter than the window no query is read.
        keys: [num_blocks, block_size, num_kv_heads, head_size], dense along the last axis, in the
            model's dtype or in fp8, whose scale the caller multiplies into `scale`.
        block_tables: int32 [num_reqs, num_columns]; a request's first entries are read only.
        num_tokens: int32 [num_reqs], at most `max_tokens` each: tokens of each request.
        scale: What logits are multiplied by.
        pool: How tokens are pooled: "avg" over zeros at both ends, "max" over what is there.
        pool_size: Width of the pooling, odd, in tokens; 1 for none.
        reduce: How the query heads of a KV head are reduced.
        max_tokens: Width of the scores; what the tables' columns hold by default.

    Raises:
        TypeError: A dtype is none that the operation takes.
        ValueError: Shapes, strides, devices or options do not fit each other.
    """
    held = block_tables.shape[-1] * (keys.shape[1] if keys.dim() > 1 else 0)
    max_tokens = held if max_tokens is None else max_tokens
    _check_dtypes(query, keys, block_tables, num_tokens)
    _check_shapes(query, keys, block_tables, num_tokens)
    _check_options(pool=pool, reduce=reduce)
    if pool_size < 1 or pool_size % 2 == 0:
        raise ValueError(f"pool_size: got {pool_size}; allowed: odd numbers from 1 on")
    if not 0 <= max_tokens <= held:
        raise ValueError(f"max_tokens: got {max_tokens}; allowed: 0 to {held}, the tables' tokens")
    if query.device.type == "cpu":
        run = reference.window_scores
    else:
        from vllm_kvpress.kernels.window_scores.triton import launch as run
    return run(
        query,
        keys,
        block_tables,
        num_tokens,
        scale,
        pool=pool,
        pool_size=pool_size,
        reduce=reduce,
        max_tokens=max_tokens,
    )


def _check_dtypes(query: Tensor, keys: Tensor, block_tables: Tensor, num_tokens: Tensor) -> None:
    allowed = {
        "query": (query, QUERY_DTYPES),
        "keys": (keys, (query.dtype, *FP8_DTYPES)),
        "block_tables": (block_tables, (torch.int32,)),
        "num_tokens": (num_tokens, (torch.int32,)),
    }
    for name, (tensor, dtypes) in allowed.items():
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: got {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
        if tensor.device != query.device:
            raise ValueError(
                f"{name}: got device {tensor.device}; allowed: {query.device}, query's"
            )


def _check_shapes(query: Tensor, keys: Tensor, block_tables: Tensor, num_tokens: Tensor) -> None:
    ranks = {
        "query": (query, 4),
        "keys": (keys, 4),
        "block_tables": (block_tables, 2),
        "num_tokens": (num_tokens, 1),
    }
    for name, (tensor, rank) in ranks.items():
        if tensor.dim() != rank:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}; allowed: {rank} axes")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}: got strides {tensor.stride()}; allowed: 1 along the last axis"
            )
    num_reqs, window, num_q_heads, head_size = query.shape
    if window < 1 or not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(
            f"query: got shape {list(query.shape)}; allowed: a window of 1 or more, a head size "
            f"from 1 to {MAX_HEAD_SIZE}"
        )
    num_kv_heads = keys.shape[2]
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads or keys.shape[1] < 1:
        raise ValueError(
            f"keys: got shape {list(keys.shape)}; allowed: a number of KV heads that divides "
            f"{num_q_heads}, query's heads, and blocks of one token or more"
        )
    expected = {
        "keys": (keys, (*keys.shape[:3], head_size)),
        "block_tables": (block_tables, (num_reqs, block_tables.shape[1])),
        "num_tokens": (num_tokens, (num_reqs,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}; allowed: {list(shape)}")


def _check_options(**options: Any) -> None:
    for name, value in options.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(CHOICES[name])}")
