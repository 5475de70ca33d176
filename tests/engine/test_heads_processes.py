"""Head plans in engines of their own: the other runner, asynchronous scheduling, two ranks, fp8."""

import random
from dataclasses import replace

import pytest

from engine.cases import LENGTHS, mixed_prompts
from engine.child import Job, in_child
from engine.compare import FELT, TOLERANCE, compare
from engine.harness import Trace
from engine.test_heads import CHUNK, PLANS, check, check_blocks
from engine.test_processes import OUTPUTS, PREEMPTIONS, RUNNER, whole
from engine.workers import serve

pytestmark = pytest.mark.full


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


def test_two_ranks_have_as_many_retrieval_heads_in_each_layer(tiny, dense, tmp_path):
    plan = replace(PLANS["uneven"], labels=SPLIT, effective=SPLIT_RUNS)
    prompts = [random.Random(n).sample(range(3, 500), n) for n in LENGTHS]

    served = serve(
        tiny, prompts, 40, tmp_path, kv_policy=plan.policy, tensor_parallel_size=2,
        max_num_batched_tokens=CHUNK,
    )  # fmt: skip

    traces = [
        Trace(prompt, outputs, logprobs, whole(prompt, outputs))
        for prompt, (outputs, logprobs) in zip(prompts, served, strict=True)
    ]
    check(traces, dense, plan)
    wrong = replace(plan.rule, labels=SPLIT)
    assert compare(traces[LENGTHS.index(411)], dense, wrong).error > FELT > TOLERANCE
