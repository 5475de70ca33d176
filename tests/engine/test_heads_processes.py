"""Head plans in engines of their own: the other runner, asynchronous scheduling, two ranks, fp8."""

from dataclasses import replace

import pytest

from engine.cases import LENGTHS, mixed_prompts
from engine.child import Job, in_child
from engine.compare import FELT, TOLERANCE, compare
from engine.test_heads import CHUNK, PLANS, check, check_blocks
from engine.test_heads_evict import CASES as EVICTING
from engine.test_heads_evict import check as check_evicting
from engine.test_heads_packed import CASES as PACKED
from engine.test_heads_stores import CASES as STORING
from engine.test_heads_stores import check as check_storing
from engine.test_packed_lane import check as check_written
from engine.test_processes import OUTPUTS, PREEMPTIONS, RUNNER, on_two_ranks

pytestmark = pytest.mark.full

# A code that falls to the other side of a tie moves a number by a step of int8.
INT8_TOLERANCE = 0.02


def job(tiny, plan, **fields):
    runs = {
        "mixed": (mixed_prompts(), OUTPUTS, {"chunk": CHUNK}),
        "forced": (mixed_prompts(4), OUTPUTS, {"chunk": CHUNK, "preempt_at": PREEMPTIONS}),
    }
    options = {"num_gpu_blocks_override": 100}
    return Job(str(tiny), runs, plan.policy, options=options, **fields)


def check_report(report, dense, plan):
    for traces in report.traces.values():
        check(traces, dense, plan)
    assert sum(trace.preemptions for trace in report.traces["forced"]) >= 3


@pytest.mark.parametrize("name", ["uneven", "straddling"])
def test_model_runner_v2(name, tiny, dense, tmp_path):
    report = in_child(job(tiny, PLANS[name], runner="v2"), tmp_path)

    assert RUNNER["v2"] in report.runner
    check_report(report, dense, PLANS[name])
    check_blocks(report.traces["mixed"], PLANS[name])


@pytest.mark.parametrize("name", ["even-int4-g32-rotated", "straddling-int8"])
def test_packed_lanes_under_model_runner_v2(name, tiny, dense, tmp_path):
    row = PACKED[name]

    report = in_child(job(tiny, row, runner="v2", rule=row.rule), tmp_path)

    assert RUNNER["v2"] in report.runner
    for traces in report.traces.values():
        check_written(traces, dense, row.rule)
        check_blocks(traces, row.plan)
    assert sum(trace.preemptions for trace in report.traces["forced"]) >= 3


@pytest.mark.parametrize(
    ("name", "asynchronous"), [("even-snapkv", False), ("straddling-knorm", True)]
)
def test_heads_that_evict_under_model_runner_v2(name, asynchronous, tiny, dense, tmp_path):
    row = EVICTING[name]

    report = in_child(job(tiny, row, runner="v2", asynchronous=asynchronous), tmp_path)

    assert RUNNER["v2"] in report.runner
    assert report.in_flight == (2 if asynchronous else 1)
    for traces in report.traces.values():
        check_evicting(traces, dense, row)
    assert sum(trace.preemptions for trace in report.traces["forced"]) >= 3
    assert sum(bool(trace.kept[0]) for trace in report.traces["mixed"]) >= 5


def test_packed_stores_of_retrieval_heads_under_model_runner_v2(tiny, dense, tmp_path):
    row = STORING["straddling-snapkv-int8"]
    one = job(tiny, row, runner="v2", asynchronous=True)
    one.options["num_gpu_blocks_override"] = 225

    report = in_child(one, tmp_path)

    assert RUNNER["v2"] in report.runner
    assert report.in_flight == 2
    for traces in report.traces.values():
        check_storing(traces, dense, row)
    assert sum(trace.preemptions for trace in report.traces["forced"]) >= 3
    assert sum(bool(trace.kept[0]) for trace in report.traces["mixed"]) >= 5


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_asynchronous_scheduling(runner, tiny, dense, tmp_path):
    report = in_child(job(tiny, PLANS["uneven"], asynchronous=True, runner=runner), tmp_path)

    assert report.scheduler == "AsyncScheduler"
    assert report.in_flight == 2
    check_report(report, dense, PLANS["uneven"])


def test_compiled(tiny, dense, tmp_path):
    one = job(tiny, PLANS["uneven"])
    one.options["enforce_eager"] = False

    check_report(in_child(one, tmp_path), dense, PLANS["uneven"])


# Two KV heads a rank. The rank with most retrieval heads sets a layer's number on both: head 2 of
# layers 0 and 3 and head 0 of layer 1 are promoted for that. 4 and 4 heads a rank are left.
SPLIT = ("1000", "0010", "0000", "1101")
SPLIT_RUNS = ("1010", "1010", "0000", "1111")
SPLIT_PLAN = replace(PLANS["uneven"], labels=SPLIT, effective=SPLIT_RUNS)


@pytest.mark.parametrize("compensated", [False, True])
def test_two_ranks_have_as_many_retrieval_heads_in_each_layer(compensated, tiny, dense, tmp_path):
    rule = replace(SPLIT_PLAN.rule, compensated=compensated)
    policy = SPLIT_PLAN.policy
    policy = {**policy, "heads": {**policy["heads"], "compensation": compensated}}

    traces = on_two_ranks(tiny, policy, tmp_path)

    for trace in traces:
        assert compare(trace, dense, rule).error <= TOLERANCE, len(trace.prompt)
    mistakes = (replace(rule, labels=SPLIT), replace(rule, compensated=not compensated))
    for wrong in mistakes:
        assert compare(traces[LENGTHS.index(411)], dense, wrong).error > FELT > TOLERANCE


def test_packed_lanes_on_two_ranks(tiny, dense, tmp_path):
    """The codes stay in the workers: a rounding near a tie may fall to the other side unseen."""
    row = replace(PACKED["straddling-int8"], plan=SPLIT_PLAN)

    traces = on_two_ranks(tiny, row.policy, tmp_path)

    for trace in traces:
        assert compare(trace, dense, row.rule).error < INT8_TOLERANCE, len(trace.prompt)
    longest = traces[LENGTHS.index(411)]
    mistakes = {**row.mistakes, "as in the policy": replace(row.rule, labels=SPLIT)}
    for what, mistake in mistakes.items():
        assert compare(longest, dense, mistake).error > 2 * INT8_TOLERANCE, what


def test_heads_that_evict_on_two_ranks(tiny, dense, tmp_path):
    row = replace(EVICTING["even-snapkv"], plan=SPLIT_PLAN)

    traces = on_two_ranks(tiny, row.policy, tmp_path)

    for trace in traces:
        assert compare(trace, dense, row.rule, own=True).agrees(), len(trace.prompt)
    wrong = replace(row.rule, labels=SPLIT)
    assert compare(traces[LENGTHS.index(411)], dense, wrong, own=True).error > FELT


def test_packed_stores_of_retrieval_heads_on_two_ranks(tiny, dense, tmp_path):
    row = replace(STORING["straddling-snapkv-int8"], plan=SPLIT_PLAN)

    traces = on_two_ranks(tiny, row.policy, tmp_path)

    for trace in traces:
        assert compare(trace, dense, row.rule, own=True).error < INT8_TOLERANCE, len(trace.prompt)
    longest = traces[LENGTHS.index(411)]
    for wrong in (replace(row.rule, labels=SPLIT), replace(row.rule, scorer="full")):
        assert compare(longest, dense, wrong, own=True).error > 2 * INT8_TOLERANCE
