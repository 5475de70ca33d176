"""The contract of a codec: how keys, or values, become the bytes of a packed cell and come back."""

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_kvpress.layout import SideFormat

__all__ = ["Codec", "Encoded"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Keys, or values, of some tokens as a packed cell holds them (see `vllm_kvpress.layout`).

    Attributes:
        codes: uint8 [num_kv_heads, num_tokens, head_size * bits / 8].
        scales: float16 [num_kv_heads, num_tokens, groups], per channel [num_kv_heads,
            num_tokens / group, head_size]; without elements if the codec is exact.
        zeros: same shape and dtype.
        nonfinite: NaN and infinities among the inputs.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    nonfinite: int


class Codec(Protocol):
    """Encodes keys or values; frozen and pure: the same numbers give the same bytes anywhere.

    PyTorch's encode and decode define the arithmetic; kernels agree with them bit for bit.
    """

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    @property
    def group(self) -> int:
        """Channels (per channel: tokens) that share a scale; 0 for the whole head."""
        ...

    @property
    def per_channel(self) -> bool:
        """Whether groups run along the tokens."""
        ...

    def encode(self, x: torch.Tensor) -> Encoded:
        """Returns `x`, [num_kv_heads, num_tokens, head_size] of any float dtype, as bytes.

        Raises:
            ValueError: `x` has another shape, or one that does not fill bytes or groups.
        """
        ...

    def decode(self, encoded: Encoded, head_size: int) -> torch.Tensor:
        """Returns float32 [num_kv_heads, num_tokens, head_size]."""
        ...

    def side_format(self, head_size: int, dtype_bits: int) -> SideFormat:
        """Returns how these bytes lie in a cell.

        Args:
            head_size: Channels of a head.
            dtype_bits: Bits of an element in the model's dtype, which an exact codec keeps.

        Raises:
            UnsupportedModelError: codes of so many channels do not fill bytes.
        """
        ...
