"""`vllm serve --data-parallel-size 2`: each engine compresses its own requests in its own pool."""

import json
import urllib.request
from pathlib import Path

import pytest
from reference.dense import DenseLlama, default_chunks
from reference.tiny_model import random_prompt

from engine.cases import CASES
from engine.compare import FELT, compare
from engine.harness import BLOCK, TOP, Trace
from vllm_kvpress.testbed import MODEL_NAME, model_path

SCRIPTS = Path(__file__).parents[2] / "scripts"
NUM_OUTPUTS = 40


def ask(server, rank, prompt):
    """The trace of a request that one engine serves."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": NUM_OUTPUTS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": TOP,
        "return_tokens_as_token_ids": True,
    }
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
    url = f"{server.url}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - ours
    with urllib.request.urlopen(request, timeout=300) as response:  # noqa: S310
        (choice,) = json.loads(response.read())["choices"]
    found = choice["logprobs"]
    rows = [{token_id(t): p for t, p in row.items()} for row in found["top_logprobs"]]
    chunks = default_chunks(len(prompt), len(prompt) + NUM_OUTPUTS - 1)
    return Trace(prompt, [token_id(token) for token in found["tokens"]], rows, chunks)


def token_id(text):
    return int(text.removeprefix("token_id:"))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_both_engines_equal_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    from serving import Server

    case, model = CASES["snapkv"], DenseLlama(model_path())
    options = ["--data-parallel-size", "2", "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "512", "--block-size", str(BLOCK)]
    options += ["--kv-cache-memory-bytes", str(2**26)]

    with Server(json.dumps(case.policy), options) as server:
        # The same prompt twice to each: the second time from that engine's prefix cache.
        traces = [ask(server, rank, random_prompt(300, seed=rank)) for rank in (0, 1, 0, 1)]
        served = [
            server.metric(rf'^vllm:prompt_tokens_total{{.*engine="{rank}".*}} (\S+)$')
            for rank in (0, 1)
        ]
        cached = [
            server.metric(rf'^vllm:prefix_cache_hits_total{{.*engine="{rank}".*}} (\S+)$')
            for rank in (0, 1)
        ]

    assert served == [600, 600]
    assert all(256 <= hits < 300 for hits in cached)
    for trace in traces:
        assert compare(trace, model, case.rule, own=True).agrees()
        for what, mistake in case.mistakes.items():
            assert compare(trace, model, mistake, own=True).error > FELT, what
