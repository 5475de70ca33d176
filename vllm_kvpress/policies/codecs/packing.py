"""Codes of less than 8 bits in bytes: planes of neighbouring channels, the first lowest.

With n = 8 / bits and w = head_size / n, byte j holds the codes of channels j, j + w, j + 2w, ...
from the lowest bits up: a plane of w channels comes out of w bytes by one shift and one mask.
"""

import torch

__all__ = ["check_channels", "pack", "unpack"]


def check_channels(head_size: int, bits: int) -> None:
    """Checks that the codes of one token fill bytes.

    Raises:
        ValueError: they do not.
    """
    if head_size < 1 or head_size * bits % 8:
        raise ValueError(
            f"codes of {bits} bits do not fill bytes; got head_size {head_size}; "
            f"allowed: multiples of {8 // bits}"
        )


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns uint8 [..., head_size * bits / 8] from uint8 [..., head_size], each below 2**bits."""
    check_channels(codes.shape[-1], bits)
    planes = torch.unflatten(codes, -1, (8 // bits, -1))
    packed = torch.zeros_like(planes[..., 0, :])
    for place in range(8 // bits):
        packed |= planes[..., place, :] << (place * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns uint8 [..., head_size] from the bytes that `pack` made."""
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)
