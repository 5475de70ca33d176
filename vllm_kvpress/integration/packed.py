"""Events of packed stores: select at the prompt's end, encode as tokens close."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.config import VllmConfig

from vllm_kvpress.integration.cells import NonfiniteNumbers, PackedStore, page_bytes
from vllm_kvpress.integration.events import EventRunner, LayerPages, PendingEvent
from vllm_kvpress.integration.kernel_form import attention_form
from vllm_kvpress.integration.lanes import cells_of
from vllm_kvpress.integration.pages import PageMap
from vllm_kvpress.integration.plugin import policy_of
from vllm_kvpress.packed_plan import Move, PackedPlan
from vllm_kvpress.policies import Scorer, select_tokens


class PackedEventRunner(EventRunner):
    """Runs the events of a packed store: select at the prompt's end, encode as tokens close.

    Attributes:
        attention: Reads what the events wrote.
        nonfinite: NaN and infinite numbers met so far.
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
        super().__init__(plan, scorer, page_map, layers)
        self.nonfinite = NonfiniteNumbers(layers[0].pages.device)
        self.stores = _stores_of(vllm_config, layers[0], self.nonfinite)
        form = attention_form(layers[0].pages.device)
        self.attention = form(self.stores, page_map, layers)

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
        table = event.tables[lane].int()
        self.stores[lane].write(page_bytes(layer), table, start, keys, values)


def _gathered(numbers: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns `numbers`, [num_kv_heads, num_tokens, head_size], at int64 [num_kv_heads, n]."""
    return numbers.gather(1, positions[:, :, None].expand(-1, -1, numbers.shape[2]))


def _complement(kept: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Returns the positions of [start, end) that are not kept, ascending in each row."""
    lost = torch.ones(len(kept), end - start, dtype=torch.bool, device=kept.device)
    lost.scatter_(1, kept - start, False)
    return start + lost.nonzero()[:, 1].view(len(kept), -1)


def _stores_of(
    vllm_config: VllmConfig, layer: LayerPages, nonfinite: NonfiniteNumbers
) -> dict[str, PackedStore]:
    """Returns what reads and writes each lane of packed cells."""
    policy = policy_of(vllm_config)
    assert policy is not None
    assert policy.quantize is not None
    spec = layer.layer.get_kv_cache_spec(vllm_config)
    stores = {}
    for lane, codecs in (("kv_store", policy.quantize), ("kv_demoted", policy.quantize.losers)):
        if codecs is not None:
            form = cells_of(codecs, spec)
            assert form is not None
            stores[lane] = PackedStore(
                form, codecs, page_bytes(layer), layer.pages.dtype, nonfinite
            )
    return stores
