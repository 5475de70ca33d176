"""Packed stores by kernel, for CUDA: the bytes and the attention of `packed.py`, on the device.

    events      read staging and choose in PyTorch; `kernels.compact` encodes into the cells
    attention   `kernels.paged_attention` reads cells and staging's open blocks where they lie

Nothing in a step waits for the device. Which form runs is decided by `packed_runner`, nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress.errors import UnsupportedModelError, UnsupportedVLLMError
from vllm_kvpress.integration.cells import CellStore
from vllm_kvpress.integration.events import LayerPages
from vllm_kvpress.integration.packed import PackedAttention, PackedEventRunner, page_bytes
from vllm_kvpress.integration.pages import PageMap
from vllm_kvpress.kernels.cells import Cells
from vllm_kvpress.kernels.compact import compact
from vllm_kvpress.kernels.paged_attention import ExactPart, PackedPart, merge, paged_attention
from vllm_kvpress.policies.codecs import hadamard

OLDEST = (8, 0)


def packed_runner(device: torch.device) -> type[PackedEventRunner]:
    """Returns what runs packed stores on a device: PyTorch on CPU, kernels on CUDA.

    Raises:
        UnsupportedModelError: there are no kernels for the device.
    """
    if device.type == "cpu":
        return PackedEventRunner
    old = device.type != "cuda" or torch.version.hip is not None
    if old or torch.cuda.get_device_capability(device) < OLDEST:
        raise UnsupportedModelError(
            "packed codecs have no kernels for this device",
            got=str(device) if old else torch.cuda.get_device_name(device),
            allowed="CPU; NVIDIA GPUs of compute capability 8.0 and newer",
            fix="Use a policy with quantize fp8, or without quantize",
        )
    return KernelEventRunner


class KernelEventRunner(PackedEventRunner):
    """Runs the events of a packed store with kernels that encode and attend."""

    def __init__(
        self, plan: Any, scorer: Any, page_map: PageMap, layers: list[LayerPages], vllm_config: Any
    ) -> None:
        super().__init__(plan, scorer, page_map, layers, vllm_config)
        pages = page_bytes(layers[0])
        self.stores = {lane: KernelStore(store, pages) for lane, store in self.stores.items()}
        self.attention = KernelAttention(self.stores, page_map, layers)


class KernelStore:
    """Writes a store's cells by kernel.

    Args:
        form: The same store in PyTorch.
        pages: uint8 [num_blocks, page_bytes] of a layer; all layers' are alike.

    Attributes:
        cells: Where things lie, in the kernels' words.
        rotations: The kernels' options for rotated keys and values.
    """

    def __init__(self, form: CellStore, pages: torch.Tensor) -> None:
        self.cells = Cells.of(form.cells.numbers(pages.shape[1]))
        self.rotations = {
            "rotation": hadamard(form.cells.head_size, pages.device),
            "rotate_keys": form.rotate_keys,
            "rotate_values": form.rotate_values,
        }
        self._found = torch.zeros(1, dtype=torch.int64, device=pages.device)
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=pages.is_cuda)
        self._told = 0

    def write(
        self,
        pages: torch.Tensor,
        table: torch.Tensor,
        start: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> int:
        """Encodes tokens into a request's store, from place `start` on; see `CellStore.write`.

        Returns:
            How many numbers of earlier calls turned out to be NaN or infinite: the device counts
            them, and nobody waits for it.
        """
        kept = torch.arange(keys.shape[1], device=pages.device).expand(len(keys), -1)
        seen = int(self._seen)
        found, self._told = seen - self._told, seen
        compact(
            keys,
            values,
            kept,
            table.int(),
            pages,
            start,
            self.cells,
            nonfinite=self._found,
            **self.rotations,
        )
        self._seen.copy_(self._found, non_blocking=True)
        return found


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
    parts: tuple[tuple[KernelStore, torch.Tensor, torch.Tensor], ...]
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

    def __init__(self, stores: dict[str, Any], page_map: PageMap, layers: list[LayerPages]) -> None:
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
