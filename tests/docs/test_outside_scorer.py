"""The worked example of CONTRIBUTING: a scorer in a package of its own, down to `vllm serve`."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kvpress.testbed.documents import count_tokens, is_correct, make_document

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "outside_scorer"
POLICY = EXAMPLE / "peak.yaml"

BLOCK_SIZE = 32
NUM_PROMPT_TOKENS = 2048
NUM_OUTPUT_TOKENS = 256


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example, installed as any package is, and nothing else."""
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(EXAMPLE, folder / "source")  # a build writes into its source
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def check(policy, site=None):
    """Runs `vllm-kvpress check` with the packages in `site` beside the installed ones."""
    path = {} if site is None else {"PYTHONPATH": str(site)}
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", "vllm_kvpress.cli", "check", str(policy)],
        capture_output=True,
        text=True,
        check=False,
        env=others | path,
        cwd=policy.parent.parent,  # not the example's own folder: its module must come from `site`
    )


def test_the_installed_scorer_is_known_by_its_name(installed):
    done = check(POLICY, installed)

    assert done.returncode == 0, done.stderr
    assert "its scorer: PeakScorer(query_window=64, reach=6)" in done.stdout


def test_the_installed_scorer_is_found_by_its_path(installed, tmp_path):
    policy = tmp_path / "by_path.yaml"
    scorer = "path: kvpress_example_peak:PeakScorer"
    policy.write_text(POLICY.read_text().replace("name: peak", scorer))

    done = check(policy, installed)

    assert done.returncode == 0, done.stderr
    assert "its scorer: PeakScorer(query_window=64, reach=6)" in done.stdout


def test_the_scorer_s_own_check_reaches_the_user(installed, tmp_path):
    policy = tmp_path / "wrong.yaml"
    policy.write_text(POLICY.read_text().replace("query_window: 64", "query_window: 64, reach: -1"))

    done = check(policy, installed)

    assert done.returncode == 2
    assert "reach at least 0" in done.stderr


def test_without_the_package_its_name_is_unknown():
    done = check(POLICY)

    assert done.returncode == 2
    assert "'peak' is not known" in done.stderr


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_installed_scorer_serves(installed, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from serving import POOL_BLOCKS, POOL_USAGE, Server

    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    document = make_document("needle", num_tokens=NUM_PROMPT_TOKENS, seed=11, depth=0.3)
    (question,) = document.questions
    options = ["--dtype", "bfloat16", "--enforce-eager", "--block-size", str(BLOCK_SIZE)]
    options += ["--max-model-len", str(NUM_PROMPT_TOKENS + NUM_OUTPUT_TOKENS)]
    options += ["--kv-cache-memory-bytes", str(2**25)]
    held = []

    with Server(str(POLICY), options) as server:
        usable = server.metric(POOL_BLOCKS) - 1  # vLLM keeps one block for itself

        def sample(piece):
            held.append(round(server.metric(POOL_USAGE) * usable))

        answer, _ = server.chat(
            document.message(question), max_tokens=NUM_OUTPUT_TOKENS, on_token=sample
        )

    assert is_correct(question, answer)
    prompt = count_tokens(document.prompt(question))
    stock = math.ceil(prompt / BLOCK_SIZE)
    # Pieces come behind the prompt, from a busy server many tokens in one; at the end none is held.
    assert min(filter(None, held)) < 0.35 * stock
