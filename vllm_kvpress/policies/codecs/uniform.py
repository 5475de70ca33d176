"""Equal steps between the least and the greatest number of a group of channels of one token."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvpress.errors import UnsupportedModelError
from vllm_kvpress.layout import SideFormat
from vllm_kvpress.policies.codecs.codec import Encoded
from vllm_kvpress.policies.codecs.packing import check_channels, pack, unpack

__all__ = [
    "UniformCodec",
    "check_input",
    "cleaned",
    "decoded",
    "quantized",
    "steps",
    "uniform_side",
]

MAX_FLOAT16 = 65504.0


@dataclass(frozen=True)
class UniformCodec:
    """Rounds to 2**bits levels; each token of a head has a scale and a zero per group of channels.

    For a group of numbers x, with L = 2**bits - 1, all in float32:

        x  = 0 if NaN, else x held within float16's range [-65504, 65504]
        lo = min(x) rounded to float16
        s  = (max(x) - lo) / L rounded to float16; 1 if that is 0
        q  = (x - lo) / s rounded half to even, held within [0, L]
        x^ = q * s + lo

    |x - x^| <= max(|s| / 2, |lo - min(x)|, max(x) - lo - L * s) but for float32's rounding; the
    last two are what rounding lo and s to float16 costs. If lo is rounded up past max(x), as in a
    group of equal numbers, s is below 0 and x^ is max(x). The last group of a head may be short.

    Source: the asymmetric round-to-nearest that KIVI (arXiv 2402.02750) uses for values.
    Deviation: the guard for s = 0; float16 scales and zeros whatever the model's dtype, and codes
    are found with the rounded ones.

    Attributes:
        bits: 2, 4 or 8.
        group: channels that share a scale and a zero; 0 for the whole head.
    """

    per_channel: ClassVar[bool] = False

    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8) or self.group < 0:
            raise ValueError(f"bits must be 2, 4 or 8 and group at least 0; got {self}")

    def encode(self, x: torch.Tensor) -> Encoded:
        """Returns codes, with scales and zeros [num_kv_heads, num_tokens, groups]."""
        check_input(x, self.bits)
        x, nonfinite = cleaned(x)
        head_size = x.shape[-1]
        groups = torch.split(x, self._group(head_size), dim=-1)
        low = torch.stack([part.amin(dim=-1) for part in groups], dim=-1)
        high = torch.stack([part.amax(dim=-1) for part in groups], dim=-1)
        scales, zeros = steps(low, high, self.bits)
        codes = quantized(
            x, self._spread(scales, head_size), self._spread(zeros, head_size), self.bits
        )
        return Encoded(
            codes=pack(codes, self.bits), scales=scales, zeros=zeros, nonfinite=nonfinite
        )

    def decode(self, encoded: Encoded, head_size: int) -> torch.Tensor:
        """Returns float32 [num_kv_heads, num_tokens, head_size]."""
        scales = self._spread(encoded.scales, head_size)
        zeros = self._spread(encoded.zeros, head_size)
        return decoded(unpack(encoded.codes, self.bits), scales, zeros)

    def side_format(self, head_size: int, dtype_bits: int) -> SideFormat:
        """Returns how these bytes lie in a cell, whatever the model's dtype."""
        return uniform_side(self.bits, self._group(head_size), False, head_size)

    def _group(self, head_size: int) -> int:
        return self.group or head_size

    def _spread(self, params: torch.Tensor, head_size: int) -> torch.Tensor:
        """Gives each channel the number of its group: [..., groups] to [..., head_size]."""
        return params.repeat_interleave(self._group(head_size), dim=-1)[..., :head_size]


def check_input(x: torch.Tensor, bits: int) -> None:
    """Checks what `encode` is given.

    Raises:
        ValueError: it is no float tensor [num_kv_heads, num_tokens, head_size] that fills bytes.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"a codec cannot encode this tensor; got {x.dtype} {list(x.shape)}; "
            "allowed: floats [num_kv_heads, num_tokens, head_size]"
        )
    check_channels(x.shape[-1], bits)


def cleaned(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns `x` in float32 without NaN and within float16's range, and its non-finite numbers."""
    x = x.to(torch.float32)
    nonfinite = x.numel() - int(x.isfinite().sum())
    x = x.nan_to_num(nan=0.0).clamp(-MAX_FLOAT16, MAX_FLOAT16)
    # Makes -0.0 a 0.0: which of the two is the least would depend on their order.
    return x + 0.0, nonfinite


def steps(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scales and zeros, float16, of groups from `low` to `high`, float32."""
    zeros = low.to(torch.float16)
    width = high - zeros.to(torch.float32)
    # Division by a tensor: CUDA turns one by a Python number into a product with its inverse.
    scales = (width / torch.full_like(width, 2**bits - 1)).to(torch.float16)
    return scales.masked_fill(scales == 0, 1.0), zeros


def quantized(
    x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> torch.Tensor:
    """Returns the codes, uint8, of float32 `x`; scales and zeros fit its shape."""
    codes = ((x - zeros.to(torch.float32)) / scales.to(torch.float32)).round()
    return codes.clamp(0, 2**bits - 1).to(torch.uint8)


def decoded(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Returns what codes stand for, float32. The product is exact, so a fused one is the same."""
    return codes.to(torch.float32) * scales.to(torch.float32) + zeros.to(torch.float32)


def uniform_side(bits: int, group: int, per_channel: bool, head_size: int) -> SideFormat:
    """Returns the format of one side of a cell, checked against the head.

    Raises:
        UnsupportedModelError: codes of so many channels do not fill bytes.
    """
    try:
        check_channels(head_size, bits)
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from None
    return SideFormat(bits=bits, group=group, per_channel=per_channel)
