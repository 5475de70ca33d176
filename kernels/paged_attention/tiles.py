"""Tiles of keys and values, as the attention kernel loads and decodes them.

A side with 8 / n bits packs n planes into a byte: plane p of a row are channels p * width up to
(p + 1) * width, so one tile of bytes [BLOCK_N, WIDTH] is loaded once and gives n tiles of numbers.
WIDTH is the width padded to a power of two.
"""

import math

import triton
import triton.language as tl

# 2 ** 23 as bits and as a number: an integer below 2 ** 23 put into its mantissa is an exact sum,
# which decodes codes without the slow integer-to-float conversion.
MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)


@triton.constexpr_function
def planes(side):
    """Returns how many codes a byte holds; 1 for exact numbers."""
    return max(8 // side.bits, 1)


@triton.constexpr_function
def width(side, head_size):
    """Returns the channels of a plane."""
    return head_size // max(8 // side.bits, 1)


@triton.constexpr_function
def padded(number):
    """Returns the least power of two from 16, what a matrix product takes, that covers a number."""
    return max(16, 1 << (number - 1).bit_length())


@triton.constexpr_function
def scales_are_rows(side, head_size):
    """Returns whether a token has one scale and zero, which then stay out of the product."""
    return side.bits < 16 and not side.per_channel and side.group >= head_size


@triton.constexpr_function
def groups_fit(side, head_size, size):
    """Returns whether a tile is whole groups: along tokens of `size`, or of a plane's channels."""
    group = side.group
    if side.per_channel:
        return size % group == 0 or group % size == 0
    channels = head_size // max(8 // side.bits, 1)
    even = channels == head_size or channels % group == 0
    return even and group & (group - 1) == 0 and group <= size


@triton.constexpr_function
def plane_is_one_group(side, head_size):
    """Returns whether all channels of any plane share a scale."""
    return side.group >= head_size or side.group % (head_size // max(8 // side.bits, 1)) == 0


@triton.constexpr_function
def alignment(*numbers):
    """Returns the power of two up to 16 that divides all numbers of bytes: wide loads need it.

    Pages, caches and their strides are multiples of 16 bytes; the launcher refuses others.
    """
    return math.gcd(16, *numbers)


@triton.jit
def find_cells(table, page_stride, token, inside, head, CELLS: tl.constexpr):
    """Returns the byte in the pages at which each token's cell starts, int64 [tokens]."""
    cell = (token // CELLS.tokens) * CELLS.num_kv_heads + head
    page = tl.load(table + cell // CELLS.per_page, mask=inside, other=0).to(tl.int64)
    return page * page_stride + (cell % CELLS.per_page) * CELLS.size


@triton.jit
def load_bias(bias, table, token, inside, head, CELLS: tl.constexpr):
    """Returns the bias of each token, float32 [tokens]."""
    cell = (token // CELLS.tokens) * CELLS.num_kv_heads + head
    page = tl.load(table + cell // CELLS.per_page, mask=inside, other=0).to(tl.int64)
    place = (page * CELLS.per_page + cell % CELLS.per_page) * CELLS.tokens + token % CELLS.tokens
    return tl.load(bias + place, mask=inside, other=0.0)


@triton.jit
def load_codes(
    pages, cell, token, inside, DTYPE: tl.constexpr, SIDE: tl.constexpr, CELLS: tl.constexpr
):
    """Returns bytes of codes, or numbers in DTYPE for an exact side, [BLOCK_N, WIDTH]."""
    WIDTH: tl.constexpr = width(SIDE, CELLS.head_size)
    column = tl.arange(0, padded(WIDTH))
    mask = inside[:, None] & (column < WIDTH)[None, :]
    BYTES: tl.constexpr = CELLS.head_size * SIDE.bits // 8
    row = pages + (cell + SIDE.codes + (token % CELLS.tokens) * BYTES)
    row = tl.multiple_of(row, [alignment(CELLS.size, SIDE.codes, BYTES)])
    if SIDE.bits >= 16:
        start = row.to(tl.pointer_type(DTYPE))
        codes = tl.load(start[:, None] + column[None, :], mask=mask, other=0.0)
    else:
        codes = tl.load(row[:, None] + column[None, :], mask=mask, other=0)
    return codes


@triton.jit
def load_rows(pages, cell, token, inside, AT: tl.constexpr, CELLS: tl.constexpr):
    """Returns the only scale, or zero, of each token, float32 [BLOCK_N]."""
    start = (pages + (cell + AT + (token % CELLS.tokens) * 2)).to(tl.pointer_type(tl.float16))
    return tl.load(start, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def decode(codes, PLANE: tl.constexpr, SIDE: tl.constexpr):
    """Returns one plane of codes as float32 [BLOCK_N, WIDTH]; exact numbers as they are."""
    if SIDE.bits >= 16:
        numbers = codes
    elif SIDE.bits == 8:
        numbers = (codes.to(tl.int32) | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC
    else:
        bits = (codes >> (PLANE * SIDE.bits)) & (2**SIDE.bits - 1)
        numbers = (bits.to(tl.int32) | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC
    return numbers


@triton.jit
def load_params(
    pages,
    table,
    page_stride,
    cell,
    first,
    token,
    inside,
    end,
    head,
    AT: tl.constexpr,
    PLANE: tl.constexpr,
    SIDE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Returns a plane's scales, or zeros, float32, [BLOCK_N, WIDTH] or what broadcasts to it.

    Args:
        pages: The cells' bytes.
        table: The request's pages.
        page_stride: Bytes from page to page.
        cell: Where each token's cell starts [BLOCK_N].
        first: The tile's first token.
        token: Its tokens [BLOCK_N].
        inside: Which of them exist [BLOCK_N].
        end: The first token that does not exist.
        head: The KV head.
        AT: Where the scales, or zeros, start in a cell.
        PLANE: Which plane.
        SIDE: Keys or values.
        CELLS: Where everything lies.
    """
    if SIDE.per_channel:
        params = load_channel_params(
            pages, table, page_stride, cell, first, token, inside, end, head, AT, PLANE, SIDE, CELLS
        )
    else:
        params = load_token_params(pages, cell, token, inside, AT, PLANE, SIDE, CELLS)
    return params


@triton.jit
def load_channel_params(
    pages,
    table,
    page_stride,
    cell,
    first,
    token,
    inside,
    end,
    head,
    AT: tl.constexpr,
    PLANE: tl.constexpr,
    SIDE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Does `load_params` for groups along tokens."""
    BLOCK_N: tl.constexpr = token.shape[0]
    WIDTH: tl.constexpr = width(SIDE, CELLS.head_size)
    PADDED: tl.constexpr = padded(WIDTH)
    ROWS: tl.constexpr = max(BLOCK_N // SIDE.group, 1)
    column = tl.arange(0, PADDED)
    real = (column < WIDTH)[None, :]
    channel = PLANE * WIDTH + column
    if groups_fit(SIDE, CELLS.head_size, BLOCK_N):
        # One row a group, then every token of the group gets it.
        leader = first + tl.arange(0, ROWS) * SIDE.group
        exists = leader < end
        start = find_cells(table, page_stride, leader, exists, head, CELLS)
        start += AT + leader % CELLS.tokens // SIDE.group * (CELLS.head_size * 2)
        start = tl.multiple_of(pages + start, [alignment(CELLS.size, AT, CELLS.head_size * 2)])
        start = start.to(tl.pointer_type(tl.float16))
        at = start[:, None] + channel[None, :]
        params = tl.load(at, mask=exists[:, None] & real, other=0.0).to(tl.float32)
        if ROWS > 1:
            every = tl.broadcast_to(params[:, None, :], [ROWS, BLOCK_N // ROWS, PADDED])
            params = tl.reshape(every, [BLOCK_N, PADDED])
    else:
        start = cell + AT + token % CELLS.tokens // SIDE.group * (CELLS.head_size * 2)
        start = (pages + start).to(tl.pointer_type(tl.float16))
        at = start[:, None] + channel[None, :]
        params = tl.load(at, mask=inside[:, None] & real, other=0.0).to(tl.float32)
    return params


@triton.jit
def load_token_params(
    pages,
    cell,
    token,
    inside,
    AT: tl.constexpr,
    PLANE: tl.constexpr,
    SIDE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Does `load_params` for groups along channels."""
    BLOCK_N: tl.constexpr = token.shape[0]
    WIDTH: tl.constexpr = width(SIDE, CELLS.head_size)
    PADDED: tl.constexpr = padded(WIDTH)
    GROUPS: tl.constexpr = (CELLS.head_size + SIDE.group - 1) // SIDE.group
    COLUMNS: tl.constexpr = max(PADDED // SIDE.group, 1)
    start = cell + AT + token % CELLS.tokens * (GROUPS * 2)
    start = (pages + start).to(tl.pointer_type(tl.float16))
    if plane_is_one_group(SIDE, CELLS.head_size):
        at = start + PLANE * WIDTH // SIDE.group
        params = tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
    elif groups_fit(SIDE, CELLS.head_size, PADDED):
        # One column a group, then every channel of the group gets it.
        group = PLANE * WIDTH // SIDE.group + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (group < GROUPS)[None, :]
        few = tl.load(start[:, None] + group[None, :], mask=mask, other=0.0).to(tl.float32)
        every = tl.broadcast_to(few[:, :, None], [BLOCK_N, COLUMNS, SIDE.group])
        params = tl.reshape(every, [BLOCK_N, PADDED])
    else:
        column = tl.arange(0, PADDED)
        at = start[:, None] + ((PLANE * WIDTH + column) // SIDE.group)[None, :]
        mask = inside[:, None] & (column < WIDTH)[None, :]
        params = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return params


@triton.jit
def load_exact(cache, table, strides, token, inside, head, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns keys, or values, of exact blocks [BLOCK_N, padded SIZE] in the model's dtype."""
    column = tl.arange(0, padded(SIZE))
    block = tl.load(table + token // BLOCK, mask=inside, other=0).to(tl.int64)
    row = block * strides[0] + (token % BLOCK) * strides[1] + head * strides[2]
    start = tl.multiple_of(cache + row, [16])
    mask = inside[:, None] & (column < SIZE)[None, :]
    return tl.load(start[:, None] + column[None, :], mask=mask, other=0.0)
