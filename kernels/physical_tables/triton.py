"""The kernel of physical tables and its launcher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from vllm_kvpress.kernels.variants import ARCHITECTURES, Variant

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["launch", "variants"]

# Columns of a program, on every architecture. untuned: no GPU measured these yet.
COLUMNS, NUM_WARPS, NUM_STAGES = 512, 4, 1


@triton.jit(do_not_specialize=["block_size", "width", "head_width", "num_columns"])
def build_tables(
    out_table, out_lens, logical, head, head_blocks, gaps, seq_lens, block_size,
    width, head_width, num_columns, out_stride, logical_stride, head_stride,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes COLUMNS columns of one request's table; the first program of it, the length too."""
    request = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    gap = tl.load(gaps + request).to(tl.int32)
    in_front = tl.minimum(tl.load(head_blocks + request).to(tl.int32), head_width)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    is_head = column < in_front
    source = tl.minimum(column + gap, width - 1)
    front = tl.load(head + request * head_stride + column, mask=inside & is_head, other=0)
    rest = tl.load(logical + request * logical_stride + source, mask=inside & ~is_head, other=0)
    block = tl.where(is_head, front, rest)
    tl.store(out_table + request * out_stride + column, block, mask=inside)
    if part == 0:
        length = tl.load(seq_lens + request)
        tl.store(out_lens + request, length - gap * block_size)


def launch(
    logical: Tensor,
    head: Tensor | None,
    head_blocks: Tensor,
    gaps: Tensor,
    seq_lens: Tensor,
    block_size: int,
    out_table: Tensor,
    out_lens: Tensor,
) -> None:
    """Writes tables and lengths; arguments as in the public operation, which has checked them."""
    head = logical if head is None else head
    num_reqs, num_columns = out_table.shape
    if not num_reqs:
        return
    # One program a request even without columns: it writes the length.
    grid = (num_reqs, max(1, triton.cdiv(num_columns, COLUMNS)))
    build_tables[grid](
        out_table, out_lens, logical, head, head_blocks, gaps, seq_lens, block_size,
        logical.shape[1], head.shape[1], num_columns,
        out_table.stride(0), logical.stride(0), head.stride(0),
        COLUMNS=COLUMNS, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    """Yields the kernel as `launch` starts it, for the check that it compiles."""
    constants: dict[str, Any] = {"COLUMNS": COLUMNS}
    tables = dict.fromkeys(("out_table", "logical", "head"), "*i32")
    for arch in ARCHITECTURES:
        for counts in ("i32", "i64"):
            for lengths in ("i32", "i64"):
                known = dict.fromkeys(("head_blocks", "gaps"), f"*{counts}")
                known |= dict.fromkeys(("seq_lens", "out_lens"), f"*{lengths}")
                known |= {"COLUMNS": "constexpr", **tables}
                signature = {name: known.get(name, "i32") for name in build_tables.arg_names}
                name = f"physical_tables sm_{arch} counts {counts} lengths {lengths}"
                yield Variant(name, build_tables, signature, constants, NUM_WARPS, NUM_STAGES, arch)
