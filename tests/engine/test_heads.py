"""Head plans in the engine: lanes of some heads each, against the dense reference head by head."""

from dataclasses import dataclass, replace

import pytest
import torch
from reference.dense import DenseLlama
from reference.heads import HeadRule
from reference.tiny_model import random_prompt

from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import FELT, TOLERANCE, compare
from engine.harness import BLOCK, Engine
from vllm_kvpress.integration.head_attention import figures_of

CHUNK = 64
# A rounding that falls on the other side moves an element by a whole step of fp8.
FP8_TOLERANCE = 0.1
SINKS, RECENT = 4, 40
SINK_BLOCKS, WINDOW_BLOCKS = 1, 2


@dataclass(frozen=True)
class Plan:
    """A head plan for 4 layers of 4 KV heads, and what it must become, worked out by hand.

    Attributes:
        labels: As the policy says.
        runs: Cache groups of retrieval and of streaming heads.
        effective: The labels after promotions, if there are any.
    """

    labels: tuple[str, ...]
    runs: tuple[int, int]
    effective: tuple[str, ...] = ()

    @property
    def policy(self):
        heads = {"plan": "inline", "labels": self.labels}
        return {"sink_tokens": SINKS, "recent_tokens": RECENT, "heads": heads}

    @property
    def rule(self):
        labels = self.effective or self.labels
        return HeadRule(BLOCK, sinks=SINKS, recent=RECENT, labels=labels)


PLANS = {
    # 7 and 9 heads: with one promoted, the first of layer 0, two runs of 8 do.
    "uneven": Plan(("1000", "0110", "0000", "1111"), (1, 1), ("1100", "0110", "0000", "1111")),
    # With one promoted, runs of 4; layers 0 and 1 share one, and layer 1 straddles a cut.
    "straddling": Plan(("1000", "1000", "0100", "0000"), (1, 3), ("1100", "1000", "0100", "0000")),
    "streaming": Plan(("0000",) * 4, (0, 1)),
    "even": Plan(("1010", "0101", "1100", "0011"), (1, 1)),
    # With one promoted, the last of layer 0, runs of 2; one begins in layer 2 and ends in layer 3.
    "crossing": Plan(("1110", "1111", "0111", "1101"), (7, 1), ("1111", "1111", "0111", "1101")),
    "one": Plan(("1111", "1111", "1101", "1111"), (15, 1)),
}
QUICK = ("straddling", "streaming")


@pytest.fixture(
    scope="module",
    params=[pytest.param(p, marks=() if p in QUICK else pytest.mark.full) for p in PLANS],
)
def plan(request):
    return PLANS[request.param]


@pytest.fixture(scope="module")
def engine(plan, tiny):
    # Enough for a request of max_model_len and a bit: freed blocks are soon wanted.
    engine = Engine(tiny, plan.policy, num_gpu_blocks_override=20 * (1 + sum(plan.runs)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed(engine):
    """Eight requests of many lengths at once, in chunks."""
    return engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)


def check(traces, dense, plan):
    for trace in traces:
        comparison = compare(trace, dense, plan.rule)

        assert comparison.error <= TOLERANCE, (len(trace.prompt), comparison)


def held_by(step, spec):
    """Blocks held in all lanes of a kind."""
    return frozenset().union(*(ids for name, ids in step.items() if name.startswith(spec)))


def expected_blocks(plan, start, end):
    """Retrieval and streaming blocks of a request in a step that computes [start, end)."""
    blocks = -(-end // BLOCK)
    gone = max(0, start // BLOCK - WINDOW_BLOCKS - SINK_BLOCKS)
    return plan.runs[0] * blocks, plan.runs[1] * (blocks - gone)


def check_blocks(traces, plan):
    for trace in traces:
        for (start, end), step in zip(trace.chunks, trace.held, strict=True):
            held = len(held_by(step, "RetrievalSpec")), len(held_by(step, "StreamSpec"))

            assert held == expected_blocks(plan, start, end), (len(trace.prompt), start, end)


def check_figures(engine, traces):
    """No request of the mixed batch holds more than the log and `explain` say."""
    figures = figures_of(engine.runner.vllm_config)
    for trace, outputs in zip(traces, NUM_OUTPUTS, strict=True):
        held = [len(held_by(step, "")) for step in trace.held]

        assert max(held) <= figures.peak_blocks(len(trace.prompt), outputs - 1)
        assert held[-1] == figures.steady_blocks(len(trace.prompt), outputs - 1)


def test_log_probabilities_equal_the_reference(plan, mixed, dense):
    check(mixed, dense, plan)
    assert [len(trace.outputs) for trace in mixed] == list(NUM_OUTPUTS)


def another_head(labels):
    """The labels with a head of layer 2 in the place of another."""
    flipped = labels[2].replace("0", "2", 1).replace("1", "0", 1).replace("2", "1", 1)
    return [*labels[:2], flipped, *labels[3:]]


def test_a_slightly_wrong_rule_is_noticed(plan, mixed, dense):
    rule = plan.rule
    mistakes = {
        "a block more of sinks": replace(rule, sinks=BLOCK + 1),
        "no sinks": replace(rule, sinks=0),
        "a block more of window": replace(rule, recent=WINDOW_BLOCKS * BLOCK + 1),
        "a block less of window": replace(rule, recent=BLOCK),
        "another head": replace(rule, labels=another_head(rule.labels)),
        "every token": replace(rule, labels=["1111"] * 4),
    }
    for what, mistake in mistakes.items():
        assert compare(mixed[LENGTHS.index(411)], dense, mistake).error > FELT, what


def test_blocks_held_are_the_plan_s_at_every_step(plan, mixed):
    check_blocks(mixed, plan)


def test_no_request_holds_more_than_explain_says(plan, engine, mixed):
    check_figures(engine, mixed)


def test_blocks_leave_while_the_prompt_is_computed(plan, mixed):
    trace = mixed[LENGTHS.index(411)]
    last = trace.chunks.index(trace.last_prefill)

    streaming = len(held_by(trace.held[last], "StreamSpec")) / plan.runs[1]

    assert streaming <= SINK_BLOCKS + WINDOW_BLOCKS + 1 + CHUNK // BLOCK < 411 // BLOCK


def test_the_caches_bytes_are_those_of_the_longest_run(plan, engine):
    config = engine.runner.kv_cache_config
    page = BLOCK * 2 * 64 * 4  # of one head: keys and values of 64 channels, float32

    specs = [group.kv_cache_spec.kv_cache_specs for group in config.kv_cache_groups]
    heads = [sum(spec.num_kv_heads for spec in run.values()) for run in specs]
    (size,) = {tensor.size for tensor in config.kv_cache_tensors}
    assert sum(heads) == 16
    assert len(heads) == sum(plan.runs)
    assert size == config.num_blocks * max(heads) * page
    assert all(count >= 0.95 * max(heads) for count in heads)
    for tensor in config.kv_cache_tensors:
        assert tensor.block_stride == max(heads) * page


def test_freed_blocks_are_given_to_others_while_their_first_owner_runs(plan, engine, dense):
    if plan.runs[0] > plan.runs[1]:
        pytest.skip("few blocks leave, and retrieval heads alone fill the pool")
    prompts = [random_prompt(length, seed=70 + length) for length in range(400, 408)]

    traces = engine.run(prompts, 20, chunk=CHUNK, arrive_at=range(0, 40, 5))

    check(traces, dense, plan)
    assert reused_blocks(traces)


def reused_blocks(traces):
    """Blocks of streaming heads that another request got while their first owner still ran."""
    found = set()
    for first in traces:
        for index in range(1, len(first.held)):
            gone = held_by(first.held[index - 1], "StreamSpec")
            gone -= held_by(first.held[index], "StreamSpec")
            after, end = first.steps[index], first.steps[-1]
            for other in traces:
                for step, held in zip(other.steps, other.held, strict=True):
                    if other is not first and after <= step <= end:
                        found |= gone & held_by(held, "")
    return found


@pytest.mark.parametrize("chunk", [40, 64, 100, 512])
def test_results_do_not_depend_on_where_a_prompt_is_cut(plan, engine, dense, chunk):
    prompt = random_prompt(2 * chunk + 1 if chunk < 512 else 400, seed=chunk)

    (trace,) = engine.run([prompt], 40, chunk=chunk)

    start, end = trace.last_prefill
    assert end - start == (1 if chunk < 512 else 400)
    check([trace], dense, plan)


def test_forced_preemption_in_prefill_and_in_decode(plan, engine, dense):
    traces = engine.run(mixed_prompts(1), NUM_OUTPUTS, chunk=CHUNK, preempt_at=range(2, 200, 5))

    pairs = [
        (end, len(trace.prompt))
        for trace in traces
        for (_, end), (start, _) in zip(trace.chunks, trace.chunks[1:], strict=False)
        if start < end
    ]
    assert any(cut < prompt for cut, prompt in pairs)
    assert any(cut > prompt for cut, prompt in pairs)
    check(traces, dense, plan)
    check_blocks(traces, plan)


def test_a_repeated_prompt_hits_the_cache_to_its_last_whole_block(plan, engine, dense):
    prompt = random_prompt(9 * BLOCK + 5, seed=10)
    first = engine.run([prompt], 40, chunk=CHUNK)

    second = engine.run([prompt, prompt], 40, chunk=CHUNK, arrive_at=[0, 3])

    assert first[0].hits == [0]
    assert [trace.hits for trace in second] == [[9 * BLOCK], [9 * BLOCK]]
    check([*first, *second], dense, plan)


def test_generated_tokens_are_found_in_the_cache(plan, engine, dense):
    prompt = random_prompt(5 * BLOCK + 3, seed=11)
    (first,) = engine.run([prompt], 80, chunk=CHUNK)

    (second,) = engine.run([[*prompt, *first.outputs[:-1]]], 8, chunk=CHUNK)

    assert second.hits == [(len(prompt) + 79 - 1) // BLOCK * BLOCK]
    check([second], dense, plan)


def test_another_tail_behind_a_common_prefix_hits_as_far_as_the_prefix(plan, engine, dense):
    prefix = random_prompt(6 * BLOCK, seed=12)
    engine.run([[*prefix, *random_prompt(150, seed=13)]], 4, chunk=CHUNK)

    (second,) = engine.run([[*prefix, *random_prompt(90, seed=14)]], 20, chunk=CHUNK)

    assert second.hits == [6 * BLOCK]
    check([second], dense, plan)


def test_an_abort_returns_every_block(plan, engine):
    traces = engine.run(mixed_prompts(2), 60, chunk=CHUNK, abort_at={3: [4], 8: [5], 40: [0, 1]})

    assert sum(len(trace.outputs) < 60 for trace in traces) == 4


def test_a_prompt_that_the_pool_could_not_hold_runs_when_every_head_streams(engine_of, dense):
    plan = PLANS["streaming"]
    engine = engine_of(plan.policy, max_num_batched_tokens=CHUNK, num_gpu_blocks_override=8)

    (trace,) = engine.run([random_prompt(411, seed=3)], 60, chunk=CHUNK)

    assert engine.pool.num_gpu_blocks - 1 < 411 // BLOCK
    assert trace.preemptions == 0
    check([trace], dense, plan)


@pytest.mark.full
def test_an_eight_bit_cache_is_read_and_written_by_lanes(engine_of, tiny):
    plan = PLANS["straddling"]
    policy = {**plan.policy, "quantize": {"keys": "fp8", "values": "fp8"}}
    engine = engine_of(policy, num_gpu_blocks_override=100)
    rounded = DenseLlama(tiny, cache_dtype=torch.float8_e4m3fn)

    traces = engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)

    assert engine.runner.kv_caches[0].dtype == torch.uint8
    for trace in traces:
        assert compare(trace, rounded, plan.rule).error < FP8_TOLERANCE
    longest = traces[LENGTHS.index(411)]
    assert compare(longest, DenseLlama(tiny), plan.rule).error > 2 * FP8_TOLERANCE, "not rounded"
