"""`streaming_llm` with `prefill: windowed`: the prompt's own queries see sinks and a window, too.

One engine whose pool could not hold the longest prompts in full.
"""

from dataclasses import replace

import pytest
from reference.dense import Rule
from reference.heads import HeadRule
from reference.tiny_model import random_prompt

from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import FELT, TOLERANCE, compare
from engine.harness import BLOCK, Engine

CHUNK = 64
POOL = 12
POLICY = {
    "base": "streaming_llm",
    "recent_tokens": 16,
    "evict": {"scorer": {"prefill": "windowed"}, "budget": {"tokens": 44}},
}
# 44 tokens: a block of sinks, and 40 recent ones in two blocks before the query's own.
RULE = HeadRule(BLOCK, sinks=4, recent=40, labels=("0000",) * 4)
MOST_BLOCKS = 1 + 2 + 1 + CHUNK // BLOCK


@pytest.fixture(scope="module")
def engine(tiny):
    engine = Engine(tiny, POLICY, num_gpu_blocks_override=POOL, max_num_batched_tokens=CHUNK)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed(engine):
    return engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)


def check(traces, dense):
    for trace in traces:
        assert compare(trace, dense, RULE).error <= TOLERANCE, len(trace.prompt)


def test_every_query_sees_sinks_and_window_alone(mixed, dense):
    check(mixed, dense)
    assert [len(trace.outputs) for trace in mixed] == list(NUM_OUTPUTS)


def test_another_window_and_an_exact_prefill_are_noticed(mixed, dense):
    longest = mixed[LENGTHS.index(411)]
    mistakes = (
        replace(RULE, recent=65),
        replace(RULE, recent=BLOCK),
        replace(RULE, sinks=0),
        Rule(BLOCK, "window", sinks=4, recent=40),
    )
    for mistake in mistakes:
        assert compare(longest, dense, mistake).error > FELT, mistake


def test_a_prompt_longer_than_the_pool_runs_without_preemption(engine, dense):
    (trace,) = engine.run([random_prompt(450, seed=3)], 50, chunk=CHUNK)

    assert len(trace.prompt) > (POOL - 1) * BLOCK
    assert trace.preemptions == 0
    check([trace], dense)


def test_blocks_do_not_grow_with_the_prompt(engine):
    most = []
    for length in (200, 300, 400, 490):
        (trace,) = engine.run([random_prompt(length, seed=length)], 4, chunk=CHUNK)
        most.append(max(len(frozenset().union(*step.values())) for step in trace.held))

    assert len(set(most)) == 1
    assert most[0] <= MOST_BLOCKS


@pytest.mark.parametrize("chunk", [33, 50])
def test_results_do_not_depend_on_where_a_prompt_is_cut(engine, dense, chunk):
    (trace,) = engine.run([random_prompt(4 * chunk + 1, seed=chunk)], 40, chunk=chunk)

    start, end = trace.last_prefill
    assert end - start == 1
    check([trace], dense)


def test_a_repeated_prompt_hits_the_cache(engine, dense):
    prompt = random_prompt(8 * BLOCK + 5, seed=10)

    (first,) = engine.run([prompt], 20, chunk=CHUNK)
    (second,) = engine.run([prompt], 20, chunk=CHUNK)

    assert (first.hits, second.hits) == ([0], [8 * BLOCK])
    check([first, second], dense)


def test_forced_preemption_in_prefill_and_in_decode(engine, dense):
    traces = engine.run(mixed_prompts(1), NUM_OUTPUTS, chunk=CHUNK, preempt_at=range(2, 200, 5))

    cuts = [
        end < len(trace.prompt)
        for trace in traces
        for (_, end), (start, _) in zip(trace.chunks, trace.chunks[1:], strict=False)
        if start < end
    ]
    assert set(cuts) == {True, False}
    check(traces, dense)
