"""Packed cells by hand: numpy, one group after the other, from the formulas and the layout alone.

Imports nothing of `vllm_kvpress.kernels` but the names of its numbers.
"""

import os

import numpy as np
import torch
from vllm_kvpress.kernels.cells import Cells, Side

from vllm_kvpress.layout import PackedFormat, SideFormat

DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Name -> bits and group of one side, per token; group 0 stands for the whole head.
FORMATS = {
    "int8": (8, 0),
    "int8-g32": (8, 32),
    "int4": (4, 0),
    "int4-g32": (4, 32),
    "int2-g32": (2, 32),
}


def side_format(name: str, head_size: int, dtype: torch.dtype) -> SideFormat:
    """Returns the format called `name`, "exact", or "kivi4" and "kivi2" for keys."""
    if name == "exact":
        return SideFormat(bits=8 * dtype.itemsize)
    if name.startswith("kivi"):
        return SideFormat(bits=int(name[4]), group=32, per_channel=True)
    bits, group = FORMATS[name]
    return SideFormat(bits=bits, group=group or head_size)


def make_cells(
    keys: str,
    values: str,
    head_size: int,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    cells_per_page: int = 5,
) -> Cells:
    """Returns cells of two formats in pages that have 20 bytes to spare."""
    packed = PackedFormat(
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        keys=side_format(keys, head_size, dtype),
        values=side_format(values, head_size, dtype),
    )
    return Cells.of(packed.numbers(packed.cell_bytes * cells_per_page + 20))


def hadamard(head_size: int) -> torch.Tensor:
    """Returns the rotation: Sylvester's matrices of the greatest power of two in `head_size`."""
    block = head_size & -head_size
    signs = [[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    blocks = [torch.tensor(signs).float() / block**0.5] * (head_size // block)
    return torch.block_diag(*blocks)


def poisoned_pages(cells: Cells, num_pages: int) -> torch.Tensor:
    """Returns pages uint8 of NaN (0xff bytes) whose rows lie further apart than they are long."""
    wide = torch.full((num_pages, cells.per_page * cells.size + 52), 255, dtype=torch.uint8)
    return wide[:, : cells.per_page * cells.size + 20]


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Returns numbers [..., num_tokens, head_size] with rows that trip a careless encoder."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 3
    rows = x.flatten(0, -2)
    channel = torch.arange(shape[-1])
    awkward_rows = [
        torch.zeros(shape[-1]),
        torch.where(channel % 2 == 0, -0.0, 0.0),
        torch.full(shape[-1:], 59999.0),  # float16 rounds it up: the scale is negative
        channel / 2.0,  # steps that end at half a code
        torch.where(channel % 3 == 0, 65504.0, -65504.0),
        channel * 1e-9,  # the scale is 0 in float16
        channel * 2e-7,  # the scale is a subnormal number in float16
        2048 + channel / 16,
        channel * 1e6,  # beyond float16
    ]
    half = len(rows) // 2
    if half >= 2 * len(awkward_rows):
        for i, row in enumerate(awkward_rows):
            rows[2 * i] = rows[half + 2 * i] = row
    return x.to(dtype)


def place(cells: Cells, side: Side, section: int, row: int, width: int) -> slice:
    """Returns where the `row`-th run of `width` bytes of a section lies in a cell."""
    start = (side.codes, side.scales, side.zeros)[section] + row * width
    return slice(start, start + width)


def quantized(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.float16, np.float16]:
    """Returns codes, scale and zero of one group."""
    top = np.float32(2**bits - 1)
    zero = np.float16(x.min())
    scale = np.float16((x.max() - np.float32(zero)) / top)
    scale = scale if scale != 0 else np.float16(1)
    codes = np.rint((x - np.float32(zero)) / np.float32(scale))
    return np.clip(codes, 0, top).astype(np.uint8), scale, zero


def fill(cell: np.ndarray, cells: Cells, side: Side, row: int, numbers: torch.Tensor) -> None:
    """Writes tokens `row` on, numbers [num_tokens, head_size], into a cell, uint8 [size]."""
    if side.bits >= 16:
        data = numbers.contiguous().view(torch.uint8).numpy()
        for i, token in enumerate(data):
            cell[place(cells, side, 0, row + i, len(token))] = token
        return
    x = numbers.float()
    x = torch.where(x.isnan(), 0.0, x).clamp(-65504, 65504).numpy() + np.float32(0)
    codes = np.zeros(x.shape, np.uint8)
    step, size = side.group, cells.head_size
    for first in range(0, len(x) if side.per_channel else size, step):
        params = []
        for i in range(size if side.per_channel else len(x)):
            part = (
                (slice(first, first + step), i)
                if side.per_channel
                else (i, slice(first, first + step))
            )
            codes[part], *both = quantized(x[part], side.bits)
            params.append(both)
        for section in (1, 2):
            halves = np.array([both[section - 1] for both in params])
            for i, half in enumerate(halves):
                if side.per_channel:
                    index = (row + first) // step * size + i
                else:
                    index = (row + i) * -(-size // step) + first // step
                cell[place(cells, side, section, index, 2)] = np.array([half]).view(np.uint8)
    width = size * side.bits // 8
    for i in range(len(x)):
        for j in range(width):
            planes = [int(codes[i, j + plane * width]) for plane in range(8 // side.bits)]
            byte = sum(code << (plane * side.bits) for plane, code in enumerate(planes))
            cell[place(cells, side, 0, row + i, width)][j] = byte


def read(cell: torch.Tensor, cells: Cells, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what codes of a cell stand for, float32 [tokens, head_size], and their steps."""
    tokens, size = cells.tokens, cells.head_size
    codes = cell[side.codes :][: tokens * size * side.bits // 8].view(tokens, -1)
    planes = [(codes >> shift) & (2**side.bits - 1) for shift in range(0, 8, side.bits)]
    groups = tokens // side.group if side.per_channel else -(-size // side.group)
    shape = (groups, size) if side.per_channel else (tokens, groups)
    params = []
    for start in (side.scales, side.zeros):
        halves = cell[start:][: 2 * shape[0] * shape[1]].clone().view(torch.float16).view(shape)
        spread = halves.float().repeat_interleave(side.group, 0 if side.per_channel else 1)
        params.append(spread[:, :size])
    scale, zero = params
    return torch.cat(planes, -1).float() * scale + zero, scale.abs()
