"""What cannot work ends at start, or ends the engine, with a typed error."""

import pytest
from reference.tiny_model import random_prompt

from engine import bad_scorers
from engine.cases import CASES
from engine.compare import compare
from vllm_kvpress.errors import CapacityError, ScoreError

OUTSIDE = {
    "sink_tokens": 4,
    "recent_tokens": 16,
    "evict": {
        "scorer": {"path": "engine.bad_scorers:Scorer"},
        "budget": {"tokens": 96},
        "when": {"every_decode_tokens": 24},
    },
}
FAULTS = {
    "NaN": (ScoreError, "returned NaN; got 1 of 600, the first at KV head 1, token 7"),
    "NaN in the open block": (ScoreError, "returned NaN; got 1 of 600"),
    "every token": (ScoreError, "did not score every token"),
    "wrong kind": (ScoreError, "wrong kind"),
    "no tensor": (ScoreError, "tensor|did not score"),
    "raises": (ScoreError, "layer 0, raised RuntimeError: a mistake of the scorer's own"),
}


def test_an_outside_scorer_works_and_its_mistakes_end_the_step(engine_of, dense, monkeypatch):
    engine = engine_of(OUTSIDE)
    prompt = random_prompt(150, seed=3)

    (trace,) = engine.run([prompt], 30)

    comparison = compare(trace, dense, CASES["knorm"].rule)
    assert comparison.agrees()
    assert comparison.events == 2
    for fault, (kind, message) in FAULTS.items():
        monkeypatch.setattr(bad_scorers.Scorer, "fault", fault)
        with pytest.raises(kind, match=message):
            engine.run([random_prompt(150, seed=4)], 30)
        engine.abort_all()
        engine.check_empty()


def test_a_budget_that_cannot_hold_its_forced_tokens_in_whole_blocks(tiny):
    from engine.harness import Engine

    policy = {**OUTSIDE, "evict": {"scorer": {"name": "knorm"}, "budget": {"tokens": 50}}}

    with pytest.raises(CapacityError, match="got 50 tokens at a block size of 32"):
        Engine(tiny, policy)


def test_a_pool_too_small_for_the_peak_of_one_request_is_refused(tiny):
    from engine.harness import Engine

    # 16 blocks of staging and 3 of store, 1 of queries, 1 null block.
    with pytest.raises(ValueError, match="KV cache"):
        Engine(tiny, CASES["snapkv"].policy, num_gpu_blocks_override=19)
