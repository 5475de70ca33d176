"""Head plans over packed cells: both kinds of heads quantize tokens as they are written.

As in `test_packed_lane.py` the reference is given the engine's own codes and checks each rounding;
as in `test_heads.py` it masks head by head.
"""

from dataclasses import dataclass, replace

import pytest
from reference.tiny_model import random_prompt
from reference.written_heads import WrittenHeadRule

from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import FELT
from engine.harness import BLOCK
from engine.recording import RecordingEngine
from engine.test_heads import (
    CHUNK,
    PLANS,
    RECENT,
    SINKS,
    Plan,
    another_head,
    check_blocks,
    check_figures,
)
from engine.test_packed_lane import CASES as WRITTEN
from engine.test_packed_lane import SHARE, Case, check, compare


@dataclass(frozen=True)
class Row:
    """A head plan and codecs."""

    plan: Plan
    codecs: Case

    @property
    def policy(self):
        return {**self.plan.policy, **self.codecs.policy}

    @property
    def rule(self):
        written, labels = self.codecs.rule, self.plan.effective or self.plan.labels
        return WrittenHeadRule(
            BLOCK,
            sinks=SINKS,
            recent=RECENT,
            labels=labels,
            bits=written.bits,
            groups=written.groups,
            rotated=written.rotated,
        )

    @property
    def mistakes(self):
        rule = self.rule
        return {
            "own chunk read exactly": replace(rule, late=True),
            "no sinks": replace(rule, sinks=0),
            "a block more of window": replace(rule, recent=RECENT + BLOCK),
            "a block less of window": replace(rule, recent=BLOCK),
            "another head": replace(rule, labels=another_head(rule.labels)),
            "every token": replace(rule, labels=["1111"] * 4),
        }


CASES = {
    f"{plan}-{codecs}": Row(PLANS[plan], WRITTEN[codecs])
    for plan, codecs in (
        ("even", "int4-g32-rotated"),
        ("straddling", "int8"),
        ("uneven", "int8-int4"),
        ("one", "int4"),
        ("straddling", "int8-kivi2"),
        ("streaming", "int8"),  # what streaming_llm:prefill=windowed becomes
    )
}
QUICK = ("straddling-int8",)
ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.full, id=name) for name in CASES
]


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def engine(row, tiny):
    blocks = 20 * (1 + sum(row.plan.runs))
    engine = RecordingEngine(tiny, row.policy, row.rule, num_gpu_blocks_override=blocks)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed(engine):
    return engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)


def test_log_probabilities_equal_the_reference_and_roundings_the_rule(row, mixed, dense):
    check(mixed, dense, row.rule)
    assert [len(trace.outputs) for trace in mixed] == list(NUM_OUTPUTS)


def test_a_slightly_wrong_rule_is_noticed(row, mixed, dense):
    longest = mixed[LENGTHS.index(411)]
    for what, mistake in row.mistakes.items():
        assert compare(longest, dense, mistake)[0] > FELT, what


def test_a_wrong_format_is_noticed(row, mixed, dense):
    for side, bits in enumerate(row.rule.bits):
        wrong = list(row.rule.bits)
        wrong[side] = 2 if bits == 4 else 4

        _, _, share = compare(mixed[0], dense, replace(row.rule, bits=tuple(wrong)))

        assert share > 2 * SHARE


def test_blocks_held_are_the_plan_s_at_every_step(row, mixed):
    check_blocks(mixed, row.plan)


def test_no_request_holds_more_than_explain_says(engine, mixed):
    check_figures(engine, mixed)


def test_a_block_has_the_packed_bytes_of_the_longest_run(row, engine):
    config = engine.runner.kv_cache_config
    page = BLOCK * row.codecs.token_bytes(64)  # of one head

    specs = [group.kv_cache_spec.kv_cache_specs for group in config.kv_cache_groups]
    heads = [sum(spec.num_kv_heads for spec in run.values()) for run in specs]
    (size,) = {tensor.size for tensor in config.kv_cache_tensors}
    assert sum(heads) == 16
    assert len(heads) == sum(row.plan.runs)
    assert size == config.num_blocks * max(heads) * page
    for layer in engine.layers:
        for cache, mine, _ in engine.stored(layer):
            assert cache[0].nbytes == len(mine) * page
            assert cache.stride(0) * cache.itemsize == max(heads) * page


@pytest.mark.parametrize("chunk", [40, 64, 512])
def test_results_do_not_depend_on_where_a_prompt_is_cut(row, engine, dense, chunk):
    prompt = random_prompt(2 * chunk + 1 if chunk < 512 else 400, seed=chunk)

    (trace,) = engine.run([prompt], 40, chunk=chunk)

    start, end = trace.last_prefill
    assert end - start == (1 if chunk < 512 else 400)
    check([trace], dense, row.rule)


def test_preempted_requests_are_exact(row, engine, dense):
    traces = engine.run(mixed_prompts(1), NUM_OUTPUTS, chunk=CHUNK, preempt_at=range(2, 200, 5))

    assert sum(trace.preemptions for trace in traces) >= 5
    check(traces, dense, row.rule)
    check_blocks(traces, row.plan)


def test_a_prefix_hit_gives_the_same_bits(row, engine, dense):
    prompt = random_prompt(300, seed=72)

    # The last chunk of the first run is what the second has left to compute.
    first, second = (engine.run([prompt], 40, chunk=96)[0] for _ in range(2))

    assert (first.hits, second.hits) == ([0], [288])
    assert first.last_prefill == second.last_prefill == (288, 300)
    assert first.outputs == second.outputs
    assert first.logprobs == second.logprobs
    check([first, second], dense, row.rule)


def test_generated_tokens_are_found_in_the_cache(row, engine, dense):
    prompt = random_prompt(5 * BLOCK + 3, seed=11)
    (first,) = engine.run([prompt], 80, chunk=CHUNK)

    (second,) = engine.run([[*prompt, *first.outputs[:-1]]], 8, chunk=CHUNK)

    assert second.hits == [(len(prompt) + 79 - 1) // BLOCK * BLOCK]
    check([second], dense, row.rule)


def test_another_tail_behind_a_common_prefix_hits_as_far_as_the_prefix(row, engine, dense):
    prefix = random_prompt(6 * BLOCK, seed=12)
    engine.run([[*prefix, *random_prompt(150, seed=13)]], 4, chunk=CHUNK)

    (second,) = engine.run([[*prefix, *random_prompt(90, seed=14)]], 20, chunk=CHUNK)

    assert second.hits == [6 * BLOCK]
    check([second], dense, row.rule)


def test_an_abort_returns_every_block(engine):
    traces = engine.run(mixed_prompts(2), 60, chunk=CHUNK, abort_at={3: [4], 8: [5], 40: [0, 1]})

    assert sum(len(trace.outputs) < 60 for trace in traces) == 4
