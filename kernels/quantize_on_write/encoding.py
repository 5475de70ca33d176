"""Device functions that encode a block of tokens of one KV head.

Shapes: T tokens; N planes, the channels that share a byte; W bytes of a token's codes; G groups of
S channels; W, G and S padded to powers of two. Groups along the channels are encoded as a tile
[T, G, S], groups along the tokens as [T, N, W], in which every channel has a scale of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["write_side"]

MAX_FLOAT16 = tl.constexpr(65504.0)
# Adding and taking away 1.5 * 2**23 rounds a float32 of at most 2**22 half to even.
ROUNDER = tl.constexpr(12582912.0)
DOT_CHANNELS = tl.constexpr(16)


@triton.jit
def _clean(numbers):
    """Returns float32 without NaN, -0.0 and what float16 cannot hold."""
    x = numbers.to(tl.float32)
    x = tl.where(x != x, 0.0, x)
    return tl.minimum(tl.maximum(x, -MAX_FLOAT16), MAX_FLOAT16) + 0.0


@triton.jit
def _nonfinite(numbers):
    """Returns 1 where a number is NaN or infinite, else 0."""
    x = numbers.to(tl.float32)
    return ((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32)


@triton.jit
def _add(counter, flags):
    """Adds up the flags into the counter, if there is one."""
    if counter is not None:
        total = tl.sum(tl.reshape(flags, [flags.numel]), axis=0)
        tl.atomic_add(counter, total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit
def _step(low, high, BITS: tl.constexpr):
    """Returns scale and zero, float16, of groups from `low` to `high`."""
    zero = low.to(tl.float16)
    span = high - zero.to(tl.float32)
    scale = tl.div_rn(span, tl.full(span.shape, 2**BITS - 1, tl.float32)).to(tl.float16)
    return tl.where(scale == 0, tl.full(scale.shape, 1, tl.float16), scale), zero


@triton.jit
def _codes(x, scale, zero, BITS: tl.constexpr):
    """Returns a tile as codes, int32; scale and zero are float16 and fit the tile."""
    zero = zero.to(tl.float32)
    code = tl.div_rn(x - zero, tl.broadcast_to(scale.to(tl.float32), x.shape))
    code = tl.minimum(tl.maximum(code, 0.0), 2.0**BITS - 1.0)
    return ((code + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def _rotate(source, live, rotation, counter, columns, wanted, HEAD_SIZE: tl.constexpr):
    """Returns columns of tokens times `rotation`, float32 [T, len(columns)]."""
    out = tl.zeros([source.shape[0], columns.shape[0]], tl.float32)
    flags = tl.zeros([source.shape[0], DOT_CHANNELS], tl.int32)
    for first in range(0, HEAD_SIZE, DOT_CHANNELS):
        channel = first + tl.arange(0, DOT_CHANNELS)
        real = channel < HEAD_SIZE
        x = tl.load(
            source[:, None] + channel[None, :], mask=live[:, None] & real[None, :], other=0.0
        )
        flags += _nonfinite(x)
        turn = tl.load(
            rotation + channel[:, None] * HEAD_SIZE + columns[None, :],
            mask=real[:, None] & wanted[None, :],
            other=0.0,
        )
        out = tl.dot(_clean(x), turn, out, input_precision="ieee")
    _add(counter, flags)
    return out


@triton.jit
def _load(
    source,
    live,
    rotation,
    counter,
    channel,
    real,
    HEAD_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Returns a tile [T, ...] as it is stored, or rotated in float32.

    Args:
        source: Pointers to the first channel of each token [T].
        live: Tokens that exist [T].
        rotation: float32 [HEAD_SIZE, HEAD_SIZE], or None.
        counter: int64 [1], to which the non-finite numbers are added; or None.
        channel: Of each place of a token [A, B].
        real: Whether it exists [A, B].
        HEAD_SIZE: Channels.
        ROTATED: Whether to multiply by `rotation`.
    """
    if ROTATED:
        columns = tl.reshape(channel, [channel.numel])
        wanted = tl.reshape(real, [channel.numel])
        x = _rotate(source, live, rotation, counter, columns, wanted, HEAD_SIZE)
        x = tl.reshape(x, [source.shape[0], channel.shape[0], channel.shape[1]])
    else:
        mask = live[:, None, None] & real[None, :, :]
        x = tl.load(source[:, None, None] + channel[None, :, :], mask=mask, other=0.0)
        _add(counter, _nonfinite(x))
    return x


@triton.jit
def _write_exact(x, cell, row, live, channel, real, DTYPE: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Stores a tile as numbers of the model's dtype; `cell` points at the first of its cell."""
    target = cell.to(tl.pointer_type(DTYPE)) + row * HEAD_SIZE
    if x.dtype != DTYPE:
        x = tl.minimum(tl.maximum(x, -MAX_FLOAT16), MAX_FLOAT16).to(DTYPE)
    mask = live[:, None, None] & real[None, :, :]
    tl.store(target[:, None, None] + channel[None, :, :], x, mask=mask)


@triton.jit
def _write_tokens(
    x,
    cell,
    row,
    live,
    channel,
    real,
    codes,
    scales,
    zeros,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Encodes a tile [T, G, S] of all channels with groups along the channels."""
    planes: tl.constexpr = 8 // BITS
    width: tl.constexpr = HEAD_SIZE // planes
    num_groups: tl.constexpr = (HEAD_SIZE + GROUP - 1) // GROUP
    low = tl.min(tl.where(real[None, :, :], x, float("inf")), axis=2)
    high = tl.max(tl.where(real[None, :, :], x, float("-inf")), axis=2)
    group = tl.arange(0, x.shape[1])[None, :]
    # Groups of padding are empty, from inf to -inf.
    scale, zero = _step(
        tl.where(group < num_groups, low, 0.0), tl.where(group < num_groups, high, 0.0), BITS
    )
    at = (row * num_groups)[:, None] + group
    mask = live[:, None] & (group < num_groups)
    half = tl.pointer_type(tl.float16)
    tl.store((cell + scales).to(half)[:, None] + at, scale, mask=mask)
    tl.store((cell + zeros).to(half)[:, None] + at, zero, mask=mask)

    code = _codes(x, scale[:, :, None], zero[:, :, None], BITS)
    target = cell + codes + row * width
    if planes == 1:
        mask = live[:, None, None] & real[None, :, :]
        target = target[:, None, None] + channel[None, :, :]
        tl.store(target, code.to(tl.uint8), mask=mask)
    else:
        code = tl.reshape(code, [x.shape[0], x.shape[1] * x.shape[2]])
        byte = tl.arange(0, WIDTH)
        packed = tl.zeros([x.shape[0], WIDTH], tl.int32)
        for plane in tl.static_range(planes):
            wanted = tl.where(byte < width, plane * width + byte, 0)
            place = wanted // GROUP * x.shape[2] + wanted % GROUP
            place = tl.broadcast_to(place[None, :], packed.shape)
            packed |= tl.gather(code, place, axis=1) << (plane * BITS)
        mask = live[:, None] & (byte < width)[None, :]
        tl.store(target[:, None] + byte[None, :], packed.to(tl.uint8), mask=mask)


@triton.jit
def _write_channels(
    x,
    cell,
    row,
    live,
    channel,
    byte,
    codes,
    scales,
    zeros,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Encodes bytes `byte` [W] of one group of tokens, a tile [T, N, W]; all exist, or none."""
    planes: tl.constexpr = 8 // BITS
    width: tl.constexpr = HEAD_SIZE // planes
    scale, zero = _step(tl.min(x, axis=0), tl.max(x, axis=0), BITS)  # [N, W]
    scale, zero = scale[None, :, :], zero[None, :, :]
    # All tokens have the group's cell and its number there; the first writes for all.
    at = (row // GROUP)[:, None, None] * HEAD_SIZE + channel[None, :, :]
    first = tl.arange(0, x.shape[0]) == 0
    mask = (live & first)[:, None, None] & (byte < width)[None, None, :]
    half = tl.pointer_type(tl.float16)
    scale_at = (cell + scales).to(half)[:, None, None] + at
    zero_at = (cell + zeros).to(half)[:, None, None] + at
    tl.store(scale_at, tl.broadcast_to(scale, x.shape), mask=mask)
    tl.store(zero_at, tl.broadcast_to(zero, x.shape), mask=mask)

    shifts = tl.arange(0, planes)[None, :, None] * BITS
    packed = tl.sum(_codes(x, scale, zero, BITS) << shifts, axis=1)
    target = (cell + codes + row * width)[:, None] + byte[None, :]
    tl.store(target, packed.to(tl.uint8), mask=live[:, None] & (byte < width)[None, :])


@triton.jit
def write_side(
    source,
    live,
    cell,
    row,
    rotation,
    counter,
    codes,
    scales,
    zeros,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROTATED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Encodes keys, or values, of T tokens of one KV head into their cells.

    Args:
        source: Pointers to the first channel of each token [T].
        live: Tokens that exist [T].
        cell: Pointers to the first byte of each token's cell [T].
        row: Token in the cell [T].
        rotation: float32 [HEAD_SIZE, HEAD_SIZE], or None.
        counter: int64 [1], to which the non-finite numbers are added; or None.
        codes: Byte of a cell at which the codes start.
        scales: Byte at which the scales start.
        zeros: Byte at which the zeros start.
        HEAD_SIZE: Channels.
        BITS: Of a code; 16 or 32: the model's own numbers.
        GROUP: Channels, or with PER_CHANNEL tokens (then T of them), that share a scale.
        PER_CHANNEL: Whether groups run along the tokens.
        ROTATED: Whether to multiply by `rotation`.
        WIDTH: W; with PER_CHANNEL the part of it that is encoded at once.
    """
    if PER_CHANNEL:
        planes: tl.constexpr = 8 // BITS
        width: tl.constexpr = HEAD_SIZE // planes
        for first in tl.static_range(0, width, WIDTH):
            byte = first + tl.arange(0, WIDTH)
            channel = tl.arange(0, planes)[:, None] * width + byte[None, :]
            real = tl.broadcast_to((byte < width)[None, :], channel.shape)
            # Rotation reads all channels for each part of them; they are counted once.
            tally = None if ROTATED and first > 0 else counter
            x = _load(source, live, rotation, tally, channel, real, HEAD_SIZE, ROTATED)
            _write_channels(
                _clean(x),
                cell,
                row,
                live,
                channel,
                byte,
                codes,
                scales,
                zeros,
                HEAD_SIZE,
                BITS,
                GROUP,
            )
    else:
        size: tl.constexpr = GROUP if BITS < 16 else HEAD_SIZE
        num_groups: tl.constexpr = triton.next_power_of_2((HEAD_SIZE + size - 1) // size)
        place = tl.arange(0, triton.next_power_of_2(size))
        channel = tl.arange(0, num_groups)[:, None] * size + place[None, :]
        real = (place < size)[None, :] & (channel < HEAD_SIZE)
        x = _load(source, live, rotation, counter, channel, real, HEAD_SIZE, ROTATED)
        if BITS >= 16:
            dtype: tl.constexpr = source.dtype.element_ty
            _write_exact(x, cell + codes, row, live, channel, real, dtype, HEAD_SIZE)
        else:
            _write_tokens(
                _clean(x),
                cell,
                row,
                live,
                channel,
                real,
                codes,
                scales,
                zeros,
                HEAD_SIZE,
                BITS,
                GROUP,
                WIDTH,
            )
