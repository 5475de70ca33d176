"""The Llama that is trained: its shape, its weights by name, and a fast forward pass for a CPU.

Weights are a plain mapping from the names of the checkpoint to tensors. The pass computes what
`transformers` computes for the same weights, but with the positions given, and with an attention
whose backward pass costs a third of PyTorch's on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
# Layer, query, key and value as `causal_attention` takes them; what it returns.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_QUERY_BLOCK = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are those of the bundled one."""

    vocab: int
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 512
    max_positions: int = 8192
    rope_theta: float = 1e8
    norm_epsilon: float = 1e-5

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return the sizes of the matrices inside of the layers, by name."""
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "self_attn.q_proj": (q_size, self.hidden),
            "self_attn.k_proj": (kv_size, self.hidden),
            "self_attn.v_proj": (kv_size, self.hidden),
            "self_attn.o_proj": (self.hidden, q_size),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {
            f"model.layers.{layer}.{name}.weight": size
            for layer in range(self.layers)
            for name, size in sizes.items()
        }

    def norms(self) -> list[str]:
        """Return the names of the normalisation weights."""
        names = ("input_layernorm", "post_attention_layernorm")
        inner = [f"model.layers.{i}.{name}.weight" for i in range(self.layers) for name in names]
        return [*inner, "model.norm.weight"]


EMBEDDING = "model.embed_tokens.weight"


def rotations(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary embeddings, [batch, 1, num_tokens, head_dim]."""
    pairs = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = shape.rope_theta ** (-pairs / shape.head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def hidden_states(
    shape: Shape, weights: Weights, ids: Tensor, positions: Tensor, attend: Attend | None = None
) -> Tensor:
    """Return the normalised states before the output matrix, [batch, num_tokens, hidden].

    Args:
        shape: Sizes of the model.
        weights: By name, all of one dtype, in which the pass computes.
        ids: Tokens, [batch, num_tokens].
        positions: Of the tokens, increasing in each row, [batch, num_tokens].
        attend: Used in place of `causal_attention`, to look into heads or to change them.
    """
    x = functional.embedding(ids, weights[EMBEDDING])
    rotation = rotations(shape, positions, x.dtype)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        y = _norm(shape, x, weights[f"{prefix}input_layernorm.weight"])
        x = x + _attention(shape, weights, layer, y, rotation, attend)
        y = _norm(shape, x, weights[f"{prefix}post_attention_layernorm.weight"])
        x = x + _mlp(weights, f"{prefix}mlp.", y)
    return _norm(shape, x, weights["model.norm.weight"])


def _norm(shape: Shape, x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (shape.hidden,), weight, shape.norm_epsilon)


def _mlp(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    gate = functional.silu(functional.linear(x, weights[f"{prefix}gate_proj.weight"]))
    up = functional.linear(x, weights[f"{prefix}up_proj.weight"])
    return functional.linear(gate * up, weights[f"{prefix}down_proj.weight"])


def _attention(
    shape: Shape,
    weights: Weights,
    layer: int,
    x: Tensor,
    rotation: tuple[Tensor, Tensor],
    attend: Attend | None,
) -> Tensor:
    prefix = f"model.layers.{layer}.self_attn."

    def heads(name: str) -> Tensor:
        y = functional.linear(x, weights[f"{prefix}{name}.weight"])
        return y.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)

    query, key, value = heads("q_proj"), heads("k_proj"), heads("v_proj")
    query, key = _rotate(query, rotation), _rotate(key, rotation)
    if attend is None:
        mixed = causal_attention(query, key, value)
    else:
        mixed = attend(layer, query, key, value)
    return functional.linear(mixed.transpose(1, 2).flatten(2), weights[f"{prefix}o_proj.weight"])


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return causal attention with grouped heads, [batch, heads, num_tokens, head_dim].

    Args:
        query: [batch, heads, num_tokens, head_dim].
        key: [batch, kv_heads, num_tokens, head_dim].
        value: As `key`.
    """
    return _CausalAttention.apply(query, key.contiguous(), value.contiguous())


class _CausalAttention(torch.autograd.Function):
    """Attention block by block over the queries, which sees no key behind a block's last query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        batch, heads, length, dim = query.shape
        groups = heads // key.shape[1]
        # [batch * kv_heads, group, num_tokens, head_dim]: the heads of a group share their keys.
        folded = (query * dim**-0.5).reshape(-1, groups, length, dim)
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        outputs, shares = [], []
        for start in range(0, length, _QUERY_BLOCK):
            end = min(start + _QUERY_BLOCK, length)
            rows = folded[:, :, start:end].flatten(1, 2)
            scores = torch.bmm(rows, keys[:, :end].transpose(1, 2))
            _hide_later(scores, groups, start, end)
            share = scores.softmax(dim=-1)
            shares.append(share)
            outputs.append(torch.bmm(share, values[:, :end]).unflatten(1, (groups, -1)))
        ctx.save_for_backward(folded, keys, values, *shares)
        ctx.batch = batch
        return torch.cat(outputs, dim=2).reshape(batch, heads, length, dim)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        folded, keys, values, *shares = ctx.saved_tensors
        count, groups, length, dim = folded.shape
        gradient = gradient.reshape(count, groups, length, dim)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        d_queries = []
        for block, share in enumerate(shares):
            start = block * _QUERY_BLOCK
            end = min(start + _QUERY_BLOCK, length)
            rows = folded[:, :, start:end].flatten(1, 2)
            d_rows = gradient[:, :, start:end].flatten(1, 2)
            d_values[:, :end].baddbmm_(share.transpose(1, 2), d_rows)
            d_share = torch.bmm(d_rows, values[:, :end].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_share, share, -1, share.dtype)
            d_keys[:, :end].baddbmm_(d_scores.transpose(1, 2), rows)
            d_queries.append(torch.bmm(d_scores, keys[:, :end]).unflatten(1, (groups, -1)))
        d_query = torch.cat(d_queries, dim=2).mul_(dim**-0.5)
        return (
            d_query.reshape(ctx.batch, -1, length, dim),
            d_keys.unflatten(0, (ctx.batch, -1)),
            d_values.unflatten(0, (ctx.batch, -1)),
        )


def _hide_later(scores: Tensor, groups: int, start: int, end: int) -> None:
    """Hide from each query of a block the keys after it, in place."""
    size = end - start
    hidden = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
    diagonal = scores.unflatten(1, (groups, size))[..., start:]
    diagonal.masked_fill_(hidden, float("-inf"))
