"""Bounds, peak and steady figures against the blocks of a simulated schedule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan.simulation import plans, schedule, slow_holdings
from vllm_kvpress.plan import RetentionPlan

LENGTHS = st.integers(1, 50)
CHUNKS = st.lists(st.integers(1, 20), max_size=6)


@settings(max_examples=400, deadline=None)
@given(plans(), LENGTHS, st.integers(1, 50))
def test_peak_and_steady_are_those_of_a_schedule(plan, prompt, outputs):
    counts = slow_holdings(plan, prompt, schedule(prompt, outputs, []), in_flight=1)

    assert plan.peak_blocks(prompt, outputs) == max(counts)
    if outputs >= 3:
        assert plan.steady_blocks(prompt, outputs) == counts[-1]


@settings(max_examples=300, deadline=None)
@given(plans(), LENGTHS, st.integers(1, 50), CHUNKS, st.sampled_from([0, 1]))
def test_peak_bounds_every_chunking(plan, prompt, outputs, chunks, in_flight):
    counts = slow_holdings(plan, prompt, schedule(prompt, outputs, chunks), in_flight=in_flight)

    assert max(counts) <= plan.peak_blocks(prompt, outputs)
    if outputs >= 3:
        steady = plan.steady_blocks(prompt, outputs)
        assert counts[-1] == steady if in_flight else counts[-1] <= steady


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(1, 70), CHUNKS)
def test_bounds_cover_every_split_of_a_length(plan, total, chunks):
    staging = -(-total // plan.block_size)
    for prompt in range(1, total + 1):
        for end in range(1, total + 1):
            assert plan.store_need(prompt, end) <= plan.store_bound(total)
            assert plan.position_need(prompt, end) <= plan.position_bound(total)
            assert plan.query_need(prompt, end) <= plan.query_bound(total)
    bound = staging + plan.store_bound(total) + plan.position_bound(total) + plan.query_bound(total)
    for prompt in {1, total // 3 + 1, total // 2 + 1, total}:
        outputs = total - prompt
        # Also as a preempted request, which computes prompt and outputs as one.
        for steps in (schedule(prompt, outputs, chunks), schedule(total, 0, chunks)):
            assert max(slow_holdings(plan, prompt, steps, in_flight=1)) <= bound


@settings(max_examples=200, deadline=None)
@given(plans(), st.integers(1, 200))
def test_bounds_grow_with_the_length(plan, total):
    for bound in (plan.store_bound, plan.position_bound, plan.query_bound):
        assert bound(total) <= bound(total + 1)


@settings(max_examples=200, deadline=None)
@given(plans(), LENGTHS, st.integers(3, 50), st.integers(0, 300))
def test_requests_at_once_fit_in_the_pool(plan, prompt, outputs, pool):
    peak, steady = plan.peak_blocks(prompt, outputs), plan.steady_blocks(prompt, outputs)
    count = plan.requests_at_once(pool, prompt, outputs)

    fits = [n for n in range(pool + 1) if (n - 1) * steady + peak <= pool and n > 0]
    assert count == max(fits, default=0)


def test_figures_worked_by_hand():
    # SnapKV on 4-token blocks: 30 prompt tokens, 12 kept: the open block has 2, the store 2 blocks.
    plan = RetentionPlan(4, 1, 4, 12, None, query_window=4, queries_per_block=2)

    assert plan.layout(30, 29) == (0, 0, 0, 0)
    assert plan.layout(30, 30) == (2, 7, 0, 0)
    assert plan.due_event(30, 20, 30) == 30
    assert plan.freed_staging(30, 30) == (0, 7)
    # 8 blocks of staging up to 32, 2 of the store, 2 of queries.
    assert plan.peak_blocks(30, 10) == 12
    # Up to 40: 10 of staging less 7, 2 of the store.
    assert plan.steady_blocks(30, 10) == 5


@pytest.mark.parametrize(("every", "peak"), [(0, 6), (4, 6 + 3)])
def test_the_peak_of_a_short_prompt_falls_at_its_first_decode_event(every, peak):
    # The prompt is within the budget of 12; 4-token events reach it first at 16.
    plan = RetentionPlan(4, 1, 4, 12, None, every_decode_tokens=every)

    held = slow_holdings(plan, 4, schedule(4, 20, []), in_flight=1)

    assert max(held) == plan.peak_blocks(4, 20)
    assert plan.peak_blocks(4, 20) == (peak if not every else -(-18 // 4) + 3)


def test_a_plan_says_whether_it_ever_evicts():
    def plan(**given):
        return RetentionPlan(32, 4, 16, **{"budget_tokens": 200, "keep_ratio": None, **given})

    assert plan().evicts(202)
    assert not plan().evicts(201)
    assert plan(prompt_end=False, every_decode_tokens=10).evicts(400)
    assert plan(budget_tokens=None, keep_ratio=0.5).evicts(400)
    assert not plan(budget_tokens=None, keep_ratio=1.0).evicts(400)
    assert plan(store=False).evicts(400)
    assert not plan(store=False).evicts(200)
