"""Records as an engine would give them, without an engine."""

import pytest

SETTINGS = {
    "model": "testbed",
    "limit": 10,
    "seed": 0,
    "vllm_options": [],
    "versions": {"vllm": "0.32.0", "vllm_kvpress": "0.1.0"},
}


def make_record(policy, right, keep_ratio=0.5, task="needle", length=1024, **changes):
    scores = [int(letter) for letter in right]
    return {
        "policy": policy,
        "keep_ratio": keep_ratio,
        "task": task,
        "length": length,
        "accuracy": sum(scores) / len(scores),
        "standard_error": 0.1,
        "n": len(scores),
        "scores": scores,
        "depths": [index / 10 for index in range(len(scores))] if task == "needle" else None,
        "blocks": {"peak": 40.0, "steady": 40.0 * keep_ratio, "pool": 1000, "least_free": 3},
        "requests_at_once": {"seen": 10, "in_pool": 50, "preemptions": 0},
        "time": {
            "prefill_seconds": 2.0,
            "prefill_tokens": 10000,
            "decode_seconds": 0.5,
            "decode_steps": 50,
            "decode_tokens": 500,
        },
        "bytes_per_token": 4096.0 * keep_ratio,
        "engine": {"device": "cpu", "dtype": "bfloat16", "block_size": 32, "block_bytes": 65536},
        "policy_in_full": None,
        "settings": SETTINGS,
        "command": "vllm-kvpress eval --model testbed",
        **changes,
    }


@pytest.fixture
def record():
    return make_record


@pytest.fixture
def records():
    """Two lengths of one task: the full cache, the floor, a good policy and a useless one."""
    made = []
    for length in (1024, 2048):
        made += [
            make_record("full", "1" * 10, 1.0, length=length),
            make_record("random", "1000000000", length=length),
            make_record("snapkv:pool=13,window=64", "1111111110", length=length),
            make_record("knorm", "0100000100", length=length),
        ]
    return made
