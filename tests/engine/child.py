"""An engine in a process of its own: stock vLLM, the other model runner, the other scheduler.

python -m engine.child JOB OUT      (both pickled)
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Job", "Report", "in_child"]

TESTS = Path(__file__).parents[1]


@dataclass
class Job:
    """What a child process does.

    Attributes:
        runs: Name -> (prompts, number of outputs, further arguments of `Engine.run`).
        policy: None for an engine without one.
        plugin: Whether vLLM may load the plugin at all.
        runner: "v1" or "v2".
        asynchronous: Whether to run vLLM's asynchronous scheduler.
        rule: Of tokens that are packed as they are written: their codes come back with the traces.
    """

    model: str
    runs: dict[str, tuple[list[list[int]], Any, dict[str, Any]]]
    policy: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    plugin: bool = True
    runner: str = "v1"
    asynchronous: bool = False
    rule: Any = None


@dataclass
class Report:
    """What a child process saw.

    Attributes:
        traces: Of each run.
        runner: The modules of the model runner's class and its bases.
        scheduler: The scheduler's class.
        modules: Modules of the plugin that the process has imported.
        in_flight: Most steps that were scheduled before an earlier one's output was processed.
    """

    traces: dict[str, list[Any]] = field(default_factory=dict)
    runner: list[str] = field(default_factory=list)
    scheduler: str = ""
    modules: list[str] = field(default_factory=list)
    in_flight: int = 1


def in_child(job: Job, folder: Path, timeout: float = 500, **env: str) -> Report:
    """Returns the report of a fresh process that did the job."""
    job_file, out_file = folder / "job.pickle", folder / "report.pickle"
    job_file.write_bytes(pickle.dumps(job))
    if not job.plugin:
        env["VLLM_PLUGINS"] = ""
    if job.runner == "v2":
        # Off CUDA, vLLM takes runner V2 for its Triton kernels only if Triton seems usable.
        env |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("KVPRESS_ACTIVE",)}
    done = subprocess.run(
        [sys.executable, "-m", "engine.child", str(job_file), str(out_file)],
        cwd=TESTS,
        env={**inherited, "PYTHONPATH": str(TESTS), **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return pickle.loads(out_file.read_bytes())  # noqa: S301 - written by our own child


def _do(job: Job) -> Report:
    if job.runner == "v2":
        _pretend_triton_works()
    if job.asynchronous:
        from engine.asynchronous import force

        force()
    from engine.harness import Engine
    from engine.recording import RecordingEngine

    if job.rule is None:
        engine = Engine(job.model, job.policy, **job.options)
    else:
        engine = RecordingEngine(job.model, job.policy, job.rule, **job.options)
    report = Report(runner=[kind.__module__ for kind in type(engine.runner).__mro__])
    report.scheduler = type(engine.scheduler).__name__
    for name, (prompts, num_outputs, further) in job.runs.items():
        report.traces[name] = engine.run(prompts, num_outputs, **further)
    report.modules = sorted(name for name in sys.modules if name.startswith("vllm_kvpress"))
    report.in_flight = engine.in_flight
    engine.close()
    return report


def _pretend_triton_works() -> None:
    from types import SimpleNamespace

    import triton.backends

    driver = SimpleNamespace(is_active=lambda: False)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


if __name__ == "__main__":
    from engine.child import _do as do

    with open(sys.argv[1], "rb") as file:
        result = do(pickle.load(file))  # noqa: S301 - written by our own parent
    Path(sys.argv[2]).write_bytes(pickle.dumps(result))
