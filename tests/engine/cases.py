"""The policies of the matrix: each as a user writes it, as the reference reads it, and mistaken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from reference.dense import Rule
from reference.tiny_model import random_prompt

from engine.harness import BLOCK

__all__ = ["BUDGET", "CASES", "LENGTHS", "NUM_OUTPUTS", "Case", "mixed_prompts", "sized"]

BUDGET = 96

# Shorter than, equal to and one above the budget; a one-token last chunk of 64; block multiples;
# and lengths in mid-block. Outputs end in mid-block and on a block's edge (97 + 63).
LENGTHS = (37, 96, 97, 129, 160, 300, 411, 257)
NUM_OUTPUTS = (24, 40, 63, 30, 50, 80, 50, 45)


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Attributes:
        policy: As `kv_policy=` takes it.
        rule: The same in the reference's words.
        mistakes: What -> a rule that is slightly wrong, and must be noticed.
    """

    name: str
    policy: dict[str, Any]
    rule: Rule
    mistakes: dict[str, Rule] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def mixed_prompts(seed: int = 0) -> list[list[int]]:
    """Returns the prompts of the mixed batch, nothing shared between them."""
    return [random_prompt(length, seed=1000 * seed + length) for length in LENGTHS]


def evicting(name: str, *, recent: int = 16, **given: Any) -> Case:
    """Returns a case that keeps the best-scored tokens.

    Args:
        name: Of the scorer.
        recent: Recent tokens.
        given: Any of every, prompt_end, keep_ratio, budget, params, label.
    """
    params = given.get("params", {})
    ratio = given.get("keep_ratio")
    budget = None if ratio else given.get("budget", BUDGET)
    when = {key: given[key] for key in ("prompt_end",) if key in given}
    if "every" in given:
        when["every_decode_tokens"] = given["every"]
    policy = {
        "sink_tokens": 4,
        "recent_tokens": recent,
        "evict": {
            "scorer": {"name": name, **params},
            "budget": {"keep_ratio": ratio} if ratio else {"tokens": budget},
            "when": when,
        },
    }
    rule = Rule(
        BLOCK,
        name,
        sinks=4,
        recent=recent,
        budget=budget,
        keep_ratio=ratio,
        prompt_end=given.get("prompt_end", True),
        every=given.get("every", 0),
        params=params,
    )
    mistakes = {
        "no eviction": replace(rule, scorer="full"),
        "budget off by one block": _budget_plus(rule, BLOCK),
        **{what: replace(rule, **change) for what, change in given.get("mistakes", {}).items()},
    }
    return Case(given.get("label", name), policy, rule, mistakes)


def _budget_plus(rule: Rule, tokens: int) -> Rule:
    if rule.budget is not None:
        return replace(rule, budget=rule.budget + tokens)
    assert rule.keep_ratio is not None
    return replace(rule, keep_ratio=rule.keep_ratio + 0.15)


def streaming(label: str = "streaming_llm", window: int = 60) -> Case:
    """Returns StreamingLLM with four sinks and a window."""
    rule = Rule(BLOCK, "window", sinks=4, recent=window)
    policy = {
        "sink_tokens": 4,
        "recent_tokens": window,
        "evict": {"scorer": {"name": "position"}},
    }
    mistakes = {
        "no eviction": replace(rule, scorer="full"),
        "budget off by one block": replace(rule, recent=window + BLOCK),
        "window + 1": replace(rule, recent=window + 1),
        "window - 1": replace(rule, recent=window - 1),
        "no sinks": replace(rule, sinks=0, recent=window),
    }
    return Case(label, policy, rule, mistakes)


def sized(case: Case, block_size: int, budget: int) -> Case:
    """Returns the case at another block size, with a budget that fits it."""
    rule = replace(case.rule, block_size=block_size, budget=budget)
    evict = {**case.policy["evict"], "budget": {"tokens": budget}}
    return Case(f"{case}-{block_size}", {**case.policy, "evict": evict}, rule)


SNAPKV = evicting(
    "snapkv",
    recent=40,
    params={"window": 32, "pool": 5},
    mistakes={
        "window + 1": {"params": {"window": 33, "pool": 5}},
        "window - 1": {"params": {"window": 31, "pool": 5}},
        "pool 3": {"params": {"window": 32, "pool": 3}},
    },
)

# Representative of the three ways: events with queries, events while decoding, position alone.
CASES = {
    case.name: case
    for case in (
        SNAPKV,
        evicting("knorm", every=24, mistakes={"every + 1": {"every": 25}}),
        streaming(),
        evicting("random", every=40, prompt_end=False, mistakes={"seed": {"params": {"seed": 1}}}),
        evicting("keydiff", keep_ratio=0.4),
        evicting("value_key_norm", every=32, mistakes={"recent + 9": {"recent": 25}}),
    )
}
REPRESENTATIVE = ("snapkv", "knorm", "streaming_llm")
