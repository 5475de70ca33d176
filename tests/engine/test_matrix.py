"""The matrix: every row on every policy. `full` runs all; otherwise one policy of each kind."""

import pytest
from reference.dense import Rule
from reference.tiny_model import random_prompt

from engine.cases import BUDGET, CASES, LENGTHS, NUM_OUTPUTS, REPRESENTATIVE, mixed_prompts
from engine.compare import FELT, TOLERANCE, compare, drop_one_key, expected_blocks
from engine.harness import BLOCK, Engine

CHUNK = 64


def marked(name):
    return pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.full)


@pytest.fixture(scope="module", params=[marked(name) for name in CASES])
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def engine(case, tiny):
    engine = Engine(tiny, case.policy)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed(engine):
    """Eight requests of many lengths at once, in chunks."""
    return engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)


def events_of(rule, trace):
    """The events that the engine ran: one that falls due in the very last step is left out."""
    return rule.events(len(trace.prompt), 0, trace.chunks[-1][0])


def loses_tokens(rule, trace):
    if rule.scorer == "window":
        return len(trace.prompt) > 128
    return bool(events_of(rule, trace))


def check(traces, dense, rule):
    for trace in traces:
        comparison = compare(trace, dense, rule)

        assert comparison.agrees(), (len(trace.prompt), comparison)


def test_log_probabilities_and_kept_sets_equal_the_reference(case, mixed, dense):
    check(mixed, dense, case.rule)
    assert [len(trace.outputs) for trace in mixed] == list(NUM_OUTPUTS)


def test_events_took_place_when_the_rule_says(case, mixed):
    for trace in mixed:
        kept = trace.kept[0]

        assert sorted({event for event, _, _ in kept}) == events_of(case.rule, trace)
    evicted = [trace for trace in mixed if trace.kept[0]]
    assert bool(evicted) == (case.rule.scorer != "window")


def test_an_uncompressed_cache_would_say_something_else(case, mixed, dense):
    full = Rule(BLOCK)

    evicted = [trace for trace in mixed if loses_tokens(case.rule, trace)]
    felt = [compare(trace, dense, full).error > FELT for trace in evicted]

    assert len(felt) >= 4
    assert all(felt)


def test_a_slightly_wrong_rule_is_noticed(case, mixed, dense):
    trace = mixed[LENGTHS.index(300)]
    for what, rule in case.mistakes.items():
        assert not compare(trace, dense, rule, own=True).agrees(), what
        assert compare(trace, dense, rule, own=True).error > FELT, what


def test_one_dropped_key_is_noticed(case, mixed, dense):
    if case.rule.scorer == "window":
        pytest.skip("position alone decides; the window's edges are moved by one instead")
    for trace in (mixed[LENGTHS.index(300)], mixed[LENGTHS.index(411)]):
        comparison = compare(trace, dense, case.rule, kept=drop_one_key(trace))

        assert comparison.error > TOLERANCE


def test_blocks_held_are_the_plan_s_at_every_step(case, mixed):
    for trace in mixed:
        held = [{lane: len(ids) for lane, ids in step.items()} for step in trace.held]

        assert held == expected_blocks(trace, case.rule)


def test_a_plan_off_by_one_block_is_noticed(case, mixed):
    rule = case.mistakes["budget off by one block"]
    trace = mixed[LENGTHS.index(411)]

    held = [{lane: len(ids) for lane, ids in step.items()} for step in trace.held]

    assert held != expected_blocks(trace, rule)


def test_freed_blocks_are_given_to_others_while_their_first_owner_runs(case, engine, dense):
    prompts = [random_prompt(length, seed=70 + length) for length in range(400, 408)]

    traces = engine.run(prompts, 70, chunk=CHUNK, arrive_at=range(0, 120, 15))

    check(traces, dense, case.rule)
    assert reused_blocks(traces)


def reused_blocks(traces):
    """Staging blocks that one request let go and another got while the first still ran."""
    found = set()
    for first in traces:
        for index in range(1, len(first.held)):
            gone = first.held[index - 1]["StagingSpec"] - first.held[index]["StagingSpec"]
            after, end = first.steps[index], first.steps[-1]
            for other in traces:
                for step, held in zip(other.steps, other.held, strict=True):
                    if other is not first and after <= step <= end:
                        found |= gone & frozenset().union(*held.values())
    return found


@pytest.mark.parametrize("chunk", [40, 64, 100, 512])
def test_results_do_not_depend_on_where_a_prompt_is_cut(case, engine, dense, chunk):
    prompt = random_prompt(2 * chunk + 1 if chunk < 512 else 400, seed=chunk)

    (trace,) = engine.run([prompt], 40, chunk=chunk)

    start, end = trace.last_prefill
    assert end - start == (1 if chunk < 512 else 400)
    check([trace], dense, case.rule)


@pytest.mark.parametrize("length", [BUDGET - 1, BUDGET, BUDGET + 1, 4 * BLOCK, 10 * BLOCK])
def test_prompts_around_the_budget_and_on_a_block_s_edge(case, engine, dense, length):
    prompt = random_prompt(length, seed=length)

    traces = engine.run([prompt], 33, chunk=CHUNK)

    check(traces, dense, case.rule)


def test_forced_preemption_in_prefill_and_in_decode(case, engine, dense):
    prompts = mixed_prompts(seed=1)

    traces = engine.run(prompts, NUM_OUTPUTS, chunk=CHUNK, preempt_at=range(2, 200, 5))

    cuts = [(cut, len(trace.prompt)) for trace in traces for cut in preempted_at(trace)]
    assert any(cut < prompt for cut, prompt in cuts)
    assert any(cut > prompt for cut, prompt in cuts)
    check(traces, dense, case.rule)


def preempted_at(trace):
    """Where a request stood when it was preempted, in tokens."""
    pairs = zip(trace.chunks, trace.chunks[1:], strict=False)
    return [end for (_, end), (start, _) in pairs if start < end]


def test_natural_preemption(case, engine, dense):
    prompts = [random_prompt(97 + index, seed=80 + index) for index in range(16)]

    traces = engine.run(prompts, 100, chunk=512)

    again = [trace for trace in traces if trace.preemptions]
    assert again
    assert all(len(trace.outputs) == 100 for trace in traces)
    check([*again, *traces[:3]], dense, case.rule)


def test_a_resumed_prompt_that_is_cached_to_its_last_block_still_has_its_event(case, engine, dense):
    prompt = random_prompt(8 * BLOCK, seed=9)

    (trace,) = engine.run([prompt], 60, chunk=CHUNK, preempt_at=(20, 45))

    assert trace.preemptions == 2
    assert all(0 < hit < len(prompt) for hit in trace.hits[1:])
    check([trace], dense, case.rule)


def test_a_repeated_prompt_hits_the_cache_and_is_compressed_alike(case, engine, dense):
    prompt = random_prompt(9 * BLOCK, seed=10)
    first = engine.run([prompt], 40, chunk=CHUNK)

    second = engine.run([prompt, prompt], 40, chunk=CHUNK, arrive_at=[0, 3])

    assert first[0].hits == [0]
    assert all(trace.hits[0] >= len(prompt) - 2 * BLOCK for trace in second)
    check([*first, *second], dense, case.rule)


# One waits, one is in its prefill, the others generate.
ABORTS = {3: [4], 8: [5], 40: [0, 1, 6], 41: [7]}


def test_an_abort_returns_every_block(case, engine):
    prompts = mixed_prompts(seed=2)

    traces = engine.run(prompts, 60, chunk=CHUNK, abort_at=ABORTS)

    aborted = [trace for trace in traces if len(trace.outputs) < 60]
    assert len(aborted) == 6
    assert any(trace.chunks and trace.chunks[-1][1] < len(trace.prompt) for trace in aborted)
    assert any(trace.outputs for trace in aborted)


def test_a_stop_token_in_mid_block_returns_every_block(case, engine, mixed, dense):
    whole = mixed[LENGTHS.index(300)]
    token = whole.outputs[25]

    (trace,) = engine.run([whole.prompt], 64, chunk=CHUNK, stop=[token])

    assert trace.outputs == whole.outputs[: whole.outputs.index(token) + 1]
    assert (len(trace.prompt) + len(trace.outputs)) % BLOCK
