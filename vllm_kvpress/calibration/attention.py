"""Any transformers model under an attention of ours, and what a streaming head sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vllm_kvpress.errors import UnsupportedModelError

__all__ = ["Heads", "attending", "full_attention", "hidden_states", "streaming_mask"]

_NAME = "kvpress_calibration"


@dataclass(frozen=True)
class Heads:
    """One layer's attention inputs, RoPE applied.

    Attributes:
        layer: index of the layer.
        query: [batch, num_heads, num_tokens, head_size].
        key: [batch, num_heads, num_tokens, head_size], each KV head repeated for its query heads.
        value: as `key`.
        scale: what logits are multiplied by.
        window: tokens that this layer's own sliding window sees, or None.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None

    def attend(self, mask: Tensor | None) -> Tensor:
        """Returns [batch, num_heads, num_tokens, head_size]; causal where there is no mask.

        Args:
            mask: [num_tokens, num_tokens], true where a query (row) sees a key.
        """
        return functional.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
        )


Attend = Callable[[Heads], Tensor]


def full_attention(heads: Heads) -> Tensor:
    """Returns what the model itself computes."""
    if heads.window is None:
        return heads.attend(None)
    num_tokens = heads.query.shape[2]
    return heads.attend(streaming_mask(num_tokens, 0, heads.window, heads.query.device))


def streaming_mask(
    num_tokens: int, sink_tokens: int, recent_tokens: int, device: torch.device
) -> Tensor:
    """Returns bool [num_tokens, num_tokens]: the first tokens and the newest up to the query's."""
    at = torch.arange(num_tokens, device=device)
    behind = at[:, None] - at
    return (behind >= 0) & ((behind < recent_tokens) | (at < sink_tokens))


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """Lets every attention layer of a transformers model compute `attend`.

    Raises:
        UnsupportedModelError: the model does not take its attention from transformers' registry, or
            caps its logits, or has learned sinks.
    """
    from transformers import AttentionInterface

    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if softcap is not None or s_aux is not None:
            what = "capped logits" if s_aux is None else "learned attention sinks"
            raise UnsupportedModelError(f"calibrate-heads does not take models with {what}")
        group = query.shape[1] // key.shape[1]
        heads = Heads(
            module.layer_idx,
            query,
            key.repeat_interleave(group, dim=1),
            value.repeat_interleave(group, dim=1),
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            sliding_window,
        )
        return attend(heads).transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, forward)
    model.set_attn_implementation(_NAME)
    if model.config._attn_implementation != _NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention from transformers' registry",
            fix="Use a model of transformers' own that supports attn_implementation='sdpa'",
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Returns the last hidden states [1, num_tokens, hidden_size] of token ids [num_tokens]."""
    hidden: Tensor = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
    return hidden
