import pytest

from vllm_kvpress.errors import ConfigError
from vllm_kvpress.layout import (
    CacheShape,
    PackedFormat,
    SideFormat,
    positions_per_block,
    queries_per_block,
)


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


def test_bytes_of_a_cell():
    """Two bits as KIVI groups them: 32 keys of a channel, 32 channels of a value."""
    cells = PackedFormat(
        num_kv_heads=8,
        head_size=128,
        keys=SideFormat(bits=2, group=32, per_channel=True),
        values=SideFormat(bits=2, group=32),
    )

    assert cells.cell_tokens == 32
    assert cells.offsets == (0, 1024, 2048, 2304, 2560, 2816, 3072)
    assert cells.bytes_per_token == 8 * 96
    # 65536 bytes hold 21 cells; 100 tokens are 4 cells of each of 8 heads.
    assert cells.cells_per_page(65536) == 21
    assert cells.pages(100, 65536) == 2
    assert cells.pages(0, 65536) == 0


def test_bytes_of_a_cell_with_short_groups_and_an_exact_side():
    cells = PackedFormat(
        num_kv_heads=1,
        head_size=80,
        keys=SideFormat(bits=16),
        values=SideFormat(bits=4, group=32),
    )

    # 160 bytes of keys; 40 of codes, and three groups of 32, 32 and 16 channels.
    assert cells.offsets == (0, 2560, 3200, 3200, 3200, 3296, 3392)
    assert cells.bytes_per_token == 160 + 40 + 3 * 4
    numbers = cells.numbers(32768)
    assert (numbers["tokens"], numbers["size"], numbers["per_page"]) == (16, 3392, 9)
    assert numbers["keys"] == (16, 0, False, 0, 3200, 3200)
    assert numbers["values"] == (4, 32, False, 2560, 3200, 3296)
