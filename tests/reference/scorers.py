"""The scorers once more, from their formulas: one (layer, KV head) at a time, higher = keep."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["SCORERS", "Observation"]


@dataclass(frozen=True)
class Observation:
    """What one KV head still holds, sorted by position.

    Attributes:
        positions: int64 [num_tokens].
        keys, values: [num_tokens, head_dim], RoPE applied to the keys.
        prompt_queries: [num_prompt_tokens, group, head_dim], RoPE applied.
    """

    layer: int
    head: int
    positions: Tensor
    keys: Tensor
    values: Tensor
    prompt_queries: Tensor


def random(seen: Observation, seed: int = 0) -> Tensor:
    """Returns splitmix64 of (seed, layer, head, position), its top 24 bits as a fraction."""
    with np.errstate(over="ignore"):
        state = _mix(_mix(_mix(np.uint64(seed)) ^ np.uint64(seen.layer)) ^ np.uint64(seen.head))
        state = _mix(state ^ seen.positions.numpy().astype(np.uint64))
    return torch.from_numpy(((state >> np.uint64(40)) / 2**24).astype(np.float32))


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def knorm(seen: Observation) -> Tensor:
    """Returns -|k|."""
    return -seen.keys.float().square().sum(-1).sqrt()


def keydiff(seen: Observation) -> Tensor:
    """Returns -cos(k, mean of k / |k|)."""
    keys = seen.keys.float()
    units = keys / keys.norm(dim=-1, keepdim=True)
    anchor = units.mean(0)
    return -(units @ anchor) / anchor.norm()


def value_key_norm(seen: Observation) -> Tensor:
    """Returns |v| / |k|."""
    return seen.values.float().norm(dim=-1) / seen.keys.float().norm(dim=-1)


def logquant(seen: Observation) -> Tensor:
    """Returns minus the least window that keeps the token: its distance over zero bits + 1."""
    last = int(seen.positions.max())
    windows = []
    for position in seen.positions.tolist():
        zeros = f"{position:b}"[::-1].find("1")
        windows.append(0.0 if position == 0 else (last - position) / (zeros + 1))
    return -torch.tensor(windows)


def snapkv(seen: Observation, window: int = 32, pool: int = 5, pooling: str = "avg") -> Tensor:
    """Returns pooled attention of the last queries, averaged; the window itself scores +inf."""
    queries = seen.prompt_queries[-window:].float()
    query_positions = torch.arange(len(seen.prompt_queries))[-window:]
    logits = torch.einsum("wgd,kd->gwk", queries, seen.keys.float()) * queries.shape[-1] ** -0.5
    hidden = seen.positions[None, :] > query_positions[:, None]
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    before = seen.positions < query_positions[0]
    # [group, num_tokens before the window]
    raw = attention.mean(1)[:, before]
    half = pool // 2
    shifted = [_shifted(raw, offset, pooling) for offset in range(-half, half + 1)]
    pooled = (
        torch.stack(shifted).amax(0) if pooling == "max" else torch.stack(shifted).sum(0) / pool
    )
    scores = torch.full(seen.positions.shape, torch.inf)
    scores[before] = pooled.mean(0)
    return scores


def _shifted(raw: Tensor, offset: int, pooling: str) -> Tensor:
    """Returns raw[:, j + offset]; outside it is 0 for averages and -inf for maxima."""
    out = torch.full_like(raw, -torch.inf if pooling == "max" else 0.0)
    size = raw.shape[1]
    low, high = max(0, -offset), min(size, size - offset)
    if low < high:
        out[:, low:high] = raw[:, low + offset : high + offset]
    return out


SCORERS: dict[str, Callable[..., Tensor]] = {
    "keydiff": keydiff,
    "knorm": knorm,
    "logquant": logquant,
    "random": random,
    "snapkv": snapkv,
    "value_key_norm": value_key_norm,
}
