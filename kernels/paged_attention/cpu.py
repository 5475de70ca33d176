"""`paged_attention` as CPU engines run it: PyTorch's fused kernel where it can, else the reference.

The fused kernel makes no logits, so its time goes into the products. It knows neither soft cap nor
sinks, and one piece of keys and values: a prefix before exact blocks is the reference's, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_kvpress.kernels.paged_attention import reference
from vllm_kvpress.kernels.paged_attention.parts import ExactPart

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_kvpress.kernels.paged_attention.parts import PackedPart

__all__ = ["attend", "paged_attention"]


def paged_attention(
    query: Tensor,
    query_start_loc: Tensor,
    *,
    causal: ExactPart | PackedPart,
    prefix: PackedPart | None,
    scale: float,
    soft_cap: float,
    sinks: Tensor | None,
    key_rotation: Tensor | None,
    value_rotation: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Does what the public operation describes; arguments as in `reference.py`."""
    if prefix is not None or soft_cap or sinks is not None:
        return reference.paged_attention(
            query,
            query_start_loc,
            causal=causal,
            prefix=prefix,
            scale=scale,
            soft_cap=soft_cap,
            sinks=sinks,
            key_rotation=key_rotation,
            value_rotation=value_rotation,
            bias=bias,
            out=out,
        )
    if isinstance(causal, ExactPart):
        key_rotation = value_rotation = None
    out = torch.zeros_like(query, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.full(query.shape[:2], -torch.inf)
    starts, lengths = query_start_loc.tolist(), causal.lengths.tolist()
    for request, length in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        if rows.start == rows.stop:
            continue
        keys, values = reference.read(causal, request, length, query.dtype, torch.float32)
        some = query[rows].float()
        if key_rotation is not None:
            some = some @ key_rotation
        result, lse[rows] = attend(some, keys, values, scale)
        out[rows] = result if value_rotation is None else result @ value_rotation
    return out, lse


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the attention of one request's queries, its last tokens, and its logarithms.

    Args:
        query: float32 [n, num_q_heads, head_size].
        keys: float32 [num_kv_heads, length, head_size].
        values: Of the same shape.
        scale: What logits are multiplied by.
        soft_cap: 0 for none.
        sinks: float32 [num_q_heads].

    Returns:
        float32 [n, num_q_heads, head_size] and [n, num_q_heads].
    """
    n, (heads, length, _) = len(query), keys.shape
    if soft_cap or sinks is not None or length < n:
        parts = [(keys, values, False)]
        return reference.attend(query, parts, 0, scale, soft_cap, sinks, (None, None), None)
    # To the kernel KV heads are a batch: those of decode have their query heads as rows, others
    # read the same keys once for each.
    rows = query.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [heads, group, n, head_size]
    group, mask = rows.shape[1], None
    if n == 1:
        rows, keys, values = rows.transpose(1, 2), keys[:, None], values[:, None]
    else:
        keys, values = (side[:, None].expand(-1, group, -1, -1) for side in (keys, values))
        if n < length:
            hidden = torch.ones(n, length, dtype=torch.bool).triu(length - n + 1)
            mask = torch.zeros(n, length).masked_fill_(hidden, -torch.inf)
    # The form of `scaled_dot_product_attention` that returns the logarithms.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, values, is_causal=n == length > 1, attn_mask=mask, scale=scale
    )
    if n == 1:
        return out.reshape(1, heads * group, -1), lse.reshape(1, -1)
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1)
