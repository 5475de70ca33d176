"""The worker's side of a policy: from logical to physical, step by step.

vLLM builds the attention metadata of a step group by group; the private lanes' builders leave
their block tables here, the staging lane's builder, which comes last, calls `begin_step`:

    1. run the events that became due in the step before (`events.py`)
    2. note the events that this step makes due
    3. replace block table and lengths by what the plan says attention reads
    4. say which of this step's queries belong to an observation window

RoPE positions and slot mappings stay logical.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress import plan_rows
from vllm_kvpress.errors import UnsupportedVLLMError
from vllm_kvpress.integration.compat import Rows, rows_of, skip_slot_mappings
from vllm_kvpress.integration.events import (
    EventRunner,
    LayerPages,
    PendingEvent,
    first_kv_head,
)
from vllm_kvpress.integration.lanes import PrivateSpec, plan_in
from vllm_kvpress.integration.packed import PackedEventRunner
from vllm_kvpress.integration.packed_attention import StoreAttention
from vllm_kvpress.integration.packed_lane import PackedLane
from vllm_kvpress.integration.pages import PageMap, flat_pages
from vllm_kvpress.integration.skipped import SkippedSpec
from vllm_kvpress.integration.tables import BatchLayout, PhysicalTables, QueryWindow
from vllm_kvpress.packed_plan import PackedPlan
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.policies import Scorer


@dataclass(frozen=True)
class Step:
    """What the stock builder is given, and the query rows to keep.

    Attributes:
        common: Physical metadata.
        query_window: Which queries belong to an observation window, if any are kept.
        packed: What attention over packed cells goes by, where the step has any: `common` itself
            where staging is packed, else the step of a `StoreAttention`.
    """

    common: CommonAttentionMetadata
    query_window: QueryWindow | None
    packed: Any = None


@dataclass(frozen=True, eq=False)
class SteadyBatch:
    """A batch of decoding requests and how far its layout serves: nothing is due until then.

    Attributes:
        num_reqs: Rows of the step, padding included.
        prompts: Prompt lengths, as bytes.
        since: Computed tokens from which on the layout serves, [num_real_reqs].
        until: Computed tokens below which it serves, [num_real_reqs].
        layout: What attention reads.
    """

    num_reqs: int
    prompts: bytes
    since: np.ndarray
    until: np.ndarray
    layout: BatchLayout | None

    def covers(self, rows: Rows, num_reqs: int) -> bool:
        return (
            num_reqs == self.num_reqs
            and rows.prompts.tobytes() == self.prompts
            and bool(((rows.starts >= self.since) & (rows.ends < self.until)).all())
        )


class Events(Protocol):
    """What runs events: an `EventRunner`, or several."""

    def run(self, events: list[PendingEvent]) -> None:
        """Runs the events, in order."""
        ...


class LaneRuntime:
    """One worker's lanes: made with the model's first attention layer, bound to its caches later.

    Args:
        scorer: The policy's scorer.
        vllm_config: The engine's configuration.

    Attributes:
        layer_names: Attention layers under the policy, in the model's order.
        tables: Block tables of the private lanes in the step being built,
            each int32 [num_reqs, max_blocks].
        skipped_tables: Block tables of skipped layers in that step, by a group's first layer.
        pending: Events that are due, to be run before the next step.
        plan: The retention plan, once the caches exist.
        events: Runs events; None if the plan has no store.
        packed: Attention over packed cells, if the plan has them: a store's, or staging's own.
    """

    def __init__(self, scorer: Scorer, vllm_config: VllmConfig) -> None:
        self.scorer = scorer
        self.vllm_config = vllm_config
        self.layer_names: list[str] = []
        self.tables: dict[str, torch.Tensor] = {}
        self.skipped_tables: dict[str, torch.Tensor] = {}
        self.pending: list[PendingEvent] = []
        self.plan: RetentionPlan | None = None
        self._runner: weakref.ref[Any] | None = None
        self.events: Events | None = None
        self.packed: StoreAttention | PackedLane | None = None
        self._pages: list[torch.Tensor] = []
        # Of each group of skipped layers, by its first layer: tokens in a block, and the pages.
        self._skipped_pages: dict[str, tuple[int, list[torch.Tensor]]] = {}
        self._foreign_bytes = False
        self._physical: PhysicalTables | None = None
        self._steady: SteadyBatch | None = None

    def attach(self, runner: Any) -> None:
        """Binds the runner and its allocated caches; runs once the engine has made them.

        Raises:
            UnsupportedVLLMError: if lanes of one layer do not share their memory, or a
                backend splits our blocks.
            CapacityError: if the budget cannot hold sinks and recent tokens at this block size.
        """
        self._runner = weakref.ref(runner)
        groups = runner.kv_cache_config.kv_cache_groups
        plan = plan_in(groups)
        assert plan is not None
        plan.check()
        self.plan = plan
        self.pending.clear()
        self._steady = None
        private = [
            i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, PrivateSpec)
        ]
        skip_slot_mappings(runner, private)
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in self.layer_names]
        for name, layer in zip(self.layer_names, layers, strict=True):
            self._check_layer(name, layer, context)
        dtype = self.vllm_config.model_config.dtype
        page_map = PageMap.learn(layers[0], dtype) if plan.store else None
        pages = []
        first = first_kv_head(self.vllm_config)
        kv_heads = tuple(range(first, first + layers[0].kv_cache.shape[1]))
        for name, layer in zip(self.layer_names, layers, strict=True):
            layer_pages = flat_pages(layer.kv_cache)
            queries = layer_pages.view(dtype)
            if plan.query_window:
                layer.impl.query_pages = queries
            pages.append(LayerPages(name, layer_pages, queries, layer, kv_heads))
        self._pages = [layer_pages.pages for layer_pages in pages]
        for group in groups:
            if isinstance(group.kv_cache_spec, SkippedSpec):
                caches = [context[name].kv_cache for name in group.layer_names]
                flat = [flat_pages(cache) for cache in caches]
                self._skipped_pages[group.layer_names[0]] = caches[0].shape[2], flat
        quantized = self._pages[0].dtype != dtype
        self._foreign_bytes = foreign_bytes(plan, quantized)
        if page_map is not None:
            self.events = event_runner(plan, self.scorer, page_map, pages, self.vllm_config)
            self.packed = getattr(self.events, "attention", None)
        elif plan.packs_on_write:
            self.packed = PackedLane(self.vllm_config, pages)
        self._physical = PhysicalTables(plan, self.vllm_config, layers[0].kv_cache.device)

    def _check_whole_blocks(self, kv_cache: torch.Tensor) -> None:
        assert self.plan is not None
        if kv_cache.shape[2] != self.plan.block_size:
            raise UnsupportedVLLMError(
                "the attention backend splits blocks into smaller kernel blocks",
                got=f"kernel blocks of {kv_cache.shape[2]} tokens, --block-size "
                f"{self.plan.block_size}",
                allowed="a block size that the backend takes whole",
                fix=f"Use --block-size {kv_cache.shape[2]}",
            )

    def _check_layer(self, name: str, layer: Any, context: dict[str, Any]) -> None:
        self._check_whole_blocks(layer.kv_cache)
        for lane_name, lane in context.items():
            if getattr(lane, "base", None) is not layer:
                continue
            same = (lane.kv_cache.data_ptr(), lane.kv_cache.stride()) == (
                layer.kv_cache.data_ptr(),
                layer.kv_cache.stride(),
            )
            if not same:
                raise UnsupportedVLLMError(
                    f"{lane_name} does not alias the cache of {name}",
                    allowed="lanes of one layer at one address with equal strides",
                    fix="Report this with the model's name: its layers were grouped unevenly",
                )

    def run_pending(self) -> None:
        """Runs the events that are due."""
        if self.pending:
            assert self.events is not None
            pending, self.pending = self.pending, []
            self.events.run(pending)

    def begin_step(self, common: CommonAttentionMetadata) -> Step:
        """Returns the physical metadata of a step that is about to run."""
        assert self._physical is not None
        assert self.plan is not None
        self.run_pending()
        rows = rows_of(self._runner() if self._runner else None, common)
        if rows is None:
            return self.capture_step(common)
        if self._foreign_bytes:
            self._clear_fresh_blocks(rows, common)
        steady = self._steady
        if steady is not None and steady.covers(rows, common.num_reqs):
            return self._step(common, steady.layout, self._physical.no_window(common))
        prompts, starts, ends = (
            column.astype(np.int64) for column in (rows.prompts, rows.starts, rows.ends)
        )
        layout = BatchLayout.of(self.plan, prompts, starts, common.num_reqs)
        until = plan_rows.steady_until(self.plan, prompts, starts)
        self._steady = SteadyBatch(common.num_reqs, rows.prompts.tobytes(), starts, until, layout)
        self._note_due_events(prompts, starts, ends, common)
        window = None
        if self.plan.query_window:
            window = self._physical.query_window(
                prompts, starts, ends, rows.query_starts, self.tables["kv_queries"]
            )
        return self._step(common, layout, window)

    def _clear_fresh_blocks(self, rows: Rows, common: CommonAttentionMetadata) -> None:
        """Zeroes the blocks that this step begins and leaves partly empty.

        Kernels multiply what lies behind the last token by a weight of zero, and the bytes that
        another lane left there may read as NaN. It runs behind the events: one of a request that
        is gone may have written into a block that has a new owner.
        """
        assert self.plan is not None
        clear_fresh(rows, self.plan.block_size, common.block_table_tensor, self._pages)
        for name, (size, pages) in self._skipped_pages.items():
            clear_fresh(rows, size, self.skipped_tables[name], pages)

    def _step(
        self,
        common: CommonAttentionMetadata,
        layout: BatchLayout | None,
        window: QueryWindow | None,
    ) -> Step:
        assert self._physical is not None
        store = self.tables.get("kv_store")
        if self.packed is None or isinstance(self.packed, PackedLane):
            return self._whole(self._physical.replace(common, layout, store), window)
        # The head of a physical table are the exact sinks, which staging holds.
        physical = self._physical.replace(common, layout, None)
        if layout is None:
            return Step(physical, window)
        num_tokens = {"kv_store": layout.store_tokens, "kv_demoted": layout.demoted_tokens}
        packed = self.packed.step(physical, self.tables, num_tokens)
        return Step(physical, window, packed)

    def capture_step(self, common: CommonAttentionMetadata) -> Step:
        """Returns the metadata of a dummy step, in the buffers that real steps use."""
        if self._physical is None:  # memory profiling runs before the caches exist
            return Step(common, None)
        return self._whole(self._physical.untouched(common), self._physical.no_window(common))

    def _whole(self, physical: CommonAttentionMetadata, window: QueryWindow | None) -> Step:
        """Returns a step whose blocks are all alike: those of the stock kernel, or packed ones."""
        return Step(physical, window, physical if isinstance(self.packed, PackedLane) else None)

    def _note_due_events(
        self,
        prompts: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        common: CommonAttentionMetadata,
    ) -> None:
        plan = self.plan
        assert plan is not None
        for row in plan_rows.may_be_due(plan, prompts, starts, ends):
            prompt, start, end = int(prompts[row]), int(starts[row]), int(ends[row])
            event = plan.due_event(prompt, start, end)
            if event:
                self.pending.append(
                    PendingEvent(
                        num_prompt_tokens=prompt,
                        before=plan.layout(prompt, start),
                        start=start,
                        event=event,
                        staging=common.block_table_tensor[row].clone(),
                        tables={lane: table[row].clone() for lane, table in self.tables.items()},
                    )
                )


def event_runner(
    plan: RetentionPlan,
    scorer: Scorer,
    page_map: PageMap,
    layers: list[LayerPages],
    vllm_config: VllmConfig,
) -> EventRunner:
    """Returns what runs the events of a plan that has a store; see `EventRunner`."""
    if isinstance(plan, PackedPlan):
        return PackedEventRunner(plan, scorer, page_map, layers, vllm_config)
    return EventRunner(plan, scorer, page_map, layers)


def foreign_bytes(plan: RetentionPlan, quantized: bool) -> bool:
    """Whether a private lane leaves bytes that another lane, in its own dtype, takes for NaN.

    Args:
        plan: The retention plan.
        quantized: Whether the cache's dtype is not the model's.
    """
    packs = isinstance(plan, PackedPlan)
    return bool(packs or plan.positions_per_block or (quantized and plan.query_window))


def clear_fresh(rows: Rows, size: int, table: torch.Tensor, pages: list[torch.Tensor]) -> None:
    """Zeroes the blocks that a step begins and leaves partly empty.

    Args:
        rows: Its requests.
        size: Tokens in a block.
        table: Logical block ids, int32 [num_reqs, max_blocks].
        pages: Of each layer, [num_blocks, page_elements].
    """
    last = (rows.ends - 1) // size
    fresh = np.flatnonzero((rows.ends % size != 0) & (rows.starts <= last * size))
    if len(fresh):
        blocks = table[fresh.tolist(), last[fresh].tolist()].long()
        for layer_pages in pages:
            layer_pages[blocks] = 0


def find_runtime(vllm_config: VllmConfig, run: int | None = None) -> LaneRuntime | None:
    """Returns the runtime that an engine's attention layers share, if any was made.

    Args:
        vllm_config: The engine's configuration.
        run: Under a head plan, the run of heads whose runtime is wanted.
    """
    for layer in vllm_config.compilation_config.static_forward_context.values():
        impl = getattr(layer, "impl", None)
        if run is None:
            runtime = getattr(impl, "lane_runtime", None)
        else:
            head_runs = getattr(impl, "head_runs", None)
            runtime = None if head_runs is None else head_runs.runtimes.get(run)
        if runtime is not None:
            return runtime  # type: ignore[no-any-return]
    return None
