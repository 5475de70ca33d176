"""Two precisions in one sequence: losers in a second store, against the dense reference.

Tolerances are those of the codecs alone (`test_packed.py`): what moves an element by a whole step
on one side only. With exact codecs on both sides nothing may differ from full attention.
"""

from dataclasses import dataclass, replace

import pytest
from reference.dense import Rule
from reference.packed import DemotingRule, PackedRule

from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.compare import compare
from engine.harness import BLOCK, Engine
from engine.test_packed import expected_blocks

CHUNK = 64
SINKS, RECENT, BUDGET = 4, 40, 128
SCORERS = {"snapkv": {"window": 32, "pool": 5}, "logquant": {}, "knorm": {}}
KIVI = {"key_channels": True, "groups": (0, 32)}
HEADS, CHANNELS, ITEMSIZE = 4, 64, 4


@dataclass(frozen=True)
class Case:
    """A policy, the same in the reference's words, how near they must be, and mistaken rules."""

    policy: dict
    rule: DemotingRule
    tolerance: float
    mistakes: dict


def case(scorer, quantize, rule, losers, tolerance, *, mistakes=None):
    own = {"sinks": SINKS, "recent": RECENT}
    right = DemotingRule(
        BLOCK,
        scorer,
        **own,
        budget=BUDGET,
        params=SCORERS[scorer],
        **rule,
        losers=PackedRule(BLOCK, **losers),
    )
    policy = {
        "sink_tokens": SINKS,
        "recent_tokens": RECENT,
        "evict": {
            "scorer": {"name": scorer, **SCORERS[scorer]},
            "budget": {"tokens": BUDGET},
            "losers": "demote",
        },
        **({"quantize": quantize} if quantize else {}),
    }
    dropped = {name: getattr(right, name) for name in PackedRule.__dataclass_fields__}
    wrong = {
        "losers are dropped": PackedRule(**dropped),
        "losers stay exact": replace(right, losers=PackedRule(BLOCK)),
        **{what: replace(right, **change) for what, change in (mistakes or {}).items()},
    }
    if right.losers.bits[0] < 8:  # at 8 bits a loser more or less is hardly felt
        wrong["budget + 64"] = replace(right, budget=BUDGET + 64)
    return Case(policy, right, tolerance, wrong)


EXACT = {"keys": "none", "values": "none"}
CASES = {
    "snapkv-int4-kivi2": case(
        "snapkv",
        {
            **{"keys": "int4", "values": "int4", "group": 32, "rotate": "keys"},
            "losers": {"keys": "kivi2", "values": "kivi2"},
        },
        {"bits": (4, 4), "groups": (32, 32), "rotated": (True, False)},
        {"bits": (2, 2), **KIVI},
        0.1,
        mistakes={"survivors stay exact": {"bits": (0, 0)}},
    ),
    "logquant-none-kivi2": case("logquant", None, {}, {"bits": (2, 2), **KIVI}, 0.1),
    "snapkv-none-int8": case(
        "snapkv",
        {**EXACT, "losers": {"keys": "int8", "values": "int8"}},
        {},
        {"bits": (8, 8)},
        0.006,
        mistakes={
            "losers in groups of 32": {"losers": PackedRule(BLOCK, bits=(8, 8), groups=(32, 32))}
        },
    ),
    "knorm-kivi4-int4": case(
        "knorm",
        {
            **{"keys": "kivi4", "values": "kivi4", "residual_tokens": 32, "exact_sinks": True},
            "losers": {"keys": "int4", "values": "int4", "rotate": "both"},
        },
        {"bits": (4, 4), "residual": 32, "exact_sinks": True, **KIVI},
        {"bits": (4, 4), "rotated": (True, True)},
        0.05,
    ),
}
FAST = ("snapkv-int4-kivi2",)
ROWS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.full, id=name) for name in CASES
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


def held_blocks(trace, rule, heads=HEADS):
    """Returns the blocks of each lane that a request must hold after each step."""
    prompt, losers = len(trace.prompt), rule.losers
    tokens = 32 if losers.key_channels else 16
    cell = 0
    for side, bits in enumerate(losers.bits):
        by_channel = side == 0 and losers.key_channels
        groups = -(-CHANNELS // (losers.groups[side] or CHANNELS))
        cell += tokens * CHANNELS * bits // 8 + 4 * (CHANNELS if by_channel else tokens * groups)
    per_page = BLOCK * heads * 2 * CHANNELS * ITEMSIZE // cell
    blocks = -(-(-(-rule.demoted(prompt) // tokens) * heads) // per_page)
    steps = expected_blocks(trace, rule, (heads, CHANNELS, ITEMSIZE))
    for step, (_, end) in zip(steps, trace.chunks, strict=True):
        step["DemotedSpec"] = blocks if end >= prompt else 0
    return steps


def test_log_probabilities_equal_the_reference(one, mixed, dense):
    assert sum(one.rule.demoted(len(trace.prompt)) > 0 for trace in mixed) >= 4
    check(mixed, dense, one)


def test_a_slightly_wrong_rule_is_noticed(one, mixed, dense):
    longest = mixed[LENGTHS.index(411)]

    for what, mistake in one.mistakes.items():
        assert compare(longest, dense, mistake, own=True).error > 2 * one.tolerance, what


def test_blocks_held_are_the_plan_s_at_every_step(one, mixed):
    lanes = ("StagingSpec", "StoreSpec", "DemotedSpec")
    for trace in mixed:
        held = [{lane: len(step[lane]) for lane in lanes} for step in trace.held]
        assert held == held_blocks(trace, one.rule)


def test_forced_preemption_prefix_hits_and_a_last_chunk_of_one_token(one, engine, dense):
    preempted = engine.run(mixed_prompts(3), NUM_OUTPUTS, chunk=90, preempt_at=range(4, 90, 6))
    again = [engine.run([mixed_prompts(5)[LENGTHS.index(300)]], 40)[0] for _ in range(2)]
    alone = engine.run([mixed_prompts(7)[LENGTHS.index(257)]], 40, chunk=CHUNK)

    assert sum(trace.preemptions for trace in preempted) >= 3
    assert again[1].hits[0] > 0
    assert alone[0].last_prefill == (256, 257)
    check([*preempted, *again, *alone], dense, one)


@pytest.mark.full
def test_exact_codecs_in_both_stores_lose_and_double_no_token(tiny, dense):
    quantize = {**EXACT, "losers": EXACT}
    one = case("snapkv", quantize, {}, {}, 1e-4)
    engine = Engine(tiny, one.policy)

    traces = engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)

    assert any(step["DemotedSpec"] for trace in traces for step in trace.held)
    for trace in traces:
        assert compare(trace, dense, Rule(BLOCK)).agrees()
    dropped = one.mistakes["losers are dropped"]
    assert compare(traces[LENGTHS.index(411)], dense, dropped, own=True).error > 1e-3
    engine.close()
