"""Engine options that change how the cache is laid out: dtype, block size, prefix caching."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from reference.dense import DenseLlama, DenseReference, Rule

from engine.cases import CASES, LENGTHS, NUM_OUTPUTS, evicting, mixed_prompts, sized
from engine.compare import compare, errors, expected_blocks
from engine.harness import BLOCK, TOP, Trace

CHUNK = 64


def check(traces, dense, rule):
    for trace in traces:
        comparison = compare(trace, dense, rule)

        assert comparison.agrees(), (len(trace.prompt), comparison)


# Distances of decode events: below, equal to and above the block size, a multiple and not.
DECODE_EVENTS = [
    evicting("knorm", every=8, label="knorm-8"),
    evicting("value_key_norm", every=64, prompt_end=False, label="value_key_norm-64-decode-only"),
    evicting("keydiff", every=32, keep_ratio=0.3, label="keydiff-32-ratio"),
    evicting("random", every=48, keep_ratio=0.5, label="random-48-ratio"),
    evicting("random", every=1, label="random-1"),
]


@pytest.mark.parametrize(
    "case",
    [
        *(CASES[name] for name in ("random", "keydiff", "value_key_norm")),
        *(pytest.param(case, marks=pytest.mark.full) for case in DECODE_EVENTS),
    ],
    ids=str,
)
def test_one_run_of_every_other_policy(case, engine_of, dense):
    engine = engine_of(case.policy)

    traces = engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)
    again = engine.run(mixed_prompts(3), NUM_OUTPUTS, chunk=90, preempt_at=range(4, 90, 6))

    check([*traces, *again], dense, case.rule)
    assert sum(trace.preemptions for trace in again) >= 3
    for trace in traces:
        held = [{lane: len(ids) for lane, ids in step.items()} for step in trace.held]
        assert held == expected_blocks(trace, case.rule)
    decode_events = {e for t in traces for e, _, _ in t.kept[0] if e > len(t.prompt)}
    assert bool(decode_events) == bool(case.rule.every)
    for what, rule in case.mistakes.items():
        assert not compare(traces[LENGTHS.index(300)], dense, rule, own=True).agrees(), what


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "block_size", "budget"),
    [
        ("snapkv", 64, 160),
        ("snapkv", 128, 300),
        ("knorm", 64, 160),
        ("knorm", 128, 300),
        ("streaming_llm", 64, 160),
        ("streaming_llm", 128, 160),
    ],
)
def test_larger_blocks(name, block_size, budget, engine_of, dense):
    case = sized(CASES[name], block_size, budget)
    engine = engine_of(case.policy, block_size=block_size, num_gpu_blocks_override=40)

    traces = engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)

    assert engine.runtime.plan.block_size == block_size
    assert any(steps_with_fewer_blocks(trace) for trace in traces)
    check(traces, dense, case.rule)
    wrong = replace(case.rule, budget=budget + block_size)
    assert not compare(traces[LENGTHS.index(411)], dense, wrong, own=True).agrees()


def steps_with_fewer_blocks(trace):
    counts = [len(step["StagingSpec"]) for step in trace.held]
    return any(after < before for before, after in pairwise(counts))


@pytest.mark.full
@pytest.mark.parametrize("name", ["snapkv", "knorm", "streaming_llm"])
def test_without_prefix_caching(name, engine_of, dense):
    case = CASES[name]
    engine = engine_of(case.policy, enable_prefix_caching=False)
    prompts = mixed_prompts()

    traces = engine.run(prompts, NUM_OUTPUTS, chunk=CHUNK, preempt_at=range(5, 200, 7))

    assert sum(trace.preemptions for trace in traces) >= 1
    assert not any(hit for trace in traces for hit in trace.hits)
    check(traces, dense, case.rule)


@pytest.mark.parametrize(
    "name", ["snapkv", *(pytest.param(n, marks=pytest.mark.full) for n in CASES if n != "snapkv")]
)
def test_bfloat16_within_the_error_of_full_attention(name, engine_of, tiny):
    """The packed bf16 cache: the same kept sets must give no larger errors than no policy does."""
    case = CASES[name]
    engine = engine_of(case.policy, dtype="bfloat16")
    rounded = DenseLlama(tiny, torch.bfloat16)
    wide = as_float32(rounded)

    traces = engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)

    budget = max(full_attention_error(engine, trace.prompt, wide) for trace in traces[-2:])
    for trace in traces:
        comparison = compare(trace, wide, case.rule)
        # Scores come from keys of 8 bits: a tenth of their spread may be noise.
        assert comparison.agrees(tolerance=1.5 * budget, near=0.1), (budget, comparison)
    longest = traces[LENGTHS.index(411)]
    assert compare(longest, wide, Rule(BLOCK)).error > 3 * budget
    wrong = compare(longest, wide, case.mistakes["budget off by one block"], own=True)
    assert wrong.error > 3 * budget


def as_float32(model):
    model._weights = {name: weight.float() for name, weight in model._weights.items()}
    model.dtype = torch.float32
    return model


def full_attention_error(engine, prompt, model):
    """The engine's largest error where nothing is evicted: in the prompt itself."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=TOP, detokenize=False)
    (result,) = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    rows = [{t: e.logprob for t, e in row.items()} for row in result.prompt_logprobs[1:]]
    reference = DenseReference(model, Rule(BLOCK))
    expected = reference.logprobs(prompt[:1], prompt[1:], [(0, len(prompt) - 1)]).logprobs
    return max(errors(Trace(prompt, logprobs=rows), expected))
