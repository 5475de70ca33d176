"""The model's own numbers in a packed cell, for the side of the cache that is left exact."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvpress.layout import EXACT_BITS, SideFormat
from vllm_kvpress.policies.codecs.codec import Encoded
from vllm_kvpress.policies.codecs.uniform import check_input

__all__ = ["ExactCodec"]


@dataclass(frozen=True)
class ExactCodec:
    """Keeps every bit, of NaN and infinities too; no scales, no zeros.

    Attributes:
        dtype: the model's dtype, of 16 or 32 bits.
    """

    group: ClassVar[int] = 0
    per_channel: ClassVar[bool] = False

    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point or self.bits not in EXACT_BITS:
            raise ValueError(f"dtype must be a float of 16 or 32 bits; got {self.dtype}")

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return self.dtype.itemsize * 8

    def encode(self, x: torch.Tensor) -> Encoded:
        """Returns the bytes of `x`.

        Raises:
            ValueError: `x` is not in the model's dtype, in which alone it stays exact.
        """
        check_input(x, self.bits)
        if x.dtype != self.dtype:
            raise ValueError(f"numbers are not in the model's dtype {self.dtype}; got {x.dtype}")
        empty = x.new_empty(*x.shape[:2], 0, dtype=torch.float16)
        nonfinite = x.numel() - int(x.isfinite().sum())
        codes = x.contiguous().view(torch.uint8)
        return Encoded(codes=codes, scales=empty, zeros=empty, nonfinite=nonfinite)

    def decode(self, encoded: Encoded, head_size: int) -> torch.Tensor:
        """Returns float32 [num_kv_heads, num_tokens, head_size]."""
        return encoded.codes.view(self.dtype).to(torch.float32)

    def side_format(self, head_size: int, dtype_bits: int) -> SideFormat:
        """Returns how these bytes lie in a cell.

        Raises:
            ValueError: the model's elements have other bits than this codec's.
        """
        if dtype_bits != self.bits:
            raise ValueError(f"the model's elements have {dtype_bits} bits, not {self.bits}")
        return SideFormat(bits=dtype_bits)
