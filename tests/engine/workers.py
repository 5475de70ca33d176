"""An engine whose core and workers are processes of their own, as `vllm serve` runs it.

    python -m engine.workers JOB OUT      (both pickled)

`write_spy` makes a package whose plugin vLLM loads in every process of such an engine.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["register_spy", "serve", "write_spy"]

TESTS = Path(__file__).parents[1]
FOLDER = "KVPRESS_TEST_SPY"

# Everything that the plugin may wrap.
TARGETS = (
    ("vllm.platforms.cpu", "CpuPlatform.get_attn_backend_cls"),
    ("vllm.v1.core.kv_cache_utils", "get_kv_cache_groups"),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_computed_blocks"),
    ("vllm.v1.engine.input_processor", "InputProcessor.process_inputs"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.initialize_kv_cache"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.initialize_kv_cache"),
)


def serve(
    model: Path, prompts: list[list[int]], num_outputs: int, folder: Path, **options: Any
) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Returns (outputs, log-probabilities) of each prompt, from an engine in other processes."""
    job, out = folder / "job.pickle", folder / "out.pickle"
    job.write_bytes(pickle.dumps((str(model), prompts, num_outputs, options)))
    env = {k: v for k, v in os.environ.items() if k != "KVPRESS_ACTIVE"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", FOLDER: str(folder)}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(folder)])
    done = subprocess.run(
        [sys.executable, "-m", "engine.workers", str(job), str(out)],
        cwd=TESTS,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return pickle.loads(out.read_bytes())  # noqa: S301 - written by our own child


def write_spy(folder: Path) -> None:
    """Writes the metadata of a package with one plugin, `register_spy`, under `folder`."""
    metadata = folder / "kvpress_test_spy-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kvpress-test-spy\nVersion: 1\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nspy = engine.workers:register_spy\n"
    )


def register_spy() -> None:
    """Writes down, again and again, what this process has wrapped: it may be killed at any time."""
    import threading

    threading.Thread(target=_spy, daemon=True).start()


def _spy() -> None:
    import multiprocessing

    from vllm_kvpress.integration import compat

    name = multiprocessing.current_process().name
    target = Path(os.environ[FOLDER]) / f"{os.getpid()}.seen.json"
    while True:
        seen = {"name": name, "patched": sorted(compat.patched()), "ours": _ours()}
        draft = target.with_suffix(".draft")
        draft.write_text(json.dumps(seen))
        draft.replace(target)
        time.sleep(0.3)


def _ours() -> list[str]:
    """Returns those of the targets that are functions of ours, in modules imported so far."""
    found = []
    for module_name, path in TARGETS:
        target: Any = sys.modules.get(module_name)
        for part in path.split(".") if target else ():
            target = getattr(target, part, None)
        code = getattr(getattr(target, "__func__", target), "__code__", None)
        if code is not None and "vllm_kvpress" in code.co_filename:
            found.append(f"{module_name}.{path}")
    return found


def _main(job_file: str, out_file: str) -> None:
    from vllm import LLM, SamplingParams

    from engine.harness import DEFAULTS, TOP

    with open(job_file, "rb") as file:
        model, prompts, num_outputs, options = pickle.load(file)  # noqa: S301 - our own parent's
    llm = LLM(model, **{**DEFAULTS, **options})
    params = SamplingParams(
        temperature=0.0, max_tokens=num_outputs, ignore_eos=True, logprobs=TOP, detokenize=False
    )
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = []
    for result in llm.generate(inputs, params, use_tqdm=False):
        (completion,) = result.outputs
        rows = [{t: e.logprob for t, e in row.items()} for row in completion.logprobs]
        results.append((list(completion.token_ids), rows))
    Path(out_file).write_bytes(pickle.dumps(results))
    time.sleep(0.5)  # for the spy


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
