"""Runs what is missing of a grid, one engine after another, and writes each cell as it comes."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_kvpress.errors import KVPressError
from vllm_kvpress.evaluation.divergence import reference_path
from vllm_kvpress.evaluation.grid import Cell, Settings, Variant
from vllm_kvpress.evaluation.items import num_prompts, room_tokens
from vllm_kvpress.evaluation.progress import Work, show_progress
from vllm_kvpress.evaluation.records import append_record, cell_key, read_records, record_key
from vllm_kvpress.testbed import MODEL_NAME

__all__ = ["Plan", "run_evaluation"]

_RUNNER = "vllm_kvpress.evaluation.runner"
_END_SECONDS = 60
_LOG_LINES = 400


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        settings: What all cells share.
        variants: The engines, in the order in which they start.
        cells: What each of them measures.
        command: The command line, for the records.
    """

    settings: Settings
    variants: Sequence[Variant]
    cells: Sequence[Cell]
    command: Sequence[str]


def run_evaluation(plan: Plan, folder: Path, console: Console) -> None:
    """Measures every cell that the folder's results do not hold yet.

    Raises:
        KVPressError: vLLM is not installed, or an engine did not do its work.
    """
    if importlib.util.find_spec("vllm") is None:
        raise KVPressError(
            "vLLM is not installed here", fix="Install vllm-kvpress[cuda] or vllm-kvpress[cpu]"
        )
    done = {record_key(record) for record in read_records(folder)}

    def is_missing(variant: Variant, cell: Cell) -> bool:
        lacks_reference = (
            plan.settings.divergence
            and variant.source is None
            and not _reference(plan, folder, cell).exists()
        )
        return lacks_reference or cell_key(plan.settings, variant, cell) not in done

    missing = [
        (variant, cells)
        for variant in plan.variants
        if (cells := [cell for cell in plan.cells if is_missing(variant, cell)])
    ]
    num_all = len(plan.variants) * len(plan.cells)
    num_missing = sum(len(cells) for _, cells in missing)
    console.print(
        f"{num_missing} cells to measure on {len(missing)} engines, "
        f"{num_all - num_missing} already in {folder}",
        markup=False,
        soft_wrap=True,
    )
    limit = plan.settings.limit
    prompts = [c.length * num_prompts(c.task) for _, cells in missing for c in cells]
    work = Work(engines=len(missing), tokens=limit * sum(prompts))
    with show_progress(console, work):
        for variant, cells in missing:
            _run_engine(plan, variant, cells, folder, work)


def _reference(plan: Plan, folder: Path, cell: Cell) -> Path:
    return reference_path(folder, plan.settings.key, cell.task, cell.length)


def _run_engine(
    plan: Plan, variant: Variant, cells: Sequence[Cell], folder: Path, work: Work
) -> None:
    """Starts one engine, reads its events, and appends a record for each cell."""
    work.title = f"{variant.title}: starting"
    log = folder / "logs" / f"{_file_name(variant.title)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    remaining = iter(cells)
    with _job_file(_job(plan, variant, cells, folder)) as job, log.open("wb") as stderr:
        command = [sys.executable, "-m", _RUNNER, str(job)]
        with _child(command, stderr, plan.settings.model) as process:
            for event in _events(process):
                if event["event"] == "answered":
                    work.answered(event["tokens"])
                    continue
                if event["event"] == "ready":
                    work.started()
                else:
                    append_record(folder, _record(plan, variant, event))
                    work.finished(variant.title, event)
                cell = next(remaining, None)
                work.title = variant.title if cell is None else f"{variant.title}: {cell.task}"
            code = process.wait()
    if code:
        raise KVPressError(
            f"the engine for {variant.title} ended with exit code {code}",
            got=_reason(log),
            fix=f"See {log}; the same command goes on from there",
        )


def _job(plan: Plan, variant: Variant, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    tasks = [cell.task for cell in plan.cells]
    longest = max(cell.length for cell in plan.cells)
    return {
        "model": plan.settings.model,
        "policy": variant.source,
        "vllm_options": list(plan.settings.vllm_options),
        "max_model_len": longest + room_tokens(tasks, plan.settings.model),
        "limit": plan.settings.limit,
        "seed": plan.settings.seed,
        "divergence": plan.settings.divergence,
        "cells": [
            {**asdict(cell), "reference": str(_reference(plan, folder, cell).absolute())}
            for cell in cells
        ],
    }


def _record(plan: Plan, variant: Variant, event: dict[str, Any]) -> dict[str, Any]:
    return {
        "policy": variant.policy,
        "keep_ratio": variant.keep_ratio,
        "task": event["task"],
        "length": event["length"],
        **event["record"],
        "policy_in_full": variant.source,
        "settings": plan.settings.to_json(),
        "command": shlex.join(plan.command),
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@contextmanager
def _job_file(job: dict[str, Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvpress-eval-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        yield path


@contextmanager
def _child(command: Sequence[str], stderr: Any, model: str) -> Iterator[subprocess.Popen[str]]:
    """Yields a running engine; ends it whatever happens."""
    process = subprocess.Popen(
        command, env=_environment(model), stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _environment(model: str) -> dict[str, str]:
    """Returns the environment of an engine: no policy from outside, the scheduler in view."""
    environment = {name: v for name, v in os.environ.items() if name != "VLLM_KV_POLICY"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if model == MODEL_NAME:
        # A hundred of its requests; by itself vLLM would take a share of the machine's memory.
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return environment


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def _reason(log: Path) -> str:
    """Returns the line of a log that says most about why the engine ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if "Error" in line.partition(":")[0] or "error:" in line]
    return (errors or said or ["nothing in its log"])[-1][:300]


def _file_name(title: str) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in title)[:120]
