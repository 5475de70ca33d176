"""The parts of a request's cache that attention reads, and the check of what a caller passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_kvpress.kernels.cells import Cells

__all__ = ["ExactPart", "PackedPart", "check"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class ExactPart(NamedTuple):
    """Tokens in the model's own numbers.

    Attributes:
        keys: Model's dtype [num_blocks, block_size, num_kv_heads, head_size], any strides but the
            last, which is 1.
        values: Likewise.
        table: int32 [num_reqs, max_blocks].
        lengths: int32 [num_reqs], tokens, the queries' own included; 0 where a request reads its
            prefix alone.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor


class PackedPart(NamedTuple):
    """Tokens in packed cells.

    Attributes:
        pages: uint8 [num_pages, page_bytes], the last stride 1.
        table: int32 [num_reqs, max_pages].
        lengths: int32 [num_reqs], tokens.
        cells: Where everything lies in a page.
    """

    pages: Tensor
    table: Tensor
    lengths: Tensor
    cells: Cells


def check(
    query: Tensor,
    query_start_loc: Tensor,
    causal: ExactPart | PackedPart,
    prefix: PackedPart | None,
    extras: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]],
) -> None:
    """Raises unless the arguments of `paged_attention` fit each other.

    Args:
        query: Queries [num_tokens, num_q_heads, head_size].
        query_start_loc: Where each request's queries start.
        causal: The part with the queries' own tokens.
        prefix: The part that every query sees.
        extras: Name -> optional tensor, its dtype and shape.

    Raises:
        TypeError: A dtype, or the kind of a part, is none that the operation takes.
        ValueError: A shape, a stride or a device is not as described.
    """
    if query.dtype not in FLOATS:
        raise TypeError(f"query: got {query.dtype}; allowed: float16, bfloat16, float32")
    if query.dim() != 3 or query.stride(-1) != 1:
        raise ValueError(
            f"query: got shape {tuple(query.shape)}, strides {query.stride()}; "
            "allowed: [num_tokens, num_q_heads, head_size], last stride 1"
        )
    num_reqs = query_start_loc.shape[0] - 1
    _expect("query_start_loc", query_start_loc, torch.int32, (num_reqs + 1,))
    if prefix is not None and isinstance(causal, PackedPart):
        raise ValueError(
            "prefix: got packed cells beside a packed causal part; allowed: one packed part "
            "(call twice and `merge`)"
        )
    for name, part in (("causal", causal), ("prefix", prefix)):
        if isinstance(part, PackedPart):
            _check_packed(name, part, query, num_reqs)
        elif isinstance(part, ExactPart) and name == "causal":
            _check_exact(part, query, num_reqs)
        elif part is not None or name == "causal":
            raise TypeError(f"{name}: got {type(part).__name__}; allowed: {_ALLOWED[name]}")
    for name, (extra, dtype, shape) in extras.items():
        if extra is not None:
            _expect(name, extra, dtype, shape)
            _same_device(name, extra, query)


_ALLOWED = {"causal": "ExactPart, PackedPart", "prefix": "PackedPart, None"}


def _check_packed(name: str, part: PackedPart, query: Tensor, num_reqs: int) -> None:
    cells = part.cells
    _expect(f"{name}.pages", part.pages, torch.uint8, (part.pages.shape[0], part.pages.shape[-1]))
    if part.pages.stride(-1) != 1 or part.pages.stride(0) % 2 or part.pages.storage_offset() % 2:
        raise ValueError(
            f"{name}.pages: got strides {part.pages.stride()}, offset "
            f"{part.pages.storage_offset()}; allowed: last stride 1, the others even"
        )
    if not 0 < cells.per_page * cells.size <= part.pages.shape[1]:
        raise ValueError(
            f"{name}.cells: got {cells.per_page} cells of {cells.size} bytes in a page; allowed: "
            f"at least one, at most {part.pages.shape[1]} bytes together"
        )
    for side in (cells.keys, cells.values):
        exact = 8 * query.element_size()
        if side.bits not in (2, 4, 8, exact):
            raise ValueError(f"{name}.cells: got {side.bits} bits; allowed: 2, 4, 8, {exact}")
    _check_heads(name, cells.num_kv_heads, cells.head_size, query)
    _check_tables(name, part, query, num_reqs)


def _check_exact(part: ExactPart, query: Tensor, num_reqs: int) -> None:
    for name, cache in (("causal.keys", part.keys), ("causal.values", part.values)):
        _expect(name, cache, query.dtype, tuple(part.keys.shape))
        if cache.dim() != 4 or cache.stride(-1) != 1:
            raise ValueError(
                f"{name}: got shape {tuple(cache.shape)}, strides {cache.stride()}; allowed: "
                "[num_blocks, block_size, num_kv_heads, head_size], last stride 1"
            )
    _check_heads("causal", part.keys.shape[2], part.keys.shape[3], query)
    _check_tables("causal", part, query, num_reqs)


def _check_heads(name: str, num_kv_heads: int, head_size: int, query: Tensor) -> None:
    _, num_q_heads, size = query.shape
    if size != head_size or num_q_heads % num_kv_heads:
        raise ValueError(
            f"{name}: got {num_kv_heads} KV heads of {head_size} channels; allowed: a divisor of "
            f"the {num_q_heads} query heads, {size} channels"
        )


def _check_tables(name: str, part: ExactPart | PackedPart, query: Tensor, num_reqs: int) -> None:
    width = part.table.shape[-1]
    _expect(f"{name}.table", part.table, torch.int32, (num_reqs, width))
    _expect(f"{name}.lengths", part.lengths, torch.int32, (num_reqs,))
    if part.table.stride(-1) != 1 and width > 1:
        raise ValueError(f"{name}.table: got strides {part.table.stride()}; allowed: last stride 1")
    for tensor in (part[0], part.table, part.lengths):
        _same_device(name, tensor, query)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}; allowed: {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; allowed: {shape}")


def _same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}; allowed: {query.device}")
