"""Lanes of a head plan: cache specs of some of a layer's heads, their groups, and their manager.

    retrieval  every token, as stock vLLM keeps it, for the lane's heads alone
    streaming  sinks and a window; blocks leave once no later query sees them (under compensation
               one block later: its sums are read), in the prompt too

A run of lanes (`head_groups.py`) is one cache group. Lanes of a group differ in their number of
heads, so a block holds their pages side by side (vLLM's block-outermost layouts). K and V are a
function of the tokens before them, so both kinds share blocks between requests, those of generated
tokens included.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_kvpress.errors import UnsupportedModelError
from vllm_kvpress.head_groups import HeadLane
from vllm_kvpress.integration.head_compensation import padded_page
from vllm_kvpress.integration.lanes import LaneSpec, PrivateSpec
from vllm_kvpress.window_plan import WindowPlan

__all__ = [
    "HeadLaneSpec",
    "RetrievalSpec",
    "StreamManager",
    "StreamSpec",
    "lane_spec",
    "run_groups",
    "stock_blocks",
]


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec(FullAttentionSpec):
    """Every token of a lane's heads.

    Attributes:
        run: The run that the lane belongs to.
    """

    run: int


@dataclass(frozen=True, kw_only=True)
class StreamSpec(AttentionSpec):
    """Sinks and a window of a lane's heads.

    Not a FullAttentionSpec: vLLM trims the prefix hits of those, and a shorter hit needs another
    window.

    Attributes:
        run: The run that the lane belongs to.
        window: What its heads see.
        in_flight_tokens: Most tokens scheduled at a time and not yet processed.
        shares_outputs: Whether blocks of generated tokens are shared, too: not where their K and V
            depend on what other heads have dropped.
    """

    run: int
    window: WindowPlan
    in_flight_tokens: int
    shares_outputs: bool = True

    def blocks_at(self, num_tokens: int) -> int:
        """Returns the most blocks that this lane holds for a sequence of this length."""
        return self.window.blocks_bound(num_tokens, self.in_flight_tokens)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.blocks_at(vllm_config.model_config.max_model_len) * self.page_size_bytes


HeadLaneSpec = RetrievalSpec | StreamSpec | LaneSpec


class StreamManager(SingleTypeKVCacheManager):
    """Blocks of streaming heads: sinks and window stay, what lies between them leaves."""

    kv_cache_spec: StreamSpec

    def __init__(self, kv_cache_spec: StreamSpec, **kwargs: Any) -> None:
        cap = kv_cache_spec.blocks_at
        super().__init__(kv_cache_spec, **kwargs)
        self._cap = cap

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        if apply_admission_cap:
            # As many blocks as start-up sizing counts: they leave while the prompt is computed.
            num_tokens = self._cap(num_tokens) * self.block_size
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        first, last = self.kv_cache_spec.window.freed(processed_computed_tokens)
        self._remove_blocks_in_range(request_id, first, last)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        if not self.kv_cache_spec.shares_outputs:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Returns the longest hit whose sinks and window are cached; null blocks between them."""
        assert isinstance(kv_cache_spec, StreamSpec)
        size = kv_cache_spec.block_size
        assert alignment_tokens == size, "lanes of a head plan have one block size"
        num_blocks = min(max_length // size, len(block_hashes))
        found: dict[int, list[KVCacheBlock]] = {}

        def cached(block: int) -> bool:
            if block not in found:
                ids = kv_cache_group_ids
                found[block] = block_pool.get_cached_block(block_hashes[block], ids) or []
            return bool(found[block])

        while num_blocks:
            sinks, first = kv_cache_spec.window.hit_needs(num_blocks)
            missing = next((b for b in range(num_blocks - 1, first - 1, -1) if not cached(b)), None)
            if missing is None:
                missing = next((b for b in range(sinks) if not cached(b)), None)
            if missing is None:
                break
            num_blocks = missing  # every longer hit needs that block, too
        if not num_blocks:
            return tuple([] for _ in kv_cache_group_ids), 0
        sinks, first = kv_cache_spec.window.hit_needs(num_blocks)
        needed = {*range(sinks), *range(first, num_blocks)}
        blocks = tuple(
            [found[b][i] if b in needed else block_pool.null_block for b in range(num_blocks)]
            for i in range(len(kv_cache_group_ids))
        )
        return blocks, num_blocks * size


def lane_spec(
    stock: AttentionSpec, lane: HeadLane, window: WindowPlan, vllm_config: VllmConfig
) -> HeadLaneSpec:
    """Returns the spec of a lane whose layer's stock spec is `stock`.

    Raises:
        UnsupportedModelError: the backend packs heads together.
    """
    if stock.num_head_slots is not None or stock.state_content_bytes is not None:
        raise UnsupportedModelError(
            "the attention backend packs the heads of a layer together",
            got=f"cache dtype {stock.dtype}",
            allowed="caches in which each KV head stands alone",
            fix="Use --kv-cache-dtype auto or fp8, or a policy without a head plan",
        )
    heads = {"num_kv_heads": len(lane.heads), "run": lane.run}
    if not lane.streams:
        full = {f.name: getattr(stock, f.name) for f in fields(FullAttentionSpec) if f.init}
        return RetrievalSpec(**{**full, **heads})
    attention = {f.name: getattr(stock, f.name) for f in fields(AttentionSpec) if f.init}
    spec = StreamSpec(
        **{**attention, **heads},
        window=window,
        in_flight_tokens=vllm_config.max_in_flight_tokens,
    )
    if not window.compensates:
        return spec
    return replace(spec, page_size_padded=padded_page(spec, window))


def run_groups(specs: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """Returns the cache groups of a head plan, one a run.

    Raises:
        UnsupportedModelError: some layers are not under the plan.
    """
    others = [name for name, spec in specs.items() if not isinstance(spec, HeadLaneSpec)]
    if others:
        raise UnsupportedModelError(
            "a head plan, or prefill: windowed, needs a model whose layers all have full attention",
            got=", ".join(others[:4]),
            fix="Use a policy without a head plan, or prefill: exact",
        )
    # Offsets in a block follow the order in a group, and a lane's private ones must have its own:
    # vLLM lists layers, and then what was added to them.
    numbers = {name: number for number, name in enumerate(specs)}

    def number_of(name: str) -> int:
        return numbers[name.rpartition(".")[0] if isinstance(specs[name], PrivateSpec) else name]

    runs: dict[tuple[int, bool, str], dict[str, Any]] = {}
    for name in sorted(specs, key=number_of):
        spec = specs[name]
        assert isinstance(spec, HeadLaneSpec)
        assert spec.run is not None
        # The private lanes first: their builders leave their tables for the staging lane's.
        key = (spec.run, not isinstance(spec, PrivateSpec), type(spec).__name__)
        runs.setdefault(key, {})[name] = spec
    return [
        KVCacheGroupSpec(list(lanes), UniformTypeKVCacheSpecs.from_specs(lanes))
        for _, lanes in sorted(runs.items())
    ]


def stock_blocks(kv_cache_groups: Any, num_blocks: int) -> int:
    """Returns the blocks of as many heads in the cache's own dtype that as much memory holds.

    Args:
        kv_cache_groups: An engine's, under a head plan.
        num_blocks: Blocks of the pool, without the null block.
    """
    spec = next(iter(kv_cache_groups[0].kv_cache_spec.kv_cache_specs.values()))
    exact = replace(spec, state_content_bytes=None)
    return int(num_blocks * spec.page_size_bytes // exact.page_size_bytes)
