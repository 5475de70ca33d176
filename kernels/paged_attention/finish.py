"""What follows the attention kernel: partial results become one, and leave the rotated basis."""

import triton
import triton.language as tl
from vllm_kvpress.kernels.paged_attention.tiles import padded

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# Whether these are 1, or multiples of 16, changes from step to step and must not compile anew.
CHANGING = ["num_reqs", "splits", "num_rows"]


@triton.jit(do_not_specialize=CHANGING)
def merge_splits(
    partial,
    partial_lse,
    packed_splits,
    query_start_loc,
    sinks,
    out,
    lse,
    rotated,
    rest,
    num_reqs,
    splits,
    out_token_stride,
    out_head_stride,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Merges one token's partial results of one query head.

    Args:
        partial: float32 [num_tokens, num_q_heads, splits, SIZE], each divided by its own sum.
        partial_lse: float32 [num_tokens, num_q_heads, splits], base 2.
        packed_splits: int32 [num_tokens], how many splits, the first, are in the rotated basis;
            None for all.
        query_start_loc: int32 [num_reqs + 1].
        sinks: float32 [num_q_heads] or None.
        out: [num_tokens, num_q_heads, SIZE]; with `rotated` not written.
        lse: float32 [num_tokens, num_q_heads], natural.
        rotated: float32 [num_tokens, num_q_heads, SIZE], the sum in the rotated basis, or None.
        rest: Likewise, what is not in it; None if `packed_splits` is.
        num_reqs: Requests.
        splits: Splits.
        out_token_stride: Of `out`.
        out_head_stride: Of `out`.
        SIZE: Channels of a head.
        STEP: Splits in a tile.
        CLEAR: Whether padded rows become zero; else `out` keeps them.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = token * tl.num_programs(1) + head
    column = tl.arange(0, padded(SIZE))
    real = column < SIZE
    is_real = token < tl.load(query_start_loc + num_reqs)
    last = tl.where(is_real, splits, 0)
    packed = splits
    if packed_splits is not None:
        packed = tl.load(packed_splits + token, mask=is_real, other=0)

    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head) * LOG2_E
        top = tl.where(is_real, top, float("-inf"))
        total += tl.where(top > float("-inf"), 1.0, 0.0)
    sum_rotated = tl.zeros([padded(SIZE)], tl.float32)
    sum_rest = tl.zeros([padded(SIZE)], tl.float32)
    for first in range(0, last, STEP):
        split = first + tl.arange(0, STEP)
        part_lse = tl.load(
            partial_lse + row * splits + split, mask=split < last, other=float("-inf")
        )
        used = part_lse > float("-inf")
        at = (row * splits + split)[:, None] * SIZE + column[None, :]
        tile = tl.load(partial + at, mask=used[:, None] & real[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, axis=0))
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        old = tl.exp2(top - base)
        weight = tl.exp2(part_lse - base)
        total = total * old + tl.sum(weight, axis=0)
        if packed_splits is not None:
            inner = tl.where(split < packed, weight, 0.0)
            sum_rest = sum_rest * old + tl.sum((weight - inner)[:, None] * tile, axis=0)
            weight = inner
        sum_rotated = sum_rotated * old + tl.sum(weight[:, None] * tile, axis=0)
        top = new_top

    share = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    tl.store(lse + row, (top + tl.log2(total)) * LN_2)
    if rotated is not None:
        tl.store(rotated + row * SIZE + column, sum_rotated * share, mask=real)
        if packed_splits is not None:
            tl.store(rest + row * SIZE + column, sum_rest * share, mask=real)
    else:
        at = out + token * out_token_stride + head * out_head_stride + column
        if not CLEAR:
            real = column < tl.where(is_real, SIZE, 0)
        tl.store(at, (sum_rotated * share).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=CHANGING)
def rotate_rows(
    rows,
    matrix,
    rest,
    out,
    query_start_loc,
    num_rows,
    num_heads,
    num_reqs,
    token_stride,
    head_stride,
    out_token_stride,
    out_head_stride,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Writes rows @ matrix + rest for BLOCK_M (token, head) pairs.

    Args:
        rows: [num_tokens, num_heads, SIZE].
        matrix: float32 [SIZE, SIZE].
        rest: float32 [num_tokens, num_heads, SIZE], contiguous, or None.
        out: [num_tokens, num_heads, SIZE].
        query_start_loc: int32 [num_reqs + 1].
        num_rows: num_tokens * num_heads.
        num_heads: Query heads.
        num_reqs: Requests.
        token_stride: Of `rows`.
        head_stride: Of `rows`.
        out_token_stride: Of `out`.
        out_head_stride: Of `out`.
        SIZE: Channels of a head.
        BLOCK_M: Pairs a program.
        BLOCK_K: Channels a step.
        CLEAR: Whether padded rows are written, too.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // num_heads
    wanted = row < num_rows
    if not CLEAR:
        wanted = wanted & (token < tl.load(query_start_loc + num_reqs))
    column = tl.arange(0, padded(SIZE))
    real = column < SIZE
    start = token * token_stride + (row % num_heads) * head_stride
    total = tl.zeros([BLOCK_M, padded(SIZE)], tl.float32)
    for first in range(0, SIZE, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = wanted[:, None] & (k < SIZE)[None, :]
        left = tl.load(rows + start[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = (k < SIZE)[:, None] & real[None, :]
        right = tl.load(matrix + k[:, None] * SIZE + column[None, :], mask=mask, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    mask = wanted[:, None] & real[None, :]
    if rest is not None:
        total += tl.load(rest + row[:, None] * SIZE + column[None, :], mask=mask, other=0.0)
    at = token * out_token_stride + (row % num_heads) * out_head_stride
    tl.store(out + at[:, None] + column[None, :], total.to(out.dtype.element_ty), mask=mask)
