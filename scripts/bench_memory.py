"""Measure how many requests run at once in one pool, with stock vLLM and with each policy.

The pool holds about five uncompressed requests. All prompts arrive at once, every request
generates the same number of tokens past its answer, and the engine's own scheduler and block pool
are watched after each scheduled step. vLLM admits a request when its whole prompt's peak fits, so
requests start one after the other, while earlier ones are already compressed. What is seen is
compared with

    1 + (pool - peak) / steady        peak and steady: blocks of one request, from the plan

The answers are checked in the same run, and again against the same policy without a crowd. The exit
code is 1 if a count falls short or stock answers are wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_engine import (
    FULL,
    POLICIES,
    Engine,
    Reader,
    add_engine_arguments,
    engine_settings,
    fresh_process,
    policy_source,
    prepare_environment,
)
from records import RESULTS, make_record, write_record
from rich.console import Console
from rich.table import Table

from vllm_kvpress.evaluation.observe import Observation, observe
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.testbed.documents import Question

POOL_REQUESTS = 5
FLOOR = 0.95
# As many tokens as the longest answer of the needle task has, its end included.
ANSWER_TOKENS = 8

Item = tuple[list[int], Question | None]
Result = dict[str, Any]


def run_crowd(
    engine: Engine, items: Sequence[Item], num_outputs: int
) -> tuple[Observation, list[list[int]]]:
    """Generate for all items at once; return what was seen, and the outputs in order."""
    seen = observe(engine.scheduler)
    ids = [engine.add(prompt, num_outputs) for prompt, _ in items]
    outputs = engine.drain()
    return seen, [outputs[request_id] for request_id in ids]


def run_alone(engine: Engine, items: Sequence[Item]) -> list[list[int]]:
    """Generate the answers one request after the other."""
    return [run_crowd(engine, [item], ANSWER_TOKENS)[1][0] for item in items]


def settled_crowd(
    engine: Engine, items: Sequence[Item], num_outputs: int, running: int
) -> Observation:
    """Return the largest crowd of at most `running` requests that runs without a preemption."""
    for count in range(running, 0, -1):
        seen, _ = run_crowd(engine, items[:count], num_outputs)
        if not seen.preemptions:
            return seen
    raise RuntimeError("the pool cannot hold a single request")


def expected_blocks(plan: RetentionPlan | None, block_size: int, item: Item, outputs: int) -> Any:
    """Return (peak, steady) blocks of one request, as the plan counts them."""
    length = len(item[0])
    if plan is None:
        # The last token is sampled, never computed.
        held = -(-(length + outputs - 1) // block_size)
        return held, held
    return plan.peak_blocks(length, outputs - 1), plan.steady_blocks(length, outputs - 1)


def measure(arguments: argparse.Namespace, policy: str) -> Result:
    """Return the result of one policy; runs in a process of its own."""
    prepare_environment(arguments)
    reader = Reader(arguments.model)
    items: list[Item] = reader.prompts(
        "needle", arguments.requests, arguments.num_tokens, arguments.seed
    )
    longest = arguments.num_tokens + arguments.outputs
    engine = Engine(
        arguments,
        policy_source(policy, arguments.keep_ratio),
        max_model_len=longest,
        max_num_batched_tokens=max(arguments.batched_tokens, arguments.requests),
        max_num_seqs=arguments.requests,
        num_gpu_blocks_override=pool_blocks(arguments) + 1,  # vLLM keeps one block for itself
    )
    seen, outputs = run_crowd(engine, items, arguments.outputs)
    settled = seen
    if seen.preemptions:
        settled = settled_crowd(engine, items, arguments.outputs, seen.running)
    alone = run_alone(engine, items)
    result = {
        "policy": policy,
        "keep_ratio": 1.0 if policy == FULL else arguments.keep_ratio,
        **capacity(engine, items, arguments, seen, settled),
        **answers(reader, items, outputs, alone),
    }
    engine.close()
    return result


def pool_blocks(arguments: argparse.Namespace) -> int:
    """Return the blocks that `POOL_REQUESTS` requests of stock vLLM fill at their end."""
    longest: int = arguments.num_tokens + arguments.outputs
    block_size: int = arguments.block_size
    return POOL_REQUESTS * -(-longest // block_size)


def capacity(
    engine: Engine,
    items: Sequence[Item],
    arguments: argparse.Namespace,
    crowd: Observation,
    settled: Observation,
) -> Result:
    """Return counts of blocks and requests beside what the plan says."""
    size = arguments.block_size
    pool = engine.pool.num_gpu_blocks - 1
    figures = [expected_blocks(engine.plan, size, item, arguments.outputs) for item in items]
    # Prompts differ by a sentence: the formula takes the request that gives it the most.
    formula = max(1 + (pool - peak) / steady for peak, steady in figures)
    return {
        "pool_blocks": pool,
        "pool_bytes": engine.pool_bytes,
        "running": settled.running,
        "formula": round(formula, 3),
        "ratio": round(settled.running / int(formula), 3),
        "least_free_blocks": settled.least_free,
        "preemptions": settled.preemptions,
        "open_crowd": {
            "running": crowd.running,
            "preemptions": crowd.preemptions,
            "least_free_blocks": crowd.least_free,
        },
        "peak_blocks": {
            "plan": max(peak for peak, _ in figures),
            "seen": max(settled.peak.values()),
        },
        "steady_blocks": {
            "plan": max(steady for _, steady in figures),
            "seen": max(settled.last.values()),
        },
    }


def answers(
    reader: Reader,
    items: Sequence[Item],
    outputs: Sequence[Sequence[int]],
    alone: Sequence[Sequence[int]],
) -> Result:
    """Return how many requests answered right, and as they do without a crowd."""
    right = [
        reader.is_right(question, tokens)
        for (_, question), tokens in zip(items, outputs, strict=True)
    ]
    same = [
        list(crowded[:ANSWER_TOKENS]) == list(single)
        for crowded, single in zip(outputs, alone, strict=True)
    ]
    return {
        "requests": len(items),
        "right": None if None in right else sum(map(bool, right)),
        "same_as_alone": sum(same),
    }


def shortcomings(results: Sequence[Result]) -> list[str]:
    """Return what fell short, in sentences."""
    wrong = []
    for result in results:
        if result["ratio"] < FLOOR:
            wrong.append(f"{result['policy']}: {result['running']} of {result['formula']} requests")
        if result["policy"] == FULL and result["right"] not in (None, result["requests"]):
            wrong.append(f"stock: {result['right']} of {result['requests']} answers are right")
        if result["peak_blocks"]["seen"] > result["peak_blocks"]["plan"]:
            wrong.append(f"{result['policy']}: a request held more than the plan's peak")
    return wrong


def results_table(results: Sequence[Result]) -> Table:
    """Return the results as a table for people."""
    table = Table(title="Requests running at once in the same pool")
    names = ("policy", "at once", "formula", "ratio", "least free", "peak", "steady", "right")
    for name in (*names, "as alone"):
        table.add_column(name)
    for result in results:
        blocks = [f"{result[n]['seen']}/{result[n]['plan']}" for n in BLOCK_COLUMNS]
        counts = [result[n] for n in ("running", "formula", "ratio", "least_free_blocks")]
        shares = [f"{result[n]}/{result['requests']}" for n in ("right", "same_as_alone")]
        table.add_row(result["policy"], *map(str, counts), *blocks, *shares)
    return table


BLOCK_COLUMNS = ("peak_blocks", "steady_blocks")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=[FULL, *POLICIES])
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--num-tokens", type=int, default=2048, help="tokens in a prompt")
    parser.add_argument("--requests", type=int, default=24, help="prompts that arrive at once")
    outputs_help = "tokens that each generates; so many that the first is not done before the last"
    parser.add_argument("--outputs", type=int, default=96, help=outputs_help)
    batched_help = "tokens of one step: about a prompt, or prompts wait for each other's peaks"
    parser.add_argument("--batched-tokens", type=int, default=2048, help=batched_help)
    parser.add_argument("--seed", type=int, default=40_000, help="draws the documents")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_memory.json")
    add_engine_arguments(parser)
    return parser.parse_args()


def main() -> int:
    """Measure every policy, write the record, print the table, and return the exit code."""
    arguments = parse_arguments()
    prepare_environment(arguments)
    console = Console(width=110)
    results: list[Result] = []
    with fresh_process() as executor:
        for policy in arguments.policies:
            with console.status(f"{policy}: {arguments.requests} requests"):
                results.append(executor.submit(measure, arguments, policy).result())
            console.print(f"{policy}: {results[-1]['running']} at once")
    names = ("keep_ratio", "num_tokens", "requests", "outputs", "batched_tokens")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {**engine_settings(arguments), "pool_requests": POOL_REQUESTS}
    seeds = {"documents": arguments.seed}
    record = make_record("memory", settings=settings, seeds=seeds, results=results)
    write_record(arguments.output, record)
    console.print(results_table(results))
    wrong = shortcomings(results)
    for sentence in wrong:
        console.print(sentence, style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
