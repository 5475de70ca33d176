"""results.jsonl: one line a cell, appended as soon as it is measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_kvpress import __version__
from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.evaluation.grid import FLOOR, FULL, Cell, Settings, Variant

__all__ = [
    "FILE_NAME",
    "Record",
    "Results",
    "append_record",
    "cell_key",
    "commands",
    "read_records",
    "read_results",
    "versions",
]

FILE_NAME = "results.jsonl"
_NEEDED = ("settings", "policy", "keep_ratio", "task", "length", "accuracy", "scores", "blocks")

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The records of one evaluation.

    Attributes:
        records: One a cell, in the order in which they were first measured.
        num_others: Records of the same file that other settings made.
    """

    records: list[Record]
    num_others: int


def versions() -> dict[str, str]:
    """Return the releases that a result depends on; looks at metadata only."""
    found = {"vllm_kvpress": __version__, "python": platform.python_version()}
    for name in ("vllm", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cell_key(settings: Settings, variant: Variant, cell: Cell) -> str:
    """Return what two measurements of the same thing have in common, as a string."""
    return _key(
        {
            "settings": settings.to_json(),
            "policy": variant.policy,
            "policy_in_full": variant.source,
            "keep_ratio": variant.keep_ratio,
            "task": cell.task,
            "length": cell.length,
        }
    )


def record_key(record: Mapping[str, Any]) -> str:
    """Return the `cell_key` of a record."""
    names = ("settings", "policy", "policy_in_full", "keep_ratio", "task", "length")
    return _key({name: record.get(name) for name in names})


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Add one line to the folder's results, and have it on disk before returning."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    _drop_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(folder: Path) -> list[Record]:
    """Return all records of a folder; none if there is no file. A torn last line is left out.

    Raises:
        ConfigError: A line is not a record.
    """
    path = folder / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown(str(path))} cannot be read", got=str(error)[:200]) from error
    *lines, _torn = text.split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not all(name in record for name in _NEEDED):
            raise ConfigError(
                f"line {number} of {shown(str(path))} is not a result",
                got=shown(line),
                fix="Remove that line, or use another folder",
            )
        records.append(record)
    return records


def read_results(folder: Path, settings: Settings | None = None) -> Results:
    """Return the newest record of every cell that was measured with the same settings.

    Args:
        folder: Of an evaluation.
        settings: Which ones; by default those of the newest record.

    Raises:
        ConfigError: There are none, or none of the settings.
    """
    records = read_records(folder)
    if not records:
        raise ConfigError(
            f"no results in {shown(str(folder))}",
            allowed=f"a folder with a {FILE_NAME} that `vllm-kvpress eval` wrote",
        )
    wanted = records[-1]["settings"] if settings is None else settings.to_json()
    same = [record for record in records if record["settings"] == wanted]
    if not same:
        raise ConfigError(
            f"no results of this command in {shown(str(folder))}",
            got=f"{len(records)} that other settings made",
            fix="`vllm-kvpress report` shows the newest of those",
        )
    cells = {_place(record): record for record in same}
    return Results(list(cells.values()), len(records) - len(same))


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("policy", "keep_ratio", "task", "length"))


def _key(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


def _drop_torn_line(path: Path) -> None:
    """Remove what an interrupted write left behind the last line's end."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with path.open("rb+") as file:
            file.truncate(whole)


def by_cell(records: Sequence[Record]) -> dict[tuple[str, int], list[Record]]:
    """Return the records of each (task, length), tasks and lengths in order of appearance."""
    cells: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        cells.setdefault((record["task"], record["length"]), []).append(record)
    return dict(sorted(cells.items(), key=lambda item: item[0][1]))


def commands(records: Sequence[Record]) -> list[str]:
    """Return the commands that give these records again.

    Commands that differ in their policies alone are one, with the policies that were measured.
    """
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for record in records:
        words = shlex.split(record["command"].replace("--policies=", "--policies "))
        if "--policies" in words:
            words[words.index("--policies") + 1] = ""
        policies = found.setdefault(tuple(words), {})
        if record["policy"] not in (FULL, FLOOR):
            policies[record["policy"]] = None
    made_by = [
        shlex.join(",".join(policies) if word == "" else word for word in words)
        for words, policies in found.items()
        if policies or "" not in words
    ]
    return made_by or [records[-1]["command"]]
