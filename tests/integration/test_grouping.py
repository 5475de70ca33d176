"""Cache groups: one for each lane, private ones first, every group as wide as a lane."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import example, given, settings
from plan.test_head_groups import labels
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvpress.config import load_policy
from vllm_kvpress.demoting_plan import DemotingPlan
from vllm_kvpress.errors import UnsupportedModelError
from vllm_kvpress.head_groups import group_heads
from vllm_kvpress.integration import compat, engine
from vllm_kvpress.integration.head_lanes import StreamSpec, lane_spec, stock_blocks
from vllm_kvpress.integration.lanes import (
    StagingSpec,
    packed_spec,
    plan_in,
    private_lanes,
    staging_of,
)
from vllm_kvpress.integration.skipped import SkippedSpec
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.policies import resolve
from vllm_kvpress.schema import Quantize
from vllm_kvpress.skip_groups import skipped_groups_of
from vllm_kvpress.window_plan import WindowPlan

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
STOCK = FullAttentionSpec(**SHAPE)
PLANS = {
    "window": RetentionPlan(16, 4, 64, 68, None, store=False),
    "store": RetentionPlan(16, 4, 64, 256, None),
    "demoted": DemotingPlan(16, 4, 64, 256, None, query_window=8, queries_per_block=4),
    "queries": RetentionPlan(16, 4, 64, 256, None, query_window=8, queries_per_block=4),
    "positions": RetentionPlan(
        16, 4, 64, 256, None, every_decode_tokens=32, positions_per_block=512
    ),
}


@pytest.fixture(autouse=True)
def _installed():
    engine.install()


def config():
    scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    layout = SimpleNamespace(is_block_outermost=False)
    return SimpleNamespace(
        scheduler_config=scheduler,
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        speculative_config=None,
        model_config=SimpleNamespace(max_model_len=4096),
    )


def specs_of(plan, num_layers):
    """Specs of a model's layers, in the order in which vLLM collects them."""
    specs = {}
    for layer in range(num_layers):
        specs[f"layers.{layer}.attn"] = StagingSpec.of(STOCK, plan)
        for lane, spec_cls in private_lanes(plan).items():
            specs[f"layers.{layer}.attn.{lane}"] = spec_cls.of(STOCK, plan)
    return specs


def original():
    return compat.patched()["vllm.v1.core.kv_cache_utils.get_kv_cache_groups"]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_one_group_for_each_lane_and_staging_last(plan, num_layers):
    groups = kv_cache_utils.get_kv_cache_groups(config(), specs_of(plan, num_layers))

    kinds = [type(group.kv_cache_spec) for group in groups]
    assert kinds == [*private_lanes(plan).values(), StagingSpec]
    for group, lane in zip(groups, [*private_lanes(plan), ""], strict=True):
        # The same layers in the same order: lanes of one layer share its tensor.
        suffix = lane and f".{lane}"
        assert group.layer_names == [f"layers.{i}.attn{suffix}" for i in range(num_layers)]
        assert group.kv_cache_spec.page_size_bytes == STOCK.page_size_bytes
        assert group.kv_cache_spec.plan is plan
    assert plan_in(groups) is plan


def block_outermost():
    """A config of block-outermost pages, for vLLM's own arithmetic."""
    found = config()
    found.cache_config = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC,
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
    )
    found.attention_config = SimpleNamespace(hisparse_config=None)
    return found


def head_specs(retrieval):
    """Specs of a head plan's lanes, in the order in which vLLM collects them."""
    window = WindowPlan(16, 4, 64)
    flying = SimpleNamespace(max_in_flight_tokens=64)
    lanes = [
        (f"layers.{layer}.attn" + (f".kv_lane{index}" if index else ""), lane)
        for layer, lanes in enumerate(group_heads(retrieval).layers)
        for index, lane in enumerate(lanes)
    ]
    # Layers first: what is added to them comes behind.
    lanes.sort(key=lambda named: "kv_lane" in named[0])
    return {name: lane_spec(STOCK, lane, window, flying) for name, lane in lanes}


def with_stores(specs, plan):
    """The same with private lanes beside those of retrieval heads, added layer by layer."""
    staging = {
        name: spec if isinstance(spec, StreamSpec) else StagingSpec.of(spec, plan)
        for name, spec in specs.items()
    }
    layers = {name: spec for name, spec in staging.items() if "kv_lane" not in name}
    found = dict(layers)
    for layer in layers:
        for name in (n for n in staging if n == layer or n.startswith(f"{layer}.kv_lane")):
            found.setdefault(name, staging[name])
            if isinstance(staging[name], StagingSpec):
                for suffix, spec_cls in private_lanes(plan).items():
                    found[f"{name}.{suffix}"] = spec_cls.of(staging[name], plan)
    return found


def places(found, groups):
    """Where vLLM puts each layer's page of a block, and that page's heads."""
    sizes = kv_cache_utils.get_kv_cache_config_from_groups(found, groups, 10**9)
    specs = {n: s for group in groups for n, s in group.kv_cache_spec.kv_cache_specs.items()}
    return {
        name: (tensor.offset + number * tensor.layer_stride, specs[name].num_kv_heads)
        for tensor in sizes.kv_cache_tensors
        for number, name in enumerate(tensor.layers)
    }


@settings(max_examples=200, deadline=None)
@given(labels())
@example([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 1]])
def test_private_lanes_lie_where_the_lane_does_that_they_belong_to(retrieval):
    found, specs = block_outermost(), with_stores(head_specs(retrieval), PLANS["queries"])

    groups = kv_cache_utils.get_kv_cache_groups(found, specs)

    place = places(found, groups)
    assert set(place) == set(specs)
    for name in specs:
        if name.endswith((".kv_store", ".kv_queries")):
            assert place[name] == place[name.rpartition(".")[0]], name


def test_a_head_plan_has_one_group_for_each_run():
    specs = head_specs([[True, True, False, False], [False] * 4])

    groups = kv_cache_utils.get_kv_cache_groups(config(), specs)

    assert [group.layer_names for group in groups] == [
        ["layers.0.attn"],
        ["layers.0.attn.kv_lane1"],
        ["layers.1.attn"],
        ["layers.1.attn.kv_lane1"],
    ]
    two_heads = STOCK.page_size_bytes
    assert [group.kv_cache_spec.page_size_bytes for group in groups] == [two_heads] * 4
    assert plan_in(groups) is None


def test_lanes_of_unequal_size_share_a_block():
    specs = head_specs([[True, False], [False, False], [True, False]])  # head 0.1 is promoted

    groups = kv_cache_utils.get_kv_cache_groups(config(), specs)

    assert [group.layer_names for group in groups] == [
        ["layers.0.attn", "layers.2.attn"],
        ["layers.1.attn", "layers.2.attn.kv_lane1"],
    ]
    for group in groups:
        assert [s.num_kv_heads for s in group.kv_cache_spec.kv_cache_specs.values()] == [2, 1]


def test_packed_lanes_of_a_head_plan_are_so_much_smaller():
    codecs = Quantize(keys="int8", values="int8")
    specs = head_specs([[True, False], [False, False], [True, False]])
    packed = {name: packed_spec(spec, codecs) for name, spec in specs.items()}

    groups = kv_cache_utils.get_kv_cache_groups(config(), packed)

    exact, cells = 2 * 32 * 4, 2 * (32 + 4)  # bytes of a token and head: float32, int8 with params
    assert [group.kv_cache_spec.page_size_bytes for group in groups] == [3 * 16 * cells] * 2
    assert stock_blocks(groups, 1000) == 1000 * cells // exact
    assert stock_blocks(kv_cache_utils.get_kv_cache_groups(config(), specs), 1000) == 1000


def test_a_head_plan_is_refused_beside_layers_that_it_does_not_know():
    specs = head_specs([[True, False]])
    specs["layers.1.attn"] = SlidingWindowSpec(**SHAPE, sliding_window=128)

    with pytest.raises(UnsupportedModelError, match=r"all have full attention; got layers\.1"):
        kv_cache_utils.get_kv_cache_groups(config(), specs)


@pytest.mark.parametrize(("num_lane", "num_sliding"), [(2, 2), (2, 5), (4, 3), (1, 6), (5, 1)])
def test_sliding_window_layers_are_split_to_the_width_of_a_lane(num_lane, num_sliding):
    sliding = SlidingWindowSpec(**SHAPE, sliding_window=128)
    specs = specs_of(PLANS["store"], num_lane)
    specs |= {f"layers.{100 + i}.attn": sliding for i in range(num_sliding)}

    groups = kv_cache_utils.get_kv_cache_groups(config(), specs)

    kinds = [type(group.kv_cache_spec) for group in groups]
    assert kinds[:2] == [*private_lanes(PLANS["store"]).values(), StagingSpec]
    assert set(kinds[2:]) == {SlidingWindowSpec}
    assert max(len(group.layer_names) for group in groups) == num_lane
    assert len(groups) == 2 + -(-num_sliding // num_lane)
    names = [name for group in groups for name in group.layer_names]
    assert sorted(names) == sorted(specs)


def test_layers_of_another_page_size_are_refused():
    other = SlidingWindowSpec(**{**SHAPE, "num_kv_heads": 1}, sliding_window=128)
    specs = specs_of(PLANS["store"], 2) | {"layers.9.attn": other}

    with pytest.raises(UnsupportedModelError, match="another page size"):
        kv_cache_utils.get_kv_cache_groups(config(), specs)


@pytest.mark.parametrize(
    ("quantize", "token_bytes"),
    [
        ({"keys": "int8", "values": "int8"}, 2 * (32 + 4)),
        ({"keys": "int4", "values": "int4", "group": 32}, 2 * (16 + 4)),
        ({"keys": "int8", "values": "int4"}, 32 + 4 + 16 + 4),
        ({"keys": "none", "values": "int4"}, 128 + 16 + 4),
    ],
)
def test_blocks_that_are_packed_on_write_hold_packed_bytes(quantize, token_bytes):
    policy = load_policy({"quantize": quantize})
    staging = staging_of(policy, resolve(policy), STOCK, 4, 1, torch.float32)

    (group,) = kv_cache_utils.get_kv_cache_groups(config(), {"layers.0.attn": staging})

    spec = group.kv_cache_spec
    assert spec.page_size_bytes == 16 * 2 * token_bytes
    assert spec.exact_page_bytes == STOCK.page_size_bytes
    assert spec.prefix_cacheable
    # A request of 4,096 tokens: start-up sizing asks for its packed bytes.
    assert spec.max_memory_usage_bytes(config()) == 4096 * 2 * token_bytes


def test_sliding_window_layers_beside_packed_blocks_are_refused():
    policy = load_policy("int8")
    staging = staging_of(policy, resolve(policy), STOCK, 4, 1, torch.float32)
    sliding = SlidingWindowSpec(**SHAPE, sliding_window=128)

    with pytest.raises(UnsupportedModelError, match="full-attention layers only"):
        kv_cache_utils.get_kv_cache_groups(
            config(), {"layers.0.attn": staging, "layers.1.attn": sliding}
        )


def test_layers_of_one_lane_with_different_specs_are_refused():
    specs = specs_of(PLANS["store"], 2)
    specs["layers.1.attn"] = StagingSpec.of(STOCK, PLANS["queries"])

    with pytest.raises(AssertionError, match="equal specs"):
        kv_cache_utils.get_kv_cache_groups(config(), specs)


def with_skipped(skip, num_layers):
    """A config of block-outermost pages, and the specs of a model whose policy skips layers."""
    skipped = skipped_groups_of(skip, num_layers, STOCK.block_size, STOCK.page_size_bytes)
    plan = replace(PLANS["queries"], skipped=skipped)
    specs = specs_of(plan, num_layers)
    for layer in skip:
        for name in [name for name in specs if name.startswith(f"layers.{layer}.")]:
            del specs[name]
        specs[f"layers.{layer}.attn"] = SkippedSpec.of(STOCK, skipped)
    return block_outermost(), specs, skipped


@pytest.mark.parametrize(
    ("skip", "num_layers", "widths", "tokens"),
    [
        ([0, 1], 32, [2], 208),
        ([0, 31], 32, [2], 208),
        ([3], 4, [1], 48),
        (range(0, 32, 2), 32, [16], 16),
        (range(12), 32, [4, 4, 4], 80),
        ([0, 1, 2], 4, [1, 1, 1], 16),
    ],
)
def test_skipped_layers_have_groups_of_their_own(skip, num_layers, widths, tokens):
    found, specs, skipped = with_skipped(skip, num_layers)

    groups = kv_cache_utils.get_kv_cache_groups(found, specs)

    alone = [group for group in groups if isinstance(group.kv_cache_spec, SkippedSpec)]
    assert groups[: len(alone)] == alone
    assert isinstance(groups[-1].kv_cache_spec, StagingSpec)
    assert [len(group.layer_names) for group in alone] == widths
    assert {group.kv_cache_spec.block_size for group in alone} == {tokens}
    names = [name for group in alone for name in group.layer_names]
    assert sorted(names) == sorted(f"layers.{layer}.attn" for layer in skip)
    assert {len(group.layer_names) for group in groups[len(alone) :]} == {num_layers - len(skip)}

    # vLLM's own arithmetic: what a block has, and how much of it is used.
    sizes = kv_cache_utils.get_kv_cache_config_from_groups(found, groups, 10**9)
    page = STOCK.page_size_bytes
    strides = {tensor.block_stride for tensor in sizes.kv_cache_tensors}
    assert strides == {skipped.block_bytes}
    used = widths[0] * tokens // 16 * page
    assert max(used, (num_layers - len(skip)) * page) == skipped.block_bytes
    offsets = {tensor.offset for tensor in sizes.kv_cache_tensors}
    assert offsets == {0}


def test_skipped_layers_beside_sliding_windows_are_refused():
    found, specs, _ = with_skipped([0], 4)
    specs["layers.9.attn"] = SlidingWindowSpec(**SHAPE, sliding_window=128)

    with pytest.raises(UnsupportedModelError, match="layers of other kinds"):
        kv_cache_utils.get_kv_cache_groups(found, specs)


@pytest.mark.parametrize("num_sliding", [0, 2])
def test_without_lanes_the_result_is_the_stock_one(num_sliding):
    specs = {f"layers.{i}.attn": STOCK for i in range(4)}
    sliding = SlidingWindowSpec(**SHAPE, sliding_window=128)
    specs |= {f"layers.{100 + i}.attn": sliding for i in range(num_sliding)}

    groups = kv_cache_utils.get_kv_cache_groups(config(), dict(specs))

    assert groups == original()(config(), dict(specs))
    assert plan_in(groups) is None


def test_specs_share_no_registered_base():
    """vLLM merges layers whose specs share a registered base into one group."""
    plan = PLANS["positions"]
    specs = [StagingSpec.of(STOCK, plan)]
    specs += [cls.of(STOCK, plan) for cls in private_lanes(plan).values()]
    for one in specs:
        for other in specs:
            uniform = one.is_uniform_with_collection({"a": one, "b": other})
            assert uniform is (type(one) is type(other))
        assert one.copy_with_new_block_size(32).plan is plan
        assert (one.copy_with_new_block_size(32)).block_size == 32
