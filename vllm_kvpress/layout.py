"""Bytes of the cache: the one place for the arithmetic that engine, kernels and `explain` share.

One block of one layer, as vLLM's KV cache holds it in the model's own dtype or in fp8 (the
engine's own, one scale a layer, which takes no room in the cache):

    | K of block_size tokens, all KV heads | V of the same |      page_bytes
      block_size * num_kv_heads * head_size elements each

Private lanes use whole pages of this size and read the bytes in their own way:

    queries    rows of one token's post-RoPE queries, all query heads, in the model's dtype
    positions  rows of one kept slot's int32 positions, one per KV head

Packed lanes hold cells. A cell is one KV head of `cell_tokens` consecutive tokens:

    | K codes | V codes | K scales | K zeros | V scales | V zeros |      cell_bytes

    codes          [cell_tokens, head_size * bits / 8] bytes. With n = 8 / bits codes in a byte,
                   byte j of a row holds the codes of channels j, j + w, j + 2w, ... where
                   w = head_size / n, the first in the lowest bits. At 16 or 32 bits the row is
                   the numbers themselves in the model's dtype, without scales and zeros.
    scales, zeros  float16, [cell_tokens, groups] per token, [cell_tokens / group, head_size] per
                   channel; a code stands for code * scale + zero

A staging lane that is packed as it is written has pages of its own size, block_size /
cell_tokens cells of each KV head without a gap. Elsewhere cells fill pages as far as they go:
token t of KV head h of a request lies in cell (t // cell_tokens) * num_kv_heads + h of its lane;
cell c lies in the lane's page c // cells_per_page, at byte (c % cells_per_page) * cell_bytes.
"""

from dataclasses import dataclass
from typing import Any

from vllm_kvpress.errors import ConfigError, shown

__all__ = [
    "DTYPE_BYTES",
    "CacheShape",
    "PackedFormat",
    "SideFormat",
    "positions_per_block",
    "queries_per_block",
]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
POSITION_BYTES = 4
PARAM_BYTES = 2  # a scale or a zero, float16
EXACT_BITS = (16, 32)
CELL_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """One attention layer's cache on one rank.

    Attributes:
        block_size: tokens in a block.
        num_kv_heads: KV heads.
        head_size: channels of a head, for keys and for values.
        dtype: element type, a key of `DTYPE_BYTES`.
    """

    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(
                "the cache's dtype is not known",
                got=shown(self.dtype),
                allowed=", ".join(DTYPE_BYTES),
            )

    @property
    def bytes_per_head(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        return 2 * self.head_size * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer, all KV heads."""
        return self.num_kv_heads * self.bytes_per_head

    @property
    def page_bytes(self) -> int:
        """Bytes of one block in this layer."""
        return self.block_size * self.bytes_per_token


def queries_per_block(
    page_bytes: int, num_query_heads: int, head_size: int, element_bytes: int
) -> int:
    """Returns how many tokens' queries fit in one page, in whole rows; 0 if none does.

    Args:
        page_bytes: Bytes of one block of one layer.
        num_query_heads: Query heads of the layer.
        head_size: Channels of a head.
        element_bytes: Bytes of one element in the model's dtype, whatever the cache's.
    """
    return page_bytes // (num_query_heads * head_size * element_bytes)


def positions_per_block(page_bytes: int, num_kv_heads: int) -> int:
    """Returns how many slots' positions, int32 per KV head, fit in one page; 0 if none does."""
    return page_bytes // (POSITION_BYTES * num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class SideFormat:
    """How keys, or values, lie in a packed cell.

    Attributes:
        bits: Bits of a code: 2, 4 or 8; 16 or 32 for the model's own numbers.
        group: What shares a scale and a zero: so many channels of one token, or with
            `per_channel` so many tokens of one channel; 0 at 16 and 32 bits.
        per_channel: Whether groups run along the tokens.
    """

    bits: int
    group: int = 0
    per_channel: bool = False

    def code_bytes(self, head_size: int) -> int:
        """Returns the bytes of one token's codes in one head."""
        return head_size * self.bits // 8

    def num_params(self, head_size: int, num_tokens: int) -> int:
        """Returns the scales (as many as the zeros) of `num_tokens` tokens in one head."""
        if self.bits in EXACT_BITS:
            return 0
        if self.per_channel:
            return num_tokens // self.group * head_size
        return num_tokens * -(-head_size // self.group)


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """The cells of a packed lane.

    Attributes:
        num_kv_heads: KV heads on this rank.
        head_size: Channels of a head, for keys and for values.
        keys: How keys lie in a cell.
        values: How values do.
    """

    num_kv_heads: int
    head_size: int
    keys: SideFormat
    values: SideFormat

    @property
    def cell_tokens(self) -> int:
        """Tokens in a cell."""
        groups = [side.group for side in (self.keys, self.values) if side.per_channel]
        return max([CELL_TOKENS, *groups])

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the six sections of a cell start, then where the cell ends, in bytes."""
        starts = [0]
        sides = (self.keys, self.values)
        for side in sides:
            starts.append(starts[-1] + self.cell_tokens * side.code_bytes(self.head_size))
        for side in sides:
            size = side.num_params(self.head_size, self.cell_tokens) * PARAM_BYTES
            starts += [starts[-1] + size, starts[-1] + 2 * size]
        return tuple(starts)

    @property
    def cell_bytes(self) -> int:
        """Bytes of a cell."""
        return self.offsets[-1]

    @property
    def bytes_per_head(self) -> int:
        """Bytes of one token's key and value in one KV head, in a format per token."""
        return self.cell_bytes // self.cell_tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in this layer, all KV heads, scales and zeros included."""
        return self.num_kv_heads * self.cell_bytes / self.cell_tokens

    def numbers(self, page_bytes: int) -> dict[str, Any]:
        """Returns the fields of a kernel's `Cells` for pages of this size; sides as tuples."""
        offsets = self.offsets
        sides = [
            (side.bits, side.group, side.per_channel, offsets[i], *offsets[2 + 2 * i : 4 + 2 * i])
            for i, side in enumerate((self.keys, self.values))
        ]
        return {
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "tokens": self.cell_tokens,
            "size": self.cell_bytes,
            "per_page": self.cells_per_page(page_bytes),
            "keys": sides[0],
            "values": sides[1],
        }

    def cells_per_page(self, page_bytes: int) -> int:
        """Returns how many cells fit in a page of this size."""
        return page_bytes // self.cell_bytes

    def pages(self, num_tokens: int, page_bytes: int) -> int:
        """Returns the pages that hold so many tokens of one request in one layer."""
        cells = -(-num_tokens // self.cell_tokens) * self.num_kv_heads
        return -(-cells // self.cells_per_page(page_bytes))
