"""Lanes: the KV-cache specs that tell vLLM what our blocks are.

A lane is one vLLM KV-cache group. Every lane of a layer declares exactly the staging page
(same block size, heads, dtype), so that all lanes alias one pool: block id b is the same bytes
of layer i in each of them. Private lanes read those bytes in their own way.

    staging    K/V at natural positions, exact or packed as it is written; prefix-cacheable
    store      survivors of an event, sorted by position; private to the request
    demoted    what an event rejected, at fewer bits, sorted by position; private to the request
    queries    the last `query_window` prompt queries, until the event has read them; private
    positions  the store's token positions, for scorers that need them while decoding; private

Sibling classes, never subclasses of one another: vLLM merges layers whose specs share a
registered base into one group, with the first one's spec.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from vllm_kvpress.demoting_plan import DemotingPlan
from vllm_kvpress.errors import UnsupportedModelError
from vllm_kvpress.layout import PackedFormat, positions_per_block, queries_per_block
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.planner import make_plan
from vllm_kvpress.policies import store_format
from vllm_kvpress.schema import Codecs
from vllm_kvpress.skip_groups import skipped_groups_of

SpecT = TypeVar("SpecT", bound=AttentionSpec)


@dataclass(frozen=True, kw_only=True)
class LaneSpec(FullAttentionSpec):
    """The staging page plus the plan that rules who holds how many of them.

    Attributes:
        plan: The retention plan.
        run: Under a head plan, the run of heads that the lane belongs to.
    """

    plan: RetentionPlan = field(metadata={"kvpress": True})
    run: int | None = None

    @classmethod
    def of(cls, spec: FullAttentionSpec, plan: RetentionPlan) -> Self:
        """Returns this lane's spec for a layer whose stock spec is `spec`."""
        values = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
        return cls(**values, plan=plan, run=getattr(spec, "run", None))

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Returns the one spec that all layers of the lane share.

        Raises:
            AssertionError: if they differ, which own grouping rules out.
        """
        assert all(type(spec) is cls and spec == specs[0] for spec in specs), (
            f"layers of one {cls.__name__} lane must have equal specs"
        )
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(type(spec) is type(self) for spec in kv_cache_specs.values())

    def blocks_at(self, num_tokens: int) -> int:
        """Returns the most blocks that this lane holds for a sequence of this length."""
        raise NotImplementedError

    def most_blocks_at(self, num_tokens: int) -> int:
        """Returns the blocks without which a request of this length might never be computed."""
        return self.blocks_at(num_tokens)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        blocks = self.most_blocks_at(vllm_config.model_config.max_model_len)
        return max(1, blocks) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # vLLM computes slot mappings for every lane without a bound check: full width.
        full = super().max_num_blocks_per_req(vllm_config, max_len)
        return max(full, self.blocks_at(max_len), self.plan.store_pages_most(max_len))


@dataclass(frozen=True, kw_only=True)
class StagingSpec(LaneSpec):
    """K/V as stock vLLM keeps it, or in packed cells; blocks leave by the plan."""

    @property
    def exact_page_bytes(self) -> int:
        """Bytes of a stock block: of as many tokens in the cache's own dtype."""
        return replace(self, state_content_bytes=None).page_size_bytes

    def blocks_at(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, kw_only=True)
class PrivateSpec(LaneSpec):
    """A lane whose blocks are never shared and never hashed."""

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False  # events and the query window address blocks themselves


@dataclass(frozen=True, kw_only=True)
class StoreSpec(PrivateSpec):
    """Survivors, in the cache's own format or in packed cells."""

    def blocks_at(self, num_tokens: int) -> int:
        return self.plan.store_bound(num_tokens)

    def most_blocks_at(self, num_tokens: int) -> int:
        # A preempted request computes prompt and outputs at once, and holds both, exact and stored.
        return self.plan.store_pages_most(num_tokens)


@dataclass(frozen=True, kw_only=True)
class DemotedSpec(PrivateSpec):
    """Losers, in packed cells."""

    plan: DemotingPlan = field(metadata={"kvpress": True})

    def blocks_at(self, num_tokens: int) -> int:
        return self.plan.demoted_bound(num_tokens)


@dataclass(frozen=True, kw_only=True)
class QuerySpec(PrivateSpec):
    """The observation window's queries."""

    def blocks_at(self, num_tokens: int) -> int:
        return self.plan.query_bound(num_tokens)


@dataclass(frozen=True, kw_only=True)
class PositionSpec(PrivateSpec):
    """Positions of the store's tokens, int32 [num_kv_heads, store tokens]."""

    def blocks_at(self, num_tokens: int) -> int:
        return self.plan.position_bound(num_tokens)


def staging_of(
    policy: Any,
    scorer: Any,
    spec: FullAttentionSpec,
    num_heads: int,
    num_layers: int,
    query_dtype: torch.dtype,
) -> StagingSpec:
    """Returns the staging lane of `policy` for layers of this shape; arguments as of `plan_of`.

    Raises:
        UnsupportedModelError: packed rows of a head do not fill elements of the cache's dtype.
    """
    plan = plan_of(policy, scorer, spec, num_heads, num_layers, query_dtype)
    if not plan.packs_on_write:
        return StagingSpec.of(spec, plan)
    return StagingSpec.of(packed_spec(spec, policy.quantize), plan)


def packed_spec(spec: SpecT, codecs: Codecs) -> SpecT:
    """Returns the spec of a lane whose blocks hold packed cells in place of numbers.

    Args:
        spec: The spec of the same heads in the cache's own dtype.
        codecs: The precision; formats per token.

    Raises:
        UnsupportedModelError: packed rows of a head do not fill elements of the cache's dtype.
    """
    cells = cells_of(codecs, spec)
    assert cells is not None
    if cells.bytes_per_head % spec.dtype.itemsize:
        raise UnsupportedModelError(
            "packed tokens do not fill elements of the cache's dtype",
            got=f"{cells.bytes_per_head} bytes a head for {spec.head_size} channels, {spec.dtype}",
            allowed="head sizes that are a multiple of 8",
            fix="Use a policy without quantize",
        )
    return replace(spec, state_content_bytes=cells.bytes_per_head)


def plan_of(
    policy: Any,
    scorer: Any,
    spec: FullAttentionSpec,
    num_heads: int,
    num_layers: int,
    query_dtype: torch.dtype,
) -> RetentionPlan:
    """Returns the plan of `policy` for layers of this shape.

    Args:
        policy: The validated `Policy`.
        scorer: Its scorer.
        spec: The layer's stock spec.
        num_heads: Query heads of the layer on this rank.
        num_layers: Layers of the model.
        query_dtype: The model's dtype.
    """
    return make_plan(
        policy,
        scorer,
        block_size=spec.block_size,
        queries_per_block=queries_per_block(
            spec.page_size_bytes, num_heads, spec.head_size, query_dtype.itemsize
        ),
        positions_per_block=positions_per_block(spec.page_size_bytes, spec.num_kv_heads),
        cells=cells_of(policy.quantize, spec),
        loser_cells=cells_of(policy.quantize and policy.quantize.losers, spec),
        page_bytes=spec.page_size_bytes,
        skipped=skipped_groups_of(
            policy.layers.skip, num_layers, spec.block_size, spec.page_size_bytes
        ),
    )


def cells_of(codecs: Codecs | None, spec: AttentionSpec) -> PackedFormat | None:
    """Returns the cells in which layers of this shape store tokens, or None if nothing is packed.

    Args:
        codecs: Of one store: the policy's `quantize`, or its `losers`.
        spec: The layer's stock spec.

    Raises:
        UnsupportedModelError: keys and values differ in their channels.
    """
    cells = store_format(codecs, spec.num_kv_heads, spec.head_size, spec.dtype.itemsize * 8)
    if cells is not None and spec.head_size_v != spec.head_size:
        raise UnsupportedModelError(
            "packed codecs need keys and values of equal size",
            got=f"{spec.head_size} and {spec.head_size_v} channels",
            fix="Use a policy without quantize",
        )
    return cells


def private_lanes(plan: RetentionPlan) -> dict[str, type[PrivateSpec]]:
    """Returns the private lanes that a plan needs, by the suffix of their layers' names."""
    lanes: dict[str, type[PrivateSpec]] = {}
    if plan.query_window:
        lanes["kv_queries"] = QuerySpec
    if plan.positions_per_block:
        lanes["kv_positions"] = PositionSpec
    if isinstance(plan, DemotingPlan):
        lanes["kv_demoted"] = DemotedSpec
    if plan.store:
        lanes["kv_store"] = StoreSpec
    return lanes


def staging_in(kv_cache_groups: Any) -> StagingSpec | None:
    """Returns the staging lane's spec among an engine's groups, or None if no policy is on."""
    specs = (group.kv_cache_spec for group in kv_cache_groups)
    return next((spec for spec in specs if isinstance(spec, StagingSpec)), None)


def plan_in(kv_cache_groups: Any) -> RetentionPlan | None:
    """Returns the plan of an engine's cache groups, or None if no policy is on."""
    staging = staging_in(kv_cache_groups)
    return None if staging is None else staging.plan
