"""The attention kernel; `README.md` has the grid and the partition of the work."""

import triton
import triton.language as tl
from vllm_kvpress.kernels.paged_attention.finish import LN_2, LOG2_E
from vllm_kvpress.kernels.paged_attention.loops import attend_exact, attend_packed
from vllm_kvpress.kernels.paged_attention.tiles import padded, planes, width


@triton.jit
def find_request(query_start_loc, num_reqs, block, BLOCK_Q: tl.constexpr, STEP: tl.constexpr):
    """Returns the request of a query block: the last whose first block is not behind it.

    Request r has the blocks from query_start_loc[r] // BLOCK_Q + r on: enough for its queries,
    whatever the others have, and known without a sum over requests.
    """
    count = 0
    for first in range(0, num_reqs, STEP):
        request = first + tl.arange(0, STEP)
        start = tl.load(query_start_loc + request, mask=request < num_reqs, other=2**30)
        count += tl.sum((start // BLOCK_Q + request <= block).to(tl.int32), axis=0)
    return count - 1


@triton.jit
def chunk(length, index, count, BLOCK_N: tl.constexpr, SHORTEST: tl.constexpr):
    """Returns where piece `index` of `count` begins and ends; late pieces may be empty."""
    per = tl.cdiv(tl.cdiv(length, BLOCK_N), count) * BLOCK_N
    per = tl.maximum(per, SHORTEST)
    begin = tl.minimum(index * per, length)
    return begin, tl.minimum(begin + per, length)


@triton.jit
def store(
    acc,
    top,
    total,
    token,
    q_head,
    num_q_heads,
    valid,
    split,
    out,
    out_strides,
    lse,
    sinks,
    partial,
    partial_lse,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes a program's result: the final one without `partial`, else float32 and base 2."""
    row = token * num_q_heads + q_head
    if partial is None:
        start = out + token * out_strides[0] + q_head * out_strides[1]
        if sinks is not None:
            # A token with the sink's logit and no value.
            sink = tl.load(sinks + q_head, mask=valid, other=float("-inf")) * LOG2_E
            new_top = tl.maximum(top, sink)
            base = tl.where(new_top > float("-inf"), new_top, 0.0)
            total = total * tl.exp2(top - base) + tl.exp2(sink - base)
            share = tl.exp2(top - base) / tl.where(total > 0.0, total, 1.0)
            top = new_top
        else:
            share = 1.0 / tl.where(total > 0.0, total, 1.0)
        tl.store(lse + row, (top + tl.log2(total)) * LN_2, mask=valid)
    else:
        row = row * tl.num_programs(2) + split
        start = partial + row * (PLANES * WIDTH)
        share = 1.0 / tl.where(total > 0.0, total, 1.0)
        tl.store(partial_lse + row, top + tl.log2(total), mask=valid)
        valid = valid & (total > 0.0)  # others are not read
    column = tl.arange(0, padded(WIDTH))
    mask = valid[:, None] & (column < WIDTH)[None, :]
    for plane in tl.static_range(PLANES):
        tile = (acc[plane] * share[:, None]).to(start.dtype.element_ty)
        tl.store(start[:, None] + (plane * WIDTH + column)[None, :], tile, mask=mask)


@triton.jit
def share_splits(num_packed, num_exact, splits, BLOCK_N: tl.constexpr):
    """Returns how many of the splits take packed tokens; the others take exact ones."""
    packed = tl.cdiv(num_packed, BLOCK_N)
    tiles = packed + tl.cdiv(num_exact, BLOCK_N)
    fair = (splits * packed + tiles // 2) // tl.maximum(tiles, 1)
    fair = tl.minimum(tl.maximum(fair, 1), splits - 1)
    fair = tl.where(packed == 0, 0, fair)
    return tl.where(packed == tiles, splits, fair)


# Whether these are 1, or multiples of 16, changes from step to step and must not compile anew.
CHANGING = ["num_reqs", "page_table_stride", "block_table_stride"]


@triton.jit(do_not_specialize=CHANGING)
def attend(  # noqa: D417 (strides follow their tensors)
    query,
    query_token_stride,
    query_head_stride,
    packed_query,
    packed_token_stride,
    packed_head_stride,
    query_start_loc,
    num_reqs,
    pages,
    page_stride,
    page_table,
    page_table_stride,
    packed_lengths,
    bias,
    keys,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    values,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    block_table,
    block_table_stride,
    exact_lengths,
    scale,
    soft_cap,
    sinks,
    out,
    out_token_stride,
    out_head_stride,
    lse,
    partial,
    partial_lse,
    packed_splits,
    CELLS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHORTEST: tl.constexpr,
):
    """Attends with one query block of one KV head to one split's share of the tokens.

    Args:
        query: [num_tokens, num_q_heads, SIZE]; it and other tensors are followed by their strides.
        packed_query: The queries for packed keys: rotated, or the same.
        query_start_loc: int32 [num_reqs + 1].
        num_reqs: Requests.
        pages: uint8 [num_pages, page_bytes], or None without a packed part.
        page_table: int32 [num_reqs, max_pages].
        packed_lengths: int32 [num_reqs].
        bias: float32 [num_pages, per_page, tokens] or None.
        keys: [num_blocks, BLOCK, num_kv_heads, SIZE], or None without an exact part.
        values: Likewise.
        block_table: int32 [num_reqs, max_blocks].
        exact_lengths: int32 [num_reqs].
        scale: What logits are multiplied by.
        soft_cap: The cap of logits, or None.
        sinks: float32 [num_q_heads] or None; read without `partial` only.
        out: [num_tokens, num_q_heads, SIZE]; written without `partial` only.
        lse: float32 [num_tokens, num_q_heads]; written without `partial` only.
        partial: float32 [num_tokens, num_q_heads, splits, SIZE], or None if `out` is final.
        partial_lse: float32 [num_tokens, num_q_heads, splits], base 2.
        packed_splits: int32 [num_tokens], written if both parts exist.
        CELLS: Where everything lies in a page, or None.
        KEYS: Its keys, or None.
        VALUES: Its values, or None: inside of a kernel a tuple's own `values` hide the field.
        SIZE: Channels of a head.
        BLOCK: Tokens in a block of the exact part.
        GROUP: Query heads of a KV head.
        SINGLE: Whether no request has more than one query.
        BLOCK_M: Rows (query, head of the group) of a program.
        BLOCK_N: Tokens of a tile.
        SHORTEST: Tokens that a split takes at least.
    """
    BLOCK_Q: tl.constexpr = 1 if SINGLE else BLOCK_M // GROUP
    HAS_BOTH: tl.constexpr = pages is not None and keys is not None
    block = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    request = block
    if not SINGLE:
        request = find_request(query_start_loc, num_reqs, block, BLOCK_Q, 256)
    start = tl.load(query_start_loc + request)
    n = tl.load(query_start_loc + request + 1) - start
    first = 0
    if not SINGLE:
        first = (block - (start // BLOCK_Q + request)) * BLOCK_Q
    if first >= n:
        return

    index = tl.arange(0, BLOCK_M)
    number = first + index // GROUP
    valid = (index < BLOCK_Q * GROUP) & (number < n)
    token = (start + number).to(tl.int64)
    q_head = head * GROUP + index % GROUP
    out_strides = (out_token_stride, out_head_stride)
    key_strides = (key_block_stride, key_token_stride, key_head_stride)
    value_strides = (value_block_stride, value_token_stride, value_head_stride)
    num_q_heads = tl.num_programs(1) * GROUP
    request = request.to(tl.int64)

    own = tl.load((packed_lengths if keys is None else exact_lengths) + request)
    limit = tl.where(valid, own - n + number, -1)  # the last causal token that a row sees
    visible = tl.maximum(own - n + tl.minimum(first + BLOCK_Q, n), 0)
    num_packed = visible
    first_exact = 0
    if keys is None:
        first_exact = splits
    if HAS_BOTH:
        num_packed = tl.load(packed_lengths + request)
        first_exact = share_splits(num_packed, visible, splits, BLOCK_N)
        if (split == 0) & (head == 0):
            tl.store(packed_splits + token, first_exact, mask=valid & (index % GROUP == 0))

    # Decided when compiling, then by each program: one condition would be the latter only.
    if pages is not None:  # noqa: SIM102
        if split < first_exact:
            begin, end = chunk(num_packed, split, first_exact, BLOCK_N, SHORTEST)
            row = token * packed_token_stride + q_head * packed_head_stride
            acc, top, total = attend_packed(
                packed_query,
                row,
                valid,
                limit,
                begin,
                end,
                head,
                pages,
                page_stride,
                page_table + request * page_table_stride,
                bias,
                scale,
                soft_cap,
                CELLS,
                KEYS,
                VALUES,
                keys is None,
                BLOCK_M,
                BLOCK_N,
            )
            store(
                acc,
                top,
                total,
                token,
                q_head,
                num_q_heads,
                valid,
                split,
                out,
                out_strides,
                lse,
                sinks,
                partial,
                partial_lse,
                planes(VALUES),
                width(VALUES, SIZE),
            )
    if keys is not None:  # noqa: SIM102
        if split >= first_exact:
            begin, end = chunk(
                visible, split - first_exact, splits - first_exact, BLOCK_N, SHORTEST
            )
            row = token * query_token_stride + q_head * query_head_stride
            acc, top, total = attend_exact(
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
                block_table + request * block_table_stride,
                scale,
                soft_cap,
                SIZE,
                BLOCK,
                BLOCK_M,
                BLOCK_N,
            )
            store(
                acc,
                top,
                total,
                token,
                q_head,
                num_q_heads,
                valid,
                split,
                out,
                out_strides,
                lse,
                sinks,
                partial,
                partial_lse,
                1,
                SIZE,
            )
