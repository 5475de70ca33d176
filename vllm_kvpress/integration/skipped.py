"""Skipped layers: vLLM's own backend and block tables, on blocks of the shared pool.

Their impl and metadata are the stock ones. Only their blocks are of another length
(`skip_groups.py`) and, because pages of two sizes lie side by side in the pool's blocks, of a
block-outermost layout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvpress.errors import UnsupportedVLLMError
from vllm_kvpress.skip_groups import SkippedGroups

__all__ = [
    "SkippedManager",
    "SkippedSpec",
    "block_outermost",
    "groups_of",
    "is_skipped",
    "skip_backend",
]


@dataclass(frozen=True, kw_only=True)
class SkippedSpec(FullAttentionSpec):
    """Every token of a layer that the policy leaves alone."""

    skipped: SkippedGroups

    @classmethod
    def of(cls, spec: FullAttentionSpec, skipped: SkippedGroups) -> Self:
        """Returns the spec of a skipped layer whose stock spec is `spec`."""
        values = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
        return cls(**{**values, "block_size": skipped.block_size}, skipped=skipped)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        assert all(type(spec) is cls and spec == specs[0] for spec in specs)
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(type(spec) is type(self) for spec in kv_cache_specs.values())


class SkippedManager(FullAttentionManager):
    """The stock manager; of generated tokens nothing is shared, as in the lanes."""

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        # Their K/V depend on what was evicted in the layers below.
        super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)


def is_skipped(name: str, skip: tuple[int, ...]) -> bool:
    """Whether the layer of this name is one that the policy leaves alone."""
    return extract_layer_index(name) in skip


def groups_of(specs: dict[str, SkippedSpec]) -> list[KVCacheGroupSpec]:
    """Returns the cache groups of the skipped layers."""
    names = list(specs)
    groups = []
    while names:
        width = specs[names[0]].skipped.width
        group, names = names[:width], names[width:]
        groups.append(KVCacheGroupSpec(group, SkippedSpec.merge([specs[name] for name in group])))
    return groups


def block_outermost(inner: type[AttentionBackend]) -> tuple[KVCacheLayout, ...]:
    """Returns the backend's layouts with the blocks outermost, their inside as it reads them.

    Raises:
        UnsupportedVLLMError: if it reads no whole pages.
    """
    supported = inner.supported_kv_cache_layouts() or tuple(KVCacheLayout)
    insides = dict.fromkeys(
        layout.stride_order[2:] for layout in supported if layout.is_block_compact
    )
    if not insides:
        raise UnsupportedVLLMError(
            "the attention backend has no cache layout with whole pages, which layers.skip and "
            "head plans need",
            got=inner.get_name(),
            allowed="CPU_ATTN, FLASH_ATTN, TRITON_ATTN, FLASHINFER",
            fix="Choose another --attention-backend, or a policy without layers.skip and heads",
        )
    return tuple(KVCacheLayout((1, 0, *inside)) for inside in insides)


def skip_backend(
    inner: type[AttentionBackend], skipped: SkippedGroups, members: dict[str, Any]
) -> type[AttentionBackend]:
    """Returns the stock backend for skipped layers: another block length, and nothing else.

    Its builder leaves the block table where `LaneRuntime` finds it.

    Args:
        inner: The stock backend.
        skipped: The layers' cache groups.
        members: Further members of the class: how it is found again by its path.
    """
    inner_builder = inner.get_builder_cls()

    class SkippedBuilder(inner_builder):  # type: ignore[misc, valid-type]
        # V1 would skip build() for a second equal group.
        supports_update_block_table = False

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            from vllm_kvpress.integration.worker import find_runtime

            runtime = find_runtime(self.vllm_config)
            if runtime is not None:
                runtime.skipped_tables[self.layer_names[0]] = (
                    common_attn_metadata.block_table_tensor
                )
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def customize_spec(cls: type[AttentionBackend], spec: Any) -> Any:
        spec = inner.customize_spec(spec)
        if type(spec) is not FullAttentionSpec:
            return spec
        return SkippedSpec.of(spec, skipped)

    layouts = block_outermost(inner)
    return type(
        members["__qualname__"],
        (inner,),
        {
            **members,
            "customize_spec": classmethod(customize_spec),
            "get_builder_cls": staticmethod(lambda: SkippedBuilder),
            "supported_kv_cache_layouts": classmethod(lambda cls: layouts),
        },
    )
