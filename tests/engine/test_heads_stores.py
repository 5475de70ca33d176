"""Packed stores in the retrieval heads of a head plan, against the dense reference head by head.

As in `test_packed.py` log-probabilities agree to a tolerance that grows with the codec's step, and
as in `test_heads.py` the reference masks head by head.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from reference.dense import DenseLlama
from reference.heads import HeadRule
from reference.packed import DemotingRule
from reference.packed_heads import DemotingHeadRule, PackedHeadRule
from reference.tiny_model import random_prompt

from engine.cases import CASES as EVICTING
from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import compare
from engine.harness import BLOCK, Engine
from engine.test_demoted import CASES as DEMOTED
from engine.test_demoted import held_blocks as expected_of_demoting_lanes
from engine.test_heads import (
    CHUNK,
    FP8_TOLERANCE,
    PLANS,
    Plan,
    another_head,
    check_figures,
    held_by,
)
from engine.test_heads import expected_blocks as expected_of_heads
from engine.test_packed import CASES as PACKED
from engine.test_packed import Case
from engine.test_packed import expected_blocks as expected_of_lanes
from vllm_kvpress.integration.head_lanes import StreamSpec


@dataclass(frozen=True)
class Row:
    """A head plan, and what the stores of its retrieval heads hold.

    Attributes:
        sizes: How many heads lanes of retrieval heads have, worked out by hand.
        compensated: Whether streaming heads have a token for what they drop.
    """

    plan: Plan
    packed: Case
    sizes: tuple[int, ...]

    compensated: bool = False

    @property
    def tolerance(self):
        """Half of what is right where all heads round: fewer do, and mistakes move less, too."""
        return self.packed.tolerance / 2

    @property
    def policy(self):
        heads = {**self.plan.policy["heads"], "compensation": self.compensated}
        return {**self.packed.policy, "heads": heads}

    @property
    def rule(self):
        return self._with_heads(self.packed.rule)

    def _with_heads(self, rule):
        labels = self.plan.effective or self.plan.labels
        rule_cls = DemotingHeadRule if isinstance(rule, DemotingRule) else PackedHeadRule
        return rule_cls(**vars(rule), labels=labels, compensated=self.compensated)

    @property
    def mistakes(self):
        rule = self.rule
        wrong = {what: self._with_heads(rule) for what, rule in self.packed.mistakes.items()}
        if self.compensated:
            wrong["no token for the others"] = replace(rule, compensated=False)
        return {
            **wrong,
            "a block less of window": replace(rule, recent=BLOCK),
            "another head": replace(rule, labels=another_head(rule.labels)),
            "every head has a store": replace(rule, labels=["1111"] * 4),
        }


CASES = {
    # Two heads of int8 take fewer blocks than one head does for itself. In several runs, one of
    # which has the second lane of a layer and the first of the next.
    "crossing-snapkv-int8": Row(PLANS["crossing"], PACKED["snapkv-int8"], (1, 2)),
    "straddling-snapkv-int8": Row(PLANS["straddling"], PACKED["snapkv-int8"], (1, 2)),
    "straddling-kivi4": Row(PLANS["straddling"], PACKED["kivi4"], (1, 2)),
    "uneven-snapkv-kivi2": Row(PLANS["uneven"], PACKED["snapkv-kivi2"], (2, 4)),
    "even-snapkv-int4": Row(PLANS["even"], PACKED["snapkv-int4"], (2,)),
    "straddling-snapkv-int4-compensated": Row(
        PLANS["straddling"], PACKED["snapkv-int4"], (1, 2), compensated=True
    ),
    "straddling-snapkv-int4-kivi2": Row(PLANS["straddling"], DEMOTED["snapkv-int4-kivi2"], (1, 2)),
    "one-snapkv-none": Row(PLANS["one"], PACKED["snapkv-none"], (1,)),
}
QUICK = ("crossing-snapkv-int8",)
ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.full, id=name) for name in CASES
]


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def engine(row, tiny):
    engine = Engine(tiny, row.policy, num_gpu_blocks_override=45 * (1 + sum(row.plan.runs)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed(engine):
    return engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)


def check(traces, dense, row):
    for trace in traces:
        comparison = compare(trace, dense, row.rule)

        assert comparison.agrees(row.tolerance), (len(trace.prompt), comparison)


def check_blocks(traces, row):
    """Runs of retrieval heads hold what the neediest lane does, streaming runs a window."""
    for trace in traces:
        lanes = [expected_of_lane(trace, row.rule, size) for size in row.sizes]
        for index, step in enumerate(trace.held):
            start, end = trace.chunks[index]
            # The block with sums stays one block longer.
            _, streaming = expected_of_heads(row.plan, start - BLOCK * row.compensated, end)
            expected = {
                name: row.plan.runs[0] * max(lane[index][name] for lane in lanes)
                for name in lanes[0][index]
            }
            expected["StreamSpec"] = streaming

            held = {name: len(held_by(step, name)) for name in expected}
            assert held == expected, trace.chunks[index]


def expected_of_lane(trace, rule, size):
    """Blocks of a lane of so many heads after each step, by the kind of its cache."""
    if isinstance(rule, DemotingRule):
        return expected_of_demoting_lanes(trace, rule, size)
    return expected_of_lanes(trace, rule, (size, 64, 4))


def test_log_probabilities_and_kept_sets_equal_the_reference(row, mixed, dense):
    check(mixed, dense, row)
    assert [len(trace.outputs) for trace in mixed] == list(NUM_OUTPUTS)


def test_a_slightly_wrong_rule_is_noticed(row, mixed, dense):
    longest = mixed[LENGTHS.index(411)]
    for what, mistake in row.mistakes.items():
        assert compare(longest, dense, mistake, own=True).error > 2 * row.tolerance, what


def test_blocks_held_are_the_plan_s_at_every_step(row, mixed):
    check_blocks(mixed, row)


def test_no_request_holds_more_than_explain_says(engine, mixed):
    check_figures(engine, mixed)


def test_a_block_has_the_exact_bytes_of_the_longest_run(row, engine):
    token = 2 * 64 * 4  # of one head: key and value of 64 channels, float32
    config = engine.runner.kv_cache_config

    sizes = []
    for group in config.kv_cache_groups:
        lanes = group.kv_cache_spec.kv_cache_specs.values()
        heads = sum(spec.num_kv_heads for spec in lanes)
        sums = row.compensated and isinstance(next(iter(lanes)), StreamSpec)
        sizes.append(heads * (BLOCK + sums) * token)
    (size,) = {tensor.size for tensor in config.kv_cache_tensors}
    assert size == config.num_blocks * max(sizes)
    assert min(sizes) >= 0.95 * max(sizes)


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


def test_a_prefix_hit_leaves_the_event_to_come(row, engine, dense):
    prompt = random_prompt(300, seed=72)

    first, second = (engine.run([prompt], 40, chunk=CHUNK)[0] for _ in range(2))

    assert first.hits == [0]
    assert second.hits[0] >= 256
    check([first, second], dense, row)


def test_freed_blocks_are_given_to_others_and_leave_no_trace_there(row, engine, dense):
    """Blocks go between exact and packed lanes: no lane takes another's bytes for numbers."""
    prompts = [random_prompt(length, seed=70 + length) for length in range(300, 308)]

    traces = engine.run(prompts, 20, chunk=CHUNK, arrive_at=range(0, 40, 5))

    check(traces, dense, row)


def test_an_abort_returns_every_block(engine):
    traces = engine.run(mixed_prompts(2), 60, chunk=CHUNK, abort_at={3: [4], 8: [5], 40: [0, 1]})

    assert sum(len(trace.outputs) < 60 for trace in traces) == 4


@pytest.mark.full
def test_eviction_over_an_eight_bit_cache(engine_of, tiny):
    plan, evicts = PLANS["straddling"], EVICTING["snapkv"]
    fp8 = {"keys": "fp8", "values": "fp8"}
    policy = {**evicts.policy, "heads": plan.policy["heads"], "quantize": fp8}
    engine = engine_of(policy, num_gpu_blocks_override=150)
    rule = HeadRule(**{**vars(evicts.rule), "labels": plan.effective})
    rounded = DenseLlama(tiny, cache_dtype=torch.float8_e4m3fn)

    traces = engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)

    assert engine.runner.kv_caches[0].dtype == torch.uint8
    for trace in traces:
        assert compare(trace, rounded, rule).error < FP8_TOLERANCE
    longest = traces[LENGTHS.index(411)]
    assert compare(longest, DenseLlama(tiny), rule).error > 2 * FP8_TOLERANCE, "not rounded"
    wrong = replace(rule, scorer="full")
    assert compare(longest, rounded, wrong, own=True).error > FP8_TOLERANCE
