"""Quantize on write as a Triton kernel: README.md has the grid and what bounds it."""

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
    stride_token,
    stride_head,
    pages,
    slots,
    rotation,
    nonfinite,
    num_tokens,
    num_kv_heads,
    page_tokens,
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
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    live = slot >= 0
    # Positions fit 32 bits, in which dividing is cheap; only bytes and strides need 64.
    slot = tl.where(live, slot, 0).to(tl.int32)
    in_page = slot % page_tokens
    cell = in_page // CELL_TOKENS * num_kv_heads + head
    write_side(
        numbers + token * stride_token + head.to(tl.int64) * stride_head,
        live,
        pages + (slot // page_tokens).to(tl.int64) * page_stride + cell.to(tl.int64) * cell_bytes,
        in_page % CELL_TOKENS,
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


@triton.jit(do_not_specialize=["num_tokens"])
def quantize_on_write_kernel(
    keys,
    values,
    pages,
    slots,
    rotation,
    nonfinite,
    num_tokens,
    num_kv_heads,
    page_tokens,
    page_stride,
    cell_bytes,
    key_stride_token,
    key_stride_head,
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
    """Encodes a block of tokens of one KV head: keys in programs (.., .., 0), values in others."""
    if tl.program_id(2) == 0:
        _write(
            keys,
            key_stride_token,
            key_stride_head,
            pages,
            slots,
            rotation,
            nonfinite,
            num_tokens,
            num_kv_heads,
            page_tokens,
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
            value_stride_token,
            value_stride_head,
            pages,
            slots,
            rotation,
            nonfinite,
            num_tokens,
            num_kv_heads,
            page_tokens,
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
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    cells: Cells,
    *,
    rotation: torch.Tensor | None,
    rotate_keys: bool,
    rotate_values: bool,
    nonfinite: torch.Tensor | None,
) -> None:
    """Runs the kernel; arguments are those of `quantize_on_write`, checked there."""
    tile, num_warps = BLOCKS[architecture_of(pages)]
    constants = constants_of(
        cells.head_size, cells.tokens, cells.keys, cells.values, rotate_keys, rotate_values, tile
    )
    tokens = min(constants["KEY_TOKENS"], constants["VALUE_TOKENS"])
    grid = (triton.cdiv(len(slots), tokens), cells.num_kv_heads, 2)
    quantize_on_write_kernel[grid](
        key,
        value,
        pages,
        slots,
        rotation if rotate_keys or rotate_values else None,
        nonfinite,
        len(slots),
        cells.num_kv_heads,
        cells.per_page // cells.num_kv_heads * cells.tokens,
        pages.stride(0),
        cells.size,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *cells.keys[3:],
        *cells.values[3:],
        **constants,
        num_warps=num_warps,
    )


def variants() -> Iterator[Variant]:
    """Yields what `launch` starts for the formats in use on every architecture."""
    pointers = {"pages": "*u8", "slots": "*i64", "nonfinite": "*i64"}
    for architecture in ARCHITECTURES:
        tile, num_warps = BLOCKS[architecture]
        for case in cases(per_channel=False):
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
                "quantize_on_write",
                quantize_on_write_kernel,
                pointers,
                case,
                constants,
                num_warps,
                architecture,
            )
