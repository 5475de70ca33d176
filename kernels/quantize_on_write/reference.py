"""Quantize on write in PyTorch: the arithmetic of every code, and the bytes of a cell they become.

Also what a CPU runs. README.md has the formulas; `vllm_kvpress.layout` draws the cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from vllm_kvpress.kernels.cells import Cells, Side

__all__ = [
    "MAX_FLOAT16",
    "Encoded",
    "Places",
    "cleaned",
    "count_nonfinite",
    "encode",
    "pack",
    "put",
    "quantize_on_write",
    "rotated",
    "write_side",
]

MAX_FLOAT16 = 65504.0


class Encoded(NamedTuple):
    """Numbers as codes, one code a byte (`pack` comes after).

    Attributes:
        codes: uint8 [..., num_tokens, head_size].
        scales: float16 [..., num_tokens, groups], per channel [..., num_tokens / group, head_size].
        zeros: Same shape and dtype as `scales`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


class Places(NamedTuple):
    """Where tokens go, int64 tensors of one shape.

    Attributes:
        page: Page of the token's cell.
        cell: First byte of the cell in its page.
        row: Token in the cell.
    """

    page: torch.Tensor
    cell: torch.Tensor
    row: torch.Tensor


def count_nonfinite(numbers: torch.Tensor) -> torch.Tensor:
    """Returns how many of the numbers are NaN or infinite, int64 []."""
    return (~torch.isfinite(numbers)).sum()


def cleaned(numbers: torch.Tensor) -> torch.Tensor:
    """Returns the numbers in float32: 0 for NaN, the rest within what float16 holds."""
    finite = numbers.float().nan_to_num(nan=0.0).clamp(-MAX_FLOAT16, MAX_FLOAT16)
    # Makes -0.0 a 0.0: which of the two is the least would depend on their order.
    return finite + 0.0


def rotated(numbers: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Returns the numbers times `rotation` in float32, or unchanged without one."""
    if rotation is None:
        return numbers
    return cleaned(numbers) @ rotation.float()


def encode(numbers: torch.Tensor, bits: int, group: int, per_channel: bool = False) -> Encoded:
    """Returns numbers [..., num_tokens, head_size] as codes with their scales and zeros.

    Args:
        numbers: Any float dtype; the arithmetic is in float32.
        bits: 2, 4 or 8.
        group: Channels of a token (the last group may be short), or with `per_channel` tokens of
            a channel (num_tokens is a multiple of it) that share a scale and a zero.
        per_channel: Whether groups run along the tokens.
    """
    num_tokens, head_size = numbers.shape[-2:]
    finite = cleaned(numbers)
    if per_channel:
        groups, axis = finite.unflatten(-2, (num_tokens // group, group)), -2
    else:
        num_groups = -(-head_size // group)
        if head_size % group:
            # The last channel again and again fills a short group without changing its range.
            channels = torch.arange(num_groups * group, device=numbers.device)
            finite = finite[..., channels.clamp(max=head_size - 1)]
        groups, axis = finite.unflatten(-1, (num_groups, group)), -1
    zeros = groups.amin(axis, keepdim=True).half()
    span = groups.amax(axis, keepdim=True) - zeros.float()
    # Division by a tensor: CUDA turns one by a Python number into a product with its inverse.
    scales = (span / torch.full_like(span, 2**bits - 1)).half()
    scales = scales.masked_fill(scales == 0, 1.0)
    codes = ((groups - zeros.float()) / scales.float()).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8).flatten(axis - 1, axis)[..., :head_size]
    return Encoded(codes, scales.squeeze(axis), zeros.squeeze(axis))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns codes [..., head_size] in bytes [..., head_size * bits / 8], planes of channels."""
    if bits == 8:
        return codes
    planes = codes.unflatten(-1, (8 // bits, codes.shape[-1] * bits // 8))
    packed = torch.zeros_like(planes[..., 0, :])
    for plane in range(8 // bits):
        packed |= planes[..., plane, :] << (plane * bits)
    return packed


def put(
    pages: torch.Tensor, places: Places, section: int, index: torch.Tensor, rows: torch.Tensor
) -> None:
    """Writes one row of bytes a token: the `index`-th row of the section that starts at `section`.

    Args:
        pages: uint8 [num_pages, page_bytes], written.
        places: Cells, [...].
        section: Byte of a cell at which the rows of this kind start.
        index: int64 [...].
        rows: [..., width] of any dtype.
    """
    data = rows.contiguous().view(torch.uint8)
    width = data.shape[-1]
    # Every run of `width` bytes in a page: a row is written as one.
    pages.unfold(1, width, 1)[places.page, places.cell + section + index * width] = data


def write_side(
    numbers: torch.Tensor,
    pages: torch.Tensor,
    places: Places,
    side: Side,
    rotation: torch.Tensor | None,
) -> None:
    """Writes keys, or values, of tokens into their cells.

    Args:
        numbers: [..., num_tokens, head_size]; for exact cells in the model's dtype.
        pages: uint8 [num_pages, page_bytes], written.
        places: [..., num_tokens]; per channel, tokens of a group are consecutive in one cell.
        side: Format, and where its sections lie.
        rotation: [head_size, head_size], or None.
    """
    turned = rotated(numbers, rotation)
    if side.bits >= 16:
        if rotation is not None:
            turned = turned.clamp(-MAX_FLOAT16, MAX_FLOAT16).to(numbers.dtype)
        put(pages, places, side.codes, places.row, turned)
        return
    encoded = encode(turned, side.bits, side.group, side.per_channel)
    put(pages, places, side.codes, places.row, pack(encoded.codes, side.bits))
    row = places.row
    if side.per_channel:
        places = Places(*(place[..., :: side.group] for place in places))
        row = places.row // side.group
    put(pages, places, side.scales, row, encoded.scales)
    put(pages, places, side.zeros, row, encoded.zeros)


def quantize_on_write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    cells: Cells,
    *,
    rotation: torch.Tensor | None = None,
    rotate_keys: bool = False,
    rotate_values: bool = False,
    nonfinite: torch.Tensor | None = None,
) -> None:
    """Encodes new tokens into the pages of their slots; see `kernels.quantize_on_write`."""
    wanted = slots >= 0
    key, value = (numbers[: len(slots)][wanted] for numbers in (key, value))
    slots = slots[wanted].unsqueeze(-1)
    heads = torch.arange(cells.num_kv_heads, device=slots.device)
    page_tokens = cells.per_page // cells.num_kv_heads * cells.tokens
    token = slots % page_tokens
    cell = token // cells.tokens * cells.num_kv_heads + heads
    places = Places(
        (slots // page_tokens).expand_as(cell),
        cell * cells.size,
        (token % cells.tokens).expand_as(cell),
    )
    write_side(key, pages, places, cells.keys, rotation if rotate_keys else None)
    write_side(value, pages, places, cells.values, rotation if rotate_values else None)
    if nonfinite is not None:
        nonfinite += count_nonfinite(key) + count_nonfinite(value)
