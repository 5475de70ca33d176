"""Evicting policies over vLLM's own 8-bit cache: tokens are quantized once, as they are written.

A rounding that falls on the other side in the engine than in the reference moves an element by a
whole step of fp8, so log-probabilities agree to some hundredths here; what a slightly wrong rule
moves them by is a hundred times that. That survivors are moved as they are is checked to the byte.
"""

import pytest
import torch
from reference.dense import DenseLlama

from engine.cases import CASES, LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import compare, expected_blocks

CHUNK = 64
DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
TOLERANCE = 0.1
# Distance from the cut, in standard deviations of the scores, within which a rounding may decide.
NEAR = 0.3
FELT = 1.0
FP8 = {"keys": "fp8", "values": "fp8"}


def full(name, cache):
    return pytest.param(name, cache, marks=pytest.mark.full)


def watch_bytes(engine):
    """Returns a list that fills with (are the store's bytes those of the kept tokens) per event."""
    events = engine.runtime.events
    seen, observe = [], events.observer

    def observer(event, layer_idx, kept):
        observe(event, layer_idx, kept)
        if event.before.first_block:  # staging alone holds what was observed
            return
        pages = events.layers[layer_idx].pages
        size = events.plan.block_size
        staging = events.page_map.read(pages, event.staging[: -(-event.event // size)].long())
        store = event.tables["kv_store"][: kept.shape[1] // size].long()
        index = kept[:, :, None].expand(-1, -1, events.page_map.head_dim)
        moved = zip(staging, events.page_map.read(pages, store), strict=True)
        seen.append(all(torch.equal(old.gather(1, index), new) for old, new in moved))

    events.observer = observer
    return seen


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("snapkv", "fp8"),
        full("knorm", "fp8_e5m2"),
        full("streaming_llm", "fp8"),
        full("random", "fp8"),
        full("keydiff", "fp8_e5m2"),
        full("value_key_norm", "fp8"),
    ],
)
def test_log_probabilities_and_kept_sets_equal_the_reference(name, cache, engine_of, tiny):
    case = CASES[name]
    # The policy says so itself, or vLLM's option does.
    asked = (
        {"kv_policy": {**case.policy, "quantize": FP8}}
        if cache == "fp8"
        else {"kv_policy": case.policy, "kv_cache_dtype": cache}
    )
    engine = engine_of(asked.pop("kv_policy"), **asked)
    dense = DenseLlama(tiny, cache_dtype=DTYPES[cache])
    same_bytes = watch_bytes(engine) if engine.runtime.events else [True]

    traces = engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)
    again = engine.run(mixed_prompts(3), NUM_OUTPUTS, chunk=90, preempt_at=range(4, 90, 6))

    assert engine.runner.kv_caches[0].dtype == torch.uint8
    assert same_bytes
    assert all(same_bytes)
    assert sum(trace.preemptions for trace in again) >= 3
    for trace in [*traces, *again]:
        comparison = compare(trace, dense, case.rule)
        assert comparison.agrees(TOLERANCE, NEAR), (len(trace.prompt), comparison.error)
    if name != "snapkv":  # whose window takes twice the pages here
        for trace in traces:
            held = [{lane: len(ids) for lane, ids in step.items()} for step in trace.held]
            assert held == expected_blocks(trace, case.rule)
    longest = traces[LENGTHS.index(411)]
    assert compare(longest, DenseLlama(tiny), case.rule).error > 2 * TOLERANCE, "not rounded"
    for what in ("no eviction", "budget off by one block"):
        assert compare(longest, dense, case.mistakes[what], own=True).error > FELT, what
