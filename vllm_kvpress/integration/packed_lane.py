"""The packed staging lane: tokens are quantized as they are written, and read back from there.

No step reads what the cache does not hold: prefill attention, too, sees the rounded keys and
values, those of its own chunk included. So chunk sizes and prefix hits change nothing, and blocks
are shared like exact ones. An engine has one policy: were blocks shared between engines, the policy
would have to enter their hash.

`PackedLane` is all that the backend knows: `write` a step's tokens, then `attend`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress.integration.events import LayerPages
from vllm_kvpress.integration.kernel_form import packed_runner
from vllm_kvpress.integration.lanes import cells_of
from vllm_kvpress.integration.packed import page_bytes
from vllm_kvpress.integration.plugin import policy_of
from vllm_kvpress.kernels.cells import Cells, Side
from vllm_kvpress.kernels.paged_attention import PackedPart, paged_attention
from vllm_kvpress.kernels.quantize_on_write import quantize_on_write
from vllm_kvpress.policies.codecs import hadamard

logger = init_logger("vllm.kvpress")


class PackedLane:
    """Writes and reads a staging lane of packed cells: on CPU in PyTorch, on CUDA by kernel.

    Args:
        vllm_config: The engine's configuration, with a policy that packs on write.
        layers: The layers, in the model's order.

    Attributes:
        nonfinite: int64 [1], NaN and infinite numbers met so far; cells hold them as 0 and the
            largest float16.
    """

    def __init__(self, vllm_config: VllmConfig, layers: list[LayerPages]) -> None:
        policy = policy_of(vllm_config)
        assert policy is not None
        assert policy.quantize is not None
        packed_runner(layers[0].pages.device)  # refuses devices without kernels
        spec = layers[0].layer.get_kv_cache_spec(vllm_config)
        form = cells_of(policy.quantize, spec)
        assert form is not None
        self._pages = {id(pages.layer): page_bytes(pages) for pages in layers}
        device = layers[0].pages.device
        numbers = form.numbers(next(iter(self._pages.values())).shape[1])
        sides = {side: Side(*numbers[side]) for side in ("keys", "values")}
        self._cells = Cells(**{**numbers, **sides})
        self._rotation = {
            "rotation": hadamard(spec.head_size, device),
            "rotate_keys": policy.quantize.rotate != "none",
            "rotate_values": policy.quantize.rotate == "both",
        }
        self.nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        # What the host knows of it: on a GPU a copy that arrives later, so that nothing waits.
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._warned = False

    def write(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Encodes a step's tokens into their slots.

        Args:
            layer: vLLM's `Attention`.
            key: [>= num_tokens, num_kv_heads, head_size].
            value: Of the same shape.
            slot_mapping: int64 [num_tokens], block * block_size + token in the block; -1 for none.
        """
        quantize_on_write(
            key,
            value,
            self._pages[id(layer)],
            slot_mapping,
            self._cells,
            nonfinite=self.nonfinite,
            **self._rotation,
        )
        if self._warned:
            return
        self._seen.copy_(self.nonfinite, non_blocking=True)
        if int(self._seen):
            self._warned = True
            logger.warning(
                "KV policy: NaN or infinity in keys or values, stored as 0 and the largest "
                "float16; more are counted silently."
            )

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        step: CommonAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the attention output of every request of the step.

        Args:
            layer: vLLM's `Attention`.
            query: [num_tokens, num_heads, head_size].
            step: Physical metadata: which blocks are read, and how many tokens of them.
            output: Like `query`, or with heads and channels as one.
            output_scale: Not taken: no CPU backend fuses output quantization.
            output_block_scale: Not taken either.
        """
        assert output_scale is None
        assert output_block_scale is None
        impl = layer.impl
        table = step.block_table_tensor[: step.num_reqs]
        part = PackedPart(
            self._pages[id(layer)], table, step.seq_lens[: step.num_reqs], self._cells
        )
        paged_attention(
            query,
            step.query_start_loc[: step.num_reqs + 1],
            causal=part,
            scale=impl.scale,
            max_query_len=step.max_query_len,
            max_tokens=step.max_seq_len,
            soft_cap=impl.logits_soft_cap or 0.0,
            sinks=None if impl.sinks is None else impl.sinks.float(),
            out=output.view(query.shape),
            **self._rotation,
        )
        return output
