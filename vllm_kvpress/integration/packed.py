"""Packed stores in the engine: events that encode, and attention over packed cells and staging.

Until the end of its prompt a request is read by the stock kernel. From its first event on it has
several parts: packed cells of one or two stores, which every query sees whole, and staging's open
blocks, in which the queries' own tokens are the last. A step in which any request has packed cells
is computed here for all its requests. This is the PyTorch form, for CPU; `kernel_form.py` has that
for CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvpress.integration.cells import CellStore
from vllm_kvpress.integration.events import EventRunner, LayerPages, PendingEvent
from vllm_kvpress.integration.lanes import cells_of
from vllm_kvpress.integration.pages import PageMap
from vllm_kvpress.integration.plugin import policy_of
from vllm_kvpress.kernels.paged_attention.cpu import attend
from vllm_kvpress.packed_plan import Move, PackedPlan
from vllm_kvpress.policies import Scorer, select_tokens
from vllm_kvpress.policies.codecs import group_channels, make_codec
from vllm_kvpress.schema import Codecs

logger = init_logger("vllm.kvpress")


@dataclass(frozen=True)
class CellPart:
    """One lane's packed cells of every request of a step.

    Attributes:
        store: Reads them.
        table: Block ids, int32 [num_reqs, max_blocks].
        num_tokens: Tokens in each request's cells, int64 [num_reqs].
    """

    store: CellStore
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


class PackedAttention:
    """Attention over packed cells and staging.

    Args:
        stores: Reads the cells, by lane.
        page_map: Where K and V lie in a page of staging.
        layers: The layers, in the model's order.
    """

    def __init__(
        self, stores: dict[str, CellStore], page_map: PageMap, layers: list[LayerPages]
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
                part.store.read(page_bytes(pages), part.table[row].long(), num_tokens)
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


def page_bytes(layer: LayerPages) -> torch.Tensor:
    """Returns a layer's pages as uint8 [num_blocks, page_bytes], aliasing them."""
    return layer.pages.view(torch.uint8)


class PackedEventRunner(EventRunner):
    """Runs the events of a packed store: select at the prompt's end, encode as tokens close.

    Attributes:
        attention: Reads what the events wrote.
        nonfinite: NaN and infinite numbers met so far, stored as 0 and the largest float16.
    """

    plan: PackedPlan

    def __init__(
        self,
        plan: PackedPlan,
        scorer: Scorer,
        page_map: PageMap,
        layers: list[LayerPages],
        vllm_config: VllmConfig,
    ) -> None:
        super().__init__(plan, scorer, page_map, layers, vllm_config)
        self.stores = _stores_of(vllm_config, layers[0])
        self.attention = PackedAttention(self.stores, page_map, layers)
        self.nonfinite = 0

    def _run_layer(self, event: PendingEvent, layer: LayerPages) -> None:
        move = self.plan.move(event.num_prompt_tokens, event.start, event.event)
        if move.survivors or move.losers:
            self._select(event, layer, move)
        if move.append_end > move.append_start:
            tokens = self._staged(event, layer, move.append_start, move.append_end)
            self._write("kv_store", event, layer, move.append_at, *tokens)

    def _select(self, event: PendingEvent, layer: LayerPages, move: Move) -> None:
        plan, prompt = self.plan, event.num_prompt_tokens
        keys, values = self._staged(event, layer, 0, prompt)
        exact, end = plan.exact_tokens, move.select_end
        num_survivors = move.survivors or 0
        if num_survivors == end - exact:
            self._write("kv_store", event, layer, 0, keys[:, exact:end], values[:, exact:end])
            return
        heads = self.page_map.num_kv_heads
        positions = torch.arange(prompt, device=keys.device).expand(heads, -1)
        scores = self._observe(event, layer, keys, values, positions)
        kept = exact + select_tokens(
            scores[:, exact:],
            num_survivors,
            0 if plan.exact_sinks else plan.sink_tokens,
            max(0, plan.recent_tokens - (prompt - end)),
            num_candidates=end - exact,
            context=self._label(layer),
        )
        self._write("kv_store", event, layer, 0, _gathered(keys, kept), _gathered(values, kept))
        if move.losers:
            lost = _complement(kept, exact, end)
            tokens = _gathered(keys, lost), _gathered(values, lost)
            self._write("kv_demoted", event, layer, 0, *tokens)
        if self.observer is not None:
            self.observer(replace(event, event=prompt), layer.layer_idx, kept)

    def _staged(
        self, event: PendingEvent, layer: LayerPages, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns staging's tokens [start, end), `start` at a block's first token."""
        block_size = self.plan.block_size
        blocks = event.staging[start // block_size : -(-end // block_size)].long()
        keys, values = self.page_map.read(layer.pages, blocks)
        return keys[:, : end - start], values[:, : end - start]

    def _write(
        self,
        lane: str,
        event: PendingEvent,
        layer: LayerPages,
        start: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        if not keys.shape[1]:
            return
        table = event.tables[lane].long()
        found = self.stores[lane].write(page_bytes(layer), table, start, keys, values)
        if found and not self.nonfinite:
            logger.warning(
                "KV policy: NaN or infinity in keys or values, seen at layer %d, stored as 0 and "
                "the largest float16; more are counted silently.",
                layer.layer_idx,
            )
        self.nonfinite += found


def _gathered(numbers: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns `numbers`, [num_kv_heads, num_tokens, head_size], at int64 [num_kv_heads, n]."""
    return numbers.gather(1, positions[:, :, None].expand(-1, -1, numbers.shape[2]))


def _complement(kept: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Returns the positions of [start, end) that are not kept, ascending in each row."""
    lost = torch.ones(len(kept), end - start, dtype=torch.bool, device=kept.device)
    lost.scatter_(1, kept - start, False)
    return start + lost.nonzero()[:, 1].view(len(kept), -1)


def _stores_of(vllm_config: VllmConfig, layer: LayerPages) -> dict[str, CellStore]:
    """Returns what reads and writes each lane of packed cells."""
    policy = policy_of(vllm_config)
    assert policy is not None
    assert policy.quantize is not None
    spec = layer.layer.get_kv_cache_spec(vllm_config)
    stores = {"kv_store": _store_of(policy.quantize, spec, layer.pages.dtype)}
    if policy.quantize.losers is not None:
        stores["kv_demoted"] = _store_of(policy.quantize.losers, spec, layer.pages.dtype)
    return stores


def _store_of(codecs: Codecs, spec: FullAttentionSpec, dtype: torch.dtype) -> CellStore:
    cells = cells_of(codecs, spec)
    assert cells is not None
    group = group_channels(codecs)
    return CellStore(
        cells,
        make_codec(codecs.keys, "keys", group=group, dtype=dtype),
        make_codec(codecs.values, "values", group=group, dtype=dtype),
        dtype,
        rotate_keys=codecs.rotate != "none",
        rotate_values=codecs.rotate == "both",
    )
