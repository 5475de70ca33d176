"""Random schedules of head plans whose retrieval heads have stores, over vLLM's own managers."""

from collections import Counter

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from plan.simulation import plans
from plan.test_packed_plan import plans as packed_plans

from managers.heads_evicting import EvictingHeads, EvictingHeadSimulation, least_pool_of
from managers.test_head_schedules import BUDGET, STEPS
from managers.test_schedules import LONGEST, REQUESTS, play, play_alone

TOTALS: Counter[str] = Counter()
PLANS = st.one_of(plans(stores=(True,)), packed_plans())
RUNS = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)])


def heads(retention, runs, in_flight):
    return EvictingHeads(retention, *runs, in_flight_tokens=BUDGET * (1 + in_flight))


@settings(max_examples=200, deadline=None)
@given(
    PLANS,
    RUNS,
    REQUESTS,
    STEPS,
    st.integers(0, 12),
    st.booleans(),
    st.sampled_from([0, 1]),
)
def test_random_schedules(retention, runs, requests, steps, spare, caching, in_flight):
    plan = heads(retention, runs, in_flight)
    pool = 1 + least_pool_of(plan, LONGEST) + spare
    simulation = EvictingHeadSimulation(plan, pool, LONGEST, caching=caching, in_flight=in_flight)

    play(simulation, requests, steps)

    TOTALS.update(simulation.counts)
    TOTALS.update(simulation.worker.counts)


def test_the_schedules_above_met_every_case():
    if not TOTALS:
        pytest.skip("runs after test_random_schedules")
    for case in ("finished", "preemptions", "aborts", "hits", "refused", "events", "stale"):
        assert TOTALS[case] >= 10, (case, TOTALS)


@settings(max_examples=100, deadline=None)
@given(
    PLANS,
    RUNS,
    st.integers(1, 40),
    st.integers(1, 16),
    st.sampled_from([1, 3, 7, 100]),
    st.lists(st.integers(1, 40), max_size=3),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_a_request_alone_in_the_least_pool_ends(
    retention, runs, prompt, outputs, chunk, preempt_at, in_flight, caching
):
    """The admission gate and start-up sizing use one figure: no request waits for ever."""
    plan = heads(retention, runs, in_flight)
    pool = 1 + least_pool_of(plan, prompt + outputs)
    simulation = EvictingHeadSimulation(
        plan, pool, prompt + outputs, caching=caching, in_flight=in_flight
    )

    play_alone(simulation, prompt, outputs, chunk, preempt_at, budget=BUDGET)

    assert simulation.counts["finished"] == 1
    assert simulation.counts["refused"] == 0
