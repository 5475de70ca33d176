"""Events: score, select and move the survivors of a request into its store.

An event reads only the caches: old store and staging for K and V, the query lane for the
observation window, the position lane for positions. It refers to blocks by id, never to rows of
a batch, so it may run when its request has moved, was preempted or is gone: a private block that
has a new owner by then is written by that owner before it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_kvpress.errors import ScoreError
from vllm_kvpress.integration.pages import PageMap, element_dtype, numbers
from vllm_kvpress.plan import Layout, RetentionPlan
from vllm_kvpress.policies import LayerObservation, Scorer, select_tokens


@dataclass(frozen=True)
class PendingEvent:
    """An event that is due: everything it needs, by block id.

    Attributes:
        num_prompt_tokens: The request's prompt length.
        before: What attention read until now.
        start: Computed tokens at the start of the step that made it due.
        event: The event's position.
        staging: Staging block ids, int32 [max_blocks].
        tables: Block ids of each private lane, int32 [max_blocks].
    """

    num_prompt_tokens: int
    before: Layout
    start: int
    event: int
    staging: torch.Tensor
    tables: dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerPages:
    """One attention layer under the policy.

    Attributes:
        name: Its name in the model.
        pages: Its cache, [num_blocks, page_elements].
        queries: The same bytes in the model's dtype, as the query lane reads them.
        layer: vLLM's `Attention`.
        kv_heads: Which of the model's KV heads it has here.
    """

    name: str
    pages: torch.Tensor
    queries: torch.Tensor
    layer: Any
    kv_heads: tuple[int, ...]

    @property
    def layer_idx(self) -> int:
        """Index of the layer in the model."""
        match = re.search(r"\.(\d+)\.", self.name)
        return int(match.group(1)) if match else 0

    @property
    def impl(self) -> Any:
        """The backend's implementation."""
        return self.layer.impl

    def numbers(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns what K and V as they lie in the cache stand for."""
        dtype, layer = element_dtype(self.layer), self.layer
        return (
            numbers(keys, dtype, layer._k_scale_float),
            numbers(values, dtype, layer._v_scale_float),
        )


Observer = Callable[[PendingEvent, int, torch.Tensor], None]


class EventRunner:
    """Runs events on all layers of a worker.

    Args:
        plan: The retention plan.
        scorer: Ranks the tokens.
        page_map: Where K and V lie in a page.
        layers: The layers, in the model's order.

    Attributes:
        observer: For tests and debugging: called with (event, layer index, kept indices
            [num_kv_heads, store tokens] into the tokens observed).
    """

    def __init__(
        self,
        plan: RetentionPlan,
        scorer: Scorer,
        page_map: PageMap,
        layers: list[LayerPages],
    ) -> None:
        self.plan = plan
        self.scorer = scorer
        self.page_map = page_map
        self.layers = layers
        self.observer: Observer | None = None
        self.label = f"scorer {type(scorer).__name__}"

    def run(self, events: list[PendingEvent]) -> None:
        """Runs the events, in order, on every layer."""
        for event in events:
            for layer in self.layers:
                self._run_layer(event, layer)

    def _run_layer(self, event: PendingEvent, layer: LayerPages) -> None:
        plan, page_map = self.plan, self.page_map
        block_size = plan.block_size
        tail = event.event % block_size
        num_tokens = (
            event.event - (event.before.first_block - event.before.head_blocks) * block_size
        )
        store = event.tables["kv_store"]
        last_block = -(-event.event // block_size)
        blocks = torch.cat(
            [
                store[: event.before.head_blocks],
                event.staging[event.before.first_block : last_block],
            ]
        ).long()
        keys, values = page_map.read(layer.pages, blocks)
        positions = self._positions(event, layer, num_tokens)
        scores = self._observe(
            event, layer, keys[:, :num_tokens], values[:, :num_tokens], positions
        )
        num_store_blocks = plan.store_blocks(event.num_prompt_tokens, event.event)
        kept = select_tokens(
            scores,
            num_store_blocks * block_size,
            plan.sink_tokens,
            max(0, plan.recent_tokens - tail),
            num_candidates=num_tokens - tail,
            context=self._label(layer),
        )
        index = kept[:, :, None].expand(-1, -1, page_map.head_dim)
        page_map.write(
            layer.pages,
            store[:num_store_blocks].long(),
            keys.gather(1, index),
            values.gather(1, index),
        )
        if plan.positions_per_block:
            assert positions is not None
            self._save_positions(event, layer, positions.gather(1, kept))
        if self.observer is not None:
            self.observer(event, layer.layer_idx, kept)

    def _label(self, layer: LayerPages) -> str:
        return f"{self.label}, layer {layer.layer_idx},"

    def _observe(
        self,
        event: PendingEvent,
        layer: LayerPages,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the scores of all tokens given, those of the open block included."""
        seen_keys, seen_values = layer.numbers(keys, values)
        observation = LayerObservation(
            keys=seen_keys,
            values=seen_values,
            queries=self._queries(event, layer),
            positions=positions if "positions" in self.scorer.needs else None,
            layer_idx=layer.layer_idx,
            kv_heads=layer.kv_heads,
            scale=layer.impl.scale,
        )
        return self._scores(observation, self._label(layer))

    def _scores(self, observation: LayerObservation, label: str) -> torch.Tensor:
        try:
            scores = self.scorer.score(observation)
        except Exception as error:
            raise ScoreError(
                f"{label} raised {type(error).__name__}: {error}",
                got=f"an observation of {observation.num_tokens} tokens, needs "
                f"{', '.join(sorted(self.scorer.needs)) or 'nothing'}",
                fix="Mend the scorer; does its `needs` name queries or positions if it reads them?",
            ) from error
        expected = (observation.num_kv_heads, observation.num_tokens)
        got = tuple(getattr(scores, "shape", ()))
        if got != expected:
            raise ScoreError(
                f"{label} did not score every token",
                got=f"shape {got}",
                allowed=f"[num_kv_heads, num_tokens] = {expected}",
            )
        return scores

    def _queries(self, event: PendingEvent, layer: LayerPages) -> torch.Tensor | None:
        """Returns the observation window, [num_heads, window, head_dim], or None."""
        plan = self.plan
        if not plan.query_window:
            return None
        heads, head_dim = layer.impl.num_heads, layer.impl.head_size
        blocks = event.tables["kv_queries"][: plan.query_blocks].long()
        rows = layer.queries[blocks][:, : plan.queries_per_block * heads * head_dim]
        queries = rows.reshape(-1, heads, head_dim)[: plan.query_window].transpose(0, 1)
        # With an fp8 cache vLLM may quantize queries too, before the backend sees them.
        if getattr(layer.layer, "query_quant", None) is None:
            return queries
        return queries * layer.layer._q_scale_float

    def _positions(
        self, event: PendingEvent, layer: LayerPages, num_tokens: int
    ) -> torch.Tensor | None:
        """Returns the observed tokens' positions, int64 [num_kv_heads, num_tokens], or None."""
        if "positions" not in self.scorer.needs:
            return None
        heads = self.page_map.num_kv_heads
        head_tokens = event.before.head_blocks * self.plan.block_size
        first = event.before.first_block * self.plan.block_size
        recent = torch.arange(first, first + num_tokens - head_tokens, device=layer.pages.device)
        recent = recent.expand(heads, -1)
        if not head_tokens:
            return recent
        lane = self._position_lane(event, layer)
        blocks = lane[event.tables["kv_positions"].long()[: self._position_blocks(head_tokens)]]
        stored = blocks.transpose(0, 1).flatten(1)[:, :head_tokens]
        return torch.cat([stored.long(), recent], dim=1)

    def _save_positions(
        self, event: PendingEvent, layer: LayerPages, positions: torch.Tensor
    ) -> None:
        per_block = self.plan.positions_per_block
        num_tokens = positions.shape[1]
        num_blocks = self._position_blocks(num_tokens)
        padded = positions.new_zeros(positions.shape[0], num_blocks * per_block)
        padded[:, :num_tokens] = positions
        lane = self._position_lane(event, layer)
        blocks = event.tables["kv_positions"].long()[:num_blocks]
        lane[blocks] = padded.unflatten(1, (num_blocks, per_block)).transpose(0, 1).int()

    def _position_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.plan.positions_per_block)

    def _position_lane(self, event: PendingEvent, layer: LayerPages) -> torch.Tensor:
        """Returns a layer's pages as int32 [num_blocks, num_kv_heads, positions_per_block]."""
        heads, per_block = self.page_map.num_kv_heads, self.plan.positions_per_block
        ints = layer.pages.view(torch.int32)[:, : heads * per_block]
        return ints.unflatten(1, (heads, per_block))


def first_kv_head(vllm_config: VllmConfig) -> int:
    """Returns the global index of this rank's first KV head."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks == 1:
        return 0
    total = vllm_config.model_config.get_total_num_kv_heads()
    return int(get_tensor_model_parallel_rank() * total // ranks)
