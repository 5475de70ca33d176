"""Packed stores by kernel, in Triton's interpreter: the engine against the dense reference."""

from dataclasses import replace

import pytest
from reference.dense import DenseLlama
from reference.tiny_model import random_llama, random_prompt

from engine.compare import FELT, compare
from engine.harness import BLOCK
from engine.kernels import run_by_kernel
from engine.recording import RecordingEngine
from engine.test_demoted import CASES as DEMOTED
from engine.test_heads import Plan
from engine.test_heads_packed import Row
from engine.test_heads_stores import Row as Stored
from engine.test_packed import CASES as PACKED
from engine.test_packed_lane import CASES as LANES
from engine.test_packed_lane import check
from engine.test_packed_lane import compare as compare_written

CHUNK = 64
# Two tokens before a block closes, beyond the budget and KIVI's residual; in mid-block, read while
# the first one decodes; and too short to pack anything.
LENGTHS, NUM_OUTPUTS, ARRIVALS = (254, 141, 37), (9, 5, 3), (0, 2, 5)
CASES = {**PACKED, **DEMOTED}
FAST = ("kivi2", "snapkv-int4")
ROWS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.full, id=name)
    for name in (*PACKED, "snapkv-int4-kivi2", "knorm-kivi4-int4")
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of two layers: interpreted programs take milliseconds each."""
    path = tmp_path_factory.mktemp("small") / "model"
    return random_llama(path, layers=2, heads=4, kv_heads=2, max_positions=512)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.parametrize("name", ROWS)
def test_the_engine_equals_the_reference(name, engine_of, small, monkeypatch):
    launches = run_by_kernel(monkeypatch)
    one = CASES[name]
    engine = engine_of(one.policy, model=small)
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]

    traces = engine.run(prompts, NUM_OUTPUTS, chunk=CHUNK, arrive_at=ARRIVALS)

    model = DenseLlama(small)
    assert launches["compact"] >= 2 * 2
    assert (launches["window_scores"] >= 2 * 2) == name.startswith("snapkv")
    assert launches["paged_attention"] >= 2 * (max(NUM_OUTPUTS) - 1)
    decoding = {
        step
        for step, (start, _) in zip(traces[0].steps, traces[0].chunks, strict=True)
        if start >= LENGTHS[0]
    }
    assert decoding & {
        step
        for step, (start, end) in zip(traces[1].steps, traces[1].chunks, strict=True)
        if end - start > 1
    }
    for trace in traces:
        comparison = compare(trace, model, one.rule)
        assert comparison.agrees(one.tolerance), (len(trace.prompt), comparison)
    for what, mistake in one.mistakes.items():
        error = compare(traces[0], model, mistake, own=True).error
        assert error > 2 * one.tolerance, what


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.full  # packed lanes of a head plan, below, are the same lanes
@pytest.mark.parametrize("name", ["int4-g32-rotated", "streaming-int8"])
def test_tokens_packed_as_they_are_written_equal_the_reference(name, small, monkeypatch):
    launches = run_by_kernel(monkeypatch)
    one = LANES[name]
    prompts = [random_prompt(length, seed=length) for length in (97, 37)]
    engine = RecordingEngine(small, one.policy, one.rule)

    traces = engine.run(prompts, [5, 3], chunk=CHUNK, arrive_at=(0, 2))

    engine.close()
    steps = {step for trace in traces for step in trace.steps}
    assert launches["quantize_on_write"] == launches["paged_attention"] == 2 * len(steps)
    model = DenseLlama(small)
    check(traces, model, one.rule)
    mistake = one.mistakes["own chunk read exactly"]
    assert compare_written(traces[0], model, mistake)[0] > FELT


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
def test_packed_lanes_of_a_head_plan_equal_the_reference(small, monkeypatch):
    launches = run_by_kernel(monkeypatch)
    one = Row(Plan(("10", "01"), (1, 1)), LANES["int4-g32-rotated"])
    prompts = [random_prompt(length, seed=length) for length in (97, 20)]
    engine = RecordingEngine(small, one.policy, one.rule, num_gpu_blocks_override=100)

    traces = engine.run(prompts, [3, 2], chunk=CHUNK, arrive_at=(0, 2))

    assert [len(engine.stored(layer)) for layer in engine.layers] == [2, 2]
    engine.close()
    steps = {step for trace in traces for step in trace.steps}
    assert launches["quantize_on_write"] == launches["paged_attention"] == 4 * len(steps)
    model = DenseLlama(small)
    check(traces, model, one.rule)
    assert compare_written(traces[0], model, replace(one.rule, recent=BLOCK))[0] > FELT


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.full  # other rows run the same kernels over the same lanes, each half
def test_stores_of_a_head_plan_equal_the_reference(small, engine_of, monkeypatch):
    launches = run_by_kernel(monkeypatch)
    one = Stored(Plan(("10", "01"), (1, 1)), PACKED["snapkv-int4"], (1,))
    engine = engine_of(one.policy, model=small, num_gpu_blocks_override=100)

    (trace,) = engine.run([random_prompt(254, seed=254)], 9, chunk=CHUNK)

    # A lane of retrieval heads in each layer: survivors, and a block that closes as it generates.
    assert launches["compact"] == 2 * 2
    assert launches["window_scores"] == 2
    assert launches["paged_attention"] == 2 * 8
    model, rule, tolerance = DenseLlama(small), one.rule, one.tolerance
    assert compare(trace, model, rule).agrees(tolerance)
    for wrong in ({"bits": (0, 0)}, {"budget": rule.budget + 32}, {"labels": ("11", "11")}):
        assert compare(trace, model, replace(rule, **wrong), own=True).error > 2 * tolerance, wrong
