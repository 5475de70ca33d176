"""Measure decoding with a full, a quantized and a compressed cache, side by side in one run.

Llama-shaped models with random weights read prompts of random tokens; then every request of a batch
decodes, and the steps are timed. Each row is an engine of its own: stock vLLM in the model's dtype,
in fp8 and with its own 4-bit caches, then our policies, then the first row again, which says what
the run resolves. A cell that a row cannot run is recorded with the reason.

Memory is what the requests of a batch hold while they decode: blocks of the pool times their bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench_engine import (
    Engine,
    add_engine_arguments,
    engine_settings,
    fresh_process,
    prepare_environment,
    random_prompt,
)
from records import RESULTS, hardware, make_record, spread, write_record
from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """One engine: stock vLLM with a cache dtype, or a policy."""

    cache_dtype: str = "auto"
    policy: str | None = None


FULL, AGAIN = "bf16", "bf16, again"
ROWS = {
    FULL: Row(),
    "fp8": Row("fp8"),
    "int4_per_token_head": Row("int4_per_token_head"),
    "turboquant_4bit_nc": Row("turboquant_4bit_nc"),
    **{
        name: Row(policy=name)
        for name in ("int8", "int4", "kivi2", "snapkv", "snapkv-fp8", "snapkv-int4")
    },
    AGAIN: Row(),
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 2**18,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
TOY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
LENGTHS, BATCH_SIZES = (4096, 8192, 32768, 131072), (1, 4, 16, 64)
BATCHED_TOKENS = 8192
WARM_UP = 4
TARGETS = (
    {"rule": "int4 decodes faster than fp8", "row": "int4", "than": "fp8", "tokens": 32768},
    *(
        {"rule": f"{row} is not slower than bf16", "row": row, "than": FULL, "tokens": 8193}
        for row in ("int8", "int4", "kivi2")
    ),
)

Result = dict[str, Any]


def outputs_of(arguments: argparse.Namespace, length: int, batch: int) -> int:
    """Returns tokens that a request may generate: the first waits for the last one's prompt."""
    chunks = -(-batch * length // (BATCHED_TOKENS - batch)) + batch
    return int(chunks + WARM_UP + arguments.steps + 2)


def open_engine(arguments: argparse.Namespace, row: Row) -> Engine:
    """Returns an engine for the longest cell."""
    cells = [(n, b) for n in arguments.lengths for b in arguments.batch_sizes]
    return Engine(
        arguments,
        row.policy,  # type: ignore[arg-type]
        kv_cache_dtype=row.cache_dtype,
        max_model_len=max(n + outputs_of(arguments, n, b) for n, b in cells),
        max_num_batched_tokens=BATCHED_TOKENS,
        max_num_seqs=max(arguments.batch_sizes),
        enable_prefix_caching=False,
        async_scheduling=False,
    )


def blocks_needed(engine: Engine, length: int, outputs: int, batch: int) -> int:
    """Returns the blocks at the moment when the last prompt of a batch ends."""
    if engine.plan is None:
        size = engine.runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        return batch * -(-(length + outputs) // size)
    steady = engine.plan.steady_blocks(length, outputs)
    return engine.plan.peak_blocks(length, outputs) + (batch - 1) * steady


def measure_cell(engine: Engine, arguments: argparse.Namespace, length: int, batch: int) -> Result:
    """Returns the step times of one batch, and what it holds, or why it was not run."""
    outputs = outputs_of(arguments, length, batch)
    needed, room = blocks_needed(engine, length, outputs, batch), engine.pool.num_gpu_blocks - 1
    if needed > room:
        return {"not_run": f"{needed} blocks are needed, the pool has {room}"}
    ids = [
        engine.add(random_prompt(length, arguments.seed + index), outputs) for index in range(batch)
    ]
    scheduler = engine.scheduler
    started = time.perf_counter()
    while (
        scheduler.waiting
        or len(scheduler.running) < batch
        or any(request.num_output_tokens < WARM_UP for request in scheduler.running)
    ):
        engine.engine.step()
    filled = time.perf_counter() - started
    seconds = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        engine.engine.step()
        seconds.append(time.perf_counter() - started)
    assert len(scheduler.running) == batch, "a request ended or was preempted while it was timed"
    blocks = room - engine.pool.get_num_free_blocks()
    engine.engine.abort_request(ids)
    engine.drain()
    step = spread([1e3 * each for each in seconds])
    return {
        "fill_seconds": round(filled, 3),
        "step_ms": step,
        "tokens_per_second": round(1e3 * batch / step["median"], 1),
        "blocks": blocks,
        "bytes": blocks * (engine.pool_bytes // engine.pool.num_gpu_blocks),
    }


def measure_row(arguments: argparse.Namespace, shape: str, name: str) -> list[Result]:
    """Returns the cells of one row over one model; runs in a process of its own."""
    cells = [(n, b) for n in arguments.lengths for b in arguments.batch_sizes]
    about = [{"shape": shape, "row": name, "tokens": n, "batch": b} for n, b in cells]
    with tempfile.TemporaryDirectory() as folder:
        config = LLAMA | arguments.shapes[shape]
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        arguments.model, arguments.load_format = folder, "dummy"
        prepare_environment(arguments)
        why = unsupported(ROWS[name])
        if why:
            return [one | {"not_run": why} for one in about]
        try:
            engine = open_engine(arguments, ROWS[name])
        except Exception as error:  # whatever the reason, it is this row's, and is recorded
            why = reason(error)
            return [one | {"not_run": why} for one in about]
        results = [
            one | measure_cell(engine, arguments, *cell)
            for one, cell in zip(about, cells, strict=True)
        ]
        engine.close()
    return results


def unsupported(row: Row) -> str:
    """Returns why a row cannot run here, or nothing: vLLM on CPU starts it all the same."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if not current_platform.is_cpu() or CPUAttentionBackend.supports_kv_cache_dtype(
        row.cache_dtype  # type: ignore[arg-type]
    ):
        return ""
    return f"CPU_ATTN does not read a cache of {row.cache_dtype}"


def reason(error: Exception) -> str:
    """Returns the first thing that an error says which is about its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.endswith("validation error for VllmConfig")]
    return f"{type(error).__name__}: {said[0] if said else ''}"[:300]


def with_ratios(results: Sequence[Result]) -> list[Result]:
    """Returns the results with their step time over that of stock vLLM in the same cell."""
    stock = {cell_of(r): r["step_ms"]["median"] for r in results if r["row"] == FULL and ran(r)}
    return [
        r | {"ratio": round(r["step_ms"]["median"] / stock[cell_of(r)], 3)}
        if ran(r) and cell_of(r) in stock
        else r
        for r in results
    ]


def ran(result: Result) -> bool:
    """Returns whether a cell was measured."""
    return "step_ms" in result


def cell_of(result: Result) -> tuple[Any, ...]:
    """Returns model, length and batch size."""
    return result["shape"], result["tokens"], result["batch"]


def shortcomings(results: Sequence[Result]) -> list[str]:
    """Returns the measured cells that miss a target, in sentences."""
    times = {(r["row"], *cell_of(r)): r["step_ms"]["median"] for r in results if ran(r)}
    return [
        f"{row}, {shape}, {tokens} tokens, batch {batch}: {ms:.2f} ms a step, {target['than']} "
        f"{times[target['than'], shape, tokens, batch]:.2f} ms; target: {target['rule']}"
        for (row, shape, tokens, batch), ms in times.items()
        for target in TARGETS
        if row == target["row"]
        and tokens >= target["tokens"]
        and ms > times.get((target["than"], shape, tokens, batch), ms)
    ]


def results_table(results: Sequence[Result]) -> Table:
    """Returns the results as a table for people."""
    table = Table(title="Decoding: time of a step, tokens a second, memory of the batch")
    names = ("shape", "tokens", "batch", "row")
    for name in (*names, "ms a token", "/ bf16", "tokens/s", "MiB"):
        table.add_column(name)
    for result in sorted(results, key=lambda one: (*cell_of(one), list(ROWS).index(one["row"]))):
        first = [str(result[name]) for name in names]
        if not ran(result):
            table.add_row(*first, f"not run: {result['not_run']}")
            continue
        table.add_row(
            *first,
            f"{result['step_ms']['median']:.2f}",
            str(result.get("ratio", "-")),
            f"{result['tokens_per_second']:.0f}",
            f"{result['bytes'] / 2**20:.1f}",
        )
    return table


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws the time of a step against the prompt's length, a panel for each model and batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(r["shape"], r["batch"]) for r in results})
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (shape, batch) in zip(axes, panels, strict=True):
        for name in ROWS:
            points = [
                (r["tokens"], r["step_ms"]["median"])
                for r in results
                if (r["row"], r["shape"], r["batch"]) == (name, shape, batch) and ran(r)
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(title=f"{shape}, batch {batch}", xlabel="prompt, tokens", xscale="log")
    axes[0].set_ylabel("decode step, ms")
    axes[-1].legend(fontsize="x-small")
    FigureCanvasAgg(figure).print_png(str(path))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes_help = "'toy': a tiny model and short prompts, to see that everything runs"
    parser.add_argument("--sizes", choices=("full", "toy"), default="full", help=sizes_help)
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, help="prompts, in tokens")
    parser.add_argument("--batch-sizes", nargs="+", type=int)
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are timed")
    parser.add_argument("--seed", type=int, default=0, help="draws the prompts")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_decode.json")
    add_engine_arguments(parser)
    parser.set_defaults(memory_utilization=0.9)
    options = parser.parse_args(arguments)
    toy = options.sizes == "toy"
    options.shapes = {"toy": TOY} if toy else {name: SHAPES[name] for name in options.shapes}
    options.rows = options.rows or [row for row in ROWS if row != AGAIN or not toy]
    options.lengths = options.lengths or list((1500,) if toy else LENGTHS)
    options.batch_sizes = options.batch_sizes or list((1, 2) if toy else BATCH_SIZES)
    if toy:
        options.steps, options.memory_utilization = min(options.steps, 4), 0.1
    return options


def measured(arguments: argparse.Namespace) -> Iterator[list[Result]]:
    """Yields the cells of each model and row; a toy's rows share one process."""
    with fresh_process(None if arguments.sizes == "toy" else 1) as executor:
        for shape in arguments.shapes:
            for row in arguments.rows:
                yield executor.submit(measure_row, arguments, shape, row).result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every row, write record and plot, print the table, and return the exit code."""
    options = parse_arguments(arguments)
    prepare_environment(options)
    console = Console(width=140)
    settings = {
        **engine_settings(options),
        "model": "random weights",
        "load_format": "dummy",
        "sizes": options.sizes,
        "shapes": options.shapes,
        "rows": {name: ROWS[name]._asdict() for name in options.rows},
        "lengths": options.lengths,
        "batch_sizes": options.batch_sizes,
        "steps": options.steps,
        "batched_tokens": BATCHED_TOKENS,
        "targets": list(TARGETS),
    }
    for unused in ("recent_tokens", "scorers"):
        del settings[unused]
    results: list[Result] = []
    for cells in measured(options):
        results = with_ratios([*results, *cells])
        seeds = {"prompts": options.seed}
        record = make_record("decode", settings=settings, seeds=seeds, results=results)
        write_record(options.output, record)
        console.print(f"{cells[0]['shape']}, {cells[0]['row']}: done")
    plot(results, options.output.with_suffix(".png"))
    console.print(results_table(results))
    on_gpu = hardware()["gpu"] is not None and options.sizes == "full"
    for target in TARGETS:
        where = f"target: {target['rule']}, from {target['tokens']} tokens on"
        console.print(where + ("" if on_gpu else "; not judged: no GPU, or toy sizes"))
    wrong = shortcomings(results) if on_gpu else []
    for sentence in wrong:
        console.print(sentence, style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
