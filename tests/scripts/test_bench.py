import argparse

import bench_cost
import bench_engine
import bench_memory
import pytest

from vllm_kvpress.config import load_policy
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.policies import resolve


@pytest.mark.parametrize("name", bench_engine.POLICIES)
def test_every_policy_of_the_benches_is_valid(name):
    policy = load_policy(bench_engine.policy_source(name, 0.25))

    assert policy.evict.budget.keep_ratio == 0.25
    assert policy.recent_tokens == bench_engine.RECENT_TOKENS
    assert resolve(policy).selects == ("window" if name == "streaming_llm" else "tokens")


def test_the_pool_holds_five_uncompressed_requests_and_the_formula_says_so():
    arguments = argparse.Namespace(num_tokens=2048, outputs=96, block_size=32)
    pool = bench_memory.pool_blocks(arguments)
    peak, steady = bench_memory.expected_blocks(None, 32, ([0] * 2048, None), 96)

    assert int(1 + (pool - peak) / steady) == bench_memory.POOL_REQUESTS


def test_stock_and_policy_read_equally_much():
    plan = RetentionPlan(
        block_size=32, sink_tokens=4, recent_tokens=64, budget_tokens=None, keep_ratio=0.5
    )
    engine = argparse.Namespace(plan=plan)

    stock, prompt = bench_cost.prompt_lengths(engine, 1024)

    assert stock == 1024
    assert plan.physical_tokens(prompt, prompt, prompt + 1) == stock + 1


def test_the_ratio_of_step_times_is_that_of_the_medians_of_each_round():
    rounds = [{"wall": [0.2, 0.4], "cpu": [0.2, 0.2], "metadata": [0.1, 0.3]}] * 3

    result = bench_cost.summary(rounds)

    assert result["wall"]["ratio"]["median"] == 2.0
    assert result["cpu"]["ratio"]["median"] == 1.0
    assert result["wall"]["policy_ms"]["median"] == 400.0


@pytest.mark.parametrize(("running", "met"), [(13, True), (12, False)])
def test_too_few_requests_at_once_are_reported(running, met):
    result = {"policy": "snapkv", "running": running, "formula": 13.8, "ratio": running / 13}
    result |= {"right": 3, "requests": 4, "peak_blocks": {"seen": 1, "plan": 1}}

    assert (bench_memory.shortcomings([result]) == []) is met
