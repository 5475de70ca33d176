"""Tokens packed as they are written: int8 and int4 alone, and under StreamingLLM.

The reference is given the engine's own codes, read from its pages byte by byte, and checks that
each is a rounding that the rule allows: a number near a tie may fall to either side. What attention
makes of them then agrees like that of an exact cache.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from reference.dense import DenseLlama, DenseReference
from reference.tiny_model import random_prompt
from reference.written import WrittenRule

from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import FELT, TOLERANCE, errors, expected_blocks, replayed
from engine.harness import BLOCK, Engine
from engine.recording import RecordingEngine
from engine.test_options import as_float32, full_attention_error

CHUNK = 64
# Steps by which a rounding near a tie may be off, and the share of rows that may have one.
OFF, SHARE = 0.65, 0.1
# The same of 4-bit codes if what is rounded comes from a bf16 model, and so from other noise.
OFF_BFLOAT16 = 0.8


@dataclass(frozen=True)
class Case:
    """A policy, the same in the reference's words, and slightly wrong rules."""

    policy: dict
    rule: WrittenRule
    mistakes: dict = field(default_factory=dict)

    def token_bytes(self, channels):
        """Bytes of a token and KV head, written anew."""
        return sum(
            channels * bits // 8 + 4 * -(-channels // (group or channels)) if bits else 4 * channels
            for bits, group in zip(self.rule.bits, self.rule.groups, strict=True)
        )


def case(keys, values, *, window=None, **options):
    bits = {"int8": 8, "int4": 4, "kivi2": 2, "none": 0}
    rotate = options.get("rotate")
    group = options.get("group", 0)
    rule = WrittenRule(
        BLOCK,
        bits=(bits[keys], bits[values]),
        groups=(group, 32 if values == "kivi2" else group),
        rotated=(rotate in ("keys", "both"), rotate == "both"),
    )
    policy = {"quantize": {"keys": keys, "values": values, **options}}
    mistakes = {}
    if any(rule.bits):
        mistakes["own chunk read exactly"] = {"late": True}
    if window:
        rule = replace(rule, scorer="window", sinks=4, recent=window)
        evict = {"scorer": {"name": "position"}}
        policy |= {"sink_tokens": 4, "recent_tokens": window, "evict": evict}
        mistakes |= {
            "nothing dropped": {"scorer": "full"},
            "window + 1": {"recent": window + 1},
            "window - 1": {"recent": window - 1},
            "no sinks": {"sinks": 0, "recent": window},
        }
    wrong = {what: replace(rule, **change) for what, change in mistakes.items()}
    return Case(policy, rule, wrong)


CASES = {
    "int8": case("int8", "int8"),
    "int4": case("int4", "int4"),
    "int4-g32-rotated": case("int4", "int4", group=32, rotate="both"),
    "int8-int4": case("int8", "int4", rotate="keys"),
    "int8-kivi2": case("int8", "kivi2"),
    "none": case("none", "none"),
    "streaming-int8": case("int8", "int8", window=60),
    "streaming-int4": case("int4", "int4", window=60, group=32, rotate="keys"),
}
FAST = ("int4-g32-rotated", "streaming-int8")
BFLOAT16 = ("int4", "streaming-int4")
ROWS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.full, id=name) for name in CASES
]


def compare(trace, model, rule):
    """Returns the error of log-probabilities, and steps off and share of rows rounded otherwise."""
    result = DenseReference(model, rule).logprobs(
        trace.prompt, trace.outputs, replayed(trace), trace.written, trace.delivered
    )
    off = torch.tensor(result.flips)
    return max(errors(trace, result.logprobs)), float(off.max()), float((off > 0).float().mean())


def check(traces, model, rule):
    for trace in traces:
        error, off, share = compare(trace, model, rule)

        assert error <= TOLERANCE, len(trace.prompt)
        assert off <= OFF, len(trace.prompt)
        assert share <= SHARE, len(trace.prompt)


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def engine(row, tiny):
    engine = RecordingEngine(tiny, row.policy, row.rule)
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


def test_one_token_out_of_place_is_noticed(row, mixed, dense):
    longest = mixed[LENGTHS.index(411)]
    (run,) = longest.written
    run[0, 0][[0, 200]] = run[0, 0][[200, 0]]

    error, off, _ = compare(longest, dense, row.rule)

    run[0, 0][[0, 200]] = run[0, 0][[200, 0]]
    assert error > FELT
    assert off > 1


def test_a_wrong_format_is_noticed(row, mixed, dense):
    for side, bits in enumerate(row.rule.bits):
        if bits:
            wrong = list(row.rule.bits)
            wrong[side] = 2 if bits == 4 else 4
            _, _, share = compare(mixed[0], dense, replace(row.rule, bits=tuple(wrong)))
            assert share > 2 * SHARE


def test_chunk_sizes_change_nothing(row, engine, mixed, dense):
    """Up to how matrix products of other shapes round, which moves a number near a tie a step."""
    index = LENGTHS.index(129)
    whole, cut = (
        engine.run([mixed_prompts()[index]], NUM_OUTPUTS[index], chunk=chunk)[0]
        for chunk in (None, 43)
    )

    assert mixed[index].outputs == whole.outputs == cut.outputs
    check([whole, cut], dense, row.rule)


def test_a_one_token_last_chunk_is_exact(row, engine, dense):
    traces = engine.run([random_prompt(129, seed=71)], 40, chunk=CHUNK)

    assert traces[0].last_prefill == (128, 129)
    check(traces, dense, row.rule)


def test_a_prefix_hit_gives_the_same_bits(row, engine, dense):
    prompt = random_prompt(300, seed=72)

    # The last chunk of the first run is what the second has left to compute.
    first, second = (engine.run([prompt], 40, chunk=96)[0] for _ in range(2))

    assert (first.hits, second.hits) == ([0], [288])
    assert first.last_prefill == second.last_prefill == (288, 300)
    assert first.outputs == second.outputs
    assert first.logprobs == second.logprobs
    check([first, second], dense, row.rule)


def test_generated_blocks_are_shared_unless_something_is_dropped(row, engine, dense):
    before = engine.run([random_prompt(140, seed=73)], 60)[0]

    after = engine.run([[*before.prompt, *before.outputs, 9]], 20)[0]

    is_pure = row.rule.scorer == "full"
    assert after.hits == [192 if is_pure else 128]
    check([after], dense, row.rule)


def test_preempted_requests_are_exact(row, engine, dense):
    traces = engine.run(mixed_prompts(3)[2:6], 40, chunk=90, preempt_at=range(4, 40, 6))

    assert sum(trace.preemptions for trace in traces) >= 3
    check(traces, dense, row.rule)


def test_blocks_are_the_plan_s_and_hold_packed_bytes(row, engine, mixed, dense):
    for trace in mixed:
        held = [{lane: len(ids) for lane, ids in step.items()} for step in trace.held]
        if row.rule.scorer == "window":
            assert held == expected_blocks(trace, row.rule)
        else:
            assert held == [{"StagingSpec": -(-end // BLOCK)} for _, end in trace.chunks]
    for layer in engine.layers:
        pages = layer.kv_cache
        assert pages.nbytes == len(pages) * BLOCK * dense.num_kv_heads * row.token_bytes(64)


@pytest.mark.parametrize(
    "name",
    ["int4-g32-rotated", *(pytest.param(n, marks=pytest.mark.full) for n in BFLOAT16)],
)
def test_bfloat16_within_the_error_of_full_attention(name, tiny):
    """A bf16 model's int4 tokens: errors as without a policy, and codes next to the exact ones."""
    row, wide = CASES[name], as_float32(DenseLlama(tiny, torch.bfloat16))
    prompts = [mixed_prompts()[LENGTHS.index(length)] for length in (37, 129, 411)]
    stock = Engine(tiny, None, dtype="bfloat16")
    budget = full_attention_error(stock, prompts[-1], wide)
    stock.close()
    engine = RecordingEngine(tiny, row.policy, row.rule, dtype="bfloat16")

    traces = engine.run(prompts, (12, 34, 36), chunk=CHUNK)
    engine.close()

    for trace in traces:
        error, off, _ = compare(trace, wide, row.rule)
        assert error <= budget, len(trace.prompt)
        assert off <= OFF_BFLOAT16, len(trace.prompt)
    for what, mistake in row.mistakes.items():
        error, off, _ = compare(traces[-1], wide, mistake)
        assert error > 3 * budget or off > 2 * OFF_BFLOAT16, what
