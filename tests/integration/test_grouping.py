"""Cache groups: one for each lane, private ones first, every group as wide as a lane."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_kvpress.demoting_plan import DemotingPlan
from vllm_kvpress.errors import UnsupportedModelError
from vllm_kvpress.integration import compat, engine
from vllm_kvpress.integration.lanes import StagingSpec, plan_in, private_lanes
from vllm_kvpress.plan import RetentionPlan

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


def test_layers_of_one_lane_with_different_specs_are_refused():
    specs = specs_of(PLANS["store"], 2)
    specs["layers.1.attn"] = StagingSpec.of(STOCK, PLANS["queries"])

    with pytest.raises(AssertionError, match="equal specs"):
        kv_cache_utils.get_kv_cache_groups(config(), specs)


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
