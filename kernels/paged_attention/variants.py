"""What the launcher compiles: every entry of its table with every format that the project has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_kvpress.kernels.cells import Cells, Side
from vllm_kvpress.kernels.paged_attention import tuning
from vllm_kvpress.kernels.paged_attention.attend import attend
from vllm_kvpress.kernels.paged_attention.finish import merge_splits, rotate_rows
from vllm_kvpress.kernels.variants import ARCHITECTURES, Variant

__all__ = ["FORMATS", "variants"]

WHOLE = -1  # a group of all channels

# Name -> (bits, group, per_channel) of keys and of values.
FORMATS = {
    "int8": ((8, WHOLE, False), (8, WHOLE, False)),
    "int8-32": ((8, 32, False), (8, 32, False)),
    "int4": ((4, WHOLE, False), (4, WHOLE, False)),
    "int4-32": ((4, 32, False), (4, 32, False)),
    "int8-int4": ((8, WHOLE, False), (4, WHOLE, False)),
    "int8-int4-32": ((8, 32, False), (4, 32, False)),
    "kivi4": ((4, 32, True), (4, 32, False)),
    "kivi2": ((2, 32, True), (2, 32, False)),
    "exact-cells": ((16, 0, False), (16, 0, False)),
}
EXACT = "exact"  # no packed part

# Format -> head sizes, beyond one (128) for all: sizes change the table's entry and the masks,
# formats the decoding; each is met with the widest choice of the other once.
HEAD_SIZES = {
    EXACT: (64, 80, 128, 256),
    "kivi2": (64, 80, 128, 256),
    "int4-32": (64, 80, 256),
    "int8": (64, 256),
}
GROUP = 4  # query heads of a KV head
MANY = 71  # so many of one KV head make a block of 128 rows

POINTERS = {
    "query_start_loc": "*i32",
    "pages": "*u8",
    "page_table": "*i32",
    "packed_lengths": "*i32",
    "bias": "*fp32",
    "block_table": "*i32",
    "exact_lengths": "*i32",
    "sinks": "*fp32",
    "lse": "*fp32",
    "partial": "*fp32",
    "partial_lse": "*fp32",
    "packed_splits": "*i32",
    "scale": "fp32",
    "soft_cap": "fp32",
    "rotated": "*fp32",
    "rest": "*fp32",
    "matrix": "*fp32",
}
MODELS = ("query", "packed_query", "keys", "values", "out", "rows")


def cells_of(head_size: int, name: str) -> Cells:
    """Returns the cells of a format, as `vllm_kvpress.layout` computes them; two KV heads."""
    sides = [
        (bits, head_size if group == WHOLE else group, along_tokens)
        for bits, group, along_tokens in FORMATS[name]
    ]
    tokens = max(16, *(group for _, group, along_tokens in sides if along_tokens), 16)
    starts = [0]
    for bits, _, _ in sides:
        starts.append(starts[-1] + tokens * head_size * bits // 8)
    for bits, group, along_tokens in sides:
        params = 0
        if bits < 16:
            params = (
                tokens // group * head_size if along_tokens else tokens * -(-head_size // group)
            )
        starts += [starts[-1] + 2 * params, starts[-1] + 4 * params]
    keys, values = (
        Side(*side, starts[i], *starts[2 + 2 * i : 4 + 2 * i]) for i, side in enumerate(sides)
    )
    return Cells(2, head_size, tokens, starts[-1], 3, keys, values)


def variants() -> Iterator[Variant]:
    """Yields all; under 60 an architecture."""
    for architecture in ARCHITECTURES:
        for name in (EXACT, *FORMATS):
            for head_size in HEAD_SIZES.get(name, (128,)):
                for queries in (1, 1024):
                    yield _attention(architecture, name, head_size, queries, is_prefix=True)
        for name in ("int8", "int4-32"):  # the whole cache packed on write
            for queries in (1, 1024):
                yield _attention(architecture, name, 128, queries, is_prefix=False)
        yield _attention(architecture, EXACT, 64, 1, is_prefix=True, group=MANY)
        for head_size in (64, 128, 256):
            yield _finish(architecture, "merge", merge_splits, head_size)
            yield _finish(architecture, "rotate", rotate_rows, head_size)


def _attention(
    architecture: int,
    name: str,
    head_size: int,
    queries: int,
    *,
    is_prefix: bool,
    group: int = GROUP,
) -> Variant:
    """Returns the attention kernel for a format; fp16 for decode, bf16 for prefill."""
    is_packed = name != EXACT
    cells = cells_of(head_size, name) if is_packed else None
    config = tuning.config(architecture, head_size, is_packed, group, queries)
    block = 16 if is_prefix else None
    constants = tuning.constants(config, cells, head_size, block, group, queries)
    absent = {"soft_cap"} if is_packed else {"partial", "partial_lse"}
    if not is_packed:
        absent |= {"pages", "page_stride", "page_table", "page_table_stride", "packed_lengths"}
    if not is_packed or not is_prefix:
        absent |= {"bias", "packed_splits"}
    if not is_prefix:
        absent |= {n for n in attend.arg_names if n.startswith(("key", "value", "block_", "exact"))}
    where = "prefix" if is_prefix else "whole"
    phase = "decode" if queries == 1 else "prefill"
    title = f"paged_attention-{architecture}-{name}-{where}-{phase}-{head_size}-{group}"
    model = "fp16" if queries == 1 else "bf16"
    return _variant(
        title, attend, absent, constants, model, architecture, config.num_warps, config.num_stages
    )


def _finish(architecture: int, name: str, kernel: Any, head_size: int) -> Variant:
    """Returns one of the kernels that follow."""
    constants = {"SIZE": head_size, "CLEAR": False}
    if name == "merge":
        constants["STEP"] = tuning.merge_step(head_size)
    else:
        constants |= {"BLOCK_M": tuning.ROTATE_ROWS, "BLOCK_K": tuning.ROTATE_CHANNELS}
    title = f"paged_attention-{architecture}-{name}-{head_size}"
    return _variant(title, kernel, set(), constants, "bf16", architecture, 4, 3)


def _variant(
    title: str,
    kernel: Any,
    absent: set[str],
    constants: dict[str, Any],
    model: str,
    architecture: int,
    num_warps: int,
    num_stages: int,
) -> Variant:
    """Returns a variant whose `absent` arguments are None."""
    constants = constants | dict.fromkeys(absent)
    types = POINTERS | dict.fromkeys(MODELS, f"*{model}")
    if kernel is rotate_rows:
        types["rows"] = "*fp32"
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    most = tuning.MAX_REGISTERS if kernel is attend else None
    return Variant(title, kernel, signature, constants, num_warps, num_stages, architecture, most)
