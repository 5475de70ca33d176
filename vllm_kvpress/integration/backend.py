"""The attention backend of a policy: the stock backend over physical block tables.

Nothing here computes attention; packed cells, which no stock kernel reads, have forms of their own
(`packed.py`, `packed_lane.py`). `policy_backend(inner, policy)` makes a thin subclass of the
backend that vLLM would have used anyway:

    backend   turns the layer's FullAttentionSpec into the staging lane's spec
    impl      adds the layer's private lanes after loading; keeps the observation window's queries
    builder   hands the stock builder physical block tables and lengths (see `worker.py`)

Private lanes are virtual layers: siblings `<layer>.kv_store` and so on in vLLM's static forward
context, which vLLM sizes, allocates, schedules and frees like any layer's cache.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_kvpress.config import Policy
from vllm_kvpress.integration.head_attention import head_backend
from vllm_kvpress.integration.lanes import (
    LaneSpec,
    PrivateSpec,
    private_lanes,
    staging_of,
)
from vllm_kvpress.integration.plugin import policy_of
from vllm_kvpress.integration.skipped import block_outermost, is_skipped, skip_backend
from vllm_kvpress.integration.worker import LaneRuntime, find_runtime
from vllm_kvpress.planner import make_plan
from vllm_kvpress.policies import Scorer, resolve
from vllm_kvpress.skip_groups import SkippedGroups

_MADE: dict[str, type[AttentionBackend]] = {}


def __getattr__(name: str) -> type[AttentionBackend]:
    """Resolves the dotted paths by which vLLM refers to the backends made here."""
    try:
        return _MADE[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def backend_path(
    inner: type[AttentionBackend],
    policy: Policy,
    num_heads: int,
    num_layers: int,
    dtype: torch.dtype,
) -> str:
    """Returns the dotted path of the policy's backend over `inner`, made if need be.

    Args:
        inner: The stock backend.
        policy: The policy.
        num_heads: Query heads of a layer on this rank.
        num_layers: Layers of the model.
        dtype: The model's.
    """
    text = json.dumps([policy.to_json(), num_heads, num_layers, str(dtype)], sort_keys=True)
    name = f"{inner.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if name not in _MADE:
        _MADE[name] = policy_backend(inner, policy, num_heads, num_layers, dtype, name)
    return f"{__name__}.{name}"


def policy_backend(
    inner: type[AttentionBackend],
    policy: Policy,
    num_heads: int,
    num_layers: int,
    dtype: torch.dtype,
    name: str,
) -> type[AttentionBackend]:
    """Returns a subclass of the stock backend `inner` that keeps what `policy` keeps."""
    made = {"__module__": __name__, "__qualname__": name, "inner": inner}
    if policy.heads.splits:
        return type(name, (inner,), {**made, **head_backend(inner, policy)})
    scorer = resolve(policy)
    impl_cls = _policy_impl(inner.get_impl_cls(), scorer)
    packs = policy.quantize is not None and not policy.quantize.is_fp8
    attributes: dict[str, Any] = {}
    if make_plan(policy, scorer, block_size=1).packs_on_write:
        impl_cls = _packed_impl(impl_cls)
        attributes["forward_includes_kv_cache_update"] = False
    builder_cls = _policy_builder(inner.get_builder_cls(), packs)

    def customize_spec(cls: type[AttentionBackend], spec: AttentionSpec) -> AttentionSpec:
        # Exact type: a lane's spec, and other kinds of layers, pass through untouched.
        spec = inner.customize_spec(spec)
        if type(spec) is not FullAttentionSpec:
            return spec
        return staging_of(policy, scorer, spec, num_heads, num_layers, dtype)

    # Pages of two sizes lie side by side in a block.
    layouts = block_outermost(inner) if policy.layers.skip else inner.supported_kv_cache_layouts()
    return type(
        name,
        (inner,),
        {
            **made,
            "supported_kv_cache_layouts": classmethod(lambda cls: layouts),
            **attributes,
            "customize_spec": classmethod(customize_spec),
            "get_impl_cls": staticmethod(lambda: impl_cls),
            "get_builder_cls": staticmethod(lambda: builder_cls),
        },
    )


def _policy_impl(inner_impl: type[Any], scorer: Scorer) -> type[Any]:
    class PolicyImpl(inner_impl):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._vllm_config = get_current_vllm_config()
            self.lane_runtime = find_runtime(self._vllm_config) or LaneRuntime(
                scorer, self._vllm_config
            )
            self.query_pages: torch.Tensor | None = None

        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            super().process_weights_after_loading(act_dtype)
            add_private_lanes(self, self._vllm_config)

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
            packed = getattr(attn_metadata, "kv_packed", None)
            if packed is not None:
                return self.lane_runtime.packed.attend(layer, query, packed, *args, **kwargs)
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
            )

    PolicyImpl.__qualname__ = PolicyImpl.__name__ = f"Policy{inner_impl.__name__}"
    return PolicyImpl


def _packed_impl(policy_impl: type[Any]) -> type[Any]:
    """Returns the form whose staging lane is packed: no stock operation touches its cache."""

    class PackedImpl(policy_impl):  # type: ignore[misc, valid-type]
        def do_kv_cache_update(
            self,
            layer: Any,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            slot_mapping: torch.Tensor,
        ) -> None:
            self.lane_runtime.packed.write(layer, key, value, slot_mapping)

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
            if attn_metadata is None:  # memory is being profiled, there is no cache yet
                return output
            step = attn_metadata.kv_packed
            return self.lane_runtime.packed.attend(layer, query, step, output, *args, **kwargs)

    PackedImpl.__qualname__ = PackedImpl.__name__ = f"Packed{policy_impl.__name__}"
    return PackedImpl


def _policy_builder(inner_builder: type[Any], packs: bool) -> type[Any]:
    """Returns the builder of physical metadata.

    Args:
        inner_builder: The stock one.
        packs: Whether the policy has packed cells. Which kernel a step needs depends on its
            requests then, so a full CUDA graph cannot hold it; piecewise graphs leave it out.
    """

    class PolicyBuilder(inner_builder):  # type: ignore[misc, valid-type]
        # V1 would skip build() for a second equal group and hand on a logical table.
        supports_update_block_table = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.lane_runtime = find_runtime(self.vllm_config)

        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
            if packs:
                return AttentionCGSupport.NEVER
            return super().get_cudagraph_support(*args, **kwargs)  # type: ignore[no-any-return]

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            step = self.lane_runtime.begin_step(common_attn_metadata)
            metadata = super().build(common_prefix_len, step.common, fast_build)
            metadata.kv_query_window = step.query_window
            metadata.kv_packed = step.packed
            return metadata

        def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
            step = self.lane_runtime.capture_step(common_attn_metadata)
            metadata = super().build_for_cudagraph_capture(step.common)
            metadata.kv_query_window = step.query_window
            metadata.kv_packed = step.packed
            return metadata

    PolicyBuilder.__qualname__ = PolicyBuilder.__name__ = f"Policy{inner_builder.__name__}"
    return PolicyBuilder


def _skip_backend(backend: Any, skipped: SkippedGroups) -> type[AttentionBackend]:
    name = f"{backend.__name__}_skipped"
    if name not in _MADE:
        members = {"__module__": __name__, "__qualname__": name}
        _MADE[name] = skip_backend(backend.inner, skipped, members)
    return _MADE[name]


class LaneLayer(AttentionLayerBase):
    """A private lane of one attention layer, in the shape of a layer that owns a cache.

    Args:
        lane: The lane's name, the suffix of this layer's name.
        spec_cls: The lane's spec.
        base: The attention layer it belongs to.
    """

    def __init__(self, lane: str, spec_cls: type[PrivateSpec], base: Any) -> None:
        self.lane = lane
        self.spec_cls = spec_cls
        self.base = base
        self.impl = base.impl
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return _lane_backend(self.base.get_attn_backend(), self.lane)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> LaneSpec:
        backend = self.base.get_attn_backend()
        staging = backend.customize_spec(self.base.get_kv_cache_spec(vllm_config))
        return self.spec_cls.of(staging, staging.plan)


def _lane_backend(backend: type[AttentionBackend], lane: str) -> type[AttentionBackend]:
    name = f"{backend.__name__}_{lane}"
    if name not in _MADE:

        class LaneBuilder(AttentionMetadataBuilder[Any]):
            _cudagraph_support = AttentionCGSupport.ALWAYS

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.lane_runtime = find_runtime(self.vllm_config, self.kv_cache_spec.run)

            def build(
                self,
                common_prefix_len: int,
                common_attn_metadata: CommonAttentionMetadata,
                fast_build: bool = False,
            ) -> None:
                self.lane_runtime.tables[lane] = common_attn_metadata.block_table_tensor

        _MADE[name] = type(
            name,
            (backend,),
            {
                "__module__": __name__,
                "__qualname__": name,
                "get_builder_cls": staticmethod(lambda: LaneBuilder),
            },
        )
    return _MADE[name]


def add_private_lanes(impl: Any, vllm_config: VllmConfig) -> None:
    """Adds the private lanes of the layer that owns `impl` to the static forward context.

    A skipped layer gets none, and the stock impl and backend back.
    """
    context = vllm_config.compilation_config.static_forward_context
    prefix, base = next(
        (name, layer) for name, layer in context.items() if getattr(layer, "impl", None) is impl
    )
    runtime = impl.lane_runtime
    if prefix in runtime.layer_names:  # weights were loaded anew
        return
    backend = base.get_attn_backend()
    staging = backend.customize_spec(base.get_kv_cache_spec(vllm_config))
    policy = policy_of(vllm_config)
    assert policy is not None
    if is_skipped(prefix, policy.layers.skip):
        impl.__class__ = backend.inner.get_impl_cls()
        base.attn_backend = _skip_backend(backend, staging.plan.skipped)
        return
    runtime.layer_names.append(prefix)
    for lane, spec_cls in private_lanes(staging.plan).items():
        context[f"{prefix}.{lane}"] = LaneLayer(lane, spec_cls, base)
