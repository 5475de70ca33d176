"""Eviction inside the retrieval heads of a head plan, against the dense reference head by head."""

from dataclasses import dataclass, replace

import pytest
from reference.heads import HeadRule
from reference.tiny_model import random_prompt

from engine.cases import CASES as EVICTING
from engine.cases import LENGTHS, NUM_OUTPUTS, Case, evicting, mixed_prompts
from engine.compare import FELT, compare
from engine.compare import expected_blocks as expected_of_a_run
from engine.harness import BLOCK, Engine
from engine.test_heads import CHUNK, PLANS, Plan, another_head, check_figures, held_by
from engine.test_heads import expected_blocks as expected_of_heads

SINKS, RECENT = 4, 40


@dataclass(frozen=True)
class Row:
    """A head plan, and eviction in its retrieval heads."""

    plan: Plan
    evicts: Case

    @property
    def policy(self):
        return {**self.evicts.policy, "heads": self.plan.policy["heads"]}

    @property
    def rule(self):
        rule, labels = self.evicts.rule, self.plan.effective or self.plan.labels
        return HeadRule(**{**vars(rule), "labels": labels})


CASES = {
    "even-snapkv": Row(PLANS["even"], EVICTING["snapkv"]),
    "straddling-knorm": Row(PLANS["straddling"], evicting("knorm", recent=RECENT)),
    "straddling-random": Row(PLANS["straddling"], evicting("random", recent=RECENT)),
    "uneven-keydiff": Row(PLANS["uneven"], evicting("keydiff", recent=RECENT, keep_ratio=0.4)),
    "one-snapkv": Row(PLANS["one"], EVICTING["snapkv"]),
}
QUICK = ("even-snapkv",)  # lanes of several sizes: test_heads_stores.py
ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.full, id=name) for name in CASES
]


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def engine(row, tiny):
    engine = Engine(tiny, row.policy, num_gpu_blocks_override=30 * (1 + sum(row.plan.runs)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed(engine):
    return engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)


def check(traces, dense, row):
    for trace in traces:
        comparison = compare(trace, dense, row.rule)

        assert comparison.agrees(), (len(trace.prompt), comparison)


def check_blocks(traces, row):
    runs = row.plan.runs
    for trace in traces:
        for index, expected in enumerate(expected_of_a_run(trace, row.rule)):
            _, streaming = expected_of_heads(row.plan, *trace.chunks[index])
            held = {lane: len(held_by(trace.held[index], lane)) for lane in (*expected, "Stream")}

            wanted = {lane: runs[0] * count for lane, count in expected.items()}
            assert held == {**wanted, "Stream": streaming}, trace.chunks[index]


def test_log_probabilities_and_kept_sets_equal_the_reference(row, mixed, dense):
    check(mixed, dense, row)
    assert [len(trace.outputs) for trace in mixed] == list(NUM_OUTPUTS)
    retrieval = sum(label.count("1") for label in row.rule.labels)
    longest = mixed[LENGTHS.index(411)]
    assert [len(run) for run in longest.kept] == [retrieval]


def test_a_slightly_wrong_rule_is_noticed(row, mixed, dense):
    longest, rule = mixed[LENGTHS.index(411)], row.rule
    mistakes = {
        "no eviction": replace(rule, scorer="full"),
        "another head": replace(rule, labels=another_head(rule.labels)),
        "every head evicts": replace(rule, labels=["1111"] * 4),
        "a block less of window": replace(rule, recent=BLOCK),
    }
    for what, mistake in mistakes.items():
        assert compare(longest, dense, mistake, own=True).error > FELT, what
    assert compare(longest, dense, rule, kept=drop_first_key(longest)).error > FELT


def drop_first_key(trace):
    """The kept sets without one survivor of the first head that evicts."""
    (run,) = trace.kept
    event, layer, head = min(run)
    return [{**run, (event, layer, head): run[event, layer, head][:-1]}]


def test_blocks_held_are_the_plan_s_at_every_step(row, mixed):
    check_blocks(mixed, row)


def test_no_request_holds_more_than_explain_says(engine, mixed):
    check_figures(engine, mixed)


@pytest.mark.parametrize("chunk", [64, 512])
def test_results_do_not_depend_on_where_a_prompt_is_cut(row, engine, dense, chunk):
    prompt = random_prompt(2 * chunk + 1 if chunk < 512 else 400, seed=chunk)

    (trace,) = engine.run([prompt], 40, chunk=chunk)

    start, end = trace.last_prefill
    assert end - start == (1 if chunk < 512 else 400)
    check([trace], dense, row)


def test_preempted_requests_are_exact(row, engine, dense):
    traces = engine.run(mixed_prompts(1), NUM_OUTPUTS, chunk=CHUNK, preempt_at=range(2, 200, 5))

    assert sum(trace.preemptions for trace in traces) >= 5
    check(traces, dense, row)
    check_blocks(traces, row)


def test_a_repeated_prompt_hits_the_cache_and_evicts_anew(row, engine, dense):
    prompt = random_prompt(9 * BLOCK + 5, seed=10)
    first = engine.run([prompt], 40, chunk=CHUNK)

    second = engine.run([prompt, prompt], 40, chunk=CHUNK, arrive_at=[0, 3])

    window = row.rule.params.get("window", 1)
    hit = (len(prompt) - window) // BLOCK * BLOCK
    assert first[0].hits == [0]
    assert [trace.hits for trace in second] == [[hit], [hit]]
    check([*first, *second], dense, row)


def test_generated_tokens_are_not_shared(row, engine, dense):
    prompt = random_prompt(5 * BLOCK + 3, seed=11)
    (first,) = engine.run([prompt], 80, chunk=CHUNK)

    (second,) = engine.run([[*prompt, *first.outputs[:-1]]], 8, chunk=CHUNK)

    assert second.hits == [5 * BLOCK]
    check([second], dense, row)


def test_an_abort_returns_every_block(engine):
    traces = engine.run(mixed_prompts(2), 60, chunk=CHUNK, abort_at={3: [4], 8: [5], 40: [0, 1]})

    assert sum(len(trace.outputs) < 60 for trace in traces) == 4
