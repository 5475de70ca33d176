"""The plan of two precisions, against prompts that are split token by token."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan.test_packed_plan import CHUNKS, plans, replay_of, steps_of
from vllm_kvpress import plan_rows
from vllm_kvpress.config import load_policy
from vllm_kvpress.demoting_plan import DemotingPlan
from vllm_kvpress.errors import CapacityError
from vllm_kvpress.layout import PackedFormat, SideFormat
from vllm_kvpress.packed_plan import PackedPlan
from vllm_kvpress.planner import make_plan, widest_plan
from vllm_kvpress.policies import resolve


@st.composite
def demoting_plans(draw):
    """Random plans that reject tokens."""
    packed = draw(plans().filter(lambda plan: plan.evicts_tokens))
    return DemotingPlan(
        **{field.name: getattr(packed, field.name) for field in fields(PackedPlan)},
        loser_group_tokens=draw(st.sampled_from([1, 4, 6])),
        loser_cell_tokens=draw(st.sampled_from([4, 8])),
        loser_cells_per_page=draw(st.integers(1, 5)),
    )


@settings(max_examples=400, deadline=None)
@given(demoting_plans(), st.integers(1, 120))
def test_every_token_of_a_prompt_is_in_one_place(plan, prompt):
    head, first, stored, demoted = plan.layout(prompt, prompt)
    size = plan.block_size

    assert head * size + stored + demoted + prompt - first * size == prompt
    assert plan.physical_tokens(prompt, prompt, prompt + 1) == prompt + 1
    assert demoted == plan.losers(prompt)
    assert demoted % plan.loser_group_tokens == 0
    assert stored % plan.group_tokens == 0


@settings(max_examples=400, deadline=None)
@given(demoting_plans(), st.integers(1, 120))
def test_the_store_exceeds_its_budget_only_by_what_fills_no_group(plan, prompt):
    closed = plan.closed_end(prompt) - plan.exact_tokens
    within = PackedPlan.survivors(plan, prompt)
    unit = math.lcm(plan.group_tokens, plan.loser_group_tokens)

    assert 0 <= plan.survivors(prompt) - within < unit
    assert plan.losers(prompt) == max(n for n in range(0, closed - within + 1, unit))


def follow(plan, prompt, steps):
    """Follows the events of a schedule; returns what was demoted."""
    stored = demoted = 0
    for start, end in steps:
        event = plan.due_event(prompt, start, end)
        if event:
            move = plan.move(prompt, start, event)
            if start < prompt:
                assert move.survivors + move.losers == move.select_end - plan.exact_tokens
                assert move.append_at == move.survivors
                stored, demoted = move.survivors, move.losers
            else:
                assert move.survivors is None
                assert move.losers == 0
            stored += move.append_end - move.append_start
        layout = plan.layout(prompt, end)
        assert (layout.store_tokens, layout.demoted_tokens) == (stored, demoted)
        cells = -(-demoted // plan.loser_cell_tokens) * plan.num_kv_heads
        assert plan.demoted_need(prompt, end) == -(-cells // plan.loser_cells_per_page)
    return demoted


@settings(max_examples=300, deadline=None)
@given(demoting_plans(), st.integers(1, 90), st.integers(0, 90), CHUNKS)
def test_losers_are_moved_once_at_the_prompts_end(plan, prompt, outputs, chunks):
    total = prompt + outputs

    first_run = follow(plan, prompt, steps_of(prompt, outputs, chunks))

    assert first_run == plan.losers(prompt)
    assert follow(plan, prompt, replay_of(total, chunks)) == first_run


@settings(max_examples=300, deadline=None)
@given(demoting_plans(), st.lists(st.tuples(st.integers(1, 300), st.integers(0, 600)), max_size=30))
def test_vectorised_rows_equal_the_scalar_plan(plan, rows):
    prompts, starts = (np.array([row[i] for row in rows], np.int64) for i in (0, 1))

    layouts = plan_rows.layouts(plan, prompts, starts)

    expected = [tuple(plan.layout(*row)) for row in rows]
    assert [tuple(int(x) for x in row) for row in zip(*layouts, strict=True)] == expected


@settings(max_examples=300, deadline=None)
@given(demoting_plans(), st.integers(1, 90))
def test_bounds_cover_every_split_of_a_length(plan, total):
    bound = -(-total // plan.block_size) + plan.store_bound(total) + plan.demoted_bound(total)

    for prompt in range(1, total + 1):
        assert plan.demoted_bound(prompt) <= plan.demoted_bound(total)
        for end in range(1, total + 1):
            assert plan.demoted_need(prompt, end) <= plan.demoted_bound(total)
        ends = range(prompt, min(total, prompt + 2) + 1)
        assert max(plan.blocks_held(prompt, end) for end in ends) <= bound


def test_figures_worked_by_hand():
    policy = load_policy(
        {
            "sink_tokens": 4,
            "recent_tokens": 64,
            "evict": {
                "scorer": {"name": "knorm"},
                "budget": {"tokens": 1000},
                "losers": "demote",
            },
            "quantize": {"keys": "int4", "values": "int4", "group": 32},
        }
    )
    int4 = SideFormat(bits=4, group=32)
    cells = PackedFormat(num_kv_heads=8, head_size=128, keys=int4, values=int4)
    losers = PackedFormat(
        num_kv_heads=8,
        head_size=128,
        keys=SideFormat(bits=2, group=32, per_channel=True),
        values=SideFormat(bits=2, group=32),
    )
    plan = make_plan(
        policy,
        resolve(policy),
        block_size=16,
        cells=cells,
        loser_cells=losers,
        page_bytes=16 * 8 * 128 * 4,
    )

    # 4010 tokens: 4000 closed, 10 open. 990 would survive; 3010 losers fill 94 groups of 32.
    assert plan.losers(4010) == 94 * 32 == 3008
    assert plan.layout(4010, 4010) == (0, 250, 992, 3008)
    # A cell of 32 losers has 3072 bytes, 21 to a block; one of 16 survivors 2560, 25 to a block.
    assert plan.demoted_need(4010, 4010) == -(-94 * 8 // 21)
    assert plan.store_need(4010, 4010) == -(-62 * 8 // 25)
    # After 20 more tokens one block more is closed.
    steady = 1 + -(-63 * 8 // 25) + -(-94 * 8 // 21)
    assert plan.steady_blocks(4010, 20) == steady


def test_a_block_smaller_than_a_cell_of_losers_is_refused():
    policy = load_policy("snapkv:losers=demote")
    form = PackedFormat(
        num_kv_heads=1, head_size=64, keys=SideFormat(bits=16), values=SideFormat(bits=16)
    )
    plan = make_plan(
        policy,
        resolve(policy),
        block_size=8,
        cells=form,
        loser_cells=form,
        page_bytes=form.cell_bytes,
    )
    plan.check()
    plan = make_plan(
        policy,
        resolve(policy),
        block_size=8,
        cells=form,
        loser_cells=PackedFormat(
            num_kv_heads=1, head_size=64, keys=SideFormat(bits=16, group=32, per_channel=True),
            values=SideFormat(bits=16),
        ),
        page_bytes=form.cell_bytes,
    )  # fmt: skip

    with pytest.raises(CapacityError, match="one packed cell of losers"):
        plan.check()


@settings(max_examples=300, deadline=None)
@given(
    demoting_plans(),
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5
    ),
    st.integers(0, 400),
)
def test_lanes_with_one_block_table_hold_what_the_neediest_does_in_each_store(
    plan, sizes, num_tokens
):
    lanes = [
        replace(plan, num_kv_heads=heads, cells_per_page=cells, loser_cells_per_page=losers)
        for heads, cells, losers in sizes
    ]

    shared = widest_plan(lanes)

    assert shared.pages(num_tokens) == max(lane.pages(num_tokens) for lane in lanes)
    needed = max(lane.demoted_bound(num_tokens) for lane in lanes)
    assert shared.demoted_bound(num_tokens) == needed
