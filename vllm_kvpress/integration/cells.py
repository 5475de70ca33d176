"""Packed cells in the engine: one store's tokens, written and read in the pages of any layer.

The bytes are those that `vllm_kvpress.layout` draws. What writes them is `kernels.compact`: PyTorch
on a CPU, a kernel on CUDA.
"""

from __future__ import annotations

import torch
from vllm.logger import init_logger

from vllm_kvpress.integration.events import LayerPages
from vllm_kvpress.kernels.cells import Cells
from vllm_kvpress.kernels.cells_reference import unpack
from vllm_kvpress.kernels.compact import compact
from vllm_kvpress.layout import PackedFormat
from vllm_kvpress.policies.codecs import hadamard
from vllm_kvpress.schema import Codecs

logger = init_logger("vllm.kvpress")


def page_bytes(layer: LayerPages) -> torch.Tensor:
    """Returns a layer's pages as uint8 [num_blocks, page_bytes], aliasing them."""
    return layer.pages.view(torch.uint8)


class NonfiniteNumbers:
    """Counts NaN and infinite numbers as they are written, and warns of the first.

    Cells hold them as 0 and the largest float16.

    Attributes:
        count: int64 [1], what writes add to.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        # What the host knows of it: on a GPU a copy that arrives later, so that nothing waits.
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._warned = False

    def look(self) -> None:
        """Warns once there is one; called after every write."""
        if self._warned:
            return
        self._seen.copy_(self.count, non_blocking=True)
        if int(self._seen):
            self._warned = True
            logger.warning(
                "KV policy: NaN or infinity in keys or values, stored as 0 and the largest "
                "float16; more are counted silently."
            )


class PackedStore:
    """The packed tokens of requests, in pages of any layer.

    Args:
        form: Where things lie in a cell.
        codecs: The precision.
        pages: uint8 [num_blocks, page_bytes] of a layer; all layers' are alike.
        dtype: The model's dtype: what sides of 16 or 32 bits hold.
        nonfinite: Counts numbers that are none.

    Attributes:
        cells: Where things lie, in the kernels' words.
        rotations: The kernels' options for rotated keys and values.
        nonfinite: As given.
    """

    def __init__(
        self,
        form: PackedFormat,
        codecs: Codecs,
        pages: torch.Tensor,
        dtype: torch.dtype,
        nonfinite: NonfiniteNumbers,
    ) -> None:
        self.cells = Cells.of(form.numbers(pages.shape[1]))
        self.rotations = {
            "rotation": hadamard(form.head_size, pages.device),
            "rotate_keys": codecs.rotate != "none",
            "rotate_values": codecs.rotate == "both",
        }
        self.nonfinite = nonfinite
        self._dtype = dtype

    def write(
        self,
        pages: torch.Tensor,
        table: torch.Tensor,
        start: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Encodes tokens into a request's store, from place `start` on; nothing else changes.

        Args:
            pages: uint8 [num_blocks, page_bytes] of one layer.
            table: Block ids of the request's store, int32 [num_pages].
            start: First place; with channel groups a multiple of their tokens.
            keys: [num_kv_heads, num_tokens, head_size].
            values: Of the same shape.
        """
        kept = torch.arange(keys.shape[1], device=pages.device).expand(len(keys), -1)
        compact(
            keys,
            values,
            kept,
            table,
            pages,
            start,
            self.cells,
            nonfinite=self.nonfinite.count,
            **self.rotations,
        )
        self.nonfinite.look()

    def read(
        self, pages: torch.Tensor, table: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the first tokens of a request's store, float32 [num_kv_heads, n, head_size]."""
        sides = unpack(pages, table, num_tokens, self.cells, self._dtype)
        turn = self.rotations["rotation"]  # which is its own inverse
        rotated = (self.rotations["rotate_keys"], self.rotations["rotate_values"])
        keys, values = (x @ turn if yes else x for x, yes in zip(sides, rotated, strict=True))
        return keys, values
