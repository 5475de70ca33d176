"""Engines in processes of their own: both runners, both schedulers, compiled, tensor-parallel."""

import json
import random

import pytest
from reference.dense import Rule

from engine.cases import CASES, LENGTHS, mixed_prompts
from engine.child import Job, in_child
from engine.compare import FELT, TOLERANCE, compare, expected_blocks
from engine.harness import Trace
from engine.test_demoted import CASES as DEMOTED
from engine.test_packed import CASES as PACKED
from engine.test_packed_lane import CASES as WRITTEN
from engine.test_packed_lane import check as check_written
from engine.test_packed_lane import compare as compare_written
from engine.test_skipped import CASES as SKIPPED
from engine.workers import serve, write_spy

CHUNK = 64
RUNNER = {
    "v1": "vllm.v1.worker.gpu_model_runner",
    "v2": "vllm.v1.worker.gpu.model_runner",
}
FLAG = {
    "vllm.engine.arg_utils.AsyncEngineArgs.__init__",
    "vllm.engine.arg_utils.EngineArgs.__init__",
    "vllm.engine.arg_utils.EngineArgs.add_cli_args",
    "vllm.engine.arg_utils.EngineArgs.create_engine_config",
    "vllm.engine.arg_utils.EngineArgs.from_cli_args",
}
OUTPUTS = [12, 14, 34, 30, 20, 36, 12, 15]
PREEMPTIONS = (3, 9, 12, 21, 26, 31)

only_full = pytest.mark.full


def rows(*quick):
    return [pytest.param(n, marks=() if n in quick else only_full) for n in CASES]


def check(traces, dense, rule):
    for trace in traces:
        comparison = compare(trace, dense, rule)

        assert comparison.agrees(), (len(trace.prompt), comparison)


def job(tiny, case, **fields):
    # A case without an event at the prompt's end needs outputs up to its first one.
    outputs = [number + (0 if case.rule.prompt_end else case.rule.every) for number in OUTPUTS]
    runs = {
        "mixed": (mixed_prompts(), outputs, {"chunk": CHUNK}),
        "forced": (mixed_prompts(4), outputs, {"chunk": CHUNK, "preempt_at": PREEMPTIONS}),
    }
    return Job(str(tiny), runs, case.policy, **fields)


def check_report(report, dense, name):
    rule = CASES[name].rule
    check(report.traces["mixed"], dense, rule)
    check(report.traces["forced"], dense, rule)
    assert sum(trace.preemptions for trace in report.traces["forced"]) >= 3
    if rule.scorer != "window":
        assert sum(bool(trace.kept[0]) for trace in report.traces["mixed"]) >= 5


@pytest.mark.parametrize("name", rows("snapkv"))
def test_model_runner_v2(name, tiny, dense, tmp_path):
    report = in_child(job(tiny, CASES[name], runner="v2"), tmp_path)

    assert RUNNER["v2"] in report.runner
    assert RUNNER["v1"] not in report.runner
    check_report(report, dense, name)
    for trace in report.traces["mixed"]:
        held = [{lane: len(ids) for lane, ids in step.items()} for step in trace.held]
        assert held == expected_blocks(trace, CASES[name].rule)


def check_packed(report, dense, case):
    for trace in [*report.traces["mixed"], *report.traces["forced"]]:
        comparison = compare(trace, dense, case.rule)
        assert comparison.agrees(case.tolerance), (len(trace.prompt), comparison)
    assert sum(trace.preemptions for trace in report.traces["forced"]) >= 3
    longest = report.traces["mixed"][LENGTHS.index(411)]
    for what, mistake in case.mistakes.items():
        assert compare(longest, dense, mistake, own=True).error > 2 * case.tolerance, what


@pytest.mark.parametrize(
    ("name", "runner", "asynchronous"),
    [
        ("snapkv-int4", "v2", False),
        pytest.param("kivi2", "v2", True, marks=only_full),
        pytest.param("snapkv-kivi2", "v1", True, marks=only_full),
        pytest.param("none-kivi2", "v2", False, marks=only_full),
        pytest.param("snapkv-int4-kivi2", "v2", True, marks=only_full),
        pytest.param("skipped-snapkv", "v2", True, marks=only_full),
        pytest.param("skipped-kivi2", "v2", False, marks=only_full),
    ],
)
def test_packed_stores_and_skipped_layers(name, runner, asynchronous, tiny, dense, tmp_path):
    skipped = {f"skipped-{name}": case for name, case in SKIPPED.items()}
    case = {**PACKED, **DEMOTED, **skipped}[name]

    report = in_child(job(tiny, case, runner=runner, asynchronous=asynchronous), tmp_path)

    assert RUNNER[runner] in report.runner
    assert report.in_flight == (2 if asynchronous else 1)
    check_packed(report, dense, case)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("int8-int4", {"runner": "v2"}),
        pytest.param("int8", {"runner": "v2", "asynchronous": True}, marks=only_full),
        pytest.param("int8-int4", {"options": {"enforce_eager": False}}, marks=only_full),
    ],
)
def test_tokens_packed_as_they_are_written(name, fields, tiny, dense, tmp_path):
    case = WRITTEN[name]

    report = in_child(job(tiny, case, rule=case.rule, **fields), tmp_path)

    assert RUNNER[fields.get("runner", "v1")] in report.runner
    assert report.in_flight == (2 if fields.get("asynchronous") else 1)
    for traces in report.traces.values():
        check_written(traces, dense, case.rule)
    assert sum(trace.preemptions for trace in report.traces["forced"]) >= 3
    longest = report.traces["mixed"][LENGTHS.index(411)]
    for what, mistake in case.mistakes.items():
        assert compare_written(longest, dense, mistake)[0] > FELT, what


def test_the_other_tests_run_model_runner_v1(engine_of):
    runner = engine_of(CASES["knorm"].policy).runner

    modules = [kind.__module__ for kind in type(runner).__mro__]
    assert RUNNER["v1"] in modules
    assert RUNNER["v2"] not in modules


@pytest.mark.full
@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("name", list(CASES))
def test_asynchronous_scheduling(name, runner, tiny, dense, tmp_path):
    report = in_child(job(tiny, CASES[name], asynchronous=True, runner=runner), tmp_path)

    assert RUNNER[runner] in report.runner
    assert report.scheduler == "AsyncScheduler"
    assert report.in_flight == 2
    check_report(report, dense, name)


@pytest.mark.full
@pytest.mark.parametrize("name", ["snapkv", "knorm", "streaming_llm"])
def test_compiled(name, tiny, dense, tmp_path):
    report = in_child(job(tiny, CASES[name], options={"enforce_eager": False}), tmp_path)

    check_report(report, dense, name)


# Roundings near a tie differ between ranks' kernels and the reference, here by a step, unseen.
PARALLEL = [
    *((case, TOLERANCE, name) for name, case in CASES.items()),
    *((PACKED[name], PACKED[name].tolerance, name) for name in ("kivi2", "snapkv-none")),
    (DEMOTED["snapkv-int4-kivi2"], DEMOTED["snapkv-int4-kivi2"].tolerance, "snapkv-int4-kivi2"),
    *((SKIPPED[name], SKIPPED[name].tolerance, f"skipped-{name}") for name in ("snapkv", "kivi2")),
    (WRITTEN["int8-int4"], 0.05, "int8-int4"),
    (WRITTEN["streaming-int4"], 0.1, "streaming-int4"),
]


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        pytest.param(case, tolerance, marks=() if name == "int8-int4" else only_full, id=name)
        for case, tolerance, name in PARALLEL
    ],
)
def test_tensor_parallel(case, tolerance, tiny, dense, tmp_path):
    write_spy(tmp_path)

    traces = on_two_ranks(tiny, case.policy, tmp_path)

    workers = [one for one in seen(tmp_path) if "Worker" in one["name"]]
    assert len(workers) == 2
    assert all(RUNNER["v1"] + ".GPUModelRunner.initialize_kv_cache" in w["ours"] for w in workers)
    longest = LENGTHS.index(411)
    for index, trace in enumerate(traces):
        assert compare(trace, dense, case.rule, own=True).agrees(tolerance), len(trace.prompt)
        if index == longest:
            assert compare(trace, dense, Rule(32), own=True).error > 2 * tolerance


def on_two_ranks(tiny, policy, folder):
    """Traces of requests served by two ranks; which tokens they keep is for them to know."""
    # No token twice: equal tokens have equal scores in layer 0 under a norm, and which of them a
    # rank keeps is for its rounding to say, unseen from here.
    prompts = [random.Random(n).sample(range(3, 500), n) for n in LENGTHS]
    served = serve(
        tiny, prompts, 40, folder, kv_policy=policy, tensor_parallel_size=2,
        max_num_batched_tokens=CHUNK,
    )  # fmt: skip
    return [
        Trace(prompt, outputs, logprobs, whole(prompt, outputs))
        for prompt, (outputs, logprobs) in zip(prompts, served, strict=True)
    ]


def whole(prompt, outputs):
    """Chunks: where a prompt is cut makes no difference."""
    length = len(prompt)
    return [(0, length), *((i, i + 1) for i in range(length, length + len(outputs) - 1))]


def test_without_a_policy_every_process_runs_vllm_s_own_functions(tiny, tmp_path):
    write_spy(tmp_path)

    serve(tiny, [[5, 6, 7]], 2, tmp_path)

    processes = seen(tmp_path)
    assert len(processes) >= 3
    for role in ("MainProcess", "EngineCore", "Worker"):
        assert any(role in one["name"] for one in processes), role
    for one in processes:
        assert set(one["patched"]) == FLAG, one
        assert one["ours"] == [], one


def seen(folder):
    return [json.loads(file.read_text()) for file in folder.glob("*.seen.json")]
