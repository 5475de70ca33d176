"""Random schedules of head plans over vLLM's own block pool, managers and prefix cache."""

from collections import Counter

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st

from managers.heads import Heads, HeadSimulation, least_pool
from managers.test_schedules import LONGEST, REQUESTS, play, play_alone
from vllm_kvpress.window_plan import WindowPlan

TOTALS: Counter[str] = Counter()
BUDGET = 8  # the most tokens of a step

STEPS = st.lists(
    st.tuples(
        st.sampled_from([3, 5, BUDGET]),
        st.sampled_from([1, 2, 5, BUDGET]),
        st.sampled_from(["", "", "", "", "preempt", "abort"]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=30,
)
WINDOWS = st.builds(
    WindowPlan, st.sampled_from([1, 2, 4]), st.integers(0, 6), st.integers(1, 9), st.booleans()
)
RUNS = st.sampled_from([(1, 1), (1, 2), (0, 1), (0, 2), (2, 1)])


def heads(window, runs, in_flight):
    return Heads(window, *runs, in_flight_tokens=BUDGET * (1 + in_flight))


@settings(max_examples=500, deadline=None)
@given(WINDOWS, RUNS, REQUESTS, STEPS, st.integers(0, 12), st.booleans(), st.sampled_from([0, 1]))
def test_random_schedules(window, runs, requests, steps, spare, caching, in_flight):
    plan = heads(window, runs, in_flight)
    pool = 1 + least_pool(plan, LONGEST) + spare
    simulation = HeadSimulation(plan, pool, LONGEST, caching=caching, in_flight=in_flight)

    play(simulation, requests, steps)

    TOTALS.update(simulation.counts)


def test_the_schedules_above_met_every_case():
    if not TOTALS:
        pytest.skip("runs after test_random_schedules")
    for case in ("finished", "preemptions", "aborts", "hits", "refused"):
        assert TOTALS[case] >= 20, (case, TOTALS)


@settings(max_examples=150, deadline=None)
@given(
    WINDOWS,
    RUNS,
    st.integers(1, 60),
    st.integers(1, 16),
    st.sampled_from([1, 3, 7, 100]),
    st.lists(st.integers(1, 40), max_size=3),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_a_request_alone_in_the_least_pool_ends(
    window, runs, prompt, outputs, chunk, preempt_at, in_flight, caching
):
    """The admission gate and start-up sizing use one figure: no request waits for ever."""
    plan = heads(window, runs, in_flight)
    pool = 1 + least_pool(plan, prompt + outputs)
    simulation = HeadSimulation(plan, pool, prompt + outputs, caching=caching, in_flight=in_flight)

    play_alone(simulation, prompt, outputs, chunk, preempt_at, budget=BUDGET)

    assert simulation.counts["finished"] == 1
    assert simulation.counts["refused"] == 0
