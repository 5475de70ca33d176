"""The engine part of the plugin: five hooks into vLLM, installed only under a policy.

    specs and managers   registered with vLLM's own registry
    attention backend    the platform's choice, over physical tables          (wrapped)
    cache groups         one group a lane, layers in one order                (wrapped)
    prefix hits          capped below the end of the prompt                   (wrapped)
    runners              hand us prompt lengths and the allocated caches      (wrapped, both)

Each wrapper passes engines without a policy through to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_kvpress.errors import UnsupportedModelError
from vllm_kvpress.integration import compat


def install() -> None:
    """Installs the hooks in this process; re-entrant.

    Raises:
        UnsupportedVLLMError: if the installed vLLM lacks a hook.
    """
    from vllm.platforms import current_platform
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    _register_specs()
    owner = next(
        base for base in type(current_platform).__mro__ if "get_attn_backend_cls" in vars(base)
    )
    compat.wrap(owner, "get_attn_backend_cls", _over_physical_tables)
    forget_choices()
    compat.wrap(kv_cache_utils, "get_kv_cache_groups", _group_lanes)
    compat.wrap(KVCacheManager, "get_computed_blocks", _cap_prefix_hits)
    for runner_cls in compat.runner_classes():
        compat.wrap(runner_cls, "initialize_kv_cache", _attach_lanes)


def forget_choices() -> None:
    """Makes the next engine of this process choose its attention backend anew.

    vLLM caches the choice under a key that knows nothing of policies.
    """
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()


def _register_specs() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import (
        FullAttentionManager,
        SingleTypeKVCacheManager,
    )
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_kvpress.integration import head_lanes, lanes, managers, skipped

    # vLLM registers its own specs lazily, and only while the registry is empty.
    KVCacheSpecRegistry._ensure_registered()
    pairs: list[tuple[type[KVCacheSpec], type[SingleTypeKVCacheManager]]] = [
        (lanes.StagingSpec, managers.StagingManager),
        (lanes.StoreSpec, managers.StoreManager),
        (lanes.DemotedSpec, managers.DemotedManager),
        (lanes.QuerySpec, managers.QueryManager),
        (lanes.PositionSpec, managers.PositionManager),
        (skipped.SkippedSpec, skipped.SkippedManager),
        (head_lanes.RetrievalSpec, FullAttentionManager),
        (head_lanes.StreamSpec, head_lanes.StreamManager),
    ]
    for spec_cls, manager_cls in pairs:
        KVCacheSpecRegistry.register(spec_cls, manager_cls, uniform_type_base_spec=spec_cls)


def _over_physical_tables(original: Callable[..., str]) -> Callable[..., str]:
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        from vllm.config import get_current_vllm_config
        from vllm.utils.import_utils import resolve_obj_by_qualname
        from vllm.v1.attention.backend import AttentionType

        from vllm_kvpress.integration import backend
        from vllm_kvpress.integration.plugin import policy_of

        path = original(cls, selected_backend, attn_selector_config, num_heads)
        config = get_current_vllm_config()
        policy = policy_of(config)
        wanted = (
            attn_selector_config.attn_type == AttentionType.DECODER
            and not attn_selector_config.has_sliding_window
            and not attn_selector_config.use_mla
        )
        if policy is None or not wanted:
            return path
        model = config.model_config
        heads = model.get_num_attention_heads(config.parallel_config)
        layers = model.get_total_num_hidden_layers()
        inner = resolve_obj_by_qualname(path)
        return backend.backend_path(inner, policy, heads, layers, model.dtype)

    return get_attn_backend_cls


def _group_lanes(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> Any:
        from vllm.v1.kv_cache_interface import KVCacheGroupSpec

        from vllm_kvpress.integration.head_lanes import run_groups
        from vllm_kvpress.integration.lanes import LaneSpec, StagingSpec
        from vllm_kvpress.integration.skipped import SkippedSpec, groups_of

        # Lanes of a head plan name their run.
        if any(getattr(spec, "run", None) is not None for spec in kv_cache_spec.values()):
            return run_groups(kv_cache_spec)
        lanes: dict[type, list[str]] = {}
        skipped: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, spec in kv_cache_spec.items():
            if isinstance(spec, LaneSpec):
                lanes.setdefault(type(spec), []).append(name)
            elif isinstance(spec, SkippedSpec):
                skipped[name] = spec
            else:
                others[name] = spec
        if not lanes:
            return original(vllm_config, kv_cache_spec)
        if skipped and others:
            raise UnsupportedModelError(
                "layers.skip is not run beside layers of other kinds",
                got=", ".join(sorted({type(spec).__name__ for spec in others.values()})),
                allowed="models whose layers all have full attention",
                fix="Set layers.skip to []",
            )
        # The private lanes first: their builders leave their tables for the staging lane's.
        order = sorted(lanes, key=lambda spec_cls: spec_cls is StagingSpec)
        width = len(lanes[StagingSpec])
        groups = [lanes[spec_cls] for spec_cls in order] + _in_lane_width(
            original(vllm_config, others) if others else [], width
        )
        specs = [[kv_cache_spec[name] for name in names] for names in groups]
        merged = [layer_specs[0].merge(layer_specs) for layer_specs in specs]
        if len({spec.page_size_bytes for spec in merged}) > 1:
            raise UnsupportedModelError(
                "layers outside the policy have another page size",
                got=str(sorted({(type(s).__name__, s.page_size_bytes) for s in merged})),
                allowed="models whose layers all have the same KV heads, head size and dtype; with "
                "codecs that pack on write (int8, int4 alone), full-attention layers only",
                fix="Start the engine without the policy",
            )
        # Skipped layers before the staging lane, too.
        return groups_of(skipped) + [
            KVCacheGroupSpec(n, s) for n, s in zip(groups, merged, strict=True)
        ]

    return get_kv_cache_groups


def _in_lane_width(stock_groups: list[Any], width: int) -> list[list[str]]:
    """Splits stock groups so that none has more layers than a lane (they share its blocks)."""
    return [
        group.layer_names[start : start + width]
        for group in stock_groups
        for start in range(0, len(group.layer_names), width)
    ]


class _Capped:
    """A request that looks no longer than its longest allowed prefix hit."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def _cap_prefix_hits(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_kvpress.integration.lanes import plan_in

        plan = plan_in(self.kv_cache_config.kv_cache_groups)
        if plan is not None and not plan.is_pure:
            # vLLM itself leaves one token to compute.
            limit = plan.hit_limit(request.num_prompt_tokens) + 1
            if limit < request.num_tokens:
                request = _Capped(request, limit)
        return original(self, request, *args, **kwargs)

    return get_computed_blocks


def _attach_lanes(original: Callable[..., None]) -> Callable[..., None]:
    def initialize_kv_cache(
        self: Any, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        original(self, kv_cache_config, is_profiling, **kwargs)
        from vllm_kvpress.integration.head_attention import figures_of
        from vllm_kvpress.integration.head_lanes import stock_blocks
        from vllm_kvpress.integration.head_stores import head_runs
        from vllm_kvpress.integration.lanes import staging_in
        from vllm_kvpress.integration.summary import head_note, log_summary
        from vllm_kvpress.integration.worker import find_runtime

        num_blocks = self.kv_cache_config.num_blocks
        runs = head_runs(self.vllm_config)
        if runs is not None:
            runs.attach(self)
        figures = figures_of(self.vllm_config)
        if figures is not None and not is_profiling:
            log_summary(
                figures,
                self.vllm_config,
                len(figures.groups.layers),
                num_blocks,
                head_note(figures),
                stock_blocks=stock_blocks(self.kv_cache_config.kv_cache_groups, num_blocks - 1),
            )
        runtime = find_runtime(self.vllm_config)
        staging = staging_in(self.kv_cache_config.kv_cache_groups)
        if runtime is None or staging is None:
            return
        runtime.attach(self)
        if not is_profiling:
            plan, num_layers = staging.plan, len(runtime.layer_names)
            stock = (num_blocks - 1) * staging.page_size_bytes // staging.exact_page_bytes
            log_summary(plan, self.vllm_config, num_layers, num_blocks, stock_blocks=stock)

    return initialize_kv_cache
