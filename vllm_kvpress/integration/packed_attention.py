"""Attention over packed cells and staging, in PyTorch for CPU; `kernel_form.py` has that for CUDA.

Until the end of its prompt a request is read by the stock kernel. From its first event on it has
several parts: packed cells of one or two stores, which every query sees whole, and staging's open
blocks, in which the queries' own tokens are the last. A step in which any request has packed cells
is computed here for all its requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress.integration.cells import PackedStore, page_bytes
from vllm_kvpress.integration.events import LayerPages
from vllm_kvpress.integration.pages import PageMap
from vllm_kvpress.kernels.paged_attention.cpu import attend


@dataclass(frozen=True)
class CellPart:
    """One lane's packed cells of every request of a step.

    Attributes:
        store: Reads them.
        table: Block ids, int32 [num_reqs, max_blocks].
        num_tokens: Tokens in each request's cells, int64 [num_reqs].
    """

    store: PackedStore
    table: torch.Tensor
    num_tokens: np.ndarray


@dataclass(frozen=True)
class PackedStep:
    """What attention reads in a step with packed cells.

    Attributes:
        common: Physical metadata of staging alone.
        parts: Packed cells, which every query sees whole: their order says nothing.
    """

    common: CommonAttentionMetadata
    parts: tuple[CellPart, ...]


class StoreAttention(Protocol):
    """Attention over packed stores and staging, in any form."""

    def step(
        self,
        common: CommonAttentionMetadata,
        tables: dict[str, torch.Tensor],
        num_tokens: dict[str, np.ndarray],
    ) -> Any:
        """Returns what attention reads in a step; see `PackedAttention.step`."""
        ...

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        step: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes a layer's attention output; see `PackedAttention.attend`."""
        ...


class PackedAttention:
    """Attention over packed cells and staging.

    Args:
        stores: Reads the cells, by lane.
        page_map: Where K and V lie in a page of staging.
        layers: The layers, in the model's order.
    """

    def __init__(
        self, stores: dict[str, PackedStore], page_map: PageMap, layers: list[LayerPages]
    ) -> None:
        self.stores = stores
        self.page_map = page_map
        self._layers = {id(pages.layer): pages for pages in layers}

    def step(
        self,
        common: CommonAttentionMetadata,
        tables: dict[str, torch.Tensor],
        num_tokens: dict[str, np.ndarray],
    ) -> PackedStep:
        """Returns what attention reads.

        Args:
            common: Physical metadata of staging alone.
            tables: Block tables by lane, each int32 [num_reqs, max_blocks].
            num_tokens: Tokens in cells by lane, each int64 [num_reqs].
        """
        parts = [
            CellPart(store, tables[lane], num_tokens[lane]) for lane, store in self.stores.items()
        ]
        return PackedStep(common, tuple(parts))

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        step: PackedStep,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the attention output of every request of the step.

        Args:
            layer: vLLM's `Attention`.
            query: [num_tokens, num_heads, head_size].
            step: What to read.
            output: Like `query`, or with heads and channels as one.
            output_scale: Not taken: no CPU backend fuses output quantization.
            output_block_scale: Not taken either.
        """
        assert output_scale is None
        assert output_block_scale is None
        pages, common, impl = self._layers[id(layer)], step.common, layer.impl
        sinks = None if impl.sinks is None else impl.sinks.float()
        bounds = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens.tolist()
        result = output.view(output.shape[0], -1, query.shape[-1])
        for row in range(common.num_reqs):
            first, last = bounds[row], bounds[row + 1]
            if first == last:
                continue
            read = [
                part.store.read(page_bytes(pages), part.table[row], num_tokens)
                for part in step.parts
                if (num_tokens := int(part.num_tokens[row]))
            ]
            # Staging last: the queries' own tokens are its newest.
            read.append(self._staged(pages, common.block_table_tensor[row], lengths[row]))
            keys, values = (torch.cat(side, dim=1) for side in zip(*read, strict=True))
            some, soft_cap = query[first:last].float(), impl.logits_soft_cap or 0.0
            result[first:last], _ = attend(some, keys, values, impl.scale, soft_cap, sinks)
        return output

    def _staged(
        self, pages: LayerPages, table: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = table[: -(-length // self.page_map.block_size)].long()
        keys, values = self.page_map.read(pages.pages, blocks)
        return keys[:, :length].float(), values[:, :length].float()
