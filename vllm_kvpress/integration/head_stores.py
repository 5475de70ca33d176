"""Stores inside the retrieval heads of a head plan; the others stream as ever, in exact numbers.

A run of retrieval heads (`head_groups.py`) is to eviction, and to codecs that do not pack tokens as
they are written, what all layers are elsewhere: it has a staging group, a store group and, for
scorers that read queries, a query group, and a `RunRuntime` that runs its events. A lane of some
heads of a layer is what elsewhere is a layer.

    run 0    queries  store  staging        three cache groups; block ids alias, lane by lane
    run 1    queries  store  staging
    run 2    streaming

Lanes of a run differ in their number of heads, so each number has its own map of pages and, packed,
its own cells. They share block tables: the lane that needs the most blocks says how many
(`planner.widest_plan`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import iter_layer_specs

from vllm_kvpress.config import Policy
from vllm_kvpress.errors import UnsupportedVLLMError
from vllm_kvpress.integration.compat import rows_of, skip_slot_mappings
from vllm_kvpress.integration.events import (
    EventRunner,
    LayerPages,
    PendingEvent,
    first_kv_head,
)
from vllm_kvpress.integration.head_lanes import RetrievalSpec, StreamSpec
from vllm_kvpress.integration.lanes import (
    LaneSpec,
    PrivateSpec,
    StagingSpec,
    plan_of,
    private_lanes,
)
from vllm_kvpress.integration.packed import PackedEventRunner
from vllm_kvpress.integration.pages import PageMap, flat_pages
from vllm_kvpress.integration.tables import PhysicalTables
from vllm_kvpress.integration.worker import (
    LaneRuntime,
    Step,
    clear_fresh,
    event_runner,
    foreign_bytes,
)
from vllm_kvpress.planner import widest_plan
from vllm_kvpress.policies import Scorer, resolve

__all__ = ["HeadRuns", "RunRuntime", "head_runs", "join_run", "storing_part", "storing_spec"]


def storing_part(inner_impl: type[Any]) -> type[Any]:
    """Returns a form of the stock impl whose lane has a store beside it.

    It keeps the observation window's queries, and leaves steps with packed cells to the run.
    """

    class StoringPart(inner_impl):  # type: ignore[misc, valid-type]
        query_pages: torch.Tensor | None = None
        lane: LaneView | None = None  # of retrieval heads

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            window = attn_metadata.kv_query_window
            if window is not None:
                window.save(query, self.query_pages)
            step = attn_metadata.kv_stores
            if step is not None:
                assert self.lane is not None
                return self.lane.runtime.packed.attend(self.lane, query, step, *args, **kwargs)
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
            )

    StoringPart.__qualname__ = StoringPart.__name__ = f"StoringPart{inner_impl.__name__}"
    return StoringPart


def storing_spec(
    spec: RetrievalSpec | StreamSpec,
    policy: Policy,
    sizes: Sequence[int],
    group: int,
    vllm_config: VllmConfig,
) -> StagingSpec | StreamSpec:
    """Returns the spec of a lane beside stores.

    Args:
        spec: The spec of the lane under the head plan alone.
        policy: The policy.
        sizes: How many KV heads lanes of retrieval heads have, each number once.
        group: Query heads of a KV head.
        vllm_config: The engine's configuration.
    """
    if isinstance(spec, StreamSpec):
        return replace(spec, shares_outputs=False)
    model = vllm_config.model_config
    layers = model.get_total_num_hidden_layers()
    scorer = resolve(policy)
    plans = [
        plan_of(policy, scorer, replace(spec, num_kv_heads=size), size * group, layers, model.dtype)
        for size in sizes
    ]
    return StagingSpec.of(spec, widest_plan(plans))


class LaneView:
    """A lane of retrieval heads in the shape of a layer, as events and attention look at it.

    Attributes:
        heads: KV heads, as this rank numbers them.
        impl: The stock impl for them.
        runtime: Of the lane's run.
    """

    def __init__(
        self, heads: Sequence[int], layer: Any, owner: Any, impl: Any, runtime: RunRuntime
    ) -> None:
        self.heads = heads
        self._layer = layer
        self._owner = owner
        self.impl = impl
        self.runtime = runtime

    @property
    def kv_cache(self) -> torch.Tensor:
        """The lane's cache."""
        return self._owner.kv_cache  # type: ignore[no-any-return]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        """Returns the lane's own spec."""
        return self._owner.get_kv_cache_spec(vllm_config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class RunEvents:
    """Runs events on the lanes of a run.

    Attributes:
        runners: One for the lanes of equally many heads.
        attention: Over packed cells, if the run's stores have them.
    """

    def __init__(self, runners: list[EventRunner]) -> None:
        self.runners = runners
        packed = [runner for runner in runners if isinstance(runner, PackedEventRunner)]
        self.attention = RunAttention(packed) if packed else None

    def run(self, events: list[PendingEvent]) -> None:
        """Runs the events, in order, on every lane."""
        for runner in self.runners:
            runner.run(events)


class RunAttention:
    """Attention over the packed cells of a run; lanes of each size have cells of their own.

    Args:
        runners: One for the lanes of equally many heads.
    """

    def __init__(self, runners: list[PackedEventRunner]) -> None:
        self._forms = [runner.attention for runner in runners]
        self._form_of = {
            id(pages.layer): number
            for number, runner in enumerate(runners)
            for pages in runner.layers
        }

    def step(
        self,
        common: CommonAttentionMetadata,
        tables: dict[str, torch.Tensor],
        num_tokens: dict[str, np.ndarray],
    ) -> list[Any]:
        """Returns what lanes of each size read."""
        return [form.step(common, tables, num_tokens) for form in self._forms]

    def attend(
        self, layer: Any, query: torch.Tensor, step: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Writes a lane's attention output; see `PackedAttention.attend`."""
        number = self._form_of[id(layer)]
        return self._forms[number].attend(layer, query, step[number], *args, **kwargs)


class RunRuntime(LaneRuntime):
    """The worker's side of the stores in one run of retrieval heads.

    Args:
        scorer: The policy's scorer.
        vllm_config: The engine's configuration.
        run: The run.
    """

    def __init__(self, scorer: Scorer, vllm_config: VllmConfig, run: int) -> None:
        super().__init__(scorer, vllm_config)
        self.run = run
        self.lanes: dict[str, LaneView] = {}

    def attach(self, runner: Any) -> None:
        """Binds the runner and its allocated caches; see `LaneRuntime.attach`."""
        self._runner = weakref.ref(runner)
        self.pending.clear()
        self._steady = None
        private = []
        for index, group in enumerate(runner.kv_cache_config.kv_cache_groups):
            spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
            if isinstance(spec, LaneSpec) and spec.run == self.run:
                self.plan = spec.plan
                private += [index] if isinstance(spec, PrivateSpec) else []
        assert self.plan is not None
        self.plan.check()
        skip_slot_mappings(runner, private)
        dtype = self.vllm_config.model_config.dtype
        by_size: dict[int, list[LayerPages]] = {}
        first = first_kv_head(self.vllm_config)
        for name, lane in self.lanes.items():
            self._check_lane(name, lane)
            pages = flat_pages(lane.kv_cache)
            queries = pages.view(dtype)
            lane.impl.query_pages = queries
            one = LayerPages(name, pages, queries, lane, tuple(first + head for head in lane.heads))
            by_size.setdefault(lane.kv_cache.shape[1], []).append(one)
        maps = [(PageMap.learn(lanes[0].layer, dtype), lanes) for lanes in by_size.values()]
        self.events = RunEvents(
            [event_runner(self.plan, self.scorer, *one, self.vllm_config) for one in maps]
        )
        self.packed = self.events.attention
        self._pages = [one.pages for lanes in by_size.values() for one in lanes]
        self._foreign_bytes = foreign_bytes(self.plan, self._pages[0].dtype != dtype)
        self._physical = PhysicalTables(self.plan, self.vllm_config, self._pages[0].device)

    def _check_lane(self, name: str, lane: LaneView) -> None:
        self._check_whole_blocks(lane.kv_cache)
        context = self.vllm_config.compilation_config.static_forward_context
        place = lane.kv_cache.data_ptr(), lane.kv_cache.stride()
        assert self.plan is not None
        for suffix in private_lanes(self.plan):
            other = context[f"{name}.{suffix}"].kv_cache
            if (other.data_ptr(), other.stride()) != place:
                raise UnsupportedVLLMError(
                    f"{name}.{suffix} does not alias the cache of {name}",
                    allowed="lanes of the same heads at one address with equal strides",
                    fix="Report this with the model's name: its lanes were laid out unevenly",
                )

    def clear_for(
        self, common: CommonAttentionMetadata, block_size: int, pages: list[torch.Tensor]
    ) -> None:
        """Zeroes the blocks that a step begins in other lanes, if a store may have had them.

        Args:
            common: The step, with those lanes' block table.
            block_size: Tokens in a block.
            pages: Those lanes', each [num_blocks, page_elements].
        """
        if not self._foreign_bytes:
            return
        rows = rows_of(self._runner() if self._runner else None, common)
        if rows is not None:
            clear_fresh(rows, block_size, common.block_table_tensor, pages)


@dataclass
class HeadRuns:
    """The runs of a head plan whose retrieval heads have stores, on one worker.

    Attributes:
        runtimes: Of the runs of retrieval heads, by run; from 0 on, there is one at least.
        streaming: What owns the caches of streaming lanes, by run.
    """

    runtimes: dict[int, RunRuntime]
    streaming: dict[int, list[Any]] = field(default_factory=dict)
    _pages: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # of `streaming`
    _built: dict[int, tuple[CommonAttentionMetadata, Step]] = field(default_factory=dict)
    _cleared: CommonAttentionMetadata | None = None

    def attach(self, runner: Any) -> None:
        """Binds the runner and its allocated caches; see `LaneRuntime.attach`."""
        for runtime in self.runtimes.values():
            runtime.attach(runner)
        self._pages = {
            run: [flat_pages(owner.kv_cache) for owner in owners]
            for run, owners in self.streaming.items()
        }

    def begin_step(self, run: int, common: CommonAttentionMetadata) -> Step:
        """Returns the physical metadata of a run's step; lanes of several sizes ask once each.

        The first run, which comes first, sees to the events of all. A request that is gone may
        have one due, whose blocks have new owners in other runs: those clear what they begin, and
        write, after it.
        """
        if run in self._built and self._built[run][0] is common:
            return self._built[run][1]
        if run == 0:
            for runtime in self.runtimes.values():
                runtime.run_pending()
        self._built[run] = common, self.runtimes[run].begin_step(common)
        return self._built[run][1]

    def clear_streaming(self, run: int, common: CommonAttentionMetadata, block_size: int) -> None:
        """Zeroes the blocks that a step begins in a run of streaming heads; after `begin_step`."""
        if self._cleared is not common:
            self._cleared = common
            self.runtimes[0].clear_for(common, block_size, self._pages.get(run, []))


def join_run(lane: Any, name: str, layer: Any, owner: Any, impl: Any, spec: Any) -> None:
    """Gives a retrieval lane its private lanes, and any lane a place among its run's.

    Args:
        lane: Its `HeadLane`.
        name: Its name in the forward context.
        layer: The attention layer.
        owner: What owns its cache: the layer itself or a virtual one.
        impl: The stock impl for its heads.
        spec: Its spec.
    """
    from vllm_kvpress.integration.backend import LaneLayer

    runs: HeadRuns = layer.impl.head_runs
    if lane.streams:
        runs.streaming.setdefault(lane.run, []).append(owner)
        return
    runtime = runs.runtimes[lane.run]
    impl.lane = runtime.lanes[name] = LaneView(lane.heads, layer, owner, impl, runtime)
    context = runtime.vllm_config.compilation_config.static_forward_context
    for suffix, spec_cls in private_lanes(spec.plan).items():
        context[f"{name}.{suffix}"] = LaneLayer(suffix, spec_cls, owner)


def head_runs(vllm_config: VllmConfig) -> HeadRuns | None:
    """Returns the runs of an engine's head plan; None if its retrieval heads have no stores."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        found = getattr(getattr(layer, "impl", None), "head_runs", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None
