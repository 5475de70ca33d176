"""Physical tables: what attention reads of each request, in the stock kernels' own form.

`README.md` has the drawing, the grid and what bounds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_kvpress.kernels.physical_tables import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["physical_tables"]

COUNTS = (torch.int32, torch.int64)


def physical_tables(
    logical: Tensor,
    head: Tensor | None,
    head_blocks: Tensor,
    gaps: Tensor,
    seq_lens: Tensor,
    block_size: int,
    out_table: Tensor,
    out_lens: Tensor,
) -> None:
    """Writes physical block tables and lengths into buffers that stay where they are.

    Column c of request r is head[r, c] for c < head_blocks[r], else the logical table's column
    c + gaps[r], its last one where that lies beyond it; the length falls by gaps[r] * block_size.
    On CUDA one launch does it, and nothing waits for the device.

    Args:
        logical: int32 [num_reqs, width], at least one column.
        head: int32 [num_reqs, head_width], what fills the columns in front, or None for the
            logical table's own first columns; columns from head_width on are never taken from it.
        head_blocks: int32 or int64 [num_reqs], columns in front.
        gaps: int32 or int64 [num_reqs], logical blocks that are left out, from 0 on.
        seq_lens: int32 or int64 [num_reqs], logical lengths in tokens.
        block_size: Tokens in a block.
        out_table: int32 [num_reqs, num_columns], every column written; its rows may lie apart, and
            it shares no memory with the other tables.
        out_lens: [num_reqs] like `seq_lens`, written; may be `seq_lens` itself.

    Raises:
        TypeError: A dtype is none that the operation takes.
        ValueError: Shapes, strides, devices or the block size do not fit each other.
    """
    tables = {"logical": logical, "head": head, "out_table": out_table}
    rows = {
        "head_blocks": head_blocks,
        "gaps": gaps,
        "seq_lens": seq_lens,
        "out_lens": out_lens,
    }
    for name, table in tables.items():
        if table is not None:
            _check(name, table, 2, (torch.int32,), logical)
    for name, row in rows.items():
        _check(name, row, 1, (seq_lens.dtype,) if name == "out_lens" else COUNTS, logical)
    if block_size < 1:
        raise ValueError(f"block_size: got {block_size}; allowed: 1 or more")
    if logical.shape[1] < 1:
        raise ValueError(f"logical: got shape {list(logical.shape)}; allowed: 1 column or more")
    if logical.device.type == "cpu":
        run = reference.physical_tables
    else:
        from vllm_kvpress.kernels.physical_tables.triton import launch as run
    run(logical, head, head_blocks, gaps, seq_lens, block_size, out_table, out_lens)


def _check(
    name: str, tensor: Tensor, axes: int, dtypes: tuple[torch.dtype, ...], logical: Tensor
) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if tensor.device != logical.device:
        raise ValueError(
            f"{name}: got device {tensor.device}; allowed: {logical.device}, logical's"
        )
    if tensor.dim() != axes or tensor.shape[0] != logical.shape[0]:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}; allowed: {axes} axes, the first of "
            f"{logical.shape[0]} requests"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}; allowed: 1 along the last axis")
