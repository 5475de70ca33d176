"""Quantize on write: new tokens' keys and values, encoded into the cells of their slots."""

from __future__ import annotations

import torch
from vllm_kvpress.kernels.cells import Cells
from vllm_kvpress.kernels.quantize_on_write import reference
from vllm_kvpress.kernels.quantize_on_write.checks import (
    check_cells,
    check_counter,
    check_pages,
    check_rotation,
    check_sources,
    check_tensor,
)

__all__ = ["quantize_on_write"]


def quantize_on_write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    cells: Cells,
    *,
    rotation: torch.Tensor | None = None,
    rotate_keys: bool = False,
    rotate_values: bool = False,
    nonfinite: torch.Tensor | None = None,
) -> None:
    """Encodes new tokens into the pages of their slots; other bytes stay as they are.

    A page holds `cells.per_page // cells.num_kv_heads * cells.tokens` tokens, whole chunks of all
    KV heads: token t of head h lies in cell t // tokens * num_kv_heads + h of its page.

    Args:
        key: [>= num_tokens, num_kv_heads, head_size] in the model's dtype, outer strides free;
            rows past the slots' are not read.
        value: The same of the values.
        pages: uint8 [num_pages, page_bytes], written.
        slots: int64 [num_tokens], page * tokens in a page + token in the page, each at most once;
            tokens with a negative slot are skipped.
        cells: The layout; formats per token.
        rotation: float32 [head_size, head_size], or None.
        rotate_keys: Whether keys are multiplied by `rotation`.
        rotate_values: Whether values are.
        nonfinite: int64 [1], to which the number of NaN and infinities written is added; or None.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong, or a format runs along the tokens.
    """
    _check(key, value, pages, slots, cells)
    check_rotation(rotation, rotate_keys or rotate_values, cells.head_size, pages.device)
    check_counter(nonfinite, pages.device)
    if pages.is_cuda:
        from vllm_kvpress.kernels.quantize_on_write.triton import launch
    else:
        launch = reference.quantize_on_write
    if len(slots):
        launch(
            key,
            value,
            pages,
            slots,
            cells,
            rotation=rotation,
            rotate_keys=rotate_keys,
            rotate_values=rotate_values,
            nonfinite=nonfinite,
        )


def _check(
    key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, cells: Cells
) -> None:
    check_sources(key, value, (None, cells.num_kv_heads, cells.head_size), pages.device)
    check_tensor("slots", slots, (torch.int64,), (None,), pages.device)
    if min(len(key), len(value)) < len(slots) or not slots.is_contiguous():
        raise ValueError(
            f"slots do not fit the tokens; got {len(slots)} with stride {slots.stride(0)}; "
            f"allowed: at most {min(len(key), len(value))}, contiguous"
        )
    check_cells(cells, key.dtype)
    check_pages(pages, cells, key.dtype)
    if cells.keys.per_channel or cells.values.per_channel:
        raise ValueError(
            "quantize_on_write writes single tokens; got a format per channel, whose groups run "
            "along the tokens; allowed: formats per token"
        )
    num_slots = len(pages) * (cells.per_page // cells.num_kv_heads) * cells.tokens
    if num_slots >= 2**31:
        raise ValueError(f"slots do not fit 32 bits; got {num_slots}; allowed: below {2**31}")
    if cells.per_page < cells.num_kv_heads:
        raise ValueError(
            f"a page does not hold a cell of every KV head; got {cells.per_page} cells; "
            f"allowed: {cells.num_kv_heads} or more"
        )
