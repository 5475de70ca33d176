"""What compiling said of every variant of a kernel: judged, shown as a table, kept in a file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Most shared memory of a block, in KiB, by compute capability.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
MAX_REGISTERS = 255
HEADER = ("op", "variant", "arch", "registers", "spill bytes", "stack", "shared", "seconds")


@dataclass(frozen=True)
class Record:
    """What became of one variant; bytes where no unit is named.

    Attributes:
        op: The operation.
        name: The variant's.
        architecture: Compute capability.
        registers: Of a thread.
        spill_stores: Of registers written to memory for want of registers, over the code.
        spill_loads: Of registers read back.
        stack: Of a thread, spills included.
        shared: Of a block.
        seconds: What compiling took.
        error: Why there is no machine code; empty if there is.
        fingerprint: Of what was compiled: the same again gives the same machine code.
    """

    op: str
    name: str
    architecture: int
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str = ""
    fingerprint: str = ""

    def problems(self) -> list[str]:
        """Returns why this variant may not be shipped; nothing if it may."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(
                f"spills registers: {self.spill_stores} bytes stored, {self.spill_loads} loaded"
            )
        if self.registers > MAX_REGISTERS:
            found.append(f"needs {self.registers} registers; at most {MAX_REGISTERS} exist")
        limit = SHARED_KIB[self.architecture] * 1024
        if self.shared > limit:
            found.append(
                f"needs {self.shared} bytes of shared memory; sm_{self.architecture} has {limit}"
            )
        return found


def table(records: Sequence[Record]) -> str:
    """Returns the records as lines of aligned columns."""
    rows = [HEADER]
    for one in records:
        spills = one.spill_stores + one.spill_loads
        numbers = (one.architecture, one.registers, spills, one.stack, one.shared)
        rows.append((one.op, one.name, *map(str, numbers), f"{one.seconds:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def complaints(records: Sequence[Record]) -> list[str]:
    """Returns a line for everything that is wrong with the records."""
    lines = [f"{one.op}: {one.name}: {text}" for one in records for text in one.problems()]
    names = Counter(one.name for one in records)
    lines += [
        f"{name}: {count} variants have this name" for name, count in names.items() if count > 1
    ]
    if not records:
        lines.append("no variant was chosen, so nothing was checked")
    return lines


def read_json(path: Path, triton: str) -> dict[tuple[str, str], Record]:
    """Returns the records that a file holds of a release, by operation and variant.

    Args:
        path: The file.
        triton: The release.
    """
    held = json.loads(path.read_text(encoding="utf-8")).get(triton, {"variants": []})
    return {(one["op"], one["name"]): Record(**one) for one in held["variants"]}


def write_json(
    path: Path, result: dict[str, Any], records: Sequence[Record], ops: Sequence[str] = ()
) -> None:
    """Adds what came out under one Triton to a file, a variant a line; replaces what it held.

    Args:
        path: The file.
        result: What is said of the run.
        records: Of its variants.
        ops: Operations that were compiled whole: what the file holds of others stays.
    """
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rounded = [asdict(one) | {"seconds": round(one.seconds, 1)} for one in records]
    known = earlier.get(result["triton"])
    if ops and known:
        others = [one for one in known["variants"] if one["op"] not in ops]
        rounded = sorted([*others, *rounded], key=lambda one: one["op"])
        problems = [line for line in known["problems"] if line.partition(":")[0] not in ops]
        rerun = {"command": result["command"], "seconds": result["seconds"]}
        reruns = [*known.get("reruns", ()), rerun]
        result = known | {"problems": problems + result["problems"], "reruns": reruns}
    earlier[result["triton"]] = result | {"variants": rounded}
    text = json.dumps(earlier, indent=1)
    flat = re.sub(r"\{\s+(\"op\":[^{}]*?)\s+\}", lambda found: _one_line(found[1]), text)
    path.write_text(flat + "\n", encoding="utf-8")


def _one_line(fields: str) -> str:
    return "{" + re.sub(r"\s*\n\s*", " ", fields) + "}"
