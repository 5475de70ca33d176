"""Compaction: the tokens of one request that were chosen, encoded into the cells of its store."""

from __future__ import annotations

import torch
from vllm_kvpress.kernels.cells import Cells
from vllm_kvpress.kernels.compact import reference
from vllm_kvpress.kernels.compact.reference import write_cells
from vllm_kvpress.kernels.quantize_on_write.checks import (
    check_cells,
    check_counter,
    check_pages,
    check_rotation,
    check_sources,
    check_tensor,
)

__all__ = ["compact", "move_cells", "write_cells"]

INDEX_DTYPES = (torch.int64, torch.int32)


def compact(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    table: torch.Tensor,
    pages: torch.Tensor,
    start: int,
    cells: Cells,
    *,
    blocks: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
    rotate_keys: bool = False,
    rotate_values: bool = False,
    nonfinite: torch.Tensor | None = None,
) -> None:
    """Encodes the kept tokens of one request into its store; other bytes stay as they are.

    Args:
        keys: The exact keys: with `blocks` a paged cache [num_blocks, block_size, num_kv_heads,
            head_size], otherwise [num_kv_heads, num_tokens, head_size]; outer strides free.
        values: The same of the values.
        kept: Token indices, int64 or int32 [num_kv_heads, num_kept], each head's own choice, in
            the order in which the store gets them.
        table: The store's pages, int32 [max_pages].
        pages: uint8 [num_pages, page_bytes], written.
        start: Position in the store of the first kept token; for formats per channel a multiple of
            `cells.tokens`, and num_kept a multiple of the group.
        cells: The store's layout.
        blocks: The source's block table, int32 [n_blocks]: token t lies in block
            blocks[t // block_size]; None if keys and values are not paged.
        rotation: float32 [head_size, head_size], or None.
        rotate_keys: Whether keys are multiplied by `rotation`.
        rotate_values: Whether values are.
        nonfinite: int64 [1], to which the number of NaN and infinities written is added; or None.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong, or tokens do not fill groups.
    """
    heads, size = cells.num_kv_heads, cells.head_size
    shape = (heads, None, size) if blocks is None else (None, None, heads, size)
    check_sources(keys, values, shape, pages.device)
    if keys.shape != values.shape:
        raise ValueError(
            f"values have the wrong shape; got {list(values.shape)}; allowed: {list(keys.shape)}"
        )
    check_cells(cells, keys.dtype)
    check_pages(pages, cells, keys.dtype)
    _check_table("table", table, pages.device)
    if blocks is not None:
        _check_table("blocks", blocks, pages.device)
    check_tensor("kept", kept, INDEX_DTYPES, (heads, None), pages.device)
    _check_start(start, kept.shape[1], len(table), cells)
    check_rotation(rotation, rotate_keys or rotate_values, size, pages.device)
    check_counter(nonfinite, pages.device)
    if pages.is_cuda:
        from vllm_kvpress.kernels.compact.triton import launch
    else:
        launch = reference.compact
    if kept.shape[1]:
        launch(
            keys,
            values,
            kept,
            table,
            pages,
            start,
            cells,
            blocks=blocks,
            rotation=rotation,
            rotate_keys=rotate_keys,
            rotate_values=rotate_values,
            nonfinite=nonfinite,
        )


def move_cells(pages: torch.Tensor, table: torch.Tensor, kept: torch.Tensor, cells: Cells) -> None:
    """Moves packed tokens of a store to its positions 0, 1, ... without decoding them.

    All bytes are read before the first is written, so tokens may move within the same cells.
    Bytes past the last moved token stay as they are. Runs in PyTorch on every device.

    Args:
        pages: uint8 [num_pages, page_bytes], written.
        table: The store's pages, int32 [max_pages].
        kept: Positions in the store, int64 or int32 [num_kv_heads, num_kept].
        cells: The store's layout; formats per token.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong, or a format runs along the tokens.
    """
    check_pages(pages, cells, None)
    _check_table("table", table, pages.device)
    check_tensor("kept", kept, INDEX_DTYPES, (cells.num_kv_heads, None), pages.device)
    if cells.keys.per_channel or cells.values.per_channel:
        raise ValueError(
            "move_cells moves single tokens; got a format per channel, whose groups run along the "
            "tokens; allowed: formats per token"
        )
    _check_start(0, kept.shape[1], len(table), cells)
    reference.move_cells(pages, table, kept, cells)


def _check_table(name: str, table: torch.Tensor, device: torch.device) -> None:
    check_tensor(name, table, (torch.int32,), (None,), device)
    if not table.is_contiguous():
        raise ValueError(f"{name} is not contiguous; got stride {table.stride(0)}; allowed: 1")


def _check_start(start: int, num_kept: int, num_pages: int, cells: Cells) -> None:
    chunks = -(-(start + num_kept) // cells.tokens)
    if start < 0 or (num_kept and chunks * cells.num_kv_heads > num_pages * cells.per_page):
        raise ValueError(
            f"the store's table does not hold positions {start} to {start + num_kept - 1}; got "
            f"{num_pages} pages of {cells.per_page} cells; allowed: {chunks} cells a KV head"
        )
    for name, side in (("keys", cells.keys), ("values", cells.values)):
        if side.per_channel and (start % cells.tokens or num_kept % side.group):
            raise ValueError(
                f"tokens do not fill groups of {name} per channel; got start {start} and "
                f"{num_kept} tokens; allowed: multiples of {cells.tokens} and of {side.group}"
            )
