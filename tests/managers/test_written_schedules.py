"""Random schedules of a staging lane that is packed as it is written: alone, and with a window.

A packed token reads back as what it was written, so the worker's memory is that of exact blocks.
What differs is who may share: with nothing dropped a generated token is a function of the tokens
before it, and its blocks are hit by any request with the same.
"""

from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from plan.simulation import plans

from managers.scheduler import Simulation, sizing
from managers.test_schedules import LONGEST, REQUESTS, STEPS, play, play_alone
from vllm_kvpress.plan import RetentionPlan

TOTALS: Counter[str] = Counter()


def alone(size):
    """int8 or int4 without eviction."""
    return RetentionPlan(size, 0, 0, None, None, store=False, packs_on_write=True)


WINDOWED = plans(stores=(False,)).map(lambda plan: replace(plan, packs_on_write=True))
PLANS = st.one_of(st.sampled_from([1, 2, 3, 4, 8]).map(alone), WINDOWED)
SCHEDULES = st.tuples(
    PLANS, REQUESTS, STEPS, st.integers(0, 12), st.booleans(), st.sampled_from([0, 1]),
    st.booleans(),
)  # fmt: skip


def play_one(plan, requests, steps, spare, caching, in_flight, by_priority):
    simulation = Simulation(
        plan,
        1 + sizing(plan, LONGEST) + spare,
        LONGEST,
        caching=caching,
        in_flight=in_flight,
        by_priority=by_priority,
    )

    play(simulation, requests, steps)

    TOTALS.update(simulation.counts)


@settings(max_examples=200)
@given(SCHEDULES)
def test_random_schedules(schedule):
    play_one(*schedule)


@pytest.mark.full
@settings(max_examples=3000)
@given(SCHEDULES)
def test_many_random_schedules(schedule):
    play_one(*schedule)


def test_the_schedules_above_met_every_case():
    if not TOTALS:
        pytest.skip("runs after test_random_schedules")
    for case in ("finished", "preemptions", "aborts", "hits"):
        assert TOTALS[case] >= 10, (case, TOTALS)


@pytest.mark.parametrize(
    ("plan", "hits"),
    [
        pytest.param(alone(4), 20, id="alone"),
        pytest.param(
            RetentionPlan(4, 0, 5, 5, None, store=False, packs_on_write=True), 8, id="windowed"
        ),
    ],
)
def test_generated_blocks_are_hit_unless_something_is_dropped(plan, hits):
    """The second prompt goes on where the first one's answer ended."""
    simulation = Simulation(plan, 40, LONGEST)

    play(simulation, [(0, 8, 14, 0), (0, 24, 2, 30)], [(100, 100, "", 0)])

    assert simulation.counts["finished"] == 2
    assert simulation.counts["hit tokens"] == hits


@settings(max_examples=100)
@given(
    PLANS, st.integers(1, 40), st.integers(0, 15), st.sampled_from([1, 3, 7, 100]),
    st.lists(st.integers(1, 40), max_size=4), st.sampled_from([0, 1]), st.booleans(),
)  # fmt: skip
def test_a_request_alone_in_the_least_pool_ends(
    plan, prompt, more, chunk, preempt_at, in_flight, caching
):
    outputs = 1 + more
    pool = 1 + sizing(plan, prompt + outputs)
    simulation = Simulation(plan, pool, prompt + outputs, caching=caching, in_flight=in_flight)

    play_alone(simulation, prompt, outputs, chunk, preempt_at)

    assert simulation.counts["finished"] == 1
    assert simulation.counts["refused"] == 0
