"""Packed stores by kernel against the same in PyTorch; the operations run their references here."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

from vllm_kvpress.errors import UnsupportedModelError, UnsupportedVLLMError
from vllm_kvpress.integration import cells
from vllm_kvpress.integration.cells import NonfiniteNumbers, PackedStore, page_bytes
from vllm_kvpress.integration.events import LayerPages
from vllm_kvpress.integration.kernel_form import KernelAttention, attention_form
from vllm_kvpress.integration.packed_attention import PackedAttention
from vllm_kvpress.integration.pages import PageMap
from vllm_kvpress.policies.codecs import hadamard, make_codec, packed_format
from vllm_kvpress.schema import Codecs

HEADS, GROUP, SIZE, BLOCK, BLOCKS = 2, 3, 32, 16, 40
F32 = torch.float32


def store_of(keys, values, *, rotate="none", like=None):
    """A store with codecs by name."""
    pages = torch.zeros(12, BLOCK * HEADS * 2 * SIZE * 4, dtype=torch.uint8)
    codecs = Codecs(keys=keys, values=values, rotate=rotate)
    form = packed_format(keys, values, 0, HEADS, SIZE, 32)
    pages = pages if like is None else page_bytes(like)
    return PackedStore(form, codecs, pages, F32, NonfiniteNumbers(pages.device))


def layer_of(seed=0, **impl):
    """A layer with pages of random numbers, K in the front half of a row and V in the back half."""
    cache = torch.randn(
        BLOCKS, HEADS, BLOCK, 2 * SIZE, generator=torch.Generator().manual_seed(seed)
    )
    given = {"scale": SIZE**-0.5, "logits_soft_cap": 0.0, "sinks": None, **impl}
    layer = SimpleNamespace(kv_cache=cache, impl=SimpleNamespace(**given))
    return LayerPages("model.layers.0.attn", cache.view(BLOCKS, -1), cache, layer, (0,))


def plain_map():
    index = torch.arange(HEADS * BLOCK * 2 * SIZE).view(HEADS, BLOCK, 2, SIZE)
    return PageMap(HEADS, BLOCK, SIZE, index.permute(2, 0, 1, 3).reshape(-1))


def tokens_of(count, seed):
    return torch.randn(2, HEADS, count, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("codecs", "rotate"),
    [
        (("int8", "int8"), "both"),
        (("int4", "int8"), "none"),
        (("int4", "none"), "keys"),
        (("kivi2", "kivi2"), "none"),
    ],
)
def test_a_store_reads_what_the_codecs_make_of_tokens(codecs, rotate):
    store, table = store_of(*codecs, rotate=rotate), torch.tensor([7, 3, 9, 1, 4, 8]).int()
    pages = torch.full((12, BLOCK * HEADS * 2 * SIZE * 4), 255, dtype=torch.uint8)
    parts = [tokens_of(count, count) for count in (64, 32)]

    for start, (keys, values) in zip((0, 64), parts, strict=True):
        store.write(pages, table, start, keys, values)
    sides = store.read(pages, table, 96)

    turned = (rotate != "none", rotate == "both")
    for side, name in enumerate(codecs):
        codec = make_codec(name, ("keys", "values")[side], dtype=F32)
        for (start, end), part in zip(((0, 64), (64, 96)), parts, strict=True):
            numbers = turn(part[side]) if turned[side] else part[side]
            near = codec.decode(codec.encode(numbers), SIZE)
            expected = turn(near) if turned[side] else near
            torch.testing.assert_close(sides[side][:, start:end], expected, rtol=0, atol=1e-6)
    assert not int(store.nonfinite.count)


def turn(numbers):
    return numbers @ hadamard(SIZE, numbers.device)


def test_what_a_codec_cannot_hold_is_counted_and_told_once(monkeypatch):
    store, table = store_of("int8", "int8"), torch.arange(6).int()
    pages = torch.zeros(12, BLOCK * HEADS * 2 * SIZE * 4, dtype=torch.uint8)
    told = []
    monkeypatch.setattr(cells.logger, "warning", told.append)
    keys, values = tokens_of(16, 0)
    bad = keys.clone()
    bad[0, 3, 5], bad[1, 2, 1] = torch.inf, torch.nan

    for numbers in (bad, keys, bad):
        store.write(pages, table, 0, numbers, values)

    assert int(store.nonfinite.count) == 4
    assert [message[:26] for message in told] == ["KV policy: NaN or infinity"]


@pytest.mark.parametrize(
    "impl", [{}, {"logits_soft_cap": 5.0, "sinks": torch.arange(6.0) / 3}], ids=["", "sinks"]
)
@pytest.mark.parametrize("rotate", ["none", "both"])
def test_attention_over_two_stores_equals_that_in_pytorch(impl, rotate):
    """Decode, a chunk, a request without cells, and a row of padding."""
    layer, page_map = layer_of(**impl), plain_map()
    stores = {
        "kv_store": store_of("int8", "int8", rotate=rotate, like=layer),
        "kv_demoted": store_of("kivi2", "kivi2", like=layer),
    }
    tables = {
        "kv_store": torch.arange(16, dtype=torch.int32).view(4, 4),
        "kv_demoted": torch.arange(16, 24, dtype=torch.int32).view(4, 2),
    }
    counts = {"kv_store": np.array([40, 20, 0, 0]), "kv_demoted": np.array([0, 32, 0, 0])}
    for lane, store in stores.items():
        for row, count in enumerate(counts[lane]):
            if count:
                table = tables[lane][row]
                store.write(page_bytes(layer), table, 0, *tokens_of(int(count), row))
    common = SimpleNamespace(
        num_reqs=4,
        query_start_loc=torch.tensor([0, 1, 6, 9, 9], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 1, 6, 9, 9]),
        seq_lens=torch.tensor([9, 30, 3, 0], dtype=torch.int32),
        block_table_tensor=torch.arange(24, 40, dtype=torch.int32).view(4, 4),
        max_query_len=5,
        max_seq_len=30,
    )
    query = torch.randn(9, HEADS * GROUP, SIZE, generator=torch.Generator().manual_seed(5))

    outputs = []
    for form_of in (PackedAttention, KernelAttention):
        form = form_of(stores, page_map, [layer])
        output = torch.full((9, HEADS * GROUP * SIZE), torch.nan)
        form.attend(layer.layer, query, form.step(common, tables, counts), output)
        outputs.append(output)

    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_pages_without_strides_are_refused():
    layer, page_map = layer_of(), plain_map()
    shuffled = PageMap(HEADS, BLOCK, SIZE, page_map.order.flip(0))

    with pytest.raises(UnsupportedVLLMError, match="cannot read the attention backend's pages"):
        KernelAttention({}, shuffled, [layer])


@pytest.mark.parametrize(
    ("device", "capability", "form"),
    [("cpu", None, PackedAttention), ("cuda", (8, 0), KernelAttention), ("cuda", (7, 5), None)],
)
def test_the_form_is_that_of_the_device(device, capability, form, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    if form is not None:
        assert attention_form(torch.device(device)) is form
        return
    with pytest.raises(UnsupportedModelError, match="got an old one; allowed: CPU; NVIDIA GPUs"):
        attention_form(torch.device(device))


def test_other_devices_are_refused():
    with pytest.raises(UnsupportedModelError, match="no kernels for this device; got xpu"):
        attention_form(torch.device("xpu"))


@pytest.mark.parametrize(("packs", "support"), [(False, "ALWAYS"), (True, "NEVER")])
def test_full_cuda_graphs_are_not_captured_over_packed_cells(packs, support):
    from vllm.v1.attention.backend import AttentionCGSupport

    from vllm_kvpress.integration.backend import _policy_builder

    class Builder:
        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            return AttentionCGSupport.ALWAYS

    builder = _policy_builder(Builder, packs)

    assert builder.get_cudagraph_support(None, None) == AttentionCGSupport[support]
