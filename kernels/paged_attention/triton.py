"""The launcher of the attention kernel: which programs run, in which sizes, over which tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from vllm_kvpress.kernels.paged_attention import tuning
from vllm_kvpress.kernels.paged_attention.attend import attend
from vllm_kvpress.kernels.paged_attention.finish import merge_splits, rotate_rows
from vllm_kvpress.kernels.paged_attention.parts import ExactPart
from vllm_kvpress.kernels.paged_attention.variants import variants

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_kvpress.kernels.paged_attention.parts import PackedPart

__all__ = ["launch", "variants"]


def launch(
    query: Tensor,
    query_start_loc: Tensor,
    *,
    causal: ExactPart | PackedPart,
    prefix: PackedPart | None,
    scale: float,
    max_query_len: int,
    max_tokens: int,
    soft_cap: float,
    sinks: Tensor | None,
    key_rotation: Tensor | None,
    value_rotation: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Does what the public operation describes; `splits` overrules the partition of the work."""
    _require_alignment(causal, prefix)
    exact = causal if isinstance(causal, ExactPart) else None
    packed = prefix if isinstance(causal, ExactPart) else causal
    num_kv_heads = exact.keys.shape[2] if packed is None else packed.cells.num_kv_heads
    group = query.shape[1] // num_kv_heads
    architecture, processors = tuning.device_facts(query.device)
    config = tuning.config(architecture, query.shape[2], packed is not None, group, max_query_len)
    blocks = num_reqs = query_start_loc.shape[0] - 1
    if max_query_len > 1:
        blocks = query.shape[0] // (config.block_m // group) + num_reqs
    if splits is None:
        least = 1 if prefix is None else 2
        programs = blocks * num_kv_heads
        splits = tuning.num_splits(programs, query.numel(), max_tokens, processors, least)
    is_final = splits == 1 and (packed is None or value_rotation is None)
    work = _outputs(query, out, splits, is_final, exact is not None and packed is not None)
    if not query.shape[0] or not num_reqs:
        return work["out"], work["lse"].fill_(-torch.inf)

    rotated = query
    if packed is not None and key_rotation is not None:
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        _rotate(query, key_rotation, None, rotated, query_start_loc, clear=False)
    size, block = query.shape[2], None if exact is None else exact.keys.shape[1]
    attend[blocks, num_kv_heads, splits](
        **_queries(query, rotated, query_start_loc),
        **_packed(packed, bias),
        **_exact(exact),
        **work,
        **_strides("out", work["out"], "token", "head"),
        scale=scale,
        soft_cap=soft_cap or None,
        sinks=sinks if is_final else None,
        **tuning.constants(config, packed and packed.cells, size, block, group, max_query_len),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=tuning.MAX_REGISTERS,
    )
    if not is_final:
        _finish(work, query_start_loc, sinks, packed and value_rotation, clear=out is None)
    return work["out"], work["lse"]


def _require_alignment(*parts: ExactPart | PackedPart | None) -> None:
    """Raises ValueError unless caches start at, and step by, multiples of 16 bytes."""
    for part in parts:
        if part is None:
            continue
        for tensor in part[:2] if isinstance(part, ExactPart) else part[:1]:
            steps = [step * tensor.element_size() for step in tensor.stride()[:-1]]
            if any(number % 16 for number in (tensor.data_ptr(), *steps)):
                raise ValueError(
                    f"{type(part).__name__}: got a cache at {tensor.data_ptr():#x} with strides of "
                    f"{steps} bytes; allowed: multiples of 16"
                )


def _outputs(
    query: Tensor, out: Tensor | None, splits: int, is_final: bool, has_both: bool
) -> dict[str, Tensor | None]:
    """Returns the tensors that the attention kernel writes, by its names for them."""
    num_tokens, num_q_heads, size = query.shape
    like = {"device": query.device, "dtype": torch.float32}
    if out is None:  # `_finish` clears padded rows; without it nobody does
        allocate = torch.zeros if is_final else torch.empty
        out = allocate(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(num_tokens, num_q_heads, **like)
    if is_final:
        lse.fill_(-torch.inf)
        partial = partial_lse = None
    else:
        partial = torch.empty(num_tokens, num_q_heads, splits, size, **like)
        partial_lse = torch.empty(num_tokens, num_q_heads, splits, **like)
    counts = torch.empty(num_tokens, dtype=torch.int32, device=query.device) if has_both else None
    return {
        "out": out,
        "lse": lse,
        "partial": partial,
        "partial_lse": partial_lse,
        "packed_splits": counts,
    }


def _strides(name: str, tensor: Tensor | None, *axes: str) -> dict[str, int | None]:
    """Returns the arguments that tell a tensor's first strides."""
    steps = [None] * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}_stride": step for axis, step in zip(axes, steps, strict=False)}


def _queries(query: Tensor, rotated: Tensor, query_start_loc: Tensor) -> dict[str, Any]:
    return {
        "query": query,
        **_strides("query", query, "token", "head"),
        "packed_query": rotated,
        **_strides("packed", rotated, "token", "head"),
        "query_start_loc": query_start_loc,
        "num_reqs": query_start_loc.shape[0] - 1,
    }


def _packed(part: PackedPart | None, bias: Tensor | None) -> dict[str, Any]:
    pages, table, lengths, _ = part or (None, None, None, None)
    return {
        "pages": pages,
        "page_stride": None if pages is None else pages.stride(0),
        "page_table": table,
        "page_table_stride": None if table is None else table.stride(0),
        "packed_lengths": lengths,
        "bias": None if bias is None else bias.contiguous(),
    }


def _exact(part: ExactPart | None) -> dict[str, Any]:
    keys, values, table, lengths = part or (None, None, None, None)
    return {
        "keys": keys,
        **_strides("key", keys, "block", "token", "head"),
        "values": values,
        **_strides("value", values, "block", "token", "head"),
        "block_table": table,
        "block_table_stride": None if table is None else table.stride(0),
        "exact_lengths": lengths,
    }


def _finish(
    work: dict[str, Any],
    query_start_loc: Tensor,
    sinks: Tensor | None,
    rotation: Tensor | None,
    *,
    clear: bool,
) -> None:
    """Merges the splits' results into `out` and `lse`, and leaves the rotated basis."""
    out, partial = work["out"], work["partial"]
    num_tokens, num_q_heads, splits, size = partial.shape
    rotated = rest = counts = None
    if rotation is not None:
        counts = work["packed_splits"]
        rotated = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        rest = None if counts is None else torch.empty_like(rotated)
    merge_splits[num_tokens, num_q_heads](
        partial,
        work["partial_lse"],
        counts,
        query_start_loc,
        sinks,
        out,
        work["lse"],
        rotated,
        rest,
        query_start_loc.shape[0] - 1,
        splits,
        *out.stride()[:2],
        SIZE=size,
        STEP=tuning.merge_step(size),
        CLEAR=clear,
        num_warps=4,
    )
    if rotated is not None:
        _rotate(rotated, rotation, rest, out, query_start_loc, clear=clear)


def _rotate(
    rows: Tensor,
    matrix: Tensor,
    rest: Tensor | None,
    out: Tensor,
    query_start_loc: Tensor,
    *,
    clear: bool,
) -> None:
    """Writes rows @ matrix + rest to `out`, all [num_tokens, num_q_heads, head_size]."""
    num_rows, num_heads, size = rows.shape[0] * rows.shape[1], rows.shape[1], rows.shape[2]
    rotate_rows[(triton.cdiv(num_rows, tuning.ROTATE_ROWS),)](
        rows,
        matrix.contiguous(),
        rest,
        out,
        query_start_loc,
        num_rows,
        num_heads,
        query_start_loc.shape[0] - 1,
        *rows.stride()[:2],
        *out.stride()[:2],
        SIZE=size,
        BLOCK_M=tuning.ROTATE_ROWS,
        BLOCK_K=tuning.ROTATE_CHANNELS,
        CLEAR=clear,
        num_warps=4,
    )
