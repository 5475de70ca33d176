"""Compile every Triton kernel to machine code and judge what ptxas says of it; needs no GPU.

Every operation `vllm_kvpress.kernels.<op>` with a module `triton` lists in `variants()` what its
launcher can start. Each is compiled as launches on ordinary tensors are: pointers are aligned to
16 bytes, and arguments with `stride` in their name are multiples of 16. The exit status is 1 if a
variant does not compile, spills registers, needs more than 255 of them, or needs more shared
memory than a block of its architecture can have.

Another Triton is checked by putting it first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_kvpress.kernels.variants import Variant

# Most shared memory of a block, in KiB, by compute capability.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
MAX_REGISTERS = 255
PROGRESS = 50  # variants between two signs of life
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
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


def operations() -> dict[str, str]:
    """Returns the module with the kernels of every operation that has one."""
    kernels = importlib.import_module("vllm_kvpress.kernels")
    found = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = f"{kernels.__name__}.{info.name}.triton"
        if info.ispkg and importlib.util.find_spec(module):
            found[info.name] = module
    return found


@dataclass(frozen=True)
class Choice:
    """Which variants are compiled.

    Attributes:
        ops: Operations; all if empty.
        architectures: Compute capabilities; all if empty.
        part: (k, n) for the k-th of n parts of all variants. Each has every place of an operation's
            list on every n-th architecture, in turn.
    """

    ops: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ()
    part: tuple[int, int] = (1, 1)

    def variants(self) -> Iterator[tuple[str, Variant]]:
        """Yields them with the names of their operations, always in the same order."""
        for op, module in operations().items():
            if self.ops and op not in self.ops:
                continue
            places: Counter[int] = Counter()
            for variant in importlib.import_module(module).variants():
                architecture = variant.architecture
                turn = places[architecture] + list(SHARED_KIB).index(architecture)
                places[architecture] += 1
                if self.architectures and architecture not in self.architectures:
                    continue
                if turn % self.part[1] == self.part[0] - 1:
                    yield op, variant


def aligned(signature: dict[str, Any]) -> dict[tuple[int, ...], list[list[Any]]]:
    """Returns which arguments are multiples of 16, in the form that Triton's compiler takes."""
    hint = [["tt.divisibility", 16]]
    found = {}
    for place, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            if "stride" in name:
                found |= {(place, item): hint for item in range(len(kind))}
        elif kind.startswith("*") or (kind != "constexpr" and "stride" in name):
            found[(place,)] = hint
    return found


def compile_variant(op: str, variant: Variant) -> Record:
    """Returns the record of one variant, compiled now."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in variant.constants else variant.signature[name]
        for name in variant.kernel.arg_names
    }
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=variant.constants,
        attrs=aligned(signature),
    )
    target = GPUTarget("cuda", variant.architecture, 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.max_registers is not None:
        options["maxnreg"] = variant.max_registers
    started = time.perf_counter()
    about = {"op": op, "name": variant.name, "architecture": variant.architecture}
    log = io.StringIO()
    try:
        # Triton prints what `ptxas -v` says, since TRITON_DUMP_PTXAS_LOG is set.
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=target, options=options)
        stack, stores, loads = map(int, SPILLS.search(log.getvalue()).groups())
        registers = int(REGISTERS.search(log.getvalue())[1])
    except Exception as error:
        # Whatever fails, one variant has no machine code, and the others are still compiled.
        reason = f"{type(error).__name__}: {error}"
        return Record(**about, seconds=time.perf_counter() - started, error=reason)
    return Record(
        **about,
        registers=registers,
        spill_stores=stores,
        spill_loads=loads,
        stack=stack,
        shared=compiled.metadata.shared,
        seconds=time.perf_counter() - started,
    )


def check(variants: Iterable[tuple[str, Variant]]) -> list[Record]:
    """Returns the records of (operation, variant) pairs, compiled in a cache of their own."""
    with fresh_cache():
        return [compile_variant(op, variant) for op, variant in variants]


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
    """Lets Triton compile everything anew and say what ptxas says, for as long as this is open."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set: kernels would be interpreted. Unset it.")
    with tempfile.TemporaryDirectory(prefix="compile_kernels.") as folder:
        os.environ.update(TRITON_CACHE_DIR=folder, TRITON_DUMP_PTXAS_LOG="1")
        yield


_queue: list[tuple[str, Any]] = []


def _prepare(choice: Choice) -> None:
    """Lists the variants in a worker: kernels do not travel between processes."""
    _queue.extend(choice.variants())


def _compile_numbered(index: int) -> Record:
    return compile_variant(*_queue[index])


def check_in_processes(choice: Choice, jobs: int) -> list[Record]:
    """Returns the records of a choice, in its order, compiled by `jobs` processes."""
    records = []
    with fresh_cache():
        count = len(list(choice.variants()))
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(jobs, count) or 1, _prepare, (choice,)) as pool:
            for record in pool.imap(_compile_numbered, range(count)):
                records.append(record)
                if len(records) % PROGRESS == 0:
                    print(f"compiled {len(records)} of {count}", file=sys.stderr, flush=True)
    return records


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


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not 1 <= int(part) <= int(parts) <= len(SHARED_KIB):
        raise ValueError
    return int(part), int(parts)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles the chosen variants, prints what came out, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="an operation; may be repeated")
    parser.add_argument(
        "--arch", action="append", default=[], type=int, choices=SHARED_KIB, help="may be repeated"
    )
    part_help = "K/N, the K-th of N parts: each variant for one of every N architectures"
    parser.add_argument("--part", type=_part, default=(1, 1), help=part_help)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument(
        "--json",
        type=Path,
        help="file to which the records are added; of a rerun with --op, those of the operations",
    )
    options = parser.parse_args(arguments)
    known = operations()
    for op in options.op:
        if op not in known:
            parser.error(f"--op: got {op!r}; allowed: {', '.join(known)}")
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}; allowed: 1 or more")
    started = time.perf_counter()
    choice = Choice(tuple(options.op), tuple(options.arch), options.part)
    records = check_in_processes(choice, options.jobs)
    seconds = time.perf_counter() - started
    import triton

    lines = complaints(records)
    print(table(records))
    print(
        f"Triton {triton.__version__}: {len(records)} variants of "
        f"{len({one.op for one in records})} operations in {seconds:.0f} s, {len(lines)} problems"
    )
    if options.part != (1, 1):
        print("Part {} of {}: each variant for some architectures only.".format(*options.part))
    print(*lines, sep="\n", end="\n" if lines else "")
    if options.json:
        from records import command

        result = {
            "triton": triton.__version__,
            "command": command(sys.argv),
            "part": options.part,
            "seconds": round(seconds, 1),
            "problems": lines,
        }
        is_whole = not options.arch and options.part == (1, 1)
        write_json(options.json, result, records, options.op if is_whole else ())
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
