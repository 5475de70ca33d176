"""Engines on a CPU whose packed stores run by kernel, in Triton's interpreter.

Two things of a GPU are stood in for. The attention backend keeps K and V in plain rows, as CUDA
backends do, and attends in PyTorch; CPU_ATTN's own order has no strides. And kernels take CPU
tensors: operations check their arguments as ever, then start the kernel in place of the reference.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

__all__ = ["run_by_kernel"]


def run_by_kernel(monkeypatch: Any) -> Counter[str]:
    """Makes engines of this process run packed stores by kernel; returns counts of the launches."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm_kvpress.kernels import compact, paged_attention, quantize_on_write, window_scores

    from vllm_kvpress.integration import kernel_form, packed

    launches: Counter[str] = Counter()
    monkeypatch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", write_rows)
    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", attend_rows)
    monkeypatch.setattr(packed, "attention_form", lambda device: kernel_form.KernelAttention)
    for package in (compact, quantize_on_write, window_scores):
        name = package.__name__.rpartition(".")[2]
        launch = counted(launches, name, package)
        monkeypatch.setattr(package.reference, name, launch)
    attend = counted(launches, "paged_attention", paged_attention)

    def with_limits(query: Any, starts: Any, *, causal: Any, prefix: Any, **options: Any) -> Any:
        # The operation keeps its limits from the reference, which needs none.
        longest = causal.lengths if prefix is None else causal.lengths + prefix.lengths
        limits = {"max_query_len": int(starts.diff().max()), "max_tokens": int(longest.max())}
        return attend(query, starts, causal=causal, prefix=prefix, **limits, **options)

    monkeypatch.setattr(paged_attention.cpu, "paged_attention", with_limits)
    return launches


def counted(launches: Counter[str], name: str, package: Any) -> Any:
    """Returns a kernel's launcher that counts its launches."""
    from importlib import import_module

    launch = import_module(f"{package.__name__}.triton").launch

    def run(*arguments: Any, **options: Any) -> Any:
        launches[name] += 1
        return launch(*arguments, **options)

    return run


def rows_of(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns K and V, [num_blocks, block_size, num_kv_heads, head_size], aliasing the cache."""
    keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


def write_rows(
    self: Any,
    layer: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Stores each token's K and V in the row of its slot."""
    slots = slot_mapping[slot_mapping >= 0]
    size = kv_cache.shape[2]
    for rows, numbers in zip(rows_of(kv_cache), (key, value), strict=True):
        rows[slots // size, slots % size] = numbers[: len(slots)]


def attend_rows(
    self: Any,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
    **unused: Any,
) -> torch.Tensor:
    """Causal attention of each request over its rows."""
    if attn_metadata is None:
        return output
    result = output.view(query.shape)
    bounds = attn_metadata.query_start_loc.tolist()
    for row, length in enumerate(attn_metadata.seq_lens.tolist()):
        first, last = bounds[row], bounds[row + 1]
        blocks = attn_metadata.block_table[row, : -(-length // kv_cache.shape[2])].long()
        keys, values = (
            rows[blocks].flatten(0, 1)[:length].transpose(0, 1) for rows in rows_of(kv_cache)
        )
        hidden = torch.ones(last - first, length, dtype=torch.bool).triu(length - last + first + 1)
        grouped = query[first:last].transpose(0, 1).unflatten(0, (len(keys), -1))
        logits = grouped @ keys[:, None].transpose(2, 3) * self.scale
        weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        result[first:last] = (weights @ values[:, None]).flatten(0, 1).transpose(0, 1)
    return output
