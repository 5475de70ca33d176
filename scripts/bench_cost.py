"""Measure what a policy costs in decoding: step time at a physical length, against stock vLLM.

Two engines live in one process and take turns step by step: stock vLLM with prompts of L tokens,
and a policy with longer prompts of which it keeps L. Both read the same amount of cache, so the
ratio of their step times is the policy's overhead, scheduler and block managers included. `none` as
a policy compares stock vLLM with itself: what the measurement resolves.

On a CPU the processor time of the process is reported too: beside other work it says more than wall
time, and with one thread both are the same on a quiet machine. A second part measures the time that
the worker takes to build a step's attention metadata for a random model of 32 layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench_engine import (
    FULL,
    Engine,
    add_engine_arguments,
    engine_settings,
    fresh_process,
    policy_source,
    prepare_environment,
    random_prompt,
)
from records import RESULTS, earlier_results, hardware, make_record, spread, write_record
from rich.console import Console
from rich.table import Table

from vllm_kvpress.testbed import resolve_model

POLICIES = (FULL, "streaming_llm", "knorm", "snapkv")
LENGTHS = (512, 1024, 2048)
BATCH_SIZES = (1, 4, 8)
KEEP_RATIO = 0.5
WARM_UP = 4
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
CEILINGS = {"cpu": 1.10, "wall": 1.03}
# The attention of 32 layers, and nothing else that would take time.
DEEP_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}

SIDES = ("stock", "policy")

Result = dict[str, Any]
# By clock, the median step time in seconds of stock vLLM and of the policy.
Round = dict[str, list[float]]


class MetadataTimer:
    """Times the worker's building of attention metadata, and keeps the lengths it was built for."""

    def __init__(self, engine: Engine) -> None:
        runner = engine.runner
        # vLLM's two model runners name it differently.
        old = hasattr(runner, "_build_attention_metadata")
        owner, name = (runner, "_build_attention_metadata") if old else (None, "prepare_attn")
        owner = runner.model_state if owner is None else owner
        build = getattr(owner, name)
        self.seconds = 0.0
        self.length: int | None = None

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            built = build(*args, **kwargs)
            self.seconds = time.perf_counter() - started
            self.length = longest_length(built[0] if isinstance(built, tuple) else built)
            return built

        setattr(owner, name, timed)


def longest_length(metadata: Any) -> int | None:
    """Return the longest sequence that attention is told to read, if the backend says it."""
    layers = metadata.values() if isinstance(metadata, dict) else ()
    lengths = [getattr(layer, "seq_lens", None) for layer in layers]
    return max((int(length.max()) for length in lengths if length is not None), default=None)


def open_engine(arguments: argparse.Namespace, policy: str) -> Engine:
    """Return an engine with room for the longest batch, and for every prompt's cached prefix."""
    longest = int(max(arguments.lengths) / KEEP_RATIO) + tokens_per_request(arguments)
    per_request = -(-longest // arguments.block_size)
    return Engine(
        arguments,
        policy_source(policy, KEEP_RATIO),
        max_model_len=longest,
        max_num_batched_tokens=max(4096, longest),
        max_num_seqs=max(arguments.batch_sizes),
        num_gpu_blocks_override=3 * max(arguments.batch_sizes) * per_request,
        enable_prefix_caching=True,
        async_scheduling=False,
    )


def tokens_per_request(arguments: argparse.Namespace) -> int:
    """Return how many tokens a request generates."""
    return int(arguments.steps + WARM_UP + 2)


def fill(engine: Engine, prompt_tokens: int, arguments: argparse.Namespace, batch: int) -> None:
    """Bring a batch to its decoding."""
    for index in range(batch):
        prompt = random_prompt(prompt_tokens, arguments.seed + index)
        engine.add(prompt, tokens_per_request(arguments))
    scheduler = engine.scheduler
    while (
        scheduler.waiting
        or len(scheduler.running) < batch
        or any(request.num_output_tokens < WARM_UP for request in scheduler.running)
    ):
        engine.engine.step()


def timed_step(engine: Engine) -> dict[str, float]:
    """Run one step and return its time on every clock."""
    started = {name: clock() for name, clock in CLOCKS.items()}
    engine.engine.step()
    return {name: clock() - started[name] for name, clock in CLOCKS.items()}


def take_turns(engines: Sequence[Engine], timers: Sequence[MetadataTimer], num_steps: int) -> Round:
    """Return for every clock the median step time of each engine.

    The engines take turns, and so does who comes first.
    """
    times: list[list[dict[str, float]]] = [[] for _ in engines]
    for step in range(num_steps):
        order = range(len(engines)) if step % 2 else reversed(range(len(engines)))
        for index in order:
            clocks = timed_step(engines[index])
            times[index].append(clocks | {"metadata": timers[index].seconds})
    return {
        clock: [statistics.median(step[clock] for step in side) for side in times]
        for clock in (*CLOCKS, "metadata")
    }


def measure(
    arguments: argparse.Namespace, policy: str, label: str, swapped: bool
) -> list[tuple[Result, list[Round]]]:
    """Return the rounds of each length and batch size; runs in a process of its own.

    The engine that was started first is a few per cent slower than an equal second one, so every
    measurement is made in both orders: `swapped` starts the policy's engine first.
    """
    prepare_environment(arguments)
    names = [policy, FULL] if swapped else [FULL, policy]
    engines = [open_engine(arguments, name) for name in names]
    if swapped:
        engines.reverse()
    timers = [MetadataTimer(engine) for engine in engines]
    results = []
    for length in arguments.lengths:
        for batch in arguments.batch_sizes:
            prompts = prompt_lengths(engines[1], length)
            rounds = []
            for _ in range(arguments.rounds):
                for engine, prompt_tokens in zip(engines, prompts, strict=True):
                    fill(engine, prompt_tokens, arguments, batch)
                rounds.append(take_turns(engines, timers, arguments.steps))
                read = [timer.length for timer in timers]
                for engine in engines:
                    engine.drain()
            cell: Result = {"model": label, "policy": policy, "length": length, "batch": batch}
            cell["prompt_tokens"] = dict(zip(SIDES, prompts, strict=True))
            cell["read_at_end"] = dict(zip(SIDES, read, strict=True))
            results.append((cell, rounds))
    for engine in engines:
        engine.close()
    return results


def prompt_lengths(engine: Engine, length: int) -> tuple[int, int]:
    """Return prompts of stock and policy for which the first decode steps read equally much."""
    if engine.plan is None:
        return length, length
    prompt = int(length / KEEP_RATIO)
    return engine.plan.physical_tokens(prompt, prompt, prompt + 1) - 1, prompt


def summary(rounds: Sequence[Round]) -> Result:
    """Return the rounds' medians and spread in milliseconds, and those of their ratios."""
    result: Result = {}
    for clock in (*CLOCKS, "metadata"):
        pairs = [one[clock] for one in rounds]
        result[clock] = {
            f"{side}_ms": spread([pair[index] * 1e3 for pair in pairs])
            for index, side in enumerate(SIDES)
        }
        result[clock]["ratio"] = spread([policy / stock for stock, policy in pairs])
    return result


def measure_deep(
    arguments: argparse.Namespace, policy: str, swapped: bool
) -> list[tuple[Result, list[Round]]]:
    """Return what `measure` does, for the random model of 32 layers at the first length."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(DEEP_MODEL), encoding="utf-8")
        own = {"model": folder, "load_format": "dummy", "dtype": "bfloat16"}
        deep = argparse.Namespace(**{**vars(arguments), **own})
        deep.lengths = arguments.lengths[:1]
        return measure(deep, policy, "random, 32 layers", swapped)


def in_both_orders(
    executor: ProcessPoolExecutor, function: Callable[..., Any], *values: Any
) -> list[Result]:
    """Return results over the rounds of both orders of starting the engines."""
    first, second = (executor.submit(function, *values, swap).result() for swap in (False, True))
    return [
        cell | summary([*rounds, *more])
        for (cell, rounds), (_, more) in zip(first, second, strict=True)
    ]


def results_table(results: Sequence[Result]) -> Table:
    """Return the results as a table for people."""
    table = Table(title="Decode step: a policy against stock vLLM that reads equally much")
    names = ("model", "policy", "length", "batch", "stock ms", "policy ms", "ratio", "cpu ratio")
    for name in (*names, "metadata ms"):
        table.add_column(name)
    for result in results:
        wall, built = result["wall"], result["metadata"]
        table.add_row(
            *(str(result[name]) for name in names[:4]),
            *(f"{wall[name]['median']:.2f}" for name in ("stock_ms", "policy_ms")),
            *(f"{result[clock]['ratio']['median']:.3f}" for clock in CLOCKS),
            " / ".join(f"{built[name]['median']:.2f}" for name in ("stock_ms", "policy_ms")),
        )
    return table


def shortcomings(results: Sequence[Result], on_gpu: bool) -> list[str]:
    """Return the cells whose median ratio exceeds the target, in sentences."""
    clock = "wall" if on_gpu else "cpu"
    ceiling = CEILINGS[clock]
    return [
        f"{r['policy']}, {r['length']} tokens, batch {r['batch']}: {clock} time x "
        f"{r[clock]['ratio']['median']:.3f}, target {ceiling}"
        for r in results
        if r[clock]["ratio"]["median"] > ceiling
    ]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    lengths_help = "tokens that attention reads at the start"
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help=lengths_help)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--rounds", type=int, default=5, help="repeats in each order of engines")
    parser.add_argument("--steps", type=int, default=12, help="steps of each engine in a round")
    parser.add_argument("--seed", type=int, default=0, help="draws the prompts")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_cost.json")
    add_engine_arguments(parser)
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all results of one file share."""
    names = ("lengths", "batch_sizes")
    settings: dict[str, Any] = {name: list(getattr(arguments, name)) for name in names}
    settings |= {"rounds": arguments.rounds, "steps": arguments.steps, "keep_ratio": KEEP_RATIO}
    return settings | engine_settings(arguments)


def main() -> int:
    """Measure every policy, write the record, print the table, and return the exit code."""
    arguments = parse_arguments()
    prepare_environment(arguments)
    console = Console(width=110)
    label = engine_settings(arguments)["model"]
    settings, seeds = settings_of(arguments), {"prompts": arguments.seed}
    earlier = earlier_results(arguments.output, settings=settings, seeds=seeds)
    steps = [result for result in earlier if result["model"] == label]
    deep = [result for result in earlier if result["model"] != label]
    done = {result["policy"] for result in deep}
    with fresh_process() as executor:
        for policy in (name for name in arguments.policies if name not in done):
            with console.status(f"{policy}: {resolve_model(arguments.model)}"):
                steps += in_both_orders(executor, measure, arguments, policy, label)
            with console.status(f"{policy}: 32 layers"):
                deep += in_both_orders(executor, measure_deep, arguments, policy)
            console.print(f"{policy}: measured")
            results = [*steps, *deep]
            record = make_record("cost", settings=settings, seeds=seeds, results=results)
            write_record(arguments.output, record)
    console.print(results_table([*steps, *deep]))
    wrong = shortcomings(steps, hardware()["gpu"] is not None)
    for sentence in wrong:
        console.print(sentence, style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
