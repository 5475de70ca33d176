"""Compaction in PyTorch, and what a CPU runs: chosen tokens into the cells of one request's store.

Token p of KV head h lies in cell c = p // tokens * num_kv_heads + h of the store; that cell lies in
page table[c // per_page], at byte c % per_page * size.
"""

from __future__ import annotations

import torch
from vllm_kvpress.kernels.cells import Cells, Side
from vllm_kvpress.kernels.quantize_on_write.reference import (
    Places,
    count_nonfinite,
    put,
    write_side,
)

__all__ = ["chosen", "compact", "move_cells", "places", "write_cells"]


def places(positions: torch.Tensor, table: torch.Tensor, cells: Cells) -> Places:
    """Returns where the store holds tokens: positions int64 [num_kv_heads, n], same shape back."""
    heads = torch.arange(cells.num_kv_heads, device=positions.device).unsqueeze(-1)
    cell = positions // cells.tokens * cells.num_kv_heads + heads
    page = table[cell // cells.per_page].long()
    return Places(page, cell % cells.per_page * cells.size, positions % cells.tokens)


def chosen(cache: torch.Tensor, kept: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
    """Returns the kept tokens of each KV head, [num_kv_heads, num_kept, head_size].

    Args:
        cache: [num_blocks, block_size, num_kv_heads, head_size] with `blocks`, otherwise
            [num_kv_heads, num_tokens, head_size].
        kept: Token indices [num_kv_heads, num_kept].
        blocks: The source's block table [n_blocks], or None.
    """
    kept = kept.long()
    heads = torch.arange(kept.shape[0], device=kept.device).unsqueeze(-1)
    if blocks is None:
        return cache[heads, kept]
    block_size = cache.shape[1]
    return cache[blocks[kept // block_size].long(), kept % block_size, heads]


def write_cells(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    start: int,
    cells: Cells,
    *,
    rotation: torch.Tensor | None = None,
    rotate_keys: bool = False,
    rotate_values: bool = False,
    nonfinite: torch.Tensor | None = None,
) -> None:
    """Encodes dense tokens into a store from position `start` on; other bytes stay as they are.

    Args:
        keys: [num_kv_heads, num_tokens, head_size] in the model's dtype.
        values: The same of the values.
        pages: uint8 [num_pages, page_bytes], written.
        table: The store's pages, int32 [max_pages].
        start: Position of the first token; for per-channel formats a multiple of `cells.tokens`,
            and num_tokens one of the group.
        cells: The store's layout.
        rotation: float32 [head_size, head_size], or None.
        rotate_keys: Whether keys are multiplied by `rotation`.
        rotate_values: Whether values are.
        nonfinite: int64 [1], to which the number of NaN and infinities is added; or None.
    """
    positions = torch.arange(start, start + keys.shape[1], device=pages.device)
    where = places(positions.expand(cells.num_kv_heads, -1), table, cells)
    write_side(keys, pages, where, cells.keys, rotation if rotate_keys else None)
    write_side(values, pages, where, cells.values, rotation if rotate_values else None)
    if nonfinite is not None:
        nonfinite += count_nonfinite(keys) + count_nonfinite(values)


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
    """Writes the kept tokens of one request into its store; see `kernels.compact`."""
    write_cells(
        chosen(keys, kept, blocks),
        chosen(values, kept, blocks),
        pages,
        table,
        start,
        cells,
        rotation=rotation,
        rotate_keys=rotate_keys,
        rotate_values=rotate_values,
        nonfinite=nonfinite,
    )


def row_sections(side: Side, head_size: int) -> list[tuple[int, int]]:
    """Returns (first byte in a cell, bytes of one token) of a per-token side's sections."""
    sections = [(side.codes, head_size * side.bits // 8)]
    if side.bits < 16:
        width = 2 * -(-head_size // side.group)
        sections += [(side.scales, width), (side.zeros, width)]
    return sections


def move_cells(pages: torch.Tensor, table: torch.Tensor, kept: torch.Tensor, cells: Cells) -> None:
    """Moves packed tokens of a store to its positions 0, 1, ...; see `kernels.compact`."""
    kept = kept.long()
    source = places(kept, table, cells)
    positions = torch.arange(kept.shape[1], device=pages.device)
    target = places(positions.expand_as(kept), table, cells)
    for side in (cells.keys, cells.values):
        for section, width in row_sections(side, cells.head_size):
            first = source.cell + section + source.row * width
            columns = first[..., None] + torch.arange(width, device=pages.device)
            # A copy, so that a row may be both read and written.
            rows = pages[source.page[..., None], columns]
            put(pages, target, section, target.row, rows)
