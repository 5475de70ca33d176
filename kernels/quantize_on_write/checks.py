"""What operations that write packed cells demand of their arguments."""

from __future__ import annotations

import torch
from vllm_kvpress.kernels.cells import Cells, Side

__all__ = [
    "check_cells",
    "check_counter",
    "check_pages",
    "check_rotation",
    "check_sources",
    "check_tensor",
]

MODEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CODE_BITS = (2, 4, 8)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """Checks dtype, shape (None: any length) and device of an argument.

    Raises:
        TypeError: the dtype is another one.
        ValueError: the shape or the device is.
    """
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has the wrong dtype; got {tensor.dtype}; allowed: {allowed}")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(w not in (None, g) for g, w in zip(got, shape, strict=True)):
        allowed = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} has the wrong shape; got {list(got)}; allowed: [{allowed}]")
    if tensor.device != device:
        raise ValueError(f"{name} is on another device; got {tensor.device}; allowed: {device}")


def check_sources(
    keys: torch.Tensor, values: torch.Tensor, shape: tuple[int | None, ...], device: torch.device
) -> None:
    """Checks keys and values in the model's dtype, head_size last and contiguous there.

    Raises:
        TypeError: a dtype is no model's, or the two differ.
        ValueError: a shape, a device or the inner stride is wrong.
    """
    for name, numbers in (("keys", keys), ("values", values)):
        check_tensor(name, numbers, MODEL_DTYPES, shape, device)
        if numbers.stride(-1) != 1:
            raise ValueError(
                f"{name} are not contiguous along the channels; got stride {numbers.stride(-1)}; "
                "allowed: 1"
            )
    if keys.dtype != values.dtype:
        raise TypeError(f"values have the wrong dtype; got {values.dtype}; allowed: {keys.dtype}")


def check_pages(pages: torch.Tensor, cells: Cells, dtype: torch.dtype | None) -> None:
    """Checks the pages that cells lie in, and that kernels can address numbers in them.

    Args:
        pages: uint8 [num_pages, page_bytes].
        cells: The layout.
        dtype: The model's dtype, None where no exact number is written.

    Raises:
        TypeError: the dtype is another one.
        ValueError: pages are too short, or not aligned to the numbers in their cells.
    """
    check_tensor("pages", pages, (torch.uint8,), (None, None), pages.device)
    needed = cells.per_page * cells.size
    if pages.shape[1] < needed or pages.stride(1) != 1:
        raise ValueError(
            f"pages do not hold {cells.per_page} cells of {cells.size} contiguous bytes; got "
            f"{pages.shape[1]} bytes with stride {pages.stride(1)}; allowed: {needed} or more"
        )
    exact = dtype is not None and max(cells.keys.bits, cells.values.bits) >= 16
    unit = dtype.itemsize if exact and dtype is not None else 2
    starts = [pages.data_ptr(), pages.stride(0), cells.size]
    for side in (cells.keys, cells.values):
        starts += [side.codes] if side.bits >= 16 else [side.scales, side.zeros]
    if any(start % unit for start in starts):
        raise ValueError(
            f"pages and cells are not aligned; got start, page, cell and sections at {starts}; "
            f"allowed: multiples of {unit} bytes"
        )


def check_cells(cells: Cells, dtype: torch.dtype) -> None:
    """Checks that both sides of the cells can hold numbers of the model's dtype.

    Raises:
        ValueError: a format is not one that exists, or does not fit the head or the dtype.
    """
    exact = dtype.itemsize * 8
    for name, side in (("keys", cells.keys), ("values", cells.values)):
        if side.bits not in (*CODE_BITS, exact):
            raise ValueError(
                f"cells.{name}.bits does not fit {dtype}; got {side.bits}; "
                f"allowed: 2, 4, 8, {exact}"
            )
        if side.bits < 16:
            _check_codes(name, side, cells)


def _check_codes(name: str, side: Side, cells: Cells) -> None:
    if cells.head_size * side.bits % 8:
        raise ValueError(
            f"codes of a head do not fill bytes; got head_size {cells.head_size} at {side.bits} "
            f"bits; allowed: multiples of {8 // side.bits}"
        )
    if not side.per_channel and not 1 <= side.group <= cells.head_size:
        raise ValueError(
            f"cells.{name}.group is no number of channels; got {side.group}; "
            f"allowed: 1 to {cells.head_size}"
        )
    if side.per_channel and (side.group < 1 or cells.tokens % side.group):
        raise ValueError(
            f"cells.{name}.group does not divide a cell's tokens; got {side.group}; "
            f"allowed: divisors of {cells.tokens}"
        )


def check_rotation(
    rotation: torch.Tensor | None, wanted: bool, head_size: int, device: torch.device
) -> None:
    """Checks the rotation, where one is wanted.

    Raises:
        TypeError: it is not float32.
        ValueError: it is missing, or has another shape, order or device.
    """
    if rotation is None:
        if wanted:
            raise ValueError(
                "rotation is missing; got None with rotate_keys or rotate_values; "
                f"allowed: float32 [{head_size}, {head_size}]"
            )
        return
    check_tensor("rotation", rotation, (torch.float32,), (head_size, head_size), device)
    if not rotation.is_contiguous():
        raise ValueError(f"rotation is not contiguous; got strides {rotation.stride()}")


def check_counter(nonfinite: torch.Tensor | None, device: torch.device) -> None:
    """Checks the counter of non-finite numbers, if there is one.

    Raises:
        TypeError: it is not int64.
        ValueError: it has another shape or device.
    """
    if nonfinite is not None:
        check_tensor("nonfinite", nonfinite, (torch.int64,), (1,), device)
