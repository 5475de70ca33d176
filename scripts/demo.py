"""Serve the bundled model with and without a policy, and compare what each holds in memory.

Starts a real ``vllm serve`` twice in the same amount of cache memory, asks both the same questions
about long documents over the OpenAI HTTP API, and prints the answers, the cache blocks that the
running engine says it holds, how many requests ran at once, and the time per token. The exit code
is 0 only if the answers are right and the blocks really fell.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from rich.markup import escape
from rich.table import Table
from serving import (
    POOL_BLOCKS,
    POOL_USAGE,
    PREEMPTIONS,
    RUNNING,
    Server,
    ServingError,
    console,
    progress,
)

from vllm_kvpress.testbed import model_path
from vllm_kvpress.testbed.documents import Document, Question, Task, is_correct, make_document

BLOCK_SIZE = 32
POOL_REQUESTS = 5
CROWD = 32
# The bundled model attends to the text before a value, whose digits lie up to 6 tokens further:
# with SnapKV's usual pooling over 5 tokens it loses some of them.
MODEL_OVERRIDES = {"snapkv": ["pool=13", "window=64"]}
# Long enough for the first request of a crowd to be still generating when the last one starts.
HOLD_TOKENS = 96
ANSWER_TOKENS = 32
SAMPLE_AT = (24, 48, 72)
TASKS: tuple[Task, ...] = ("needle", "multi_key")


@dataclass(frozen=True)
class Reading:
    """What one server did with one question; blocks as the engine held them while generating."""

    answer: str
    blocks: int
    megabytes: float
    seconds_per_token: float


@dataclass(frozen=True)
class Crowd:
    """Many requests at once: the most that ran together, the answers that were right."""

    running: int
    preemptions: int
    right: int
    sent: int


@dataclass(frozen=True)
class Half:
    """All measurements of one server."""

    readings: list[Reading]
    crowd: Crowd


def pool_bytes(num_tokens: int) -> int:
    """Return the cache memory that holds ``POOL_REQUESTS`` requests of stock vLLM and no more."""
    config = json.loads((model_path() / "config.json").read_text())
    heads_bytes = config["num_key_value_heads"] * config["head_dim"] * 2  # bfloat16
    block_bytes = 2 * config["num_hidden_layers"] * heads_bytes * BLOCK_SIZE  # keys and values
    blocks = POOL_REQUESTS * math.ceil((num_tokens + HOLD_TOKENS) / BLOCK_SIZE)
    return int(block_bytes * (blocks + 1))  # vLLM keeps one block for itself


def server_options(num_tokens: int) -> list[str]:
    """Return the arguments that both servers get: the same memory, above all."""
    options = ["--dtype", "bfloat16", "--enforce-eager", "--block-size", str(BLOCK_SIZE)]
    options += ["--kv-cache-memory-bytes", str(pool_bytes(num_tokens))]
    return [*options, "--max-model-len", str(num_tokens + HOLD_TOKENS)]


def make_questions(count: int, num_tokens: int, seed: int) -> list[tuple[Document, Question]]:
    """Draw documents of alternating tasks, the fact at depths spread over the text."""
    documents = []
    for i in range(count):
        task, depth = TASKS[i % len(TASKS)], (i + 0.5) / count
        documents.append(
            make_document(task, num_tokens=num_tokens, seed=seed * 1000 + i, depth=depth)
        )
    return [(document, document.questions[0]) for document in documents]


def ask(server: Server, document: Document, question: Question, memory: int) -> Reading:
    """Ask one question, then hold the same request open and read what it occupies."""
    message = document.message(question)
    answer, _ = server.chat(message, max_tokens=ANSWER_TOKENS)
    usable = int(server.metric(POOL_BLOCKS)) - 1  # vLLM keeps one block for itself
    held = [0]

    def sample(token: int) -> None:
        if token in SAMPLE_AT:
            held.append(round(server.metric(POOL_USAGE) * usable))

    _, times = server.chat(message, max_tokens=HOLD_TOKENS, on_token=sample)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    megabytes = max(held) * memory / (usable + 1) / 1e6
    return Reading(answer, max(held), megabytes, statistics.median(gaps))


def send_crowd(server: Server, count: int, num_tokens: int, seed: int) -> Crowd:
    """Send ``count`` different requests at once and watch how many run together."""
    first = seed * 1000 + 500
    documents = [
        make_document("needle", num_tokens=num_tokens, seed=first + i) for i in range(count)
    ]
    before = server.metric(PREEMPTIONS)
    running = 0

    def send(document: Document) -> bool:
        question = document.questions[0]
        message = document.message(question)
        answer, _ = server.chat(message, max_tokens=HOLD_TOKENS, on_token=lambda _: None)
        return is_correct(question, answer)

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(send, document) for document in documents]
        while not all(future.done() for future in futures):
            running = max(running, int(server.metric(RUNNING)))
            time.sleep(0.05)
    preemptions = int(server.metric(PREEMPTIONS) - before)
    return Crowd(running, preemptions, sum(f.result() for f in futures), count)


def settle_crowd(server: Server, num_tokens: int, seed: int) -> Crowd:
    """Return the largest crowd seen to run together without a preemption."""
    crowd = send_crowd(server, CROWD, num_tokens, seed)
    while crowd.preemptions and crowd.running > 1:
        crowd = send_crowd(server, min(crowd.sent, crowd.running) - 1, num_tokens, seed)
    return crowd


def run_half(
    policy: str | None, questions: Sequence[tuple[Document, Question]], seed: int, num_tokens: int
) -> Half:
    """Start one server and take all measurements on it."""
    with Server(policy, server_options(num_tokens)) as server:
        with progress(f"asking {len(questions)} questions of {server.title}"):
            server.chat("what is the pass code of alice?", max_tokens=ANSWER_TOKENS)  # warm-up
            memory = pool_bytes(num_tokens)
            readings = [ask(server, *asked, memory) for asked in questions]
        with progress(f"sending {CROWD} requests at once to {server.title}"):
            crowd = settle_crowd(server, num_tokens, seed)
    return Half(readings, crowd)


def answers_table(
    questions: Sequence[tuple[Document, Question]], stock: Half, other: Half | None
) -> Table:
    """Return the table of questions, answers and blocks."""
    table = Table(title="The same questions about the same long documents")
    table.add_column("question at the end of the document")
    answers = ("facts", "expected", "stock answers", "policy answers")
    for name in (*answers, "stock blocks", "policy blocks", "smaller"):
        table.add_column(name, justify="right")
    for index, (document, question) in enumerate(questions):
        plain = stock.readings[index]
        kept = other.readings[index] if other else None
        table.add_row(
            question.text,
            str(document.num_facts),
            question.answer,
            marked(question, plain.answer),
            marked(question, kept.answer) if kept else "-",
            str(plain.blocks),
            str(kept.blocks) if kept else "-",
            f"{plain.megabytes / kept.megabytes:.1f}x" if kept and kept.megabytes else "-",
        )
    return table


def marked(question: Question, answer: str) -> str:
    """Return an answer in green or red for the table."""
    colour = "green" if is_correct(question, answer) else "red"
    return f"[{colour}]{escape(answer or '(nothing)')}[/{colour}]"


def totals_table(memory: int, stock: Half, other: Half | None) -> Table:
    """Return the table of memory, concurrency and time, one column a server."""
    halves = [stock, other] if other else [stock]
    table = Table(title=f"The same {memory / 1e6:.1f} MB of cache memory")
    table.add_column("seen in the running engine")
    for name in ("stock", "policy")[: len(halves)]:
        table.add_column(name, justify="right")
    memories = [statistics.mean(r.megabytes for r in half.readings) for half in halves]
    paces = [statistics.mean(r.seconds_per_token for r in half.readings) for half in halves]
    crowds = [half.crowd for half in halves]
    table.add_row("cache held by one request, MB", *(f"{value:.2f}" for value in memories))
    table.add_row("requests that ran at once", *(str(crowd.running) for crowd in crowds))
    table.add_row("  their right answers", *(f"{c.right} of {c.sent}" for c in crowds))
    table.add_row("  preemptions", *(str(crowd.preemptions) for crowd in crowds))
    table.add_row("time per token of one request, ms", *(f"{pace * 1e3:.1f}" for pace in paces))
    return table


def shortcomings(
    questions: Sequence[tuple[Document, Question]], stock: Half, other: Half | None, ratio: float
) -> list[str]:
    """Return what went wrong, in sentences; nothing when the demo shows what it promises.

    Half of what the keep ratio promises is asked for: it counts the prompt's tokens only, while the
    blocks also hold sinks, recent tokens, and everything generated.
    """
    wrong: list[str] = []
    for name, half in (("stock", stock), ("policy", other)):
        readings = half.readings if half else []
        right = [is_correct(q, r.answer) for (_, q), r in zip(questions, readings, strict=False)]
        if not all(right):
            wrong.append(f"{name}: {right.count(False)} of {len(right)} answers are wrong")
    limit = (1 + ratio) / 2 if ratio else 1.0
    for plain, kept in zip(stock.readings, other.readings if other else [], strict=False):
        if not 0 < kept.megabytes < limit * plain.megabytes:
            wrong.append(f"the cache did not shrink: {plain.blocks} blocks, then {kept.blocks}")
    return wrong


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="draws all facts and questions")
    parser.add_argument("--policy", default="snapkv", help="a policy, or none: stock vLLM only")
    ratio_help = "share of the prompt to keep; 0: the policy's own budget"
    parser.add_argument("--keep-ratio", type=float, default=0.25, help=ratio_help)
    parser.add_argument("--num-tokens", type=int, default=2048, help="tokens in a prompt")
    parser.add_argument("--questions", type=int, default=4, help="how many questions")
    arguments = parser.parse_args()
    longest = json.loads((model_path() / "config.json").read_text())["max_position_embeddings"]
    if not 256 <= arguments.num_tokens <= longest - HOLD_TOKENS:
        parser.error(f"--num-tokens must lie between 256 and {longest - HOLD_TOKENS}")
    if arguments.questions < 1:
        parser.error("--questions must be at least 1")
    if not 0 <= arguments.keep_ratio <= 1:
        parser.error("--keep-ratio must lie between 0 and 1")
    return arguments


def policy_source(policy: str, keep_ratio: float) -> tuple[str, float]:
    """Return what to give to ``--kv-policy``, and the keep ratio to expect.

    A bare name gets the keep ratio and the parameters that the bundled model needs; a file, inline
    JSON, or a name with its own overrides stays as it is.
    """
    if re.fullmatch(r"[\w-]+", policy) is None:
        return policy, 0.0
    overrides = [f"keep_ratio={keep_ratio}"] if keep_ratio else []
    overrides += MODEL_OVERRIDES.get(policy, [])
    return ":".join([policy, ",".join(overrides)] if overrides else [policy]), keep_ratio


def main() -> int:
    """Run both servers, print the tables, and return the exit code."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server stays behind
    policy, ratio = policy_source(arguments.policy, arguments.keep_ratio)
    questions = make_questions(arguments.questions, arguments.num_tokens, arguments.seed)
    size = (questions, arguments.seed, arguments.num_tokens)
    try:
        other = None if arguments.policy == "none" else run_half(policy, *size)
        stock = run_half(None, *size)
    except (ServingError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    console.print(answers_table(questions, stock, other))
    console.print(totals_table(pool_bytes(arguments.num_tokens), stock, other))
    wrong = shortcomings(questions, stock, other, ratio)
    for sentence in wrong:
        console.print(sentence, style="red", markup=False)
    if not wrong:
        gain = "" if other is None else " and the cache really shrank"
        console.print(f"All answers are right{gain}.", style="bold green")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
