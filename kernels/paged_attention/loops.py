"""The loops over a split's tokens: softmax as it goes, in base 2, sums in float32."""

import triton
import triton.language as tl
from vllm_kvpress.kernels.paged_attention.finish import LOG2_E
from vllm_kvpress.kernels.paged_attention.tiles import (
    decode,
    find_cells,
    load_bias,
    load_codes,
    load_exact,
    load_params,
    load_rows,
    padded,
    planes,
    scales_are_rows,
    width,
)


@triton.jit
def load_query(query, row, valid, PLANES: tl.constexpr, WIDTH: tl.constexpr):
    """Returns a query block's planes, [BLOCK_M, padded WIDTH] each."""
    column = tl.arange(0, padded(WIDTH))
    mask = valid[:, None] & (column < WIDTH)[None, :]
    tiles = ()
    for plane in tl.static_range(PLANES):
        at = query + row[:, None] + (plane * WIDTH + column)[None, :]
        tiles = tiles + (tl.load(at, mask=mask, other=0.0),)  # noqa: RUF005 (no stars here)
    return tiles


@triton.jit
def soften(logits, soft_cap):
    """Returns logits in base 2, below the cap if there is one."""
    if soft_cap is not None:
        # tanh, which stays finite where the exponential does not.
        twice = tl.exp2(logits * (2.0 * LOG2_E) / soft_cap)
        logits = soft_cap * (1.0 - 2.0 / (twice + 1.0))
    return logits * LOG2_E


@triton.jit
def weigh(logits, top, total):
    """Returns the tile's weights, the factor of older sums, the new maximum and the new sum."""
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    base = tl.where(new_top > float("-inf"), new_top, 0.0)
    weights = tl.exp2(logits - base[:, None])
    old = tl.exp2(top - base)
    return weights, old, new_top, total * old + tl.sum(weights, axis=1)


@triton.jit
def attend_exact(
    query,
    row,
    valid,
    limit,
    begin,
    end,
    head,
    keys,
    values,
    key_strides,
    value_strides,
    block_table,
    scale,
    soft_cap,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Returns sums of values (one plane), maxima and sums of weights over exact tokens."""
    q = load_query(query, row, valid, 1, SIZE)[0]
    acc = tl.zeros([BLOCK_M, padded(SIZE)], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        inside = token < end
        k = load_exact(keys, block_table, key_strides, token, inside, head, SIZE, BLOCK)
        logits = soften(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, soft_cap)
        seen = inside[None, :] & (token[None, :] <= limit[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        weights, old, top, total = weigh(logits, top, total)
        v = load_exact(values, block_table, value_strides, token, inside, head, SIZE, BLOCK)
        acc = tl.dot(weights.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
    return (acc,), top, total


@triton.jit
def packed_logits(
    q,
    q_sum,
    pages,
    page_table,
    page_stride,
    cell,
    first,
    token,
    inside,
    end,
    head,
    CELLS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Returns queries times the keys in cells, float32 [BLOCK_M, BLOCK_N]."""
    codes = load_codes(pages, cell, token, inside, q[0].dtype, KEYS, CELLS)
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for plane in tl.static_range(planes(KEYS)):
        k = decode(codes, plane, KEYS)
        if KEYS.bits < 16 and not scales_are_rows(KEYS, CELLS.head_size):
            scale = load_params(
                pages,
                page_table,
                page_stride,
                cell,
                first,
                token,
                inside,
                end,
                head,
                KEYS.scales,
                plane,
                KEYS,
                CELLS,
            )
            zero = load_params(
                pages,
                page_table,
                page_stride,
                cell,
                first,
                token,
                inside,
                end,
                head,
                KEYS.zeros,
                plane,
                KEYS,
                CELLS,
            )
            k = k * scale + zero
        logits = tl.dot(q[plane], tl.trans(k.to(q[0].dtype)), logits, input_precision="ieee")
    if scales_are_rows(KEYS, CELLS.head_size):
        # sum of q * (code * scale + zero) = scale * (q . codes) + zero * sum of q
        scale = load_rows(pages, cell, token, inside, KEYS.scales, CELLS)
        zero = load_rows(pages, cell, token, inside, KEYS.zeros, CELLS)
        logits = logits * scale[None, :] + q_sum[:, None] * zero[None, :]
    return logits


@triton.jit
def attend_packed(
    query,
    row,
    valid,
    limit,
    begin,
    end,
    head,
    pages,
    page_stride,
    page_table,
    bias,
    scale,
    soft_cap,
    CELLS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Returns sums of values (a plane each), maxima and sums of weights over packed tokens."""
    q = load_query(query, row, valid, planes(KEYS), width(KEYS, CELLS.head_size))
    q_sum = tl.zeros([BLOCK_M], tl.float32)
    for plane in tl.static_range(planes(KEYS)):
        q_sum += tl.sum(q[plane].to(tl.float32), axis=1)
    acc = ()
    for _ in tl.static_range(planes(VALUES)):
        zeros = tl.zeros([BLOCK_M, padded(width(VALUES, CELLS.head_size))], tl.float32)
        acc = acc + (zeros,)  # noqa: RUF005
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        inside = token < end
        cell = find_cells(page_table, page_stride, token, inside, head, CELLS)
        logits = packed_logits(
            q,
            q_sum,
            pages,
            page_table,
            page_stride,
            cell,
            first,
            token,
            inside,
            end,
            head,
            CELLS,
            KEYS,
            BLOCK_M,
            BLOCK_N,
        )
        logits = soften(logits * scale, soft_cap)
        if bias is not None:
            logits += load_bias(bias, page_table, token, inside, head, CELLS)[None, :] * LOG2_E
        seen = inside[None, :] & valid[:, None]
        if CAUSAL:
            seen = inside[None, :] & (token[None, :] <= limit[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        weights, old, top, total = weigh(logits, top, total)

        weights = weights.to(q[0].dtype)
        codes = load_codes(pages, cell, token, inside, q[0].dtype, VALUES, CELLS)
        new = ()
        for plane in tl.static_range(planes(VALUES)):
            v = decode(codes, plane, VALUES)
            if VALUES.bits < 16:
                v_scale = load_params(
                    pages,
                    page_table,
                    page_stride,
                    cell,
                    first,
                    token,
                    inside,
                    end,
                    head,
                    VALUES.scales,
                    plane,
                    VALUES,
                    CELLS,
                )
                v_zero = load_params(
                    pages,
                    page_table,
                    page_stride,
                    cell,
                    first,
                    token,
                    inside,
                    end,
                    head,
                    VALUES.zeros,
                    plane,
                    VALUES,
                    CELLS,
                )
                v = v * v_scale + v_zero
            v = v.to(q[0].dtype)
            older = acc[plane] * old[:, None]
            new = new + (tl.dot(weights, v, older, input_precision="ieee"),)  # noqa: RUF005
        acc = new
    return acc, top, total
