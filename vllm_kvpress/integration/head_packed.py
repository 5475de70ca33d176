"""Head lanes of packed cells: under a head plan too, tokens are quantized as they are written.

A lane of n heads has pages of n heads' cells, in both kinds of lanes. What a head keeps is for the
head plan to say, how it lies in a block for the codecs: neither knows of the other. The form of a
lane's impl is the stock impl with its two operations on the cache replaced.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvpress.integration.cells import NonfiniteNumbers, PackedStore
from vllm_kvpress.integration.packed_lane import PackedCache
from vllm_kvpress.integration.pages import flat_pages
from vllm_kvpress.policies.codecs import store_format
from vllm_kvpress.schema import Codecs

__all__ = ["packed_part"]


def packed_part(inner_impl: type[Any], codecs: Codecs) -> type[Any]:
    """Returns a form of the stock impl whose cache is packed.

    Args:
        inner_impl: The stock impl, made for some heads of a layer.
        codecs: The precision; formats per token.
    """
    shared: list[NonfiniteNumbers] = []  # one for all lanes, made once the device is known

    class PackedPart(inner_impl):  # type: ignore[misc, valid-type]
        # The bound cache, in vLLM's form and in ours.
        _bound: tuple[torch.Tensor, PackedCache] | None = None

        def do_kv_cache_update(
            self,
            layer: Any,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            slot_mapping: torch.Tensor,
        ) -> None:
            self._cache(kv_cache).write(key, value, slot_mapping)

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
        ) -> torch.Tensor:
            step = attn_metadata.kv_packed
            return self._cache(kv_cache).attend(self, query, step, output, *args, **kwargs)

        def _cache(self, kv_cache: torch.Tensor) -> PackedCache:
            if self._bound is None or self._bound[0] is not kv_cache:
                dtype_bits = 8 * kv_cache.dtype.itemsize
                form = store_format(codecs, self.num_kv_heads, self.head_size, dtype_bits)
                assert form is not None
                pages = flat_pages(kv_cache).view(torch.uint8)
                if not shared:
                    shared.append(NonfiniteNumbers(pages.device))
                store = PackedStore(form, codecs, pages, kv_cache.dtype, shared[0])
                self._bound = kv_cache, PackedCache(pages, store)
            return self._bound[1]

    PackedPart.__qualname__ = PackedPart.__name__ = f"PackedPart{inner_impl.__name__}"
    return PackedPart
