"""Attention over packed cells and staging by kernel, for CUDA: what `packed_attention.py` computes.

`kernels.paged_attention` reads cells and staging's open blocks where they lie, and nothing in a
step waits for the device. Which form runs is decided by `attention_form`, nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress.errors import UnsupportedModelError, UnsupportedVLLMError
from vllm_kvpress.integration.cells import PackedStore, page_bytes
from vllm_kvpress.integration.events import LayerPages
from vllm_kvpress.integration.packed_attention import PackedAttention
from vllm_kvpress.integration.pages import PageMap
from vllm_kvpress.kernels.paged_attention import ExactPart, PackedPart, merge, paged_attention

OLDEST = (8, 0)


def attention_form(device: torch.device) -> type[PackedAttention]:
    """Returns what attends to packed stores on a device: PyTorch on CPU, kernels on CUDA.

    Raises:
        UnsupportedModelError: there are no kernels for the device.
    """
    if device.type == "cpu":
        return PackedAttention
    old = device.type != "cuda" or torch.version.hip is not None
    if old or torch.cuda.get_device_capability(device) < OLDEST:
        raise UnsupportedModelError(
            "packed codecs have no kernels for this device",
            got=str(device) if old else torch.cuda.get_device_name(device),
            allowed="CPU; NVIDIA GPUs of compute capability 8.0 and newer",
            fix="Use a policy with quantize fp8, or without quantize",
        )
    return KernelAttention


@dataclass(frozen=True)
class KernelStep:
    """What attention reads in a step with packed cells, on the device.

    Attributes:
        common: Physical metadata of staging alone.
        parts: Of each lane, its store, its block table int32 [num_reqs, max_blocks], and the
            tokens in its cells, int32 [num_reqs].
        max_tokens: At least the tokens that any request reads.
    """

    common: CommonAttentionMetadata
    parts: tuple[tuple[PackedStore, torch.Tensor, torch.Tensor], ...]
    max_tokens: int


class KernelAttention(PackedAttention):
    """Attention over packed cells and staging, by kernel.

    Args:
        stores: Of each lane.
        page_map: Where K and V lie in a page of staging.
        layers: The layers, in the model's order.

    Raises:
        UnsupportedVLLMError: the backend orders pages in a way that no strides describe.
    """

    def __init__(
        self, stores: dict[str, PackedStore], page_map: PageMap, layers: list[LayerPages]
    ) -> None:
        super().__init__(stores, page_map, layers)
        self._views = {}
        for pages in layers:
            views = page_map.views(pages.pages)
            if views is None:
                raise UnsupportedVLLMError(
                    "kernels for packed codecs cannot read the attention backend's pages",
                    got=type(pages.impl).__mro__[1].__name__,
                    allowed="FLASH_ATTN, TRITON_ATTN, FLASHINFER",
                    fix="Choose another --attention-backend",
                )
            self._views[id(pages.layer)] = views

    def step(
        self,
        common: CommonAttentionMetadata,
        tables: dict[str, torch.Tensor],
        num_tokens: dict[str, np.ndarray],
    ) -> Any:
        device, rows = common.seq_lens.device, common.num_reqs
        parts, longest = [], np.zeros(rows, np.int64)
        for lane, store in self.stores.items():
            counts = torch.from_numpy(num_tokens[lane].astype(np.int32))
            lengths = counts.to(device, non_blocking=True)
            parts.append((store, tables[lane][:rows], lengths))
            longest += num_tokens[lane]
        return KernelStep(common, tuple(parts), common.max_seq_len + int(longest.max()))

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        step: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert output_scale is None
        assert output_block_scale is None
        common, impl, rows = step.common, layer.impl, step.common.num_reqs
        keys, values = self._views[id(layer)]
        pages = page_bytes(self._layers[id(layer)])
        result = output.view(query.shape)
        lengths, sinks = common.seq_lens[:rows], impl.sinks
        found = []
        for store, table, counts in step.parts:
            found.append(
                paged_attention(
                    query,
                    common.query_start_loc[: rows + 1],
                    causal=ExactPart(keys, values, common.block_table_tensor[:rows], lengths),
                    prefix=PackedPart(pages, table, counts, store.cells),
                    scale=impl.scale,
                    max_query_len=common.max_query_len,
                    max_tokens=step.max_tokens,
                    soft_cap=impl.logits_soft_cap or 0.0,
                    sinks=None if sinks is None else sinks.float(),
                    out=result if len(step.parts) == 1 else None,
                    **store.rotations,
                )
            )
            # Staging and sinks count once: the other parts are cells alone.
            lengths, sinks = torch.zeros_like(lengths), None
        if len(found) > 1:
            result.copy_(merge(*zip(*found, strict=True))[0])
        return output
