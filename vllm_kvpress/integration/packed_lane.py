"""The packed staging lane: tokens are quantized as they are written, and read back from there.

No step reads what the cache does not hold: prefill attention, too, sees the rounded keys and
values, those of its own chunk included. So chunk sizes and prefix hits change nothing, and blocks
are shared like exact ones. An engine has one policy: were blocks shared between engines, the policy
would have to enter their hash.

    PackedCache   pages of some heads of a layer: `write` a step's tokens, then `attend`
    PackedLane    those of all layers, where a lane is a whole layer: what `backend.py` knows
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress.integration.cells import NonfiniteNumbers, PackedStore, page_bytes
from vllm_kvpress.integration.events import LayerPages
from vllm_kvpress.integration.kernel_form import attention_form
from vllm_kvpress.integration.lanes import cells_of
from vllm_kvpress.integration.plugin import policy_of
from vllm_kvpress.kernels.paged_attention import PackedPart, paged_attention
from vllm_kvpress.kernels.quantize_on_write import quantize_on_write


class PackedCache:
    """Packed pages of some KV heads of a layer: on CPU in PyTorch, on CUDA by kernel.

    Args:
        pages: uint8 [num_blocks, page_bytes].
        store: How tokens lie in them.
    """

    def __init__(self, pages: torch.Tensor, store: PackedStore) -> None:
        attention_form(pages.device)  # refuses devices without kernels
        self._pages = pages
        self._store = store

    def write(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Encodes a step's tokens into their slots.

        Args:
            key: [>= num_tokens, num_kv_heads, head_size].
            value: Of the same shape.
            slot_mapping: int64 [num_tokens], block * block_size + token in the block; -1 for none.
        """
        quantize_on_write(
            key,
            value,
            self._pages,
            slot_mapping,
            self._store.cells,
            nonfinite=self._store.nonfinite.count,
            **self._store.rotations,
        )
        self._store.nonfinite.look()

    def attend(
        self,
        impl: Any,
        query: torch.Tensor,
        step: CommonAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the attention output of every request of the step.

        Args:
            impl: vLLM's implementation for these heads: scale, soft cap, sinks.
            query: [num_tokens, num_heads, head_size].
            step: Physical metadata: which blocks are read, and how many tokens of them.
            output: Like `query`, or with heads and channels as one.
            output_scale: Not taken: no CPU backend fuses output quantization.
            output_block_scale: Not taken either.
        """
        assert output_scale is None
        assert output_block_scale is None
        table = step.block_table_tensor[: step.num_reqs]
        paged_attention(
            query,
            step.query_start_loc[: step.num_reqs + 1],
            causal=PackedPart(
                self._pages, table, step.seq_lens[: step.num_reqs], self._store.cells
            ),
            scale=impl.scale,
            max_query_len=step.max_query_len,
            max_tokens=step.max_seq_len,
            soft_cap=impl.logits_soft_cap or 0.0,
            sinks=None if impl.sinks is None else impl.sinks.float(),
            out=output.view(query.shape),
            **self._store.rotations,
        )
        return output


class PackedLane:
    """The caches of all layers whose staging lane is packed.

    Args:
        vllm_config: The engine's configuration, with a policy that packs on write.
        layers: The layers, in the model's order.
    """

    def __init__(self, vllm_config: VllmConfig, layers: list[LayerPages]) -> None:
        policy = policy_of(vllm_config)
        assert policy is not None
        assert policy.quantize is not None
        form = cells_of(policy.quantize, layers[0].layer.get_kv_cache_spec(vllm_config))
        assert form is not None
        first = page_bytes(layers[0])
        nonfinite = NonfiniteNumbers(first.device)
        store = PackedStore(form, policy.quantize, first, layers[0].pages.dtype, nonfinite)
        self._caches = {id(pages.layer): PackedCache(page_bytes(pages), store) for pages in layers}

    def write(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Encodes a step's tokens of a layer; see `PackedCache.write`."""
        self._caches[id(layer)].write(key, value, slot_mapping)

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        step: CommonAttentionMetadata,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Writes a layer's attention output; see `PackedCache.attend`."""
        cache = self._caches[id(layer)]
        return cache.attend(layer.impl, query, step, output, *args, **kwargs)
