"""Bytes of the cache: the one place for the arithmetic that engine, kernels and `explain` share.

One block of one layer, as vLLM's KV cache holds it in the model's own dtype or in fp8 (the
engine's own, one scale a layer, which takes no room in the cache):

    | K of block_size tokens, all KV heads | V of the same |      page_bytes
      block_size * num_kv_heads * head_size elements each

Private lanes use whole pages of this size and read the bytes in their own way:

    queries    rows of one token's post-RoPE queries, all query heads, in the model's dtype
    positions  rows of one kept slot's int32 positions, one per KV head
"""

from dataclasses import dataclass

from vllm_kvpress.errors import ConfigError, shown

__all__ = ["DTYPE_BYTES", "CacheShape", "positions_per_block", "queries_per_block"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
POSITION_BYTES = 4


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
