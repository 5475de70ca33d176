"""Physical tables in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["physical_tables"]


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
    """Writes tables and lengths; arguments as in the public operation.

    Args:
        logical: int32 [num_reqs, width].
        head: int32 [num_reqs, head_width] or None.
        head_blocks: [num_reqs].
        gaps: [num_reqs].
        seq_lens: [num_reqs].
        block_size: Tokens in a block.
        out_table: int32 [num_reqs, num_columns], written.
        out_lens: [num_reqs], written.
    """
    head = logical if head is None else head
    num_columns = out_table.shape[1]
    columns = torch.arange(num_columns, device=logical.device)
    source = (columns + gaps[:, None].long()).clamp_(max=logical.shape[1] - 1)
    table = logical.gather(1, source)
    width = min(num_columns, head.shape[1])
    in_head = columns[:width] < head_blocks[:, None]
    table[:, :width] = torch.where(in_head, head[:, :width], table[:, :width])
    out_table.copy_(table)
    out_lens.copy_(seq_lens - (gaps * block_size).to(seq_lens.dtype))
