"""What kernels are told of packed cells; `vllm_kvpress.layout` draws and computes them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Side(NamedTuple):
    """Keys, or values, in a cell.

    Attributes:
        bits: Bits of a code: 2, 4, 8; 16 or 32 for the model's own numbers.
        group: Channels of one token (or with `per_channel` tokens of one channel) that share a
            scale and a zero; 0 at 16 and 32 bits.
        per_channel: Whether groups run along the tokens.
        codes: Byte of a cell at which the codes start.
        scales: Byte at which the scales start.
        zeros: Byte at which the zeros start.
    """

    bits: int
    group: int
    per_channel: bool
    codes: int
    scales: int
    zeros: int


class Cells(NamedTuple):
    """The cells of a packed lane.

    Attributes:
        num_kv_heads: KV heads.
        head_size: Channels of a head.
        tokens: Tokens in a cell.
        size: Bytes of a cell.
        per_page: Cells in a page.
        keys: Where keys lie in a cell.
        values: Where values do.
    """

    num_kv_heads: int
    head_size: int
    tokens: int
    size: int
    per_page: int
    keys: Side
    values: Side

    @classmethod
    def of(cls, numbers: dict[str, Any]) -> Cells:
        """Returns the cells that a layout draws; `numbers` as `PackedFormat.numbers` gives them."""
        sides = {side: Side(*numbers[side]) for side in ("keys", "values")}
        return cls(**{**numbers, **sides})
