"""`paged_attention` in plain PyTorch, request by request: the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_kvpress.kernels.cells_reference import unpack
from vllm_kvpress.kernels.paged_attention.parts import ExactPart

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_kvpress.kernels.paged_attention.parts import PackedPart

__all__ = ["attend", "paged_attention", "read"]

# Logits computed at a time, so that long prompts need no tensor of queries x tokens.
LOGITS_AT_A_TIME = 2**24


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
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Does what the public operation describes.

    Args:
        query: [num_tokens, num_q_heads, head_size].
        query_start_loc: int32 [num_reqs + 1].
        causal: The tokens that end with the queries' own.
        prefix: The tokens before them.
        scale: What logits are multiplied by.
        soft_cap: 0 for none.
        sinks: float32 [num_q_heads].
        key_rotation: The rotation if packed keys are rotated.
        value_rotation: The rotation if packed values are.
        bias: float32 [num_pages, cells.per_page, cells.tokens].
        out: Where to write.
        compute: The dtype to compute in; logarithms have it, too.
    """
    out = torch.zeros_like(query, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.full(query.shape[:2], -torch.inf, dtype=compute)
    starts, lengths = query_start_loc.tolist(), causal.lengths.tolist()
    before = prefix.lengths.tolist() if prefix is not None else [0] * len(lengths)
    for request, length in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        if rows.start == rows.stop:
            continue
        sides = [read(causal, request, length, query.dtype, compute)]
        is_packed = [not isinstance(causal, ExactPart)]
        added = None
        if prefix is not None and before[request]:
            sides.insert(0, read(prefix, request, before[request], query.dtype, compute))
            is_packed.insert(0, True)
            if bias is not None:
                added = _bias_of(bias, prefix, request, before[request]).to(compute)
        out[rows], lse[rows] = attend(
            query[rows].to(compute),
            [(keys, values, yes) for (keys, values), yes in zip(sides, is_packed, strict=True)],
            before[request],
            scale,
            soft_cap,
            sinks,
            tuple(x if x is None else x.to(compute) for x in (key_rotation, value_rotation)),
            added,
        )
    return out, lse


def read(
    part: ExactPart | PackedPart,
    request: int,
    length: int,
    dtype: torch.dtype,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns one request's keys and values, [num_kv_heads, length, head_size]."""
    if not isinstance(part, ExactPart):
        keys, values = unpack(part.pages, part.table[request], length, part.cells, dtype)
        return keys.to(compute), values.to(compute)
    blocks = part.table[request, : -(-length // part.keys.shape[1])].long()
    keys, values = (
        cache[blocks].flatten(0, 1)[:length].transpose(0, 1).to(compute)
        for cache in (part.keys, part.values)
    )
    return keys, values


def _bias_of(bias: Tensor, part: PackedPart, request: int, length: int) -> Tensor:
    """Returns the bias of one request's tokens, [num_kv_heads, length]."""
    cells = part.cells
    columns = -(-length // cells.tokens)
    num_cells = columns * cells.num_kv_heads
    pages = part.table[request, : -(-num_cells // cells.per_page)].long()
    rows = bias[pages].flatten(0, 1)[:num_cells].view(columns, cells.num_kv_heads, cells.tokens)
    return rows.transpose(0, 1).flatten(1)[:, :length]


def attend(
    query: Tensor,
    parts: list[tuple[Tensor, Tensor, bool]],
    num_prefix: int,
    scale: float,
    soft_cap: float,
    sinks: Tensor | None,
    rotations: tuple[Tensor | None, Tensor | None],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns one request's output [n, num_q_heads, head_size] and logarithms [n, num_q_heads].

    Args:
        query: [n, num_q_heads, head_size].
        parts: Keys and values [num_kv_heads, tokens, head_size] and whether they were packed; the
            causal part last.
        num_prefix: Tokens before the causal part.
        scale: What logits are multiplied by.
        soft_cap: 0 for none.
        sinks: [num_q_heads].
        rotations: Of packed keys and values.
        bias: [num_kv_heads, num_prefix].
    """
    n, heads, _ = query.shape
    num_tokens = sum(keys.shape[1] for keys, _, _ in parts)
    step = max(1, LOGITS_AT_A_TIME // (heads * max(num_tokens, 1)))
    outs, lses = [], []
    for first in range(0, n, step):
        some = query[first : first + step]
        logits = _logits(some, parts, scale, soft_cap, rotations[0])
        if bias is not None:
            logits[..., :num_prefix] += bias[:, None, None, :]
        last = num_tokens - n + torch.arange(first, first + some.shape[0])  # what each query sees
        last.clamp_(min=num_prefix - 1)
        hidden = torch.arange(num_tokens) > last[:, None]
        logits.masked_fill_(hidden, -torch.inf)
        lse = torch.logsumexp(logits, dim=-1)  # [num_kv_heads, group, n]
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(*lse.shape[:2], 1))
        weights = logits.sub_(torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp_()
        outs.append(_output(weights, parts, rotations[1]))
        lses.append(lse.permute(2, 0, 1).flatten(1))
    return torch.cat(outs), torch.cat(lses)


def _logits(
    query: Tensor,
    parts: list[tuple[Tensor, Tensor, bool]],
    scale: float,
    soft_cap: float,
    rotation: Tensor | None,
) -> Tensor:
    """Returns logits of all tokens, [num_kv_heads, group, n, num_tokens]."""
    n = query.shape[0]
    pieces = []
    for keys, _, is_packed in parts:
        rows = query @ rotation if is_packed and rotation is not None else query
        rows = rows.unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)
        product = rows.flatten(1, 2) @ keys.transpose(1, 2)
        pieces.append(product.unflatten(1, (-1, n)))
    logits = torch.cat(pieces, dim=-1).mul_(scale)
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def _output(
    weights: Tensor, parts: list[tuple[Tensor, Tensor, bool]], rotation: Tensor | None
) -> Tensor:
    """Returns the weighted sums of the values, [n, num_q_heads, head_size]."""
    total, first = 0, 0
    for _, values, is_packed in parts:
        some = weights[..., first : first + values.shape[1]]
        product = (some.flatten(1, 2) @ values).unflatten(1, some.shape[1:3])
        total = total + (product @ rotation if is_packed and rotation is not None else product)
        first += values.shape[1]
    return total.permute(2, 0, 1, 3).flatten(1, 2)
