"""The plan's layouts and events against a token-by-token simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plan.simulation import (
    SlowRequest,
    as_array,
    budget_of,
    capacity,
    least_budget,
    plans,
    schedule,
)
from vllm_kvpress import plan_rows
from vllm_kvpress.errors import CapacityError
from vllm_kvpress.plan import RetentionPlan

LENGTHS = st.integers(1, 60)
CHUNKS = st.lists(st.integers(1, 20), max_size=6)


def run_and_compare(plan, prompt, steps):
    """Runs a schedule through the simulation; the plan must say the same before every step."""
    slow = SlowRequest(plan, prompt)
    size = plan.block_size
    blocks_gone: set[int] = set()
    for start, end in steps:
        heads, first, *_ = plan.layout(prompt, start)
        events_before = len(slow.events)
        seen = slow.step(start, end)
        assert plan.physical_tokens(prompt, start, end) == seen
        due = slow.events[-1] if len(slow.events) > events_before else 0
        assert plan.due_event(prompt, start, end) == due
        if due:
            assert plan.store_blocks(prompt, due) * size == len(slow.store)
            assert plan.store_need(prompt, end) >= plan.store_blocks(prompt, due)
            assert plan.store_need(prompt, end) == capacity(plan, prompt)
            room = plan.position_need(prompt, end) * plan.positions_per_block
            assert not plan.positions_per_block or room >= len(slow.store)
        if not slow.events:
            assert plan.store_need(prompt, end) == plan.position_need(prompt, end) == 0
        # What is free once this start has settled is never read again.
        freed = set(range(*plan.freed_staging(prompt, start)))
        assert blocks_gone <= freed
        blocks_gone = freed
        read = set(range(first, -(-end // size))) | (set() if plan.store else set(range(heads)))
        assert not freed & read
        if not plan.store:
            assert {p // size for p in slow.staging} == read
    return slow


@settings(max_examples=600, deadline=None)
@given(plans(), LENGTHS, st.integers(0, 60), CHUNKS)
def test_layouts_are_those_of_the_simulation(plan, prompt, outputs, chunks):
    run_and_compare(plan, prompt, schedule(prompt, outputs, chunks))


@settings(max_examples=300, deadline=None)
@given(plans(), LENGTHS, st.integers(1, 60), CHUNKS, st.integers(1, 20))
def test_a_replay_in_large_chunks_collapses_events(plan, prompt, outputs, chunks, later):
    """A preempted request computes prompt and outputs in chunks that know no prompt's end."""
    total = prompt + outputs
    replay = schedule(total, 0, chunks)
    last = replay[-1][1]
    slow = run_and_compare(plan, prompt, replay + [(last + i, last + i + 1) for i in range(later)])
    assert len([e for e in slow.events if e <= total]) <= len(replay)


def small_plans():
    shapes = itertools.product((1, 2, 3, 4), (0, 1, 3), (0, 1, 5), (0, 1, 2, 3, 4, 6), (0, 1, 5))
    for size, sinks, recent, every, extra in shapes:
        for prompt_end in {True, not every}:
            plan = RetentionPlan(
                size, sinks, recent, 0, None, prompt_end=prompt_end, every_decode_tokens=every
            )
            tokens = least_budget(plan) + extra
            yield RetentionPlan(
                size, sinks, recent, tokens, None, prompt_end=prompt_end, every_decode_tokens=every
            )
        if recent:
            yield RetentionPlan(size, sinks, recent, sinks + recent, None, store=False)


def test_every_small_plan():
    cases = 0
    for plan in small_plans():
        for prompt in range(1, 17, 1 if plan.block_size > 2 else 3):
            run_and_compare(plan, prompt, schedule(prompt, 18, []))
            cases += 1
    assert cases > 5000


@settings(max_examples=300, deadline=None)
@given(plans(), st.lists(st.tuples(st.integers(1, 500), st.integers(0, 900)), max_size=40))
def test_vectorised_layouts_equal_the_scalar_ones(plan, rows):
    prompts = as_array(*(prompt for prompt, _ in rows))
    starts = as_array(*(start for _, start in rows))

    columns = plan_rows.layouts(plan, prompts, starts)

    assert all(column.dtype == np.int64 for column in columns)
    expected = [tuple(plan.layout(prompt, start)) for prompt, start in rows]
    found = (column.tolist() for column in columns)
    assert list(zip(*found, strict=True)) == expected


@settings(max_examples=300, deadline=None)
@given(
    plans(),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 80), st.integers(1, 20)), min_size=1),
)
def test_the_sieve_lets_every_due_event_through(plan, rows):
    prompts, starts, lengths = (as_array(*column) for column in zip(*rows, strict=True))

    sieved = plan_rows.may_be_due(plan, prompts, starts, starts + lengths).tolist()

    for row, (prompt, start, length) in enumerate(rows):
        slow = SlowRequest(plan, prompt)
        chunk = range(start + 1, start + length + 1)
        if any(slow.is_event(position) for position in chunk):
            assert row in sieved
        elif prompt not in chunk:
            assert row not in sieved


@settings(max_examples=300, deadline=None)
@given(plans(), LENGTHS, st.integers(0, 120))
def test_sizes_stay_within_the_budget(plan, prompt, outputs):
    slow = SlowRequest(plan, prompt)
    budget = budget_of(plan, prompt)
    assert plan.budget(prompt) == budget
    limit = budget + plan.every_decode_tokens + plan.block_size
    for start, end in schedule(prompt, outputs, []):
        slow.step(start, end)
        if slow.events and slow.events[-1] == end:
            assert slow.visible <= budget
            assert slow.visible > budget - plan.block_size
        if end <= budget:
            assert not slow.events
            assert slow.visible == end
        if slow.events and plan.every_decode_tokens:
            assert slow.visible <= limit
        if not plan.store and end > prompt:
            assert slow.visible <= plan.sink_blocks * plan.block_size + limit - plan.sink_tokens


@settings(max_examples=300, deadline=None)
@given(plans(), LENGTHS, st.integers(0, 60))
def test_layouts_only_move_forward(plan, prompt, outputs):
    layouts = [plan.layout(prompt, x) for x in range(prompt + outputs + 1)]
    gaps = [first - heads for heads, first, *_ in layouts]

    assert [first for _, first, *_ in layouts] == sorted(first for _, first, *_ in layouts)
    assert all(gap >= 0 for gap in gaps)
    assert all(not any(layout) for layout in layouts[:prompt])
    needs = [plan.store_need(prompt, x) for x in range(prompt + outputs + 1)]
    assert needs == sorted(needs)
    for heads, first, *_ in layouts:
        # Whole blocks only: dropping nothing is written as (0, 0) or as equal counts.
        assert heads <= first or heads == 0


@settings(max_examples=200, deadline=None)
@given(plans(), LENGTHS, st.integers(0, 60))
def test_a_keep_ratio_is_of_the_prompt_and_stays(plan, prompt, outputs):
    budgets = {budget_of(plan, prompt)}
    for event in range(prompt, prompt + outputs + 1):
        blocks = plan.store_blocks(prompt, event)
        expected = (budget_of(plan, prompt) - event % plan.block_size) // plan.block_size
        assert blocks == max(0, expected)
        budgets.add(plan.budget(prompt))
    assert len(budgets) == 1


@settings(max_examples=300, deadline=None)
@given(plans(), LENGTHS, CHUNKS)
@example(RetentionPlan(4, 0, 4, 8, None, query_window=4, queries_per_block=2), 16, [])
def test_a_capped_prefix_hit_leaves_the_event_and_its_queries(plan, prompt, chunks):
    hit = plan.hit_limit(prompt) // plan.block_size * plan.block_size
    assert 0 <= hit < prompt
    assert hit + min(prompt, plan.query_window) <= prompt
    slow = SlowRequest(plan, prompt)
    slow.staging = list(range(hit))
    events, rows = [], set()
    for start, end in schedule(prompt + 5, 0, [max(1, chunks[0]) if chunks else prompt]):
        start, end = start + hit, end + hit
        rows |= set(range(max(start, plan.query_start(prompt)), min(end, prompt)))
        if plan.query_window and rows and prompt > plan.budget(prompt):
            assert plan.query_need(prompt, end) == plan.query_blocks
            assert plan.query_blocks * plan.queries_per_block >= len(rows)
        slow.step(start, end)
        if plan.due_event(prompt, start, end):
            events.append(plan.due_event(prompt, start, end))
        if end >= prompt:
            break
    assert events == slow.events
    if plan.store and plan.prompt_end and prompt > plan.budget(prompt) and not events:
        pytest.fail("the event at the end of the prompt was skipped")
    if plan.query_window:
        assert rows == set(range(max(0, prompt - plan.query_window), prompt))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 20), st.integers(-3, 3))
def test_the_least_budget_is_the_least(size, sinks, recent, off):
    plan = RetentionPlan(size, sinks, recent, None, 0.5)
    assert plan.least_budget == least_budget(plan)
    plan = RetentionPlan(size, sinks, recent, plan.least_budget + off, None)
    if off < 0:
        with pytest.raises(CapacityError, match=str(plan.least_budget)):
            plan.check()
    else:
        plan.check()


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(1, 200), st.integers(0, 300))
def test_nothing_happens_while_a_row_is_steady(plan, prompt, start):
    (until,) = plan_rows.steady_until(plan, as_array(prompt), as_array(start)).tolist()

    for end in range(start + 1, min(until, start + 80)):
        assert start >= prompt
        for first in range(start, end):
            assert plan.layout(prompt, first) == plan.layout(prompt, start)
            assert plan.due_event(prompt, first, end) == 0
    if start < prompt:
        assert until == 0
    elif until > start + 1000:
        assert plan.store
        assert not plan.every_decode_tokens
    else:  # not much too early either
        after = range(start + 1, until + 1)
        changed = any(plan.layout(prompt, x) != plan.layout(prompt, start) for x in after)
        longest = budget_of(plan, prompt) + 2 * plan.block_size
        assert changed or until - start <= max(plan.every_decode_tokens, longest)
