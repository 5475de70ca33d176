"""Packed cells in PyTorch: what the engine reads and writes on a CPU.

The bytes are those that `vllm_kvpress.layout` draws; the codecs define the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvpress.kernels.cells import Cells
from vllm_kvpress.kernels.cells_reference import unpack
from vllm_kvpress.layout import PackedFormat
from vllm_kvpress.policies.codecs import Codec, rotate
from vllm_kvpress.policies.codecs.uniform import cleaned

_BYTES = torch.uint8


@dataclass(frozen=True)
class CellStore:
    """Reads and writes the packed tokens of a request in one layer's pages.

    Attributes:
        cells: Where things lie.
        keys: Codec of keys.
        values: Codec of values.
        dtype: The model's dtype: what exact sides hold.
        rotate_keys: Whether keys are stored rotated.
        rotate_values: Whether values are.
    """

    cells: PackedFormat
    keys: Codec
    values: Codec
    dtype: torch.dtype
    rotate_keys: bool = False
    rotate_values: bool = False

    def write(
        self,
        pages: torch.Tensor,
        table: torch.Tensor,
        start: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> int:
        """Encodes tokens into a request's store, from place `start` on; nothing else changes.

        Args:
            pages: uint8 [num_blocks, page_bytes] of one layer.
            table: Block ids of the request's store, int64 [num_pages].
            start: First place; with channel groups a multiple of their tokens.
            keys: [num_kv_heads, num_tokens, head_size].
            values: Of the same shape.

        Returns:
            How many numbers were NaN or infinite; they are stored as 0 and the largest float16.
        """
        first = start // self.cells.cell_tokens
        end = start + keys.shape[1]
        pages_of, content = self._open(pages, table, first, end)
        at = start - first * self.cells.cell_tokens
        nonfinite = 0
        sides = ((self.keys, keys, self.rotate_keys), (self.values, values, self.rotate_values))
        for side, (codec, numbers, rotated) in enumerate(sides):
            if rotated:  # which would spread a NaN over its whole row
                numbers, bad = cleaned(numbers)
                nonfinite, numbers = nonfinite + bad, rotate(numbers)
            encoded = codec.encode(numbers)
            nonfinite += encoded.nonfinite
            parts = (encoded.codes, encoded.scales, encoded.zeros)
            for section, part in zip(self._sections(content, side), parts, strict=True):
                if part.numel():
                    place = at * part.shape[1] // keys.shape[1]
                    rows = section.flatten(1, 2)  # a copy, as sections are not dense
                    rows[:, place : place + part.shape[1]] = part.contiguous().view(_BYTES)
                    section.copy_(rows.view(section.shape))
        self._close(pages, pages_of, content, first)
        return nonfinite

    def read(
        self, pages: torch.Tensor, table: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the first tokens of a request's store, float32 [num_kv_heads, n, head_size]."""
        cells = Cells.of(self.cells.numbers(pages.shape[1]))
        sides = unpack(pages, table, num_tokens, cells, self.dtype)
        rotated = (self.rotate_keys, self.rotate_values)
        keys, values = (rotate(x) if yes else x for x, yes in zip(sides, rotated, strict=True))
        return keys, values

    def _open(
        self, pages: torch.Tensor, table: torch.Tensor, first_chunk: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns page ids, and copies of cells as [num_kv_heads, chunks, cell_bytes]."""
        heads, size = self.cells.num_kv_heads, self.cells.cell_bytes
        per_page = self.cells.cells_per_page(pages.shape[1])
        chunks = -(-end // self.cells.cell_tokens) - first_chunk
        first_cell, num_cells = first_chunk * heads, chunks * heads
        first_page = first_cell // per_page
        page_ids = table[first_page : -(-(first_cell + num_cells) // per_page)]
        cells = pages[page_ids][:, : per_page * size].reshape(-1, size)
        skipped = first_cell - first_page * per_page
        cells = cells[skipped : skipped + num_cells].view(chunks, heads, size)
        return page_ids, cells.transpose(0, 1).contiguous()

    def _close(
        self, pages: torch.Tensor, page_ids: torch.Tensor, content: torch.Tensor, first: int
    ) -> None:
        heads, size = self.cells.num_kv_heads, self.cells.cell_bytes
        per_page = self.cells.cells_per_page(pages.shape[1])
        skipped = first * heads % per_page
        whole = pages[page_ids][:, : per_page * size].reshape(-1, size)
        num_cells = content.shape[0] * content.shape[1]
        whole[skipped : skipped + num_cells] = content.transpose(0, 1).reshape(-1, size)
        pages[page_ids, : per_page * size] = whole.view(len(page_ids), -1)

    def _sections(self, content: torch.Tensor, side: int) -> list[torch.Tensor]:
        """Returns codes, scales and zeros of a side, [heads, chunks, rows, bytes], aliasing."""
        form = (self.cells.keys, self.cells.values)[side]
        offsets, rows = self.cells.offsets, self.cells.cell_tokens
        param_rows = rows // form.group if form.per_channel else rows
        params = offsets[2 + 2 * side : 5 + 2 * side]
        edges = [
            (offsets[side], offsets[side + 1], rows),
            (params[0], params[1], param_rows),
            (params[1], params[2], param_rows),
        ]
        return [
            content[:, :, start:end].unflatten(2, (count, (end - start) // count))
            for start, end, count in edges
        ]
