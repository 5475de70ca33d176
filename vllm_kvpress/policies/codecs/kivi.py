"""KIVI: keys share a step along the tokens of a channel, for their outliers stay in a few channels.

The values of KIVI are those of `UniformCodec` over `GROUP` channels of one token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvpress.layout import SideFormat
from vllm_kvpress.policies.codecs.codec import Encoded
from vllm_kvpress.policies.codecs.packing import pack, unpack
from vllm_kvpress.policies.codecs.uniform import (
    check_input,
    cleaned,
    decoded,
    quantized,
    steps,
    uniform_side,
)

__all__ = ["GROUP", "KiviKeyCodec"]

GROUP = 32
"""Tokens of a channel, for values channels of a token, that share a scale: KIVI's default."""


@dataclass(frozen=True)
class KiviKeyCodec:
    """Rounds as `UniformCodec` does, over `group` consecutive tokens of one channel.

    Whole groups only: tokens that do not fill one stay outside (KIVI's residual).

    Source: arXiv 2402.02750, section 3; jy-yuan/KIVI, models/llama_kivi.py. Deviations: those of
    `UniformCodec`; codes are packed along the channels, as values are.

    Attributes:
        bits: 2, 4 or 8.
        group: tokens of a channel that share a scale and a zero.
    """

    per_channel: ClassVar[bool] = True

    bits: int
    group: int = GROUP

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8) or self.group < 1:
            raise ValueError(f"bits must be 2, 4 or 8 and group at least 1; got {self}")

    def encode(self, x: torch.Tensor) -> Encoded:
        """Returns codes, with scales and zeros [num_kv_heads, num_tokens / group, head_size].

        Raises:
            ValueError: the tokens do not fill groups.
        """
        check_input(x, self.bits)
        if x.shape[1] % self.group:
            raise ValueError(
                f"tokens do not fill groups; got {x.shape[1]}; allowed: multiples of {self.group}"
            )
        x, nonfinite = cleaned(x)
        groups = torch.unflatten(x, 1, (x.shape[1] // self.group, self.group))
        scales, zeros = steps(groups.amin(dim=2), groups.amax(dim=2), self.bits)
        codes = quantized(groups, scales.unsqueeze(2), zeros.unsqueeze(2), self.bits)
        return Encoded(
            codes=pack(codes.flatten(1, 2), self.bits),
            scales=scales,
            zeros=zeros,
            nonfinite=nonfinite,
        )

    def decode(self, encoded: Encoded, head_size: int) -> torch.Tensor:
        """Returns float32 [num_kv_heads, num_tokens, head_size]."""
        codes = unpack(encoded.codes, self.bits)
        scales = encoded.scales.repeat_interleave(self.group, dim=1)
        zeros = encoded.zeros.repeat_interleave(self.group, dim=1)
        return decoded(codes, scales, zeros)

    def side_format(self, head_size: int, dtype_bits: int) -> SideFormat:
        """Returns how these bytes lie in a cell, whatever the model's dtype."""
        return uniform_side(self.bits, self.group, True, head_size)
