"""Compile every Triton kernel to machine code and judge what ptxas says of it; needs no GPU.

Every operation `vllm_kvpress.kernels.<op>` with a module `triton` lists in `variants()` what its
launcher can start. Each is compiled as launches on ordinary tensors are: pointers are aligned to
16 bytes, and arguments with `stride` in their name are multiples of 16. The exit status is 1 if a
variant does not compile, spills registers, needs more than 255 of them, or needs more shared
memory than a block of its architecture can have.

Another Triton is checked by putting it first on PYTHONPATH.

Compiling all of them takes half an hour of a core. With --known FILE those of whose compilation
FILE has a record are not compiled again: a record's fingerprint is Triton's own key of the kernel's
source (and of all it calls), the constants, the options, ptxas and the architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import io
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_records import SHARED_KIB, Record, complaints, read_json, table, write_json

if TYPE_CHECKING:
    from vllm_kvpress.kernels.variants import Variant

PROGRESS = 50  # variants between two signs of life
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


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


def prepared(variant: Variant) -> tuple[Any, Any, dict[str, Any]]:
    """Returns a variant as Triton's compiler takes it: source, target, options."""
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
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.max_registers is not None:
        options["maxnreg"] = variant.max_registers
    return source, GPUTarget("cuda", variant.architecture, 32), options


def fingerprint(variant: Variant) -> str:
    """Returns what two variants share only if this Triton makes the same machine code of them."""
    return _fingerprint(*prepared(variant))


def _fingerprint(source: Any, target: Any, options: dict[str, Any]) -> str:
    import triton
    from triton.compiler import make_backend

    backend = make_backend(target)
    parts = (
        triton.__version__,
        source.hash(),
        str(sorted(source.constants.items())),
        backend.hash(),
        backend.parse_options(options).hash(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def compile_variant(op: str, variant: Variant) -> Record:
    """Returns the record of one variant, compiled now."""
    import triton

    started = time.perf_counter()
    about = {"op": op, "name": variant.name, "architecture": variant.architecture}
    log = io.StringIO()
    try:
        source, target, options = prepared(variant)
        about["fingerprint"] = _fingerprint(source, target, options)
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


def check_in_processes(
    choice: Choice, jobs: int, known: Mapping[tuple[str, str], Record] | None = None
) -> tuple[list[Record], int]:
    """Returns records, in the choice's order, and how many of them are of variants compiled now.

    Args:
        choice: The variants that are compiled.
        jobs: Processes that compile.
        known: Records by operation and variant. The other parts of the choice are recorded, too,
            and compiled only where these do not have the same fingerprint.
    """
    records: list[Record | None] = []
    with fresh_cache():
        compiled_anyway = {variant.name for _, variant in choice.variants()}
        if known is not None:
            choice = replace(choice, part=(1, 1))
        for op, variant in choice.variants():
            record = (known or {}).get((op, variant.name))
            may_stay = record is not None and variant.name not in compiled_anyway
            is_current = may_stay and record.fingerprint == fingerprint(variant)
            records.append(record if is_current else None)
        places = [place for place, record in enumerate(records) if record is None]
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(jobs, len(places)) or 1, _prepare, (choice,)) as pool:
            compiled = pool.imap(_compile_numbered, places)
            for count, (place, record) in enumerate(zip(places, compiled, strict=True), 1):
                records[place] = record
                if count % PROGRESS == 0:
                    print(f"compiled {count} of {len(places)}", file=sys.stderr, flush=True)
    return [record for record in records if record], len(places)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not 1 <= int(part) <= int(parts):
        raise ValueError
    return int(part), int(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="an operation; may be repeated")
    parser.add_argument(
        "--arch", action="append", default=[], type=int, choices=SHARED_KIB, help="may be repeated"
    )
    part_help = "K/N, the K-th of N parts: each variant for one of every N architectures, up to 4"
    parser.add_argument("--part", type=_part, default=(1, 1), help=part_help)
    parser.add_argument(
        "--known",
        type=Path,
        help="file with records: the other parts are compiled, too, unless it has the same code",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument(
        "--json",
        type=Path,
        help="file to which the records are added; of a rerun with --op, those of the operations",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles the chosen variants, prints what came out, and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    ops = operations()
    for op in options.op:
        if op not in ops:
            parser.error(f"--op: got {op!r}; allowed: {', '.join(ops)}")
    if options.known and not options.known.is_file():
        parser.error(f"--known: no such file: {options.known}")
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}; allowed: 1 or more")
    started = time.perf_counter()
    choice = Choice(tuple(options.op), tuple(options.arch), options.part)
    import triton

    known = read_json(options.known, triton.__version__) if options.known else None
    records, compiled = check_in_processes(choice, options.jobs, known)
    seconds = time.perf_counter() - started
    lines = complaints(records)
    print(table(records))
    print(
        f"Triton {triton.__version__}: {len(records)} variants of "
        f"{len({one.op for one in records})} operations, {compiled} of them compiled, "
        f"in {seconds:.0f} s, {len(lines)} problems"
    )
    if options.part != (1, 1) and known is None:
        print("Part {} of {}: each variant for some architectures only.".format(*options.part))
    print(*lines, sep="\n", end="\n" if lines else "")
    if options.json:
        from records import command

        result = {
            "triton": triton.__version__,
            "command": command(sys.argv),
            "part": options.part,
            "compiled": compiled,
            "seconds": round(seconds, 1),
            "problems": lines,
        }
        is_whole = not options.arch and (options.part == (1, 1) or known is not None)
        write_json(options.json, result, records, options.op if is_whole else ())
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
