"""lm-eval for real, offline: our tasks under a policy, in its own vLLM and through a server."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from vllm_kvpress.testbed import model_path
from vllm_kvpress.testbed.documents import TASKS, count_tokens

pytest.importorskip("vllm")

SNAPKV = {
    "base": "snapkv",
    "evict": {"scorer": {"window": 64, "pool": 13}, "budget": {"keep_ratio": 0.5}},
}
ENGINE = {"dtype": "bfloat16", "max_model_len": 1200, "enforce_eager": True, "block_size": 32}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
SERVER_SECONDS = 300


def environment(**more):
    dropped = ("VLLM_KV_POLICY",)
    return {name: v for name, v in os.environ.items() if name not in dropped} | OFFLINE | more


def task_path():
    words = [sys.executable, "-m", "vllm_kvpress.cli", "eval", "--task-path"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def lm_eval(output, model, model_args, tasks, *words):
    """Runs lm_eval on a few documents and returns its results by task, and all it printed."""
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        model,
        "--model_args",
        json.dumps(model_args),
    ]
    command += ["--tasks", tasks, "--include_path", task_path(), "--limit", "3"]
    command += ["--metadata", '{"num_documents": 3}', "--output_path", str(output), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), timeout=550
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = output.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    return {task: row["exact_match,none"] for task, row in results.items()}, (
        done.stdout + done.stderr
    )


def test_every_task_file_gives_lm_eval_prompts_of_its_length():
    from lm_eval.tasks import TaskManager

    metadata = {"num_documents": 2, "pretrained": str(model_path())}
    manager = TaskManager(include_path=task_path(), metadata=metadata)
    names = [*(f"kvpress_{task}_1k" for task in TASKS), "kvpress_chain_4k"]
    tasks = manager.load(names)["tasks"]

    assert len(tasks) == len(TASKS) + 1
    for name, task in tasks.items():
        row = max(task.test_docs(), key=lambda row: count_tokens(row["prompt"]))
        longest = count_tokens(row["prompt"])
        assert 0.97 < longest / (4096 if name.endswith("4k") else 1024) <= 1
        assert task.doc_to_text(row).endswith(" answer:")
        assert task.process_results(row, [f" {row['answer']} "])["exact_match"] == 1.0
        assert task.process_results(row, ["no"]) == {"exact_match": 0.0, "contains": 0.0}


@pytest.mark.engine
def test_lm_eval_s_own_engine_runs_our_tasks_under_a_policy(tmp_path):
    model_args = {
        "pretrained": str(model_path()),
        **ENGINE,
        "additional_config": {"kv_policy": SNAPKV},
    }

    found, printed = lm_eval(
        tmp_path, "vllm", model_args, "kvpress_needle_1k,kvpress_multi_turn_1k"
    )

    assert found == {"kvpress_needle_1k": 1.0, "kvpress_multi_turn_1k": 1.0}
    assert "KV policy snapkv-custom: 4 layers" in printed


@pytest.fixture
def server(tmp_path):
    """The port and the log of a `vllm serve --kv-policy`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_path())]
    command += ["--served-model-name", "testbed", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-policy", "snapkv:keep_ratio=0.5,pool=13,window=64", "--enforce-eager"]
    command += ["--max-model-len", "1200"]
    log = tmp_path / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment())
    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while not is_up(port):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield port, log
    finally:
        process.terminate()
        process.wait(timeout=60)


def is_up(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.engine
@pytest.mark.full
def test_lm_eval_asks_a_running_server(tmp_path, server):
    port, log = server
    model_args = {
        "model": "testbed",
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer": str(model_path()),
        "tokenized_requests": False,
        "num_concurrent": 3,
    }

    found, _ = lm_eval(tmp_path / "out", "local-completions", model_args, "kvpress_needle_1k")

    assert found == {"kvpress_needle_1k": 1.0}
    assert "KV policy snapkv-custom: 4 layers" in log.read_text()
