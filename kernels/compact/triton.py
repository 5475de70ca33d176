"""Compaction as a Triton kernel: README.md has the grid and what bounds it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from vllm_kvpress.kernels.cells import Cells
from vllm_kvpress.kernels.quantize_on_write.encoding import write_side
from vllm_kvpress.kernels.quantize_on_write.launching import (
    architecture_of,
    cases,
    constants_of,
    variant,
)
from vllm_kvpress.kernels.variants import ARCHITECTURES, Variant

__all__ = ["launch", "variants"]

# Numbers of one side that a program holds at once, and its warps, by compute capability.
# Untuned: no GPU measured these yet.
BLOCKS = {80: (1024, 4), 89: (1024, 4), 90: (1024, 4), 100: (1024, 4)}


@triton.jit
def _write(
    numbers,
    stride_block,
    stride_token,
    stride_head,
    kept,
    blocks,
    table,
    pages,
    rotation,
    nonfinite,
    num_kept,
    kept_stride_head,
    kept_stride_token,
    block_size,
    start,
    num_kv_heads,
    per_page,
    page_stride,
    cell_bytes,
    codes,
    scales,
    zeros,
    CELL_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROTATED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Positions fit 32 bits, in which dividing is cheap; only bytes and strides need 64.
    index = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    live = index < num_kept
    chosen = kept + head.to(tl.int64) * kept_stride_head + index.to(tl.int64) * kept_stride_token
    token = tl.load(chosen, mask=live, other=0).to(tl.int32)
    source = numbers + head.to(tl.int64) * stride_head
    if blocks is None:
        source += token.to(tl.int64) * stride_token
    else:
        block = tl.load(blocks + token // block_size, mask=live, other=0).to(tl.int64)
        source += block * stride_block + (token % block_size).to(tl.int64) * stride_token
    position = start + index
    cell = position // CELL_TOKENS * num_kv_heads + head
    page = tl.load(table + cell // per_page, mask=live, other=0).to(tl.int64)
    write_side(
        source,
        live,
        pages + page * page_stride + (cell % per_page).to(tl.int64) * cell_bytes,
        position % CELL_TOKENS,
        rotation,
        nonfinite,
        codes,
        scales,
        zeros,
        HEAD_SIZE,
        BITS,
        GROUP,
        PER_CHANNEL,
        ROTATED,
        WIDTH,
    )


@triton.jit(do_not_specialize=["num_kept", "start", "kept_stride_head"])
def compact_kernel(
    keys,
    values,
    kept,
    blocks,
    table,
    pages,
    rotation,
    nonfinite,
    num_kept,
    kept_stride_head,
    kept_stride_token,
    block_size,
    start,
    num_kv_heads,
    per_page,
    page_stride,
    cell_bytes,
    key_stride_block,
    key_stride_token,
    key_stride_head,
    value_stride_block,
    value_stride_token,
    value_stride_head,
    key_codes,
    key_scales,
    key_zeros,
    value_codes,
    value_scales,
    value_zeros,
    CELL_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_PER_CHANNEL: tl.constexpr,
    KEY_ROTATED: tl.constexpr,
    KEY_TOKENS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    VALUE_PER_CHANNEL: tl.constexpr,
    VALUE_ROTATED: tl.constexpr,
    VALUE_TOKENS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    """Encodes a block of kept tokens of one KV head: keys in programs (.., .., 0)."""
    if tl.program_id(2) == 0:
        _write(
            keys,
            key_stride_block,
            key_stride_token,
            key_stride_head,
            kept,
            blocks,
            table,
            pages,
            rotation,
            nonfinite,
            num_kept,
            kept_stride_head,
            kept_stride_token,
            block_size,
            start,
            num_kv_heads,
            per_page,
            page_stride,
            cell_bytes,
            key_codes,
            key_scales,
            key_zeros,
            CELL_TOKENS,
            HEAD_SIZE,
            KEY_BITS,
            KEY_GROUP,
            KEY_PER_CHANNEL,
            KEY_ROTATED,
            KEY_TOKENS,
            KEY_WIDTH,
        )
    else:
        _write(
            values,
            value_stride_block,
            value_stride_token,
            value_stride_head,
            kept,
            blocks,
            table,
            pages,
            rotation,
            nonfinite,
            num_kept,
            kept_stride_head,
            kept_stride_token,
            block_size,
            start,
            num_kv_heads,
            per_page,
            page_stride,
            cell_bytes,
            value_codes,
            value_scales,
            value_zeros,
            CELL_TOKENS,
            HEAD_SIZE,
            VALUE_BITS,
            VALUE_GROUP,
            VALUE_PER_CHANNEL,
            VALUE_ROTATED,
            VALUE_TOKENS,
            VALUE_WIDTH,
        )


def launch(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    table: torch.Tensor,
    pages: torch.Tensor,
    start: int,
    cells: Cells,
    *,
    blocks: torch.Tensor | None,
    rotation: torch.Tensor | None,
    rotate_keys: bool,
    rotate_values: bool,
    nonfinite: torch.Tensor | None,
) -> None:
    """Runs the kernel; arguments are those of `compact`, checked there."""
    tile, num_warps = BLOCKS[architecture_of(pages)]
    constants = constants_of(
        cells.head_size, cells.tokens, cells.keys, cells.values, rotate_keys, rotate_values, tile
    )
    num_kept = kept.shape[1]
    tokens = min(constants["KEY_TOKENS"], constants["VALUE_TOKENS"])
    grid = (triton.cdiv(num_kept, tokens), cells.num_kv_heads, 2)
    compact_kernel[grid](
        keys,
        values,
        kept,
        blocks,
        table,
        pages,
        rotation if rotate_keys or rotate_values else None,
        nonfinite,
        num_kept,
        *kept.stride(),
        1 if blocks is None else keys.shape[1],
        start,
        cells.num_kv_heads,
        cells.per_page,
        pages.stride(0),
        cells.size,
        *_strides(keys, blocks is not None),
        *_strides(values, blocks is not None),
        *cells.keys[3:],
        *cells.values[3:],
        **constants,
        num_warps=num_warps,
    )


def _strides(numbers: torch.Tensor, paged: bool) -> tuple[int, int, int]:
    """Returns the strides of block, token and head."""
    if paged:
        return numbers.stride()[:3]
    return 0, numbers.stride(1), numbers.stride(0)


def variants() -> Iterator[Variant]:
    """Yields what `launch` starts for the formats in use on every architecture."""
    pointers = {
        "kept": "*i64",
        "blocks": "*i32",
        "table": "*i32",
        "pages": "*u8",
        "nonfinite": "*i64",
    }
    for architecture in ARCHITECTURES:
        tile, num_warps = BLOCKS[architecture]
        for case in cases(per_channel=True):
            constants = constants_of(
                case.head_size,
                case.tokens,
                case.keys,
                case.values,
                case.rotated,
                case.rotated,
                tile,
            )
            yield variant(
                "compact", compact_kernel, pointers, case, constants, num_warps, architecture
            )
