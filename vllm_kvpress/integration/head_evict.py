"""Eviction inside the retrieval heads of a head plan; the others stream as ever.

A run of retrieval heads (`head_groups.py`) is to eviction what all layers are elsewhere: it has a
staging group, a store group and, for scorers that read queries, a query group, and a `RunRuntime`
that runs its events. A lane of some heads of a layer is what elsewhere is a layer.

    run 0    queries  store  staging        three cache groups; block ids alias, lane by lane
    run 1    queries  store  staging
    run 2    streaming

Lanes of a run differ in their number of heads, so each number has its own map of pages.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import iter_layer_specs

from vllm_kvpress.config import Policy
from vllm_kvpress.errors import UnsupportedVLLMError
from vllm_kvpress.integration.compat import skip_slot_mappings
from vllm_kvpress.integration.events import EventRunner, LayerPages, PendingEvent
from vllm_kvpress.integration.head_lanes import RetrievalSpec, StreamSpec
from vllm_kvpress.integration.lanes import (
    LaneSpec,
    PrivateSpec,
    StagingSpec,
    plan_of,
    private_lanes,
)
from vllm_kvpress.integration.pages import PageMap, flat_pages
from vllm_kvpress.integration.tables import PhysicalTables
from vllm_kvpress.integration.worker import LaneRuntime, Step
from vllm_kvpress.policies import Scorer, resolve

__all__ = ["RunRuntime", "evicting_part", "evicting_spec", "join_run", "run_runtimes"]


def evicting_part(inner_impl: type[Any]) -> type[Any]:
    """Returns a form of the stock impl that keeps the observation window's queries."""

    class EvictingPart(inner_impl):  # type: ignore[misc, valid-type]
        query_pages: torch.Tensor | None = None

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
            window = getattr(attn_metadata, "kv_query_window", None)
            if window is not None:
                window.save(query, self.query_pages)
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
            )

    EvictingPart.__qualname__ = EvictingPart.__name__ = f"EvictingPart{inner_impl.__name__}"
    return EvictingPart


def evicting_spec(
    spec: RetrievalSpec | StreamSpec, policy: Policy, num_heads: int, vllm_config: VllmConfig
) -> StagingSpec | StreamSpec:
    """Returns the spec of a lane beside eviction.

    Args:
        spec: The spec of the lane under the head plan alone.
        policy: The policy.
        num_heads: Query heads of the lane.
        vllm_config: The engine's configuration.
    """
    if isinstance(spec, StreamSpec):
        return replace(spec, shares_outputs=False)
    model = vllm_config.model_config
    layers = model.get_total_num_hidden_layers()
    plan = plan_of(policy, resolve(policy), spec, num_heads, layers, model.dtype)
    return StagingSpec.of(spec, plan)


class LaneView:
    """A lane in the shape of a layer, as events look at it.

    Attributes:
        impl: The stock impl for the lane's heads.
    """

    def __init__(self, layer: Any, owner: Any, impl: Any) -> None:
        self._layer = layer
        self._owner = owner
        self.impl = impl

    @property
    def kv_cache(self) -> torch.Tensor:
        """The lane's cache."""
        return self._owner.kv_cache  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class RunEvents:
    """Runs events on the lanes of a run.

    Attributes:
        runners: One for the lanes of equally many heads.
    """

    def __init__(self, runners: list[EventRunner]) -> None:
        self.runners = runners

    def run(self, events: list[PendingEvent]) -> None:
        """Runs the events, in order, on every lane."""
        for runner in self.runners:
            runner.run(events)


class RunRuntime(LaneRuntime):
    """The worker's side of eviction in one run of retrieval heads.

    Args:
        scorer: The policy's scorer.
        vllm_config: The engine's configuration.
        run: The run.
    """

    def __init__(self, scorer: Scorer, vllm_config: VllmConfig, run: int) -> None:
        super().__init__(scorer, vllm_config)
        self.run = run
        self.lanes: dict[str, LaneView] = {}
        self._built: tuple[CommonAttentionMetadata, Step] | None = None

    def attach(self, runner: Any) -> None:
        """Binds the runner and its allocated caches; see `LaneRuntime.attach`."""
        self._runner = weakref.ref(runner)
        self.pending.clear()
        self._steady = self._built = None
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
        for name, lane in self.lanes.items():
            self._check_lane(name, lane)
            pages = flat_pages(lane.kv_cache)
            queries = pages.view(dtype)
            lane.impl.query_pages = queries
            one = LayerPages(name, pages, queries, lane)
            by_size.setdefault(lane.kv_cache.shape[1], []).append(one)
        maps = [(PageMap.learn(lanes[0].layer, dtype), lanes) for lanes in by_size.values()]
        self.events = RunEvents(
            [EventRunner(self.plan, self.scorer, *one, self.vllm_config) for one in maps]
        )
        device = next(iter(self.lanes.values())).kv_cache.device
        self._physical = PhysicalTables(self.plan, self.vllm_config, device)

    def _check_lane(self, name: str, lane: LaneView) -> None:
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

    def begin_step(self, common: CommonAttentionMetadata) -> Step:
        """Returns the physical metadata of a step; lanes of several sizes ask once each."""
        if self._built is None or self._built[0] is not common:
            self._built = common, super().begin_step(common)
        return self._built[1]


def join_run(lane: Any, name: str, layer: Any, owner: Any, impl: Any, spec: Any) -> None:
    """Gives a retrieval lane its private lanes, and a place among its run's.

    Args:
        lane: Its `HeadLane`.
        name: Its name in the forward context.
        layer: The attention layer.
        owner: What owns its cache: the layer itself or a virtual one.
        impl: The stock impl for its heads.
        spec: Its staging spec.
    """
    from vllm_kvpress.integration.backend import LaneLayer

    runtime = layer.impl.run_runtimes[lane.run]
    runtime.lanes[name] = LaneView(layer, owner, impl)
    context = runtime.vllm_config.compilation_config.static_forward_context
    for suffix, spec_cls in private_lanes(spec.plan).items():
        context[f"{name}.{suffix}"] = LaneLayer(suffix, spec_cls, owner)


def run_runtimes(vllm_config: VllmConfig) -> dict[int, RunRuntime]:
    """Returns the runtimes of an engine's runs of retrieval heads; empty if none evicts."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        found = getattr(getattr(layer, "impl", None), "run_runtimes", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return {}
