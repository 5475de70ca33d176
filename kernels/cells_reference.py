"""Packed cells back to numbers, in PyTorch: what every kernel that reads cells is measured against.

`vllm_kvpress.layout` draws the bytes of a cell; `vllm_kvpress.kernels.cells` names its numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm_kvpress.kernels.cells import Cells, Side

__all__ = ["unpack"]


def unpack(
    pages: Tensor, table: Tensor, length: int, cells: Cells, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns keys and values of one request's cells, float32 [num_kv_heads, length, head_size].

    Args:
        pages: uint8 [num_pages, page_bytes].
        table: The request's pages, int32 [max_pages]; entries past its cells are not read.
        length: Tokens that the cells hold.
        cells: Where everything lies.
        dtype: The model's dtype: what sides of 16 or 32 bits hold.
    """
    columns = -(-length // cells.tokens)
    num_cells = columns * cells.num_kv_heads
    rows = pages[table[: -(-num_cells // cells.per_page)].long()]
    data = rows[:, : cells.per_page * cells.size].reshape(-1, cells.size)[:num_cells]
    data = data.view(columns, cells.num_kv_heads, cells.size).transpose(0, 1)
    keys, values = (
        _decode(data, side, cells, dtype)[:, :length] for side in (cells.keys, cells.values)
    )
    return keys, values


def _decode(data: Tensor, side: Side, cells: Cells, dtype: torch.dtype) -> Tensor:
    """Returns one side, float32 [num_kv_heads, columns * tokens, head_size].

    Args:
        data: Cells, uint8 [num_kv_heads, columns, size].
        side: Keys or values.
        cells: Where everything lies.
        dtype: The model's dtype.
    """
    heads, columns, _ = data.shape
    shape = (heads, columns * cells.tokens, cells.head_size)
    width = cells.head_size * side.bits // 8
    codes = data[..., side.codes : side.codes + cells.tokens * width].contiguous()
    if side.bits >= 16:
        return codes.view(dtype).view(shape).float()
    scales, zeros = (_params(data, at, side, cells) for at in (side.scales, side.zeros))
    numbers = _codes(codes.view(heads, columns, cells.tokens, width), side.bits)
    return (numbers * scales).add_(zeros).view(shape)


def _codes(codes: Tensor, bits: int) -> Tensor:
    """Returns the codes in bytes [..., width] as float32 [..., width * 8 / bits]."""
    if bits == 8:
        return codes.float()
    planes = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(planes, dim=-1).float()


def _params(data: Tensor, at: int, side: Side, cells: Cells) -> Tensor:
    """Returns scales, or zeros, float32 [num_kv_heads, columns, tokens, head_size]."""
    channels = cells.head_size if side.per_channel else -(-cells.head_size // side.group)
    rows = cells.tokens // side.group if side.per_channel else cells.tokens
    params = data[..., at : at + 2 * rows * channels].contiguous().view(torch.float16).float()
    params = params.view(*data.shape[:2], rows, channels)
    if side.per_channel:
        return params.repeat_interleave(side.group, dim=-2)
    if channels == 1:
        return params
    return params.repeat_interleave(side.group, dim=-1)[..., : cells.head_size]
