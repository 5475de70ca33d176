"""Measure how often the bundled model answers right from a cache that a policy has compressed.

Every cell (policy, keep ratio, task) asks the same questions about the same documents, greedily,
through the engine; the question stands at the end of the prompt. Cells that the output file
already holds are skipped. The exit code is 1 if a result contradicts what must hold: `random` and
`streaming_llm` fall, `snapkv` keeps the single needle.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
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
from records import RESULTS, earlier_results, make_record, write_record
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_kvpress.testbed import MODEL_NAME
from vllm_kvpress.testbed.documents import Task

TASKS: tuple[Task, ...] = ("needle", "multi_key")
KEEP_RATIOS = (0.5, 0.25, 0.1)
# The longest answer of these tasks has 7 tokens.
ANSWER_TOKENS = 12
NEEDLE_FLOOR = 0.9
RANDOM_CEILING = 0.2
SURE = 3.0  # standard errors

Cell = tuple[str, float]
Result = dict[str, Any]


def measure_cell(arguments: argparse.Namespace, policy: str, keep_ratio: float) -> list[Result]:
    """Return one result a task for one engine; runs in a process of its own."""
    prepare_environment(arguments)
    reader = Reader(arguments.model)
    longest = arguments.num_tokens + ANSWER_TOKENS
    engine = Engine(
        arguments,
        policy_source(policy, keep_ratio),
        max_model_len=longest,
        max_num_batched_tokens=max(8192, longest),
        max_num_seqs=16,
        num_gpu_blocks_override=20 * math.ceil(longest / arguments.block_size),
        enable_prefix_caching=False,
    )
    results = []
    for task in arguments.tasks:
        started = time.monotonic()
        right = ask_all(engine, reader, task, arguments)
        results.append(
            {
                "policy": policy,
                "keep_ratio": keep_ratio,
                "task": task,
                **accuracy(right),
                # One character an item, in the same order in every cell: paired comparisons.
                "right": "".join("1" if answer else "0" for answer in right),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    engine.close()
    return results


def ask_all(
    engine: Engine, reader: Reader, task: Task, arguments: argparse.Namespace
) -> list[bool]:
    """Return for every item of a task whether its answer was right."""
    items = reader.prompts(task, arguments.items, arguments.num_tokens, arguments.seed)
    ids = [engine.add(prompt, ANSWER_TOKENS) for prompt, _ in items]
    outputs = engine.drain()
    return [
        bool(reader.is_right(question, outputs[request_id]))
        for request_id, (_, question) in zip(ids, items, strict=True)
    ]


def accuracy(right: Sequence[bool]) -> dict[str, float | int]:
    """Return the share of right answers with its binomial standard error.

    The error is that of the share with one right and one wrong answer added, so that a cell of
    equal answers does not claim to be certain.
    """
    number = len(right)
    share = sum(right) / number
    shrunk = (sum(right) + 1) / (number + 2)
    error = math.sqrt(shrunk * (1 - shrunk) / (number + 2))
    return {"n": number, "accuracy": round(share, 4), "standard_error": round(error, 4)}


def unmet(results: Sequence[Result]) -> list[str]:
    """Return what contradicts the expectations, in sentences; cells not measured say nothing."""
    found = {(r["policy"], r["keep_ratio"], r["task"]): r for r in results}
    wrong: list[str] = []
    for (policy, ratio, task), result in found.items():
        share, error = result["accuracy"], result["standard_error"]
        cell = f"{policy} at {ratio} on {task}: {share:.2f} +- {error:.2f}"
        if policy == FULL and share < NEEDLE_FLOOR:
            wrong.append(f"{cell}, the full cache should be right")
        # The window holds a fact at a random place with the probability of the keep ratio.
        if policy == "streaming_llm" and share > ratio + SURE * error:
            wrong.append(f"{cell}, a window cannot hold that many facts")
        if policy == "random" and ratio <= 0.5 and share > RANDOM_CEILING + SURE * error:
            wrong.append(f"{cell}, random choice should lose digits")
        if (policy, ratio, task) == ("snapkv", 0.25, "needle") and share < NEEDLE_FLOOR:
            wrong.append(f"{cell}, snapkv should keep the single needle")
    return wrong


def wanted_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return the engines to start, the full cache first."""
    return [
        (policy, ratio)
        for policy in arguments.policies
        for ratio in ([1.0] if policy == FULL else arguments.keep_ratios)
    ]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=[FULL, *POLICIES])
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=list(KEEP_RATIOS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--items", type=int, default=100, help="questions in a cell")
    parser.add_argument("--num-tokens", type=int, default=2048, help="tokens in a prompt")
    parser.add_argument("--seed", type=int, default=70_000, help="draws documents and questions")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_quality.json")
    add_engine_arguments(parser)
    arguments = parser.parse_args()
    if arguments.model != MODEL_NAME:
        parser.error("only the bundled model speaks the language of the documents")
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all cells of one file share."""
    settings = engine_settings(arguments)
    del settings["cpu_threads"]  # an interrupted run may go on with more or fewer
    names = ("items", "num_tokens", "tasks")
    return settings | {name: getattr(arguments, name) for name in names}


def main() -> int:
    """Measure every missing cell, write the record after each, and return the exit code."""
    arguments = parse_arguments()
    prepare_environment(arguments)
    settings, seeds = settings_of(arguments), {"documents": arguments.seed}
    results = earlier_results(arguments.output, settings=settings, seeds=seeds)
    done = {(r["policy"], r["keep_ratio"]) for r in results}
    missing = [cell for cell in wanted_cells(arguments) if cell not in done]
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    with fresh_process(3) as executor, Progress(*columns, console=console) as bar:
        progress = bar.add_task("cells", total=len(missing))
        for cell in missing:
            bar.update(progress, description=f"{cell[0]} at {cell[1]}")
            results += executor.submit(measure_cell, arguments, *cell).result()
            record = make_record("quality", settings=settings, seeds=seeds, results=results)
            write_record(arguments.output, record)
            shares = ", ".join(
                f"{r['task']} {r['accuracy']:.2f}" for r in results[-len(arguments.tasks) :]
            )
            console.print(f"{cell[0]} at {cell[1]}: {shares}")
            bar.advance(progress)
    wrong = unmet(results)
    for sentence in wrong:
        console.print(sentence, style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
