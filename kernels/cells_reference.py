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
    # By rows: an index takes uint8 byte by byte.
    rows = pages.index_select(0, table[: -(-num_cells // cells.per_page)])
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
    codes = data[..., side.codes : side.codes + cells.tokens * width]
    if side.bits >= 16:
        return codes.contiguous().view(dtype).view(shape).float()
    numbers = torch.empty(heads, columns, cells.tokens, cells.head_size, dtype=torch.float32)
    codes = codes.unflatten(-1, (cells.tokens, width))
    for plane in range(8 // side.bits):
        some = codes if side.bits == 8 else (codes >> (plane * side.bits)) & (2**side.bits - 1)
        numbers[..., plane * width : (plane + 1) * width].copy_(some)
    groups, params = _grouped(numbers, data, side, cells)
    groups.mul_(params[0]).add_(params[1])
    return numbers.view(shape)


def _grouped(
    numbers: Tensor, data: Tensor, side: Side, cells: Cells
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns a view of the numbers by groups, and scales and zeros in float32 that fit it.

    Args:
        numbers: [num_kv_heads, columns, tokens, head_size].
        data: Cells, uint8 [num_kv_heads, columns, size].
        side: Keys or values.
        cells: Where everything lies.
    """
    group, size = side.group, cells.head_size
    rows = cells.tokens // group if side.per_channel else cells.tokens
    channels = size if side.per_channel else -(-size // group)
    scales, zeros = (
        data[..., at : at + 2 * rows * channels]
        .contiguous()
        .view(torch.float16)
        .float()
        .unflatten(-1, (rows, channels))
        for at in (side.scales, side.zeros)
    )
    if side.per_channel:
        return numbers.unflatten(2, (rows, group)), (scales.unsqueeze(3), zeros.unsqueeze(3))
    if size % group == 0:
        return numbers.unflatten(3, (channels, group)), (scales.unsqueeze(4), zeros.unsqueeze(4))
    wide = (params.repeat_interleave(group, dim=-1)[..., :size] for params in (scales, zeros))
    return numbers, tuple(wide)
