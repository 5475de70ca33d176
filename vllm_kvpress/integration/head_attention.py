"""The attention backend of a head plan: the stock backend, once for each lane of a layer.

    impl      cuts queries, keys and values by head, lets the stock impl (or its packed form,
              `head_packed.py`) write and attend each lane's part over the lane's own cache, and
              puts the outputs together
    builder   makes the stock metadata of a lane's heads; for streaming lanes, of one row for each
              block of queries (see `window_rows.py`)

A layer whose heads are of one kind, in one run, has one lane and costs no cut. The first lane is
the layer's own; others are virtual layers beside it, `<layer>.kv_lane1` and so on.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kvpress.config import Policy
from vllm_kvpress.head_figures import HeadFigures
from vllm_kvpress.head_groups import HeadGroups, HeadLane, group_heads
from vllm_kvpress.integration.head_compensation import compensated_impl, step_of
from vllm_kvpress.integration.head_lanes import HeadLaneSpec, StreamSpec, lane_spec
from vllm_kvpress.integration.head_packed import packed_part
from vllm_kvpress.integration.head_stores import (
    HeadRuns,
    RunRuntime,
    head_runs,
    join_run,
    storing_part,
    storing_spec,
)
from vllm_kvpress.integration.lanes import LaneSpec, packed_spec
from vllm_kvpress.integration.plugin import policy_of
from vllm_kvpress.integration.skipped import block_outermost
from vllm_kvpress.policies import resolve
from vllm_kvpress.policies.heads import HeadPlan
from vllm_kvpress.window_plan import WindowPlan
from vllm_kvpress.window_rows import window_rows

__all__ = ["figures_of", "head_backend", "window_metadata"]


def head_backend(inner: type[AttentionBackend], policy: Policy) -> dict[str, Any]:
    """Returns the members of a subclass of `inner` that keeps what the head plan keeps."""
    inner_impl = part_impl = inner.get_impl_cls()
    members: dict[str, Any] = {}
    if policy.heads_store:
        part_impl = storing_part(inner_impl)
    elif policy.packs_on_write:
        assert policy.quantize is not None
        part_impl = packed_part(inner_impl, policy.quantize)
        members["forward_includes_kv_cache_update"] = False
    impl_cls = _head_impl(inner_impl, part_impl, policy)
    builder_cls = _head_builder(inner.get_builder_cls())
    layouts = block_outermost(inner)
    return {
        **members,
        "supported_kv_cache_layouts": classmethod(lambda cls: layouts),
        "get_impl_cls": staticmethod(lambda: impl_cls),
        "get_builder_cls": staticmethod(lambda: builder_cls),
    }


class LanePart:
    """A lane in the hands of the layer's impl.

    Attributes:
        heads: The lane.
        impl: The stock impl for the lane's heads.
        layer: What owns the lane's cache: the layer itself or a virtual one.
        name: Its name in the forward context.
        queries: Query heads, int64 [num_heads of the lane].
        keys: KV heads, int64 [num_kv_heads of the lane].
    """

    def __init__(self, lane: HeadLane, impl: Any, layer: Any, name: str, group: int) -> None:
        self.heads = lane
        self.impl = impl
        self.layer = layer
        self.name = name
        self.keys = torch.tensor(lane.heads)
        self.queries = (self.keys[:, None] * group + torch.arange(group)).flatten()

    def to(self, device: torch.device) -> None:
        """Moves the head indices to where the tensors are."""
        if self.keys.device != device:
            self.keys, self.queries = self.keys.to(device), self.queries.to(device)


def _head_impl(inner_impl: type[Any], part_impl: type[Any], policy: Policy) -> type[Any]:
    """Returns the impl of a layer, over parts of class `part_impl`."""

    class HeadImpl(inner_impl):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._vllm_config = get_current_vllm_config()
            self.head_groups = _shared_groups(self._vllm_config, policy)
            self.parts: list[LanePart] = []
            if policy.heads_store:
                runs = range(self.head_groups.runs.retrieval)
                self.head_runs = head_runs(self._vllm_config) or HeadRuns(
                    {run: RunRuntime(resolve(policy), self._vllm_config, run) for run in runs}
                )

        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            super().process_weights_after_loading(act_dtype)
            if not self.parts:
                self.parts = _add_lanes(self, part_impl, policy, self._vllm_config)

        def do_kv_cache_update(
            self,
            layer: Any,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            slot_mapping: torch.Tensor,
        ) -> None:
            mappings = get_forward_context().slot_mapping
            for part in self.parts:
                part.to(key.device)
                part.impl.do_kv_cache_update(
                    layer,
                    key.index_select(1, part.keys),
                    value.index_select(1, part.keys),
                    part.layer.kv_cache,
                    mappings[part.name],
                )

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if attn_metadata is None:  # memory profiling
                return super().forward(
                    layer, query, key, value, kv_cache, None, output, *args, **kwargs
                )
            metadata = get_forward_context().attn_metadata
            for part in self.parts:
                part.to(query.device)
                part_query = query.index_select(1, part.queries)
                part_output = torch.empty_like(part_query, dtype=output.dtype)
                part.impl.forward(
                    layer,
                    part_query,
                    key.index_select(1, part.keys),
                    value.index_select(1, part.keys),
                    part.layer.kv_cache,
                    metadata[part.name],
                    part_output,
                    *args,
                    **kwargs,
                )
                output.index_copy_(1, part.queries, part_output)
            return output

    HeadImpl.__qualname__ = HeadImpl.__name__ = f"Head{inner_impl.__name__}"
    return HeadImpl


def _head_builder(inner_builder: type[Any]) -> type[Any]:
    class HeadBuilder(inner_builder):  # type: ignore[misc, valid-type]
        # V1 would skip build() for a second equal group and hand on its table.
        supports_update_block_table = False
        # The number of rows of a step varies: no graph over a whole step.
        _cudagraph_support = AttentionCGSupport.NEVER

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.head_runs = head_runs(self.vllm_config)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            spec, common = self.kv_cache_spec, common_attn_metadata
            query_window = compensation = stores = None
            runs = self.head_runs
            if isinstance(spec, StreamSpec) and runs is not None:
                runs.clear_streaming(spec.run, common, spec.block_size)
            if isinstance(spec, StreamSpec) and spec.window.compensates:
                compensation = step_of(spec.window, common)  # all that these lanes read
            elif isinstance(spec, StreamSpec):
                common = window_metadata(spec.window, common)
            elif isinstance(spec, LaneSpec):
                assert runs is not None
                assert spec.run is not None
                step = runs.begin_step(spec.run, common)
                common, query_window, stores = step.common, step.query_window, step.packed
            metadata = super().build(common_prefix_len, common, fast_build)
            metadata.kv_query_window = query_window
            metadata.kv_stores = stores
            metadata.kv_packed = common  # what packed lanes go by
            metadata.kv_compensation = compensation
            return metadata

    HeadBuilder.__qualname__ = HeadBuilder.__name__ = f"Head{inner_builder.__name__}"
    return HeadBuilder


def window_metadata(window: WindowPlan, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """Returns `common` with a row for each block of queries; logical for a dummy batch."""
    if common.seq_lens_cpu_upper_bound is None:
        return common
    query_starts = common.query_start_loc_cpu.numpy().astype(np.int64)
    ends = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
    rows = window_rows(window, query_starts, ends)
    device = common.block_table_tensor.device
    requests = torch.from_numpy(rows.requests).to(device, non_blocking=True)
    columns = torch.from_numpy(rows.columns).to(device, non_blocking=True)
    starts_cpu, lengths_cpu = torch.from_numpy(rows.query_starts), torch.from_numpy(rows.lengths)
    return common.replace(
        num_reqs=len(rows.requests),
        query_start_loc=starts_cpu.to(device, non_blocking=True),
        query_start_loc_cpu=starts_cpu,
        seq_lens=lengths_cpu.to(device, non_blocking=True),
        seq_lens_cpu_upper_bound=lengths_cpu,
        max_query_len=int(np.diff(rows.query_starts).max()),
        max_seq_len=int(rows.lengths.max()),
        block_table_tensor=common.block_table_tensor[requests[:, None], columns],
        is_prefilling=None,
        req_idx=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class HeadLaneLayer(AttentionLayerBase):
    """A further lane of an attention layer, in the shape of a layer that owns a cache.

    Args:
        base: The attention layer.
        impl: The stock impl for the lane's heads.
        spec_of: The lane's spec under a configuration.
    """

    def __init__(self, base: Any, impl: Any, spec_of: Any) -> None:
        self.base = base
        self.impl = impl
        self.kv_cache = torch.tensor([])
        self._spec_of = spec_of

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.base.get_attn_backend()  # type: ignore[no-any-return]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> HeadLaneSpec:
        return self._spec_of(vllm_config)  # type: ignore[no-any-return]


def figures_of(vllm_config: VllmConfig) -> HeadFigures | None:
    """Returns what requests hold under an engine's head plan, or None if it has none."""
    policy, groups = policy_of(vllm_config), _known_groups(vllm_config)
    if policy is None or groups is None:
        return None
    block_size = vllm_config.cache_config.block_size
    window = WindowPlan.from_policy(policy, block_size)
    runs = head_runs(vllm_config)
    retention = None if runs is None else runs.runtimes[0].plan
    return HeadFigures(groups, window, vllm_config.max_in_flight_tokens, retention)


def _known_groups(vllm_config: VllmConfig) -> HeadGroups | None:
    for layer in vllm_config.compilation_config.static_forward_context.values():
        groups = getattr(getattr(layer, "impl", None), "head_groups", None)
        if groups is not None:
            return groups  # type: ignore[no-any-return]
    return None


def _shared_groups(vllm_config: VllmConfig, policy: Policy) -> HeadGroups:
    """The lanes of this rank, made once for all layers."""
    known = _known_groups(vllm_config)
    if known is not None:
        return known
    assert policy.heads.labels is not None, "the front end resolves head plans"
    plan = HeadPlan.from_labels(policy.heads.labels)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    window = WindowPlan.from_policy(policy, vllm_config.cache_config.block_size)
    rows = window.rows(vllm_config.model_config.dtype.itemsize)
    return group_heads(plan.retrieval, ranks, get_tensor_model_parallel_rank(), rows)


def _add_lanes(
    impl: Any, part_impl: type[Any], policy: Policy, vllm_config: VllmConfig
) -> list[LanePart]:
    """Gives the layer that owns `impl` its first lane, and a virtual layer for each further one."""
    context = vllm_config.compilation_config.static_forward_context
    name, layer = next(
        (name, layer) for name, layer in context.items() if getattr(layer, "impl", None) is impl
    )
    stock_spec_of = layer.get_kv_cache_spec
    inner_customize = layer.get_attn_backend().customize_spec
    group = impl.num_heads // impl.num_kv_heads
    parts = []
    for index, lane in enumerate(impl.head_groups.layers[extract_layer_index(name)]):

        def spec_of(config: VllmConfig, lane: HeadLane = lane) -> HeadLaneSpec:
            stock: AttentionSpec = inner_customize(stock_spec_of(config))
            window = WindowPlan.from_policy(policy, stock.block_size)
            spec = lane_spec(stock, lane, window, config)
            if policy.heads_store:
                sizes = impl.head_groups.retrieval_sizes
                return storing_spec(spec, policy, sizes, group, config)
            if policy.packs_on_write:
                assert policy.quantize is not None
                return packed_spec(spec, policy.quantize)
            return spec

        compensated = lane.streams and policy.heads.compensation
        part_cls = compensated_impl(part_impl) if compensated else part_impl
        part = _impl_of_heads(impl, part_cls, lane, group)
        owner, part_name = layer, name
        if index:
            part_name = f"{name}.kv_lane{index}"
            owner = context[part_name] = HeadLaneLayer(layer, part, spec_of)
        else:
            layer.get_kv_cache_spec = spec_of
        parts.append(LanePart(lane, part, owner, part_name, group))
        if policy.heads_store:
            join_run(lane, part_name, layer, owner, part, spec_of(vllm_config))
    # Builders size their scratch by the heads of a layer's impl: those of the layer's own lane.
    impl.num_heads, impl.num_kv_heads = parts[0].impl.num_heads, parts[0].impl.num_kv_heads
    return parts


def _impl_of_heads(impl: Any, part_impl: type[Any], lane: HeadLane, group: int) -> Any:
    """A copy of the layer's impl, of class `part_impl`, for some of its heads."""
    part = copy.copy(impl)
    part.__class__ = part_impl
    part.num_kv_heads = len(lane.heads)
    part.num_heads = part.num_kv_heads * group
    if getattr(impl, "sinks", None) is not None:
        heads = [head * group + i for head in lane.heads for i in range(group)]
        part.sinks = impl.sinks[heads].contiguous()
    return part
