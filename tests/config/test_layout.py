import pytest

from vllm_kvpress.errors import ConfigError
from vllm_kvpress.layout import CacheShape, positions_per_block, queries_per_block


def test_bytes_of_a_page():
    """The bundled model at vLLM's default block size: 4 KV heads of 64 channels in 16 bits."""
    shape = CacheShape(block_size=16, num_kv_heads=4, head_size=64, dtype="bfloat16")

    assert shape.bytes_per_head == 2 * 64 * 2
    assert shape.bytes_per_token == 1024
    assert shape.page_bytes == 16384
    assert shape.page_elements == 8192


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_element_size(dtype, num_bytes):
    shape = CacheShape(block_size=1, num_kv_heads=1, head_size=1, dtype=dtype)

    assert shape.page_bytes == 2 * num_bytes
    assert shape.page_elements == 2


def test_unknown_dtype():
    with pytest.raises(ConfigError, match="got 'int3'; allowed: float32"):
        CacheShape(block_size=1, num_kv_heads=1, head_size=1, dtype="int3")


def test_private_rows_in_a_page():
    """A page of 16 tokens, 4 KV heads of 64: 8192 elements, 16384 bytes."""
    assert queries_per_block(8192, num_query_heads=8, head_size=64) == 16
    assert queries_per_block(8192, num_query_heads=7, head_size=64) == 18
    assert queries_per_block(8192, num_query_heads=200, head_size=64) == 0
    assert positions_per_block(16384, num_kv_heads=4) == 1024
    assert positions_per_block(16384, num_kv_heads=3) == 1365
