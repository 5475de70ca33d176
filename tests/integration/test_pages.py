"""The order of a page, learned through a backend's own cache-write op."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpress.errors import UnsupportedVLLMError
from vllm_kvpress.integration.pages import PageMap, element_dtype, flat_pages, numbers

BLOCKS = 6


class ShuffledImpl:
    """A backend that writes each element of a block somewhere of its own choosing.

    Args:
        places: Flat index in the page of each element [K|V, block_size, heads, head_dim].
        loses: Elements that it drops.
    """

    def __init__(self, places, loses=0):
        self.places = places
        self.loses = loses

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        block_size = kv_cache.shape[2]
        pages = flat_pages(kv_cache)
        for row, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, block_size)
            for index, vectors in enumerate((key, value)):
                places = self.places[index, offset].flatten()
                count = places.numel() - self.loses
                pages[block, places[:count]] = vectors[row].flatten()[:count]


def layer_of(heads, block_size, head_dim, *, token_major=False, dtype=torch.float32, seed=0):
    """A layer with a cache of the given strides and a random order inside a page."""
    shape = (BLOCKS, heads, block_size, 2 * head_dim)
    if token_major:
        cache = torch.zeros(BLOCKS, block_size, heads, 2 * head_dim, dtype=dtype).transpose(1, 2)
    else:
        cache = torch.zeros(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(cache[0].numel(), generator=generator)
    places = places.view(2, block_size, heads, head_dim)
    return attention(cache, ShuffledImpl(places))


def attention(cache, impl, **more):
    """The part of vLLM's `Attention` that pages are learned from."""
    scales = {"_k_scale_float": 1.0, "_v_scale_float": 1.0}
    return SimpleNamespace(kv_cache=cache, impl=impl, **{**scales, **more})


def strided_layer(heads, block_size, head_dim, *, token_major):
    """K in the front half of a content row, V in the back half, as CUDA backends keep them."""
    layer = layer_of(heads, block_size, head_dim, token_major=token_major)
    index = torch.arange(layer.kv_cache[0].numel())
    if token_major:
        grid = index.view(block_size, heads, 2, head_dim).permute(2, 0, 1, 3)
    else:
        grid = index.view(heads, block_size, 2, head_dim).permute(2, 1, 0, 3)
    layer.impl.places = grid
    return layer


def fill(layer, block_size, heads, head_dim, blocks):
    """Writes random tokens through the op; returns keys, values [heads, tokens, head_dim]."""
    tokens = len(blocks) * block_size
    dtype = layer.kv_cache.dtype
    keys = torch.randn(tokens, heads, head_dim).to(dtype)
    values = torch.randn(tokens, heads, head_dim).to(dtype)
    slots = torch.cat([torch.arange(b * block_size, (b + 1) * block_size) for b in blocks])
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
    return keys.transpose(0, 1), values.transpose(0, 1)


def check_round_trip(layer, heads, block_size, head_dim):
    page_map = PageMap.learn(layer, layer.kv_cache.dtype)
    pages = flat_pages(layer.kv_cache)
    assert pages.data_ptr() == layer.kv_cache.data_ptr()
    assert torch.equal(page_map.order[page_map.inverse], torch.arange(pages.shape[1]))
    before = layer.kv_cache.clone()
    keys, values = fill(layer, block_size, heads, head_dim, [4, 1])

    read = page_map.read(pages, torch.tensor([4, 1]))
    assert torch.equal(read[0], keys)
    assert torch.equal(read[1], values)

    # What we write is what the op would have written, to the bit, and nothing else.
    page_map.write(pages, torch.tensor([2, 5]), *read)
    assert torch.equal(layer.kv_cache[[2, 5]], layer.kv_cache[[4, 1]])
    assert torch.equal(layer.kv_cache[[0, 3]], before[[0, 3]])
    again = page_map.read(pages, torch.tensor([5, 2, 2]))
    swapped = keys.unflatten(1, (2, block_size))[:, [1, 0, 0]].flatten(1, 2)
    assert torch.equal(again[0], swapped)


@pytest.mark.parametrize("token_major", [False, True], ids=["head-major", "token-major"])
@pytest.mark.parametrize(("heads", "block_size", "head_dim"), [(1, 1, 8), (2, 4, 16), (8, 16, 64)])
def test_strided_layouts(heads, block_size, head_dim, token_major):
    layer = strided_layer(heads, block_size, head_dim, token_major=token_major)

    check_round_trip(layer, heads, block_size, head_dim)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_any_order_of_a_page(heads, block_size, head_dim, token_major, dtype, seed):
    layer = layer_of(heads, block_size, head_dim, token_major=token_major, dtype=dtype, seed=seed)

    check_round_trip(layer, heads, block_size, head_dim)


def test_the_cache_itself_is_not_touched_by_learning():
    layer = layer_of(2, 4, 8)
    layer.kv_cache.fill_(7)

    PageMap.learn(layer, torch.float32)

    assert bool((layer.kv_cache == 7).all())


@pytest.mark.parametrize("fault", ["loses", "overwrites"])
def test_a_backend_that_is_no_permutation_is_refused(fault):
    layer = layer_of(2, 4, 8)
    if fault == "loses":
        layer.impl.loses = 1
    else:
        layer.impl.places[0, 0, 0, 1] = layer.impl.places[1, 3, 1, 7]

    with pytest.raises(UnsupportedVLLMError, match="does not store K and V as they are"):
        PageMap.learn(layer, torch.float32)


def test_blocks_further_apart_than_a_page_are_pages():
    # Two layers that share one allocation, block by block.
    both = torch.arange(BLOCKS * 2 * 48.0).view(BLOCKS, 2, 2, 3, 8)

    pages = flat_pages(both[:, 1])

    assert pages.shape == (BLOCKS, 48)
    assert torch.equal(pages, both[:, 1].reshape(BLOCKS, 48))
    pages[3, 0] = -1
    assert both[3, 1, 0, 0, 0] == -1


def not_dense():
    wide = torch.zeros(BLOCKS, 2, 4, 20)
    yield "padded rows", wide[..., :16]
    yield "every other token", torch.zeros(BLOCKS, 2, 8, 16)[:, :, ::2]
    yield "heads outside of the blocks", torch.zeros(2, BLOCKS, 4, 16).transpose(0, 1)
    yield "overlapping", torch.zeros(BLOCKS, 1, 4, 16).expand(-1, 2, -1, -1)


@pytest.mark.parametrize(("name", "cache"), list(not_dense()), ids=lambda v: str(v)[:20])
def test_pages_that_are_not_dense_are_refused(name, cache):
    with pytest.raises(UnsupportedVLLMError, match="not one dense page"):
        flat_pages(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "block_size", "head_dim"), [(2, 16, 32), (1, 32, 64), (4, 32, 128)]
)
def test_the_cpu_backend_as_it_is(monkeypatch, dtype, heads, block_size, head_dim):
    """CPU_ATTN packs by instruction set: transposed, interleaved, or plain."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the CPU build's own op")
    from vllm.v1.attention.backends import cpu_attn

    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)
    impl = cpu_attn.CPUAttentionBackendImpl(heads, head_dim, 1.0, heads, None, None, "auto")
    cache = torch.zeros(BLOCKS, heads, block_size, 2 * head_dim, dtype=dtype)
    isa = cpu_attn._get_attn_isa(dtype, block_size, head_dim)
    layer = attention(cache, impl, isa=isa)

    check_round_trip(layer, heads, block_size, head_dim)
    if isa == "amx" or (isa == "vec" and dtype == torch.float32):
        # The case is not trivial: this instruction set does reorder a page.
        order = PageMap.learn(layer, dtype).order
        assert not torch.equal(order, torch.arange(order.numel()))


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.037)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_the_cpu_backend_with_an_fp8_cache(monkeypatch, name, dtype, scales):
    """Bytes go through unchanged, and stand for the tokens within a step of fp8."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the CPU build's own op")
    from vllm.v1.attention.backends import cpu_attn

    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)
    impl = cpu_attn.CPUAttentionBackendImpl(4, 64, 1.0, 4, None, None, name)
    layer = attention(
        torch.zeros(BLOCKS, 4, 32, 128, dtype=torch.uint8),
        impl,
        isa=cpu_attn._get_attn_isa(dtype, 32, 64, name),
        kv_cache_dtype=name,
        _k_scale_float=scales[0],
        _v_scale_float=scales[1],
    )
    page_map = PageMap.learn(layer, dtype)
    pages = flat_pages(layer.kv_cache)
    tokens = [(torch.randn(32, 4, 64) * scale).to(dtype) for scale in scales]
    impl.do_kv_cache_update(layer, *tokens, layer.kv_cache, torch.arange(64, 96))

    raw = page_map.read(pages, torch.tensor([2]))
    step = 0.25 if name == "fp8_e5m2" else 0.125
    for written, elements, scale in zip(tokens, raw, scales, strict=True):
        seen = numbers(elements, element_dtype(layer), scale)
        expected = written.float().transpose(0, 1)
        torch.testing.assert_close(seen, expected, rtol=step * 1.01, atol=0.002 * scale)

    page_map.write(pages, torch.tensor([5]), *raw)
    assert torch.equal(pages[5], pages[2])


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_pages_of_cuda_backends_have_strided_views(heads, token_major):
    layer = strided_layer(heads, 16, 8, token_major=token_major)
    page_map, pages = PageMap.learn(layer, torch.float32), flat_pages(layer.kv_cache)
    keys, values = fill(layer, 16, heads, 8, [3, 1])

    views = page_map.views(pages)

    for view, expected in zip(views, (keys, values), strict=True):
        assert view.shape == (BLOCKS, 16, heads, 8)
        assert view.stride(-1) == 1
        assert torch.equal(view[[3, 1]].permute(2, 0, 1, 3).flatten(1, 2), expected)
    views[0][3, 5, 0, 2] = 77
    assert page_map.read(pages, torch.tensor([3]))[0][0, 5, 2] == 77


@pytest.mark.parametrize("swapped", [(0, 0, 0, 0, 1), (1, 3, 2, 4, 5)])
def test_pages_in_another_order_have_no_views(swapped):
    layer = strided_layer(3, 16, 8, token_major=False)
    side, token, head, one, other = swapped
    row = layer.impl.places[side, token, head].clone()
    row[[one, other]] = row[[other, one]]
    layer.impl.places = layer.impl.places.clone()
    layer.impl.places[side, token, head] = row

    page_map = PageMap.learn(layer, torch.float32)

    assert page_map.views(flat_pages(layer.kv_cache)) is None
    assert PageMap.learn(layer_of(3, 16, 8), torch.float32).views(layer.kv_cache) is None
