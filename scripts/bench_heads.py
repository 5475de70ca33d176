"""Measure head plans: memory of a request, requests at once, and time, against stock vLLM.

Memory: prompts arrive at once, in a pool of the bytes of about five uncompressed requests, whatever
the plan makes of a block. Seen is compared with the plan's counts and with

    1 + (pool - peak) / steady        peak and steady: blocks of one request, from the plan

Time: one engine for each share of retrieval heads, stock vLLM for all of them, in one process; they
take turns, request by request, without prefix caching. Retrieval heads are drawn at random: which
they are changes neither memory nor time. The exit code is 1 if a count falls short.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_engine import (
    Engine,
    add_engine_arguments,
    engine_settings,
    fresh_process,
    prepare_environment,
    random_prompt,
)
from bench_memory import FLOOR, POOL_REQUESTS, run_crowd, settled_crowd
from records import RESULTS, make_record, spread, write_record
from rich.console import Console
from rich.table import Table

from vllm_kvpress.config import load_policy
from vllm_kvpress.evaluation.observe import observe
from vllm_kvpress.head_groups import group_heads
from vllm_kvpress.policies.heads import HeadShape, resolve_heads

STOCK = 1.0
SINK_TOKENS, RECENT_TOKENS = 64, 256

Result = dict[str, Any]


def policy_of(ratio: float) -> dict[str, Any] | None:
    """Return the policy with this share of retrieval heads; None for all of them."""
    if ratio == STOCK:
        return None
    heads = {"plan": "random", "retrieval_ratio": ratio}
    return {"sink_tokens": SINK_TOKENS, "recent_tokens": RECENT_TOKENS, "heads": heads}


def heads_per_block(arguments: argparse.Namespace, ratio: float) -> tuple[int, int]:
    """Return the KV heads of a block under the plan, and those of the model."""
    num_layers, num_kv_heads = arguments.shape
    if ratio == STOCK:
        return num_layers * num_kv_heads, num_layers * num_kv_heads
    shape = HeadShape(num_layers=num_layers, num_kv_heads=num_kv_heads)
    plan = resolve_heads(load_policy(policy_of(ratio) or {}).heads, shape)
    return group_heads(plan.retrieval).width, plan.num_heads


def measure_memory(arguments: argparse.Namespace, ratio: float, length: int) -> Result:
    """Return what a crowd holds, beside what the plan says; runs in a process of its own."""
    prepare_environment(arguments)
    items = [(random_prompt(length, arguments.seed + i), None) for i in range(arguments.requests)]
    longest = length + arguments.outputs
    width, all_heads = heads_per_block(arguments, ratio)
    blocks = POOL_REQUESTS * -(-longest // arguments.block_size) * all_heads // width
    engine = Engine(
        arguments,
        policy_of(ratio),
        max_model_len=longest,
        max_num_batched_tokens=arguments.batched_tokens,
        max_num_seqs=arguments.requests,
        num_gpu_blocks_override=blocks + 1,  # vLLM keeps one block for itself
        async_scheduling=False,
    )
    seen, _ = run_crowd(engine, items, arguments.outputs)
    if seen.preemptions:
        seen = settled_crowd(engine, items, arguments.outputs, seen.running)
    plan, pool = engine.plan, engine.pool.num_gpu_blocks - 1
    held = -(-(longest - 1) // arguments.block_size)
    peak = plan.peak_blocks(length, arguments.outputs - 1) if plan else held
    steady = plan.steady_blocks(length, arguments.outputs - 1) if plan else held
    block_bytes = engine.pool_bytes // engine.pool.num_gpu_blocks
    formula = 1 + (pool - peak) / steady
    engine.close()
    return {
        "kind": "memory",
        "ratio": ratio,
        "length": length,
        "pool_bytes": (pool + 1) * block_bytes,
        "block_bytes": block_bytes,
        "peak_blocks": {"plan": peak, "seen": max(seen.peak.values())},
        "steady_blocks": {"plan": steady, "seen": max(seen.last.values())},
        "steady_bytes": max(seen.last.values()) * block_bytes,
        "running": seen.running,
        "formula": round(formula, 3),
        "of_formula": round(seen.running / int(formula), 3),
        "preemptions": seen.preemptions,
    }


def measure_time(arguments: argparse.Namespace, length: int) -> list[Result]:
    """Return prefill and decode times of every share, measured in turns; own process."""
    prepare_environment(arguments)
    longest = length + arguments.time_outputs
    engines = {
        ratio: Engine(
            arguments,
            policy_of(ratio),
            max_model_len=longest,
            max_num_batched_tokens=arguments.batched_tokens,
            max_num_seqs=2,
            num_gpu_blocks_override=8 * -(-longest // arguments.block_size),
            enable_prefix_caching=False,
            async_scheduling=False,
        )
        for ratio in arguments.ratios
    }
    prefill: dict[float, list[float]] = {ratio: [] for ratio in engines}
    decode: dict[float, list[float]] = {ratio: [] for ratio in engines}
    for turn in range(arguments.rounds + 1):
        for ratio, engine in engines.items():
            first, steps = one_request(engine, random_prompt(length, turn), arguments.time_outputs)
            if turn:  # the first warms up
                prefill[ratio].append(first)
                decode[ratio].append(statistics.median(steps))
    for engine in engines.values():
        engine.close()
    return [
        {
            "kind": "time",
            "ratio": ratio,
            "length": length,
            "prefill_ms": spread([1e3 * one for one in prefill[ratio]]),
            "decode_ms": spread([1e3 * one for one in decode[ratio]]),
            "prefill_ratio": ratios(prefill[ratio], prefill[STOCK]),
            "decode_ratio": ratios(decode[ratio], decode[STOCK]),
        }
        for ratio in engines
    ]


def ratios(times: Sequence[float], stock: Sequence[float]) -> dict[str, float | int]:
    """Return how the times of each turn compare with stock vLLM's in the same turn."""
    return spread([one / other for one, other in zip(times, stock, strict=True)])


def one_request(engine: Engine, prompt: list[int], outputs: int) -> tuple[float, list[float]]:
    """Return processor seconds of the prefill, and of each step that only generates."""
    seen = observe(engine.scheduler)
    engine.add(prompt, outputs)
    prefill, steps = 0.0, []
    while engine.engine.has_unfinished_requests():
        started, before = time.process_time(), seen.prefill_tokens
        seen.time_step(engine.engine.step)
        seconds = time.process_time() - started
        if seen.prefill_tokens > before:
            prefill += seconds
        else:
            steps.append(seconds)
    return prefill, steps


def results_table(results: Sequence[Result]) -> Table:
    """Return the results as a table for people."""
    table = Table(title="Head plans")
    for name in ("ratio", "length", "MB a request", "at once", "formula", "prefill", "decode"):
        table.add_column(name)
    times = {(r["ratio"], r["length"]): r for r in results if r["kind"] == "time"}
    for result in results:
        if result["kind"] == "memory":
            spent = times[result["ratio"], result["length"]]
            table.add_row(
                f"{result['ratio']:g}",
                str(result["length"]),
                f"{result['steady_bytes'] / 1e6:.2f}",
                str(result["running"]),
                f"{result['formula']:.2f}",
                f"{spent['prefill_ratio']['median']:.2f}",
                f"{spent['decode_ratio']['median']:.2f}",
            )
    return table


def shortcomings(results: Sequence[Result]) -> list[str]:
    """Return what fell short, in sentences."""
    wrong = []
    for result in results:
        if result["kind"] != "memory":
            continue
        name = f"ratio {result['ratio']:g} at {result['length']} tokens"
        if result["of_formula"] < FLOOR:
            wrong.append(f"{name}: {result['running']} of {result['formula']} requests")
        for which in ("peak_blocks", "steady_blocks"):
            if result[which]["seen"] > result[which]["plan"]:
                wrong.append(f"{name}: a request held more than the plan's {which}")
    return wrong


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", nargs="+", type=float, default=[STOCK, 0.5, 0.25])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    shape_help = "layers and KV heads of the model, to size pools of equal bytes"
    parser.add_argument("--shape", nargs=2, type=int, default=[4, 4], help=shape_help)
    parser.add_argument("--requests", type=int, default=24, help="prompts that arrive at once")
    outputs_help = "tokens that each generates; so many that the first is not done before the last"
    parser.add_argument("--outputs", type=int, default=224, help=outputs_help)
    parser.add_argument("--batched-tokens", type=int, default=512, help="tokens of one step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the timing")
    parser.add_argument("--time-outputs", type=int, default=24, help="tokens generated in a turn")
    parser.add_argument("--seed", type=int, default=50_000, help="draws the prompts")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_heads.json")
    add_engine_arguments(parser)
    arguments = parser.parse_args()
    if arguments.ratios[0] != STOCK:
        parser.error("--ratios begins with 1, which is stock vLLM")
    return arguments


def main() -> int:
    """Measure every share and length, write the record, and return the exit code."""
    arguments = parse_arguments()
    prepare_environment(arguments)
    console = Console(width=110)
    results: list[Result] = []
    with fresh_process() as executor:
        for length in arguments.lengths:
            for ratio in arguments.ratios:
                job = executor.submit(measure_memory, arguments, ratio, length)
                results.append(job.result())
                console.print(f"{ratio:g} at {length}: {results[-1]['running']} at once")
            results += executor.submit(measure_time, arguments, length).result()
    names = ("ratios", "lengths", "shape", "requests", "outputs", "batched_tokens", "rounds")
    settings = {name: getattr(arguments, name) for name in (*names, "time_outputs")}
    settings |= {**engine_settings(arguments), "pool_requests": POOL_REQUESTS}
    settings |= {"sink_tokens": SINK_TOKENS, "recent_tokens": RECENT_TOKENS}
    seeds = {"prompts": arguments.seed, "heads": 0}
    write_record(
        arguments.output, make_record("heads", settings=settings, seeds=seeds, results=results)
    )
    console.print(results_table(results))
    wrong = shortcomings(results)
    for sentence in wrong:
        console.print(sentence, style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
