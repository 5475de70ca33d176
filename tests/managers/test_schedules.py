"""Random schedules over vLLM's own block pool, managers and prefix cache."""

from collections import Counter

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from plan.simulation import plans

from managers.scheduler import STREAMS, Simulation, new_request, sizing

LONGEST = 48
TOTALS: Counter[str] = Counter()

REQUESTS = st.lists(
    st.tuples(
        st.integers(0, STREAMS - 1),
        st.integers(1, 32),
        st.integers(1, LONGEST - 32),
        st.integers(0, 12),  # the step of its arrival
    ),
    min_size=1,
    max_size=6,
)
# Per step: token budget, longest chunk, and what happens to which request before it.
STEPS = st.lists(
    st.tuples(
        st.sampled_from([3, 8, 20, 64]),
        st.sampled_from([1, 2, 5, 16, 64]),
        st.sampled_from(["", "", "", "", "preempt", "abort"]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=30,
)


def play(simulation, requests, steps):
    """Plays a schedule to its end; every request finishes unless it is aborted."""
    waiting = sorted(
        (arrival, f"r{number}", stream, prompt, outputs)
        for number, (stream, prompt, outputs, arrival) in enumerate(requests)
    )
    time, limit = 0, 3000
    while waiting or not simulation.idle:
        while waiting and waiting[0][0] <= time:
            _, name, stream, prompt, outputs = waiting.pop(0)
            request = new_request(name, stream, prompt, outputs, simulation.plan.block_size)
            request.arrival_time = float(name[1:])
            simulation.waiting.append(request)
        # Once the script is over, the last line without its mishap repeats.
        budget, chunk, mishap, who = steps[min(time, len(steps) - 1)]
        if time < len(steps):
            happen(simulation, mishap, who)
        simulation.step(budget, chunk)
        time += 1
        assert time < limit, "the schedule does not end: a request is never admitted again"


def play_alone(simulation, prompt, outputs, chunk, preempt_at, budget=100):
    """Plays one request to its end, which is preempted before the steps of these numbers."""
    steps = [
        (budget, chunk, "preempt" if time in preempt_at else "", 0)
        for time in range(max(preempt_at, default=0) + 1)
    ]
    play(simulation, [(0, prompt, outputs, 0)], steps)
    simulation.check_nothing_is_left()


def happen(simulation, mishap, who):
    if mishap == "preempt" and simulation.running:
        simulation.preempt(simulation.running[who % len(simulation.running)])
    everyone = simulation.running + simulation.waiting
    if mishap == "abort" and everyone:
        simulation.abort(everyone[who % len(everyone)])


@settings(max_examples=1500, deadline=None)
@given(
    plans(),
    REQUESTS,
    STEPS,
    st.integers(0, 12),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_random_schedules(plan, requests, steps, spare, caching, in_flight, by_priority):
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
    TOTALS.update(simulation.worker.counts)


def test_the_schedules_above_met_every_case():
    if not TOTALS:
        pytest.skip("runs after test_random_schedules")
    for case in ("finished", "preemptions", "aborts", "hits", "refused", "events", "stale"):
        assert TOTALS[case] >= 20, (case, TOTALS)
    assert TOTALS["scheduled then preempted"] >= 3, TOTALS


@settings(max_examples=300, deadline=None)
@given(
    plans(),
    st.integers(1, 40),
    st.integers(0, 15),
    st.sampled_from([1, 3, 7, 100]),
    st.lists(st.integers(1, 40), max_size=4),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_a_request_alone_in_the_least_pool_ends(
    plan, prompt, more, chunk, preempt_at, in_flight, caching
):
    """The admission gate and start-up sizing use one figure: no request waits for ever."""
    outputs = 1 + more
    pool = 1 + sizing(plan, prompt + outputs)
    simulation = Simulation(plan, pool, prompt + outputs, caching=caching, in_flight=in_flight)

    play_alone(simulation, prompt, outputs, chunk, preempt_at)

    assert simulation.counts["finished"] == 1
    assert simulation.counts["refused"] == 0
