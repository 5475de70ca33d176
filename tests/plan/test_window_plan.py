"""What streaming heads see, hold and find, against the rule written token by token."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpress.window_plan import WindowPlan
from vllm_kvpress.window_rows import window_rows

PLANS = st.builds(
    WindowPlan,
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 9),
    st.integers(1, 12),
    st.booleans(),
)
LENGTHS = st.integers(1, 90)


def seen(plan, query):
    """The rule of the docstring, in tokens."""
    size = plan.block_size
    sinks = -(-plan.sink_tokens // size) * size
    first = (query // size - -(-plan.recent_tokens // size)) * size
    return {key for key in range(query + 1) if key < sinks or key >= first}


def summed(plan, query):
    """The block with the sums of what the query does not see, where it does not see something."""
    if not plan.compensates or len(seen(plan, query)) == query + 1:
        return set()
    return {max(set(range(query)) - seen(plan, query)) // plan.block_size}


def needed_blocks(plan, query):
    return {key // plan.block_size for key in seen(plan, query)} | summed(plan, query)


@st.composite
def batches(draw):
    """(start, end) of each request of a step; some schedule nothing."""
    starts = draw(st.lists(st.integers(0, 70), min_size=1, max_size=5))
    return [(start, start + draw(st.integers(0, 40))) for start in starts]


@given(PLANS, LENGTHS)
def test_a_query_sees_the_sinks_and_the_window_in_whole_blocks(plan, query):
    assert {key for key in range(query + 5) if plan.sees(query, key)} == seen(plan, query)


@given(PLANS, LENGTHS)
def test_the_sums_of_a_query_lie_right_before_its_window(plan, query):
    block = plan.summed_block(query // plan.block_size)

    assert ({block} if block is not None else set()) == summed(plan, query)


def test_sums_take_the_room_of_four_bytes_a_number():
    plan = WindowPlan(16, 4, 64, compensates=True)

    assert [plan.rows(element_bytes) for element_bytes in (4, 2)] == [(16, 17), (16, 18)]
    assert WindowPlan(16, 4, 64).rows(2) == (16, 16)


@given(PLANS, LENGTHS)
def test_every_recent_token_and_every_sink_is_seen(plan, query):
    recent = set(range(max(0, query - plan.recent_tokens), query + 1))

    assert recent <= seen(plan, query)
    assert set(range(min(plan.sink_tokens, query + 1))) <= seen(plan, query)


@settings(max_examples=400, deadline=None)
@given(PLANS, batches())
def test_under_a_causal_mask_a_row_reads_what_its_queries_see(plan, batch):
    bounds = np.cumsum([0, *(end - start for start, end in batch)])
    rows = window_rows(plan, bounds, np.array([end for _, end in batch]))

    found = []
    for row, request in enumerate(rows.requests):
        first, last = rows.query_starts[row : row + 2]
        length = int(rows.lengths[row])
        tokens = [
            int(block) * plan.block_size + offset
            for block in rows.columns[row]
            for offset in range(plan.block_size)
        ][:length]
        for query in range(first, last):
            position = batch[request][0] + query - bounds[request]
            gap = set(range(position)) - seen(plan, position)
            assert len(gap) == rows.gaps[row] * plan.block_size
            visible = tokens[: length - (last - first) + (query - first) + 1]
            assert set(visible) == seen(plan, position)
            assert len(visible) == len(set(visible))
            found.append(query)
    assert found == list(range(bounds[-1]))


@given(PLANS, batches())
def test_a_row_holds_queries_of_one_block(plan, batch):
    bounds = np.cumsum([0, *(end - start for start, end in batch)])
    rows = window_rows(plan, bounds, np.array([end for _, end in batch]))

    for row, request in enumerate(rows.requests):
        first, last = rows.query_starts[row : row + 2]
        start = batch[request][0] - bounds[request]
        assert len({(start + query) // plan.block_size for query in range(first, last)}) <= 1


@settings(max_examples=300, deadline=None)
@given(PLANS, st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_blocks_that_left_are_never_needed_again_and_all_others_are(plan, chunks):
    ends = list(itertools.accumulate(chunks))
    for processed, end in zip([0, *ends], ends, strict=False):
        first, last = plan.freed(processed)
        later = range(processed, processed + 40)
        needed = set().union(*(needed_blocks(plan, query) for query in later))

        gone = set(range(first, last))
        assert not gone & needed
        assert set(range(processed // plan.block_size)) - gone <= needed
        total = -(-end // plan.block_size)
        assert plan.blocks_held(processed, end) == total - len(gone)


@given(PLANS, st.integers(1, 200), st.integers(1, 40))
def test_no_schedule_holds_more_than_the_bound(plan, length, in_flight):
    most = 0
    for processed in range(length):
        end = min(length, processed + in_flight)
        most = max(most, plan.blocks_held(processed, end))

    bound = plan.blocks_bound(length, in_flight)
    assert most <= bound <= most + 1


@given(PLANS, st.integers(1, 40))
def test_a_hit_needs_what_the_first_query_behind_it_needs(plan, num_blocks):
    sinks, first = plan.hit_needs(num_blocks)

    position = num_blocks * plan.block_size
    needed = needed_blocks(plan, position) - {num_blocks}
    # One block more where the gap begins right behind the window: its sums are never asked for.
    assert needed <= {*range(sinks), *range(first, num_blocks)}
    assert len(needed) + plan.compensates >= sinks + num_blocks - first
