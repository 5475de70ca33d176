"""Random schedules of plans with packed stores, of one precision and of two."""

from collections import Counter

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from plan.test_demoting_plan import demoting_plans
from plan.test_packed_plan import plans

from managers.packed_worker import PackedWorker
from managers.scheduler import Simulation, sizing
from managers.test_schedules import LONGEST, REQUESTS, STEPS, play, play_alone
from vllm_kvpress.packed_plan import PackedPlan

TOTALS: Counter[str] = Counter()
PLANS = st.one_of(plans(), demoting_plans())


def simulation_of(plan, spare, longest, **options):
    simulation = Simulation(plan, 1 + sizing(plan, longest) + spare, longest, **options)
    simulation.worker = PackedWorker(plan, simulation.owned)
    return simulation


@settings(max_examples=400, deadline=None)
@given(
    PLANS, REQUESTS, STEPS, st.integers(0, 12), st.booleans(), st.sampled_from([0, 1]),
    st.booleans(),
)  # fmt: skip
def test_random_schedules(plan, requests, steps, spare, caching, in_flight, by_priority):
    simulation = simulation_of(
        plan, spare, LONGEST, caching=caching, in_flight=in_flight, by_priority=by_priority
    )

    play(simulation, requests, steps)

    TOTALS.update(simulation.counts)
    TOTALS.update(simulation.worker.counts)


def test_the_schedules_above_met_every_case():
    if not TOTALS:
        pytest.skip("runs after test_random_schedules")
    for case in ("finished", "preemptions", "aborts", "hits", "events", "stale"):
        assert TOTALS[case] >= 10, (case, TOTALS)


@settings(max_examples=200, deadline=None)
@given(
    PLANS, st.integers(1, 40), st.integers(0, 40), st.sampled_from([1, 3, 7, 100]),
    st.lists(st.integers(1, 60), max_size=4), st.sampled_from([0, 1]), st.booleans(),
)  # fmt: skip
def test_a_request_alone_in_the_least_pool_ends(
    plan, prompt, more, chunk, preempt_at, in_flight, caching
):
    """Prompt and outputs of a preempted request are computed as one chunk: the store holds most."""
    outputs = 1 + more
    simulation = simulation_of(plan, 0, prompt + outputs, caching=caching, in_flight=in_flight)

    play_alone(simulation, prompt, outputs, chunk, preempt_at)

    assert simulation.counts["finished"] == 1


def test_a_short_prompt_with_a_long_answer_is_computed_again_in_the_least_pool():
    """The replay holds all of it exactly, and all that has closed since in the store."""
    plan = PackedPlan(
        4, 0, 3, 12, None, residual_tokens=3, group_tokens=4, cell_tokens=8, num_kv_heads=3
    )
    simulation = simulation_of(plan, 0, 80)
    steps = [(100, 100, "", 0)] * 65 + [(100, 100, "preempt", 0)]

    play(simulation, [(0, 9, 71, 0)], steps)

    assert simulation.counts["preemptions"] >= 1
    assert simulation.counts["finished"] == 1
