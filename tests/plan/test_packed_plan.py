"""The plan of packed stores, against a request that is followed token by token."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpress import plan_rows
from vllm_kvpress.config import load_policy
from vllm_kvpress.errors import CapacityError
from vllm_kvpress.layout import PackedFormat, SideFormat
from vllm_kvpress.packed_plan import PackedPlan
from vllm_kvpress.plan import Layout
from vllm_kvpress.planner import make_plan, widest_plan
from vllm_kvpress.policies import resolve

CHUNKS = st.lists(st.integers(1, 40), max_size=6)


@st.composite
def plans(draw):
    """Random plans as `make_plan` and `check` let them pass."""
    plan = PackedPlan(
        block_size=draw(st.sampled_from([1, 2, 4, 8])),
        sink_tokens=draw(st.integers(0, 6)),
        recent_tokens=draw(st.integers(0, 9)),
        budget_tokens=None,
        keep_ratio=draw(st.one_of(st.none(), st.floats(0.01, 1.0))),
        residual_tokens=draw(st.integers(0, 20)),
        exact_sinks=draw(st.booleans()),
        group_tokens=draw(st.sampled_from([1, 1, 4, 6])),
        cell_tokens=draw(st.sampled_from([4, 8])),
        num_kv_heads=draw(st.integers(1, 3)),
        cells_per_page=draw(st.integers(1, 5)),
    )
    if plan.keep_ratio is not None and draw(st.booleans()):
        fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
        tokens = plan.least_budget + draw(st.integers(0, 20))
        return PackedPlan(**{**fields, "budget_tokens": tokens, "keep_ratio": None})
    return plan


class SlowRequest:
    """What one KV head of a request holds: positions in staging, and how the store was filled."""

    def __init__(self, plan, prompt):
        self.plan, self.prompt = plan, prompt
        size = plan.block_size
        self.sinks = -(-plan.sink_tokens // size) * size if plan.exact_sinks else 0
        self.staging: list[int] = []
        self.store: list[int] = []

    def close(self):
        """Takes closed tokens out of staging, unit by unit, and returns them."""
        unit = math.lcm(self.plan.block_size, self.plan.group_tokens)
        closed = []
        while len(self.staging) - self.sinks - self.plan.residual_tokens >= unit:
            closed += self.staging[self.sinks : self.sinks + unit]
            del self.staging[self.sinks : self.sinks + unit]
        return closed

    def step(self, start, end):
        self.staging += range(start, end)
        if end < self.prompt:
            return
        if start < self.prompt:
            # As if the step had stopped at the prompt's end.
            later = [token for token in self.staging if token >= self.prompt]
            self.staging = [token for token in self.staging if token < self.prompt]
            closed = self.close()
            if self.plan.evicts_tokens:
                room = self.plan.budget(self.prompt) - len(self.staging)
                room = room // self.plan.group_tokens * self.plan.group_tokens
                assert room >= 0
                forced = [t for t in closed if t < self.plan.sink_tokens]
                forced += [t for t in closed if t >= self.prompt - self.plan.recent_tokens]
                assert len(set(forced)) <= max(room, 0) or room >= len(closed)
                closed = closed[: max(0, room)]
            self.store += closed
            self.staging += later
        self.store += self.close()


def steps_of(prompt, outputs, chunks):
    start, total = 0, prompt + outputs
    for size in chunks:
        end = min(prompt, start + size)
        if end > start:
            yield start, end
            start = end
    if start < prompt:
        yield start, prompt
    for start in range(prompt, total):
        yield start, start + 1


def replay_of(total, chunks):
    start = 0
    for size in [*chunks, total]:
        end = min(total, start + size)
        if end > start:
            yield start, end
            start = end


def follow(plan, prompt, steps):
    request, start_layout = SlowRequest(plan, prompt), plan.layout(prompt, 0)
    assert start_layout == (0, 0, 0, 0)
    before, stored, events = plan.exact_tokens, 0, 0
    for start, end in steps:
        request.step(start, end)
        event = plan.due_event(prompt, start, end)
        if event:
            events += 1
            assert start < event <= end
            move = plan.move(prompt, start, event)
            if start < prompt:
                assert move.survivors is not None
                assert move.survivors <= move.select_end - plan.exact_tokens
                stored = move.survivors
            else:
                assert move.survivors is None
                assert move.append_start == before
            assert move.append_at == stored
            stored += move.append_end - move.append_start
            before = move.append_end
        head, first, tokens, _ = plan.layout(prompt, end)
        assert tokens == len(request.store) == stored
        size = plan.block_size
        if first:
            assert [*range(head * size), *range(first * size, end)] == request.staging
        else:
            assert request.staging == list(range(end))
        cells = -(-tokens // plan.cell_tokens) * plan.num_kv_heads
        assert plan.store_need(prompt, end) == -(-cells // plan.cells_per_page)
    return events


@settings(max_examples=400, deadline=None)
@given(plans(), st.integers(1, 90), st.integers(0, 90), CHUNKS)
def test_counts_are_those_of_a_request_followed_token_by_token(plan, prompt, outputs, chunks):
    events = follow(plan, prompt, steps_of(prompt, outputs, chunks))

    assert (events > 0) == (
        plan.layout(prompt, prompt + outputs).first_block > plan.sink_blocks * plan.exact_sinks
    )


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(1, 90), st.integers(1, 90), CHUNKS)
def test_a_replay_in_large_chunks_holds_what_the_first_run_held(plan, prompt, outputs, chunks):
    follow(plan, prompt, replay_of(prompt + outputs, chunks))


@settings(max_examples=300, deadline=None)
@given(plans(), st.lists(st.tuples(st.integers(1, 300), st.integers(0, 600)), max_size=30))
def test_vectorised_rows_equal_the_scalar_plan(plan, rows):
    prompts, starts = (np.array([row[i] for row in rows], np.int64) for i in (0, 1))

    layouts = plan_rows.layouts(plan, prompts, starts)
    due = plan_rows.may_be_due(plan, prompts, starts, starts + 1)
    until = plan_rows.steady_until(plan, prompts, starts)

    expected = [tuple(plan.layout(*row)) for row in rows]
    assert [tuple(int(x) for x in row) for row in zip(*layouts, strict=True)] == expected
    for index, (prompt, start) in enumerate(rows):
        if plan.due_event(prompt, start, start + 1):
            assert index in due
        for end in range(start, int(until[index])):
            assert plan.layout(prompt, end) == plan.layout(prompt, start)
            assert not plan.due_event(prompt, start, end)
        if start >= prompt:
            assert plan.layout(prompt, int(until[index])) != plan.layout(prompt, start)


@settings(max_examples=200, deadline=None)
@given(plans(), st.integers(1, 90))
def test_bounds_cover_every_split_of_a_length(plan, total):
    bound = -(-total // plan.block_size) + plan.store_bound(total)

    for prompt in range(1, total + 1):
        ends = range(prompt, min(total, prompt + 2) + 1)
        assert max(plan.blocks_held(prompt, end) for end in ends) <= bound


@settings(max_examples=200, deadline=None)
@given(plans(), st.integers(1, 200))
def test_the_survivors_fit_the_budget_and_leave_room_for_what_is_forced(plan, prompt):
    survivors, closed = plan.survivors(prompt), plan.closed_end(prompt)

    kept = survivors + plan.exact_tokens + prompt - closed
    assert survivors % plan.group_tokens == 0
    if plan.evicts_tokens and prompt > plan.budget(prompt):
        assert kept <= plan.budget(prompt)
        sinks = 0 if plan.exact_sinks else min(plan.sink_tokens, closed)
        recent = max(0, plan.recent_tokens - (prompt - closed))
        assert survivors >= min(sinks + recent, closed - plan.exact_tokens)
    else:
        assert kept == prompt


def test_make_plan_takes_cells_and_options_from_the_policy():
    policy = load_policy(
        {"quantize": {"keys": "kivi2", "values": "kivi2", "exact_sinks": True}, "sink_tokens": 5}
    )
    cells = PackedFormat(
        num_kv_heads=8,
        head_size=128,
        keys=SideFormat(bits=2, group=32, per_channel=True),
        values=SideFormat(bits=2, group=32),
    )
    plan = make_plan(
        policy, resolve(policy), block_size=16, cells=cells, page_bytes=16 * 8 * 128 * 4
    )

    assert isinstance(plan, PackedPlan)
    assert (plan.residual_tokens, plan.unit, plan.exact_tokens) == (128, 32, 16)
    # A cell of 32 tokens has 1024 + 512 bytes a side; 65536 bytes hold 21 of them.
    assert plan.cells_per_page == 21
    # 4096 tokens: closed up to 16 + 3936, which is 123 cells of each head.
    assert plan.store_tokens(4096, 4096) == 3936
    assert plan.store_need(4096, 4096) == -(-123 * 8 // 21)


def test_a_block_smaller_than_a_cell_is_refused():
    policy = load_policy({"quantize": {"keys": "none", "values": "none", "residual_tokens": 16}})
    cells = PackedFormat(
        num_kv_heads=1, head_size=64, keys=SideFormat(bits=16), values=SideFormat(bits=16)
    )
    plan = make_plan(policy, resolve(policy), block_size=8, cells=cells, page_bytes=8 * 64 * 4)

    with pytest.raises(CapacityError, match="smaller than one packed cell"):
        plan.check()


def on_write(block_size, **policy):
    policy = load_policy({"quantize": {"keys": "int8", "values": "int4"}, **policy})
    return make_plan(policy, resolve(policy), block_size=block_size)


def test_tokens_that_nothing_delays_are_packed_as_they_are_written_and_stay():
    plan = on_write(16)

    assert plan.packs_on_write
    assert plan.is_pure
    assert not plan.store
    for prompt, computed in ((1, 0), (40, 39), (40, 40), (40, 400), (4000, 4100)):
        assert plan.layout(prompt, computed) == Layout(0, 0)
        assert plan.due_event(prompt, computed, computed + 1) == 0
        assert plan.blocks_held(prompt, computed) == -(-computed // 16)
        arrays = np.array([prompt]), np.array([computed])
        assert [column.item() for column in plan_rows.layouts(plan, *arrays)] == [0, 0, 0, 0]
        assert plan_rows.steady_until(plan, *arrays).item() == (
            0 if computed < prompt else np.iinfo(np.int64).max
        )
    assert plan.peak_blocks(4000, 100) == plan.steady_blocks(4000, 100) == -(-4100 // 16)


def test_a_window_over_packed_tokens_is_that_over_exact_ones():
    window = {"evict": {"scorer": {"name": "position"}}, "recent_tokens": 60}
    packed, exact = on_write(16, **window), on_write(16, **window, quantize=None)

    assert packed.packs_on_write
    assert not exact.packs_on_write
    assert not packed.is_pure
    assert packed.layout(300, 400) == exact.layout(300, 400) == Layout(1, 340 // 16)


@pytest.mark.parametrize(
    "quantize",
    [
        {"keys": "kivi4", "values": "int4"},
        {"keys": "int8", "values": "int8", "residual_tokens": 1},
        {"keys": "int8", "values": "int8", "exact_sinks": True},
    ],
)
def test_tokens_wait_for_channel_groups_and_where_something_stays_exact(quantize):
    assert not on_write(16, quantize=quantize).packs_on_write


def test_tokens_beside_skipped_layers_wait():
    assert not on_write(16, layers={"skip": [0]}).packs_on_write


def test_survivors_of_a_scorer_wait():
    evict = {"scorer": {"name": "knorm"}, "budget": {"tokens": 512}}

    assert isinstance(on_write(16, evict=evict), PackedPlan)


def test_a_block_of_packed_tokens_holds_whole_cells():
    on_write(48).check()

    with pytest.raises(CapacityError, match="got --block-size 24; allowed: multiples of 16"):
        on_write(24).check()


@settings(max_examples=300, deadline=None)
@given(
    plans(),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(0, 400),
)
def test_lanes_with_one_block_table_hold_what_the_neediest_of_them_does(plan, sizes, num_tokens):
    lanes = [
        dataclasses.replace(plan, num_kv_heads=heads, cells_per_page=cells)
        for heads, cells in sizes
    ]

    shared = widest_plan(lanes)

    assert shared.pages(num_tokens) == max(lane.pages(num_tokens) for lane in lanes)


def test_a_lane_whose_page_holds_no_cell_is_refused():
    policy = load_policy("kivi2")
    plan = make_plan(policy, resolve(policy), block_size=16)
    lanes = [
        dataclasses.replace(plan, num_kv_heads=heads, cells_per_page=cells)
        for heads, cells in ((1, 0), (2, 1), (8, 3))
    ]

    with pytest.raises(CapacityError, match="smaller than one packed cell"):
        widest_plan(lanes).check()
