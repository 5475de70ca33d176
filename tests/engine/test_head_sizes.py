"""Packed cells of heads that are no power of two, or larger than the other tests' 64 channels."""

import pytest
from reference.dense import DenseLlama
from reference.tiny_model import random_llama, random_prompt

from engine.compare import compare
from engine.recording import RecordingEngine
from engine.test_packed import CASES as STORED
from engine.test_packed import expected_blocks
from engine.test_packed_lane import CASES as WRITTEN
from engine.test_packed_lane import check

LENGTHS = (300, 129, 70)
OUTPUTS = 40
SIZES = [80, *(pytest.param(size, marks=pytest.mark.full) for size in (96, 128))]


@pytest.fixture(scope="module", params=SIZES)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / f"heads-{request.param}"
    shape = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": request.param}
    return random_llama(path, max_positions=512, **shape)


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(length, seed=500 + length) for length in LENGTHS]


def test_tokens_packed_as_they_are_written(model, prompts):
    case, dense = WRITTEN["int4-g32-rotated"], DenseLlama(model)
    engine = RecordingEngine(model, case.policy, case.rule)

    traces = engine.run(prompts, OUTPUTS, chunk=64)

    check(traces, dense, case.rule)
    pages = engine.layers[0].kv_cache
    token_bytes = case.token_bytes(dense.head_dim)
    assert pages.nbytes == len(pages) * 32 * dense.num_kv_heads * token_bytes
    engine.close()


@pytest.mark.parametrize("name", ["kivi2", pytest.param("snapkv-int4", marks=pytest.mark.full)])
def test_packed_stores(name, model, prompts, engine_of):
    case, dense = STORED[name], DenseLlama(model)

    traces = engine_of(case.policy, model).run(prompts, OUTPUTS, chunk=64)

    for trace in traces:
        assert compare(trace, dense, case.rule).agrees(case.tolerance), len(trace.prompt)
        held = [
            {lane: len(step[lane]) for lane in ("StagingSpec", "StoreSpec")} for step in trace.held
        ]
        assert held == expected_blocks(trace, case.rule, (dense.num_kv_heads, dense.head_dim, 4))
    wrong = case.mistakes["not rounded"]
    assert compare(traces[0], dense, wrong, own=True).error > 2 * case.tolerance
