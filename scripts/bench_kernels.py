"""Measure each kernel: bytes that it must move, its time, and its share of the copy bandwidth.

The copy bandwidth is that of this card in this run: a tensor of 1 GiB copied onto another, read and
written bytes over time. A kernel's bytes are those of its inputs and outputs, each counted once.
Times are medians of Triton's `do_bench`, which empties the L2 cache between runs; on a GPU only.

Without a GPU, `--sizes toy` runs every case once in Triton's interpreter and compares the result
with the kernel's PyTorch reference: times are then not run, and said to be so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Triton decides as it is imported whether kernels are interpreted.
if "toy" in sys.argv or os.environ.get("TRITON_INTERPRET") == "1":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from kernel_cases import CASES, Case, Shape
from records import RESULTS, make_record, write_record
from rich.console import Console
from rich.table import Table

# Shapes of attention in models of about so many parameters.
SHAPES = {
    "1B": Shape(num_q_heads=32, num_kv_heads=8, head_size=64, dtype="bfloat16"),
    "8B": Shape(num_q_heads=32, num_kv_heads=8, head_size=128, dtype="bfloat16"),
}
TOY_SHAPES = {"toy": Shape(num_q_heads=4, num_kv_heads=2, head_size=64, dtype="float32")}
LENGTHS, BATCH_SIZES = (4096, 8192, 32768, 131072), (1, 4, 16, 64)
TOY_LENGTHS, TOY_BATCH_SIZES = (96,), (1, 2)
COPY_BYTES = 2**30
# Of the memory that is free; the rest is for what a kernel allocates itself.
MEMORY_SHARE = 0.8
TARGET = {
    "rule": "attention over packed cells reaches this share of the copy bandwidth",
    "kernel": "paged_attention",
    "share": 0.6,
    "tokens": 32768,
}
INTERPRETED = "not run: kernels are interpreted here, and their times say nothing"

Result = dict[str, Any]


class Timer(NamedTuple):
    """Times functions on a GPU.

    Attributes:
        copy_bandwidth: Bytes read and written in a second by a copy.
    """

    copy_bandwidth: float

    @classmethod
    def of(cls, device: torch.device) -> Timer:
        """Returns the timer of a GPU, whose copy bandwidth is measured now."""
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = median_seconds(lambda: target.copy_(source))["median"]
        return cls(2 * COPY_BYTES / seconds)

    def time(self, case: Case) -> Result:
        """Returns the seconds of a case, and what share of the copy bandwidth that is."""
        seconds = median_seconds(case.run)
        share = case.num_bytes / seconds["median"] / self.copy_bandwidth
        return {"seconds": seconds, "bandwidth_share": round(share, 4)}


def median_seconds(run: Callable[[], Any]) -> dict[str, float]:
    """Returns median and quartiles of the time of a function on the GPU."""
    from triton.testing import do_bench

    names = ("median", "quartile_1", "quartile_3")
    found = do_bench(run, quantiles=[0.5, 0.25, 0.75])
    return {name: ms / 1e3 for name, ms in zip(names, found, strict=True)}


def measure(case: Case, timer: Timer | None, checked: bool) -> Result:
    """Returns what became of one case: its times, or why there are none, and its error."""
    result: Result = {"bytes": case.num_bytes}
    if checked:
        case.run()
        result["error"] = case.error()
    return result | (timer.time(case) if timer else {"seconds": INTERPRETED})


def results_of(arguments: argparse.Namespace, timer: Timer | None) -> Iterator[Result]:
    """Yields the result of each kernel, shape, number of tokens and batch size."""
    device = torch.device("cuda" if timer else "cpu")
    for name, make in CASES.items():
        kernel, _, variant = name.partition(" ")
        if arguments.kernels and kernel not in arguments.kernels:
            continue
        for shape_name, shape in arguments.shapes.items():
            for tokens in arguments.lengths:
                for batch in arguments.batch_sizes:
                    plan = make(shape, tokens, batch)
                    if plan is None:
                        continue
                    about = {
                        "kernel": kernel,
                        "variant": variant,
                        "shape": shape_name,
                        "tokens": tokens,
                        "batch": batch,
                    }
                    room = free_bytes(device)
                    if plan.memory > room:
                        why = f"not run: {plan.memory >> 20} MiB do not fit in {room >> 20} MiB"
                        yield about | {"bytes": None, "seconds": why}
                        continue
                    case = plan.make(device)
                    yield about | measure(case, timer, arguments.check)
                    del case


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that cases may take."""
    if device.type == "cpu":
        return 2**30
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)


def shortcomings(results: Sequence[Result]) -> list[str]:
    """Returns the measured cells that miss the target, in sentences."""
    return [
        f"{r['kernel']} {r['variant']}, {r['shape']}, {r['tokens']} tokens, batch {r['batch']}: "
        f"{r['bandwidth_share']:.0%} of the copy bandwidth, target {TARGET['share']:.0%}"
        for r in results
        if r["kernel"] == TARGET["kernel"]
        and r["variant"] != "exact"
        and r["tokens"] >= TARGET["tokens"]
        and r.get("bandwidth_share", 1) < TARGET["share"]
    ]


def results_table(results: Sequence[Result]) -> Table:
    """Returns the results as a table for people."""
    table = Table(title="Kernels: bytes, time, share of the copy bandwidth")
    names = ("kernel", "variant", "shape", "tokens", "batch")
    for name in (*names, "MiB", "time, us", "share", "error"):
        table.add_column(name)
    for result in results:
        time = result["seconds"]
        measured = isinstance(time, dict)
        error = result.get("error")
        table.add_row(
            *(str(result[name]) for name in names),
            "-" if result["bytes"] is None else f"{result['bytes'] / 2**20:.2f}",
            f"{time['median'] * 1e6:.1f}" if measured else "not run",
            f"{result['bandwidth_share']:.2f}" if measured else "-",
            "-" if error is None else f"{error:.1e}",
        )
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes_help = "'full' on a GPU; 'toy' runs in Triton's interpreter, for no times"
    parser.add_argument("--sizes", choices=("full", "toy"), default="full", help=sizes_help)
    parser.add_argument("--kernels", nargs="+", choices=sorted({n.split()[0] for n in CASES}))
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a request")
    parser.add_argument("--batch-sizes", nargs="+", type=int)
    parser.add_argument("--check", action="store_true", help="compare with the references too")
    parser.add_argument("--seed", type=int, default=0, help="draws the numbers")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_kernels.json")
    options = parser.parse_args(arguments)
    toy = options.sizes == "toy"
    options.shapes = TOY_SHAPES if toy else SHAPES
    options.lengths = options.lengths or list(TOY_LENGTHS if toy else LENGTHS)
    options.batch_sizes = options.batch_sizes or list(TOY_BATCH_SIZES if toy else BATCH_SIZES)
    options.check = options.check or toy
    if not toy and not torch.cuda.is_available():
        parser.error("--sizes: got full on a machine without a GPU; allowed there: toy")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every kernel, write the record, print the table, and return the exit code."""
    options = parse_arguments(arguments)
    torch.manual_seed(options.seed)
    timer = None if options.sizes == "toy" else Timer.of(torch.device("cuda"))
    results = list(results_of(options, timer))
    settings = {
        "sizes": options.sizes,
        "shapes": {name: shape._asdict() for name, shape in options.shapes.items()},
        "lengths": options.lengths,
        "batch_sizes": options.batch_sizes,
        "copy_bandwidth": timer.copy_bandwidth if timer else INTERPRETED,
        "target": TARGET,
    }
    seeds = {"numbers": options.seed}
    record = make_record("kernels", settings=settings, seeds=seeds, results=results)
    write_record(options.output, record)
    console = Console(width=120)
    console.print(results_table(results))
    if timer:
        console.print(f"copy bandwidth: {timer.copy_bandwidth / 1e9:.0f} GB/s")
    console.print(
        f"target: {TARGET['rule']}: {TARGET['share']:.0%} from {TARGET['tokens']} tokens on"
        + ("" if timer else "; not measured here")
    )
    wrong = shortcomings(results)
    for sentence in wrong:
        console.print(sentence, style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
