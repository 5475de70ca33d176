"""Attention over a cache of packed cells, of exact blocks, or of a packed prefix before exact ones.

`README.md` has the math, the grid and what bounds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_kvpress.kernels.paged_attention import cpu
from vllm_kvpress.kernels.paged_attention.parts import ExactPart, PackedPart, check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["ExactPart", "PackedPart", "merge", "paged_attention"]


def paged_attention(
    query: Tensor,
    query_start_loc: Tensor,
    *,
    causal: ExactPart | PackedPart,
    prefix: PackedPart | None = None,
    scale: float,
    max_query_len: int,
    max_tokens: int,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    rotation: Tensor | None = None,
    rotate_keys: bool = False,
    rotate_values: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns attention and the log of its softmax's denominator.

    A request's tokens are those of `prefix`, which all its queries see, then those of `causal`, of
    which query i of n sees the first lengths - n + i + 1. On CUDA nothing waits for the device,
    and the grid depends on shapes and on the two `max_` numbers only.

    Args:
        query: [num_tokens, num_q_heads, head_size] in the model's dtype.
        query_start_loc: int32 [num_reqs + 1]; rows of `query` past its last entry are padding.
        causal: The tokens that end with the queries' own.
        prefix: The tokens before them.
        scale: What logits are multiplied by.
        max_query_len: At least the longest request's queries; 1 for decode.
        max_tokens: At least the longest request's tokens, both parts.
        soft_cap: c of c * tanh(logit / c); 0 for none.
        sinks: float32 [num_q_heads], one more logit per head that has no value.
        rotation: float32 [head_size, head_size], orthonormal and symmetric, for packed parts.
        rotate_keys: Whether packed keys were multiplied by it.
        rotate_values: Whether packed values were.
        bias: float32 [num_pages, cells.per_page, cells.tokens], added to logits of prefix tokens
            after the soft cap.
        out: Where to write; padded rows of it stay as they are.

    Returns:
        Output [num_tokens, num_q_heads, head_size] in the model's dtype, and natural logarithms,
        float32 [num_tokens, num_q_heads], sinks included. A query without tokens has output 0 and
        the logarithm -inf, or its sink's logit; so have padded rows (-inf) unless `out` is given.

    Raises:
        TypeError: A dtype, or the kind of a part, is none that the operation takes.
        ValueError: Shapes, strides, devices or options do not fit each other.
    """
    if bias is not None and prefix is None:
        raise ValueError("bias: got a tensor without a prefix; allowed: None")
    size = query.shape[-1]
    places: tuple[int, ...] = ()
    if isinstance(prefix, PackedPart):
        places = (prefix.pages.shape[0], prefix.cells.per_page, prefix.cells.tokens)
    extras = {
        "sinks": (sinks, torch.float32, (query.shape[1],)),
        "rotation": (rotation, torch.float32, (size, size)),
        "bias": (bias, torch.float32, places),
        "out": (out, query.dtype, tuple(query.shape)),
    }
    check(query, query_start_loc, causal, prefix, extras)
    if (rotate_keys or rotate_values) and rotation is None:
        raise ValueError("rotation: got None; allowed: a matrix where keys or values are rotated")
    if min(max_query_len, max_tokens) < 1 or soft_cap < 0:
        raise ValueError(
            f"max_query_len, max_tokens, soft_cap: got {max_query_len}, {max_tokens}, {soft_cap}; "
            "allowed: at least 1, 1 and 0"
        )
    options = {
        "causal": causal,
        "prefix": prefix,
        "scale": scale,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "key_rotation": rotation if rotate_keys else None,
        "value_rotation": rotation if rotate_values else None,
        "bias": bias,
        "out": out,
    }
    if query.device.type == "cpu":
        return cpu.paged_attention(query, query_start_loc, **options)
    from vllm_kvpress.kernels.paged_attention import triton as kernel

    limits = {"max_query_len": max_query_len, "max_tokens": max_tokens}
    return kernel.launch(query, query_start_loc, **limits, **options)


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the attention over several disjoint sets of tokens out of that over each.

    Args:
        outs: [num_tokens, num_q_heads, head_size] each.
        lses: float32 [num_tokens, num_q_heads] each; the sinks in one of them at most.

    Returns:
        Output in the dtype of the first, and its logarithms.
    """
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"merge: got {len(outs)} outputs, {len(lses)} lses; allowed: one of each")
    every = torch.stack(list(lses))  # [parts, num_tokens, num_q_heads]
    lse = torch.logsumexp(every, dim=0)
    weights = torch.exp(every - torch.where(lse == -torch.inf, 0.0, lse)).unsqueeze(-1)
    # A part of weight 0 has no tokens; its output may be anything.
    parts = [torch.where(w > 0, x.float() * w, 0.0) for x, w in zip(outs, weights, strict=True)]
    return torch.stack(parts).sum(dim=0).to(outs[0].dtype), lse
