import pytest

from vllm_kvpress.errors import ConfigError
from vllm_kvpress.layout import CacheShape, positions_per_block, queries_per_block


def test_bytes_of_a_page():
    """The bundled model at vLLM's default block size: 4 KV heads of 64 channels in 16 bits."""
    shape = CacheShape(block_size=16, num_kv_heads=4, head_size=64, dtype="bfloat16")

    assert shape.bytes_per_head == 2 * 64 * 2
    assert shape.bytes_per_token == 1024
    assert shape.page_bytes == 16384


@pytest.mark.parametrize(
    ("dtype", "num_bytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("fp8", 1)]
)
def test_element_size(dtype, num_bytes):
    shape = CacheShape(block_size=1, num_kv_heads=1, head_size=1, dtype=dtype)

    assert shape.page_bytes == 2 * num_bytes


def test_unknown_dtype():
    with pytest.raises(ConfigError, match="got 'int3'; allowed: float32"):
        CacheShape(block_size=1, num_kv_heads=1, head_size=1, dtype="int3")


def test_private_rows_in_a_page():
    """A page of 16 tokens, 4 KV heads of 64, in 16 bits; queries have them with fp8 too."""
    assert queries_per_block(16384, num_query_heads=8, head_size=64, element_bytes=2) == 16
    assert queries_per_block(16384, num_query_heads=7, head_size=64, element_bytes=2) == 18
    assert queries_per_block(16384, num_query_heads=200, head_size=64, element_bytes=2) == 0
    assert queries_per_block(8192, num_query_heads=8, head_size=64, element_bytes=2) == 8
    assert positions_per_block(16384, num_kv_heads=4) == 1024
    assert positions_per_block(16384, num_kv_heads=3) == 1365
