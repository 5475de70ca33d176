"""Packed stores in the engine: each codec alone and under eviction, against the dense reference.

Codecs per token have a store where something stays exact; else they pack on write
(`test_packed_lane.py`).

A rounding that falls on the other side in the engine than in the reference moves an element by a
whole step, so log-probabilities agree to a tolerance that grows with the step; what a slightly
wrong rule moves them by is far above it.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from reference.packed import PackedRule

from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import compare
from engine.harness import BLOCK

CHUNK = 64
SINKS, RECENT = 4, 40
BUDGET = 128
SNAPKV = {
    "scorer": {"name": "snapkv", "window": 32, "pool": 5},
    "budget": {"tokens": BUDGET},
}


@dataclass(frozen=True)
class Case:
    """A policy, the same in the reference's words, and how near the two must be."""

    quantize: dict
    rule: PackedRule
    tolerance: float
    evict: dict | None = None
    mistakes: dict = field(default_factory=dict)

    @property
    def policy(self):
        evict = {"evict": self.evict} if self.evict else {}
        return {
            "sink_tokens": SINKS,
            "recent_tokens": RECENT,
            "quantize": self.quantize,
            **evict,
        }


def case(keys, values, rule, tolerance, *, evict=False, mistakes=None, **options):
    rule = PackedRule(BLOCK, sinks=SINKS, recent=RECENT, **rule)
    if evict:
        scored = {"scorer": "snapkv", "budget": BUDGET, "params": {"window": 32, "pool": 5}}
        rule = replace(rule, **scored)
    wrong = {}
    if any(rule.bits):
        wrong["not rounded"] = {"bits": (0, 0)}
        wrong["residual + 1 unit"] = {"residual": rule.residual + 32}
    if evict:
        wrong["budget + 32"] = {"budget": BUDGET + 32}
    return Case(
        {"keys": keys, "values": values, **options},
        rule,
        tolerance,
        SNAPKV if evict else None,
        {what: replace(rule, **change) for what, change in {**wrong, **(mistakes or {})}.items()},
    )


KIVI = {"key_channels": True, "groups": (0, 32)}
CASES = {
    "kivi2": case("kivi2", "kivi2", {"bits": (2, 2), "residual": 128, **KIVI}, 0.1),
    "kivi4": case(
        "kivi4", "kivi4", {"bits": (4, 4), "residual": 32, **KIVI}, 0.03, residual_tokens=32
    ),
    "int8": case("int8", "int8", {"bits": (8, 8), "residual": 32}, 0.006, residual_tokens=32),
    "int4": case(
        "int4",
        "int4",
        {"bits": (4, 4), "rotated": (True, False), "residual": 32},
        0.05,
        rotate="keys",
        residual_tokens=32,
    ),
    "int8-int4": case(
        "int8",
        "int4",
        {"bits": (8, 4), "groups": (32, 32), "rotated": (True, True), "residual": 16},
        0.03,
        group=32,
        rotate="both",
        residual_tokens=16,
    ),
    "none-kivi2": case(
        "none",
        "kivi2",
        {"bits": (0, 2), "groups": (0, 32), "exact_sinks": True},
        0.05,
        exact_sinks=True,
    ),
    "none": case("none", "none", {"residual": 1}, 1e-4, residual_tokens=1),
    "snapkv-none": case("none", "none", {}, 1e-4, evict=True),
    "snapkv-int8": case("int8", "int8", {"bits": (8, 8)}, 0.01, evict=True),
    "snapkv-int4": case("int4", "int4", {"bits": (4, 4)}, 0.05, evict=True),
    "snapkv-kivi2": case(
        "kivi2",
        "kivi2",
        {"bits": (2, 2), "exact_sinks": True, **KIVI},
        0.1,
        evict=True,
        residual_tokens=0,
        exact_sinks=True,
    ),
}
FAST = ("kivi2", "int8-int4", "snapkv-int4", "snapkv-kivi2")
ROWS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.full, id=name) for name in CASES
]


def expected_blocks(trace, rule, shape):
    """Returns the blocks that a request must hold after each step, from bytes written anew."""
    heads, channels, itemsize = shape
    tokens = 32 if rule.key_channels else 16
    cell = 0
    for side, bits in enumerate(rule.bits):
        cell += tokens * channels * bits // 8 if bits else tokens * channels * itemsize
        if bits:
            by_channel = side == 0 and rule.key_channels
            cell += 4 * (
                channels if by_channel else tokens * -(-channels // (rule.groups[side] or channels))
            )
    per_page = BLOCK * heads * 2 * channels * itemsize // cell
    prompt, held = len(trace.prompt), []
    settled = restart = -1
    for start, end in trace.chunks:
        settled = 0 if restart < 0 or start < restart else settled
        stored = 0
        if end >= prompt:
            stored = rule.survivors(prompt) + rule.closed(end) - rule.closed(prompt)
        gone = (rule.closed(settled) - rule.first) // BLOCK if settled >= prompt else 0
        blocks = {
            "StagingSpec": -(-end // BLOCK) - gone,
            "StoreSpec": -(-(-(-stored // tokens) * heads) // per_page),
        }
        held.append(blocks)
        settled, restart = start, end
    return held


@pytest.mark.parametrize("name", ROWS)
def test_the_engine_equals_the_reference_and_holds_the_planned_blocks(name, engine_of, dense):
    one = CASES[name]
    engine = engine_of(one.policy)

    traces = engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)
    preempted = engine.run(mixed_prompts(3), NUM_OUTPUTS, chunk=90, preempt_at=range(4, 90, 6))
    again = [engine.run([mixed_prompts(5)[LENGTHS.index(300)]], 40)[0] for _ in range(2)]
    alone = engine.run([mixed_prompts(7)[LENGTHS.index(129)]], 40, chunk=CHUNK)

    assert sum(trace.preemptions for trace in preempted) >= 3
    assert again[1].hits[0] > 0
    assert alone[0].last_prefill == (128, 129)
    for trace in [*traces, *preempted, *again, *alone]:
        comparison = compare(trace, dense, one.rule)
        assert comparison.agrees(one.tolerance), (len(trace.prompt), comparison)
    shape = (dense.num_kv_heads, dense.head_dim, 4)
    for trace in [*traces, *preempted]:
        held = [
            {lane: len(step[lane]) for lane in ("StagingSpec", "StoreSpec")} for step in trace.held
        ]
        assert held == expected_blocks(trace, one.rule, shape)
    longest = traces[LENGTHS.index(411)]
    for what, mistake in one.mistakes.items():
        assert compare(longest, dense, mistake, own=True).error > 2 * one.tolerance, what


def test_a_number_that_no_codec_holds_is_counted_and_held_back(engine_of):
    engine = engine_of(CASES["int4"].policy)
    events = engine.runtime.events
    store = events.stores["kv_store"]
    write = store.write

    def with_infinity(pages, table, start, keys, values):
        keys = keys.clone()
        keys[0, 0, 0] = torch.inf
        return write(pages, table, start, keys, values)

    store.write = with_infinity

    traces = engine.run([mixed_prompts()[5]], 40)

    closed = CASES["int4"].rule.closed
    moves = 1 + (closed(len(traces[0].prompt) + 39) - closed(len(traces[0].prompt))) // BLOCK
    assert int(events.nonfinite.count) == len(events.layers) * moves
    assert all(value == value for row in traces[0].logprobs for value in row.values())
