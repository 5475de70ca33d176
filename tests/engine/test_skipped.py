"""Layers left alone, under an evicting and under a packed policy, against the dense reference."""

from dataclasses import dataclass, replace

import pytest
import torch
from reference.dense import Rule
from reference.packed import PackedRule
from reference.tiny_model import random_prompt

from engine import cases, test_packed
from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import FELT, compare, expected_blocks
from engine.harness import BLOCK, Engine

CHUNK = 64


@dataclass(frozen=True)
class Case:
    """A policy that skips layers, the same in the reference's words, and what it must hold.

    Attributes:
        skipped_block: Tokens in a block of the skipped layers.
        mistakes: Rules that skip other layers.
    """

    policy: dict
    rule: Rule
    tolerance: float
    skipped_block: int
    mistakes: dict

    def held(self, trace):
        if isinstance(self.rule, PackedRule):
            steps = test_packed.expected_blocks(trace, self.rule, (4, 64, 4))
        else:
            steps = expected_blocks(trace, self.rule)
        for step, (_, end) in zip(steps, trace.chunks, strict=True):
            step["SkippedSpec"] = -(-end // self.skipped_block)
        return steps


def skipping(one, tolerance, skip, skipped_block):
    rule = replace(one.rule, skip=skip)
    others = {
        "none skipped": (),
        "all skipped": (0, 1, 2, 3),
        "the neighbours": tuple((layer + 1) % 4 for layer in skip),
    }
    mistakes = {what: replace(rule, skip=other) for what, other in others.items()}
    policy = {**one.policy, "layers": {"skip": list(skip)}}
    return Case(policy, rule, tolerance, skipped_block, mistakes)


CASES = {
    # One of four layers: its blocks have room for three times the tokens.
    "snapkv": skipping(cases.SNAPKV, 1e-4, (2,), 3 * BLOCK),
    "kivi2": skipping(test_packed.CASES["kivi2"], 0.1, (0, 3), BLOCK),
    "streaming_llm": skipping(cases.CASES["streaming_llm"], 1e-4, (1,), 3 * BLOCK),
}
ROWS = [
    pytest.param(name, marks=() if name == "snapkv" else pytest.mark.full, id=name)
    for name in CASES
]


@pytest.fixture(scope="module", params=ROWS)
def one(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def engine(one, tiny):
    engine = Engine(tiny, one.policy)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed(engine):
    return engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)


def check(traces, dense, one):
    for trace in traces:
        comparison = compare(trace, dense, one.rule)
        assert comparison.agrees(one.tolerance), (len(trace.prompt), comparison)


def test_log_probabilities_equal_the_reference(one, mixed, dense):
    check(mixed, dense, one)


def test_a_layer_more_or_less_is_noticed(one, mixed, dense):
    longest = mixed[LENGTHS.index(411)]
    for what, mistake in one.mistakes.items():
        error = compare(longest, dense, mistake, own=True).error
        assert error > max(FELT, 2 * one.tolerance), what


def test_blocks_held_are_the_plan_s_at_every_step(one, mixed):
    for trace in mixed:
        expected = one.held(trace)
        held = [{lane: len(step[lane]) for lane in expected[0]} for step in trace.held]
        assert held == expected


def test_skipped_layers_run_the_stock_backend(one, engine):
    context = engine.runner.vllm_config.compilation_config.static_forward_context
    layers = {
        int(name.split(".")[2]): layer for name, layer in context.items() if name.endswith(".attn")
    }

    stock = {i for i, layer in layers.items() if type(layer.impl).__name__.startswith("CPU")}

    assert len(layers) == 4
    assert stock == set(one.rule.skip)
    (block_bytes,) = {
        tensor.block_stride for tensor in engine.runner.kv_cache_config.kv_cache_tensors
    }
    page = BLOCK * 4 * 2 * 64 * torch.float32.itemsize
    # No byte of a block is empty in these lists: three pages of a token each, or one of three.
    assert block_bytes == (4 - len(one.rule.skip)) * page
    assert len(one.rule.skip) * one.skipped_block // BLOCK * page == block_bytes


def test_prefix_hits_end_on_a_block_of_every_layer_and_are_exact(one, engine, dense):
    prompt = random_prompt(9 * BLOCK, seed=10)
    first = engine.run([prompt], 40, chunk=CHUNK)

    second = engine.run([prompt, prompt[: 7 * BLOCK]], 40, chunk=CHUNK, arrive_at=[0, 3])

    assert first[0].hits == [0]
    for trace in second:
        assert trace.hits[0] >= len(trace.prompt) - BLOCK - one.skipped_block
        assert trace.hits[0] % one.skipped_block == 0
        assert trace.hits[0] > 0
    check([*first, *second], dense, one)


def test_what_a_request_generated_is_not_shared(one, engine, dense):
    """A skipped layer's K/V depend on what was evicted below it."""
    prompt = random_prompt(200, seed=11)
    (first,) = engine.run([prompt], 120, chunk=CHUNK)
    longer = [*prompt, *first.outputs]

    again = engine.run([longer], 30, chunk=CHUNK) + engine.run([longer], 30, chunk=CHUNK)

    assert again[0].hits[0] <= 200 < again[1].hits[0]
    check(again, dense, one)


def test_forced_preemption_and_a_last_chunk_of_one_token(one, engine, dense):
    preempted = engine.run(mixed_prompts(3), NUM_OUTPUTS, chunk=90, preempt_at=range(4, 90, 6))
    alone = engine.run([mixed_prompts(7)[LENGTHS.index(257)]], 40, chunk=CHUNK)

    assert sum(trace.preemptions for trace in preempted) >= 3
    assert alone[0].last_prefill == (256, 257)
    check([*preempted, *alone], dense, one)
