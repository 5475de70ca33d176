"""Random schedules on a real engine: arrivals, chunks, preemptions, aborts, shared prefixes."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.tiny_model import random_prompt

from engine.cases import CASES
from engine.compare import compare, expected_blocks

POLICIES = ("snapkv", "knorm", "random", "streaming_llm")
# Dozens in all; `make test-full` sets more.
EXAMPLES = int(os.environ.get("KVPRESS_SCHEDULES", "8"))
SHARED = random_prompt(400, seed=77)


@st.composite
def schedules(draw):
    """Draws a schedule: what the requests are, and what happens to them."""
    count = draw(st.integers(1, 5))
    prompts = []
    for index in range(count):
        shared = draw(st.sampled_from((0, 0, 64, 130, 300)))
        own = draw(st.integers(1, 400 - shared))
        prompts.append(SHARED[:shared] + random_prompt(own, seed=draw(st.integers(0, 3)) + index))
    steps = st.integers(0, 60)
    return {
        "prompts": prompts,
        "num_outputs": draw(st.lists(st.integers(1, 40), min_size=count, max_size=count)),
        "chunk": draw(st.sampled_from((33, 64, 100, 257, 512))),
        "preempt_at": draw(st.sets(steps, max_size=6)),
        "abort_at": draw(st.dictionaries(steps, st.lists(st.integers(0, count - 1)), max_size=2)),
        "arrive_at": sorted(draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))),
    }


@pytest.fixture(scope="module", params=POLICIES)
def served(request, tiny):
    from engine.harness import Engine

    case = CASES[request.param]
    # 40 blocks: two long prompts do not fit at once, so that vLLM itself preempts and waits.
    engine = Engine(tiny, case.policy, num_gpu_blocks_override=40)
    yield engine, case
    engine.close()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(schedule=schedules())
def test_every_schedule_is_exact_and_leaves_nothing(served, dense, schedule):
    engine, case = served

    # `run` checks after each step that every block is owned as it must be, and at the end that
    # nothing is left.
    traces = engine.run(**schedule)

    aborted = {index for indices in schedule["abort_at"].values() for index in indices}
    for index, trace in enumerate(traces):
        if trace.chunks:
            held = [{lane: len(ids) for lane, ids in step.items()} for step in trace.held]
            assert held == expected_blocks(trace, case.rule)
        if index not in aborted:
            assert len(trace.outputs) == schedule["num_outputs"][index]
            assert compare(trace, dense, case.rule).agrees()
