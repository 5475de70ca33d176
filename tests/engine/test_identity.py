"""Where a policy has nothing to do, it changes not one bit of what stock vLLM says."""

from dataclasses import replace

import pytest
from reference.tiny_model import random_prompt

from engine.cases import (
    BUDGET,
    CASES,
    NUM_OUTPUTS,
    REPRESENTATIVE,
    evicting,
    mixed_prompts,
    streaming,
)
from engine.child import Job, in_child
from engine.harness import BLOCK, Engine

CHUNK = 64

# Longer than its budget; its first blocks are cached for the one that follows while it runs.
COMPRESSED = random_prompt(300, seed=1)
SHARING = [*COMPRESSED[:80], *random_prompt(BUDGET - 80, seed=2)]

RUNS = {
    "mixed": (mixed_prompts(), NUM_OUTPUTS, {"chunk": CHUNK}),
    "short": ([random_prompt(n, seed=n) for n in (5, 31, 64, 70)], 20, {"chunk": CHUNK}),
    "sharing": ([COMPRESSED, SHARING], [40, 20], {"chunk": CHUNK, "arrive_at": [0, 12]}),
}

# More budget than any request has tokens.
ROOMY = [
    evicting("snapkv", recent=40, budget=600, params={"window": 32, "pool": 5}),
    evicting("random", budget=600, every=40, label="random every 40"),
    evicting("knorm", keep_ratio=1.0, label="knorm, all of the prompt"),
    evicting("keydiff", budget=600),
    evicting("value_key_norm", budget=600),
    streaming(window=600),
]


@pytest.fixture(scope="module")
def stock(tiny, tmp_path_factory):
    """What vLLM says in a process that never loads the plugin."""
    job = Job(str(tiny), RUNS, plugin=False)
    report = in_child(job, tmp_path_factory.mktemp("stock"))
    assert not report.modules
    return report.traces


def roomy(index):
    case = ROOMY[index]
    return pytest.param(case, marks=() if index < 2 else pytest.mark.full, id=case.name)


@pytest.mark.parametrize("case", [roomy(index) for index in range(len(ROOMY))])
def test_a_budget_for_all_tokens_is_bit_identical_to_stock(case, engine_of, stock):
    engine = engine_of(case.policy)

    prompts, num_outputs, further = RUNS["mixed"]
    traces = engine.run(prompts, num_outputs, **further)

    for trace, expected in zip(traces, stock["mixed"], strict=True):
        assert trace.chunks == expected.chunks
        assert trace.outputs == expected.outputs
        assert trace.logprobs == expected.logprobs


# A share of the prompt evicts from any prompt: here a budget in tokens.
WITH_BUDGET = {**CASES, "keydiff": evicting("keydiff")}


def marked(name):
    return pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.full)


@pytest.fixture(scope="module", params=[marked(name) for name in CASES])
def compressing(request, tiny):
    case = WITH_BUDGET[request.param]
    engine = Engine(tiny, case.policy)
    yield case, engine
    engine.close()


def test_prompts_within_the_budget_are_bit_identical_to_stock(compressing, stock):
    _, engine = compressing
    prompts, num_outputs, further = RUNS["short"]

    traces = engine.run(prompts, num_outputs, **further)

    assert [t.logprobs for t in traces] == [t.logprobs for t in stock["short"]]


def test_a_prefix_cached_by_a_compressed_request_is_bit_identical_to_stock(compressing, stock):
    case, engine = compressing
    prompts, num_outputs, further = RUNS["sharing"]

    first, second = engine.run(prompts, num_outputs, **further)

    stock_first, stock_second = stock["sharing"]
    assert second.hits == stock_second.hits == [2 * BLOCK]
    assert second.steps[0] > first.steps[first.chunks.index(first.last_prefill)]
    assert second.outputs == stock_second.outputs
    assert second.logprobs == stock_second.logprobs
    # The first was compressed, or the row proves nothing.
    assert (first.logprobs != stock_first.logprobs) == compresses_by_40(case)


def compresses_by_40(case):
    rule = replace(case.rule, scorer="random") if case.rule.scorer != "window" else case.rule
    return rule.scorer == "window" or bool(rule.events(300, 0, 338))
