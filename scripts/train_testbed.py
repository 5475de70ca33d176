"""Train the bundled test model from nothing, write it, and measure what it can do.

The same command goes on where an interrupted one stopped: checkpoints stand in the output folder,
and so do the accuracies measured so far.
With --eval-only nothing is trained; the folder's last checkpoint is written and measured. The exit
code is 1 if the model misses a bar; it is written all the same. Copy the folder `model` inside of
the output to `vllm_kvpress/testbed/model` if it is to be shipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from records import command, hardware
from rich.console import Console
from testbed_training.accuracy import (
    NUMBERS,
    generation_agrees,
    load,
    make_items,
    measure,
    missed,
)
from testbed_training.card import write_card
from testbed_training.export import LARGEST_BYTES, folder_bytes, write_model
from testbed_training.heads import observe_heads
from testbed_training.loop import read_checkpoint
from testbed_training.model import Shape
from testbed_training.processes import keep_freed_memory, train_together
from testbed_training.schedule import Schedule
from testbed_training.vocabulary import token_ids

from vllm_kvpress.testbed.documents import Task
from vllm_kvpress.testbed.language import vocabulary

HEAD_TASKS: tuple[Task, ...] = ("needle", "multi_key", "multi_value", "chain")
HEAD_DOCUMENTS, HEAD_LENGTH = 8, 1024


def write_and_measure(
    folder: Path, shape: Shape, state: dict[str, Any], arguments: argparse.Namespace
) -> list[str]:
    """Write the model of a checkpoint with its card; return which requirements it misses."""
    weights = state["optimiser"]["masters"]
    write_model(folder, shape, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(folder, device)
    numbers = {length: min(number, arguments.limit) for length, number in NUMBERS.items()}
    # Named by the step: more training makes another model.
    known = folder.parent / f"accuracy_{state['step']}.json"
    cells = measure(model, tokenizer, numbers, known)
    wrong = missed(cells)
    if not generation_agrees(model, tokenizer):
        wrong.append("generating and teacher forcing disagree")
    items = [
        item
        for task in HEAD_TASKS
        for item in make_items(task, HEAD_LENGTH, min(HEAD_DOCUMENTS, arguments.limit), tokenizer)
    ]
    heads = observe_heads(folder, shape, items, HEAD_LENGTH)
    training = {
        "command": command([word for word in sys.argv if word != "--eval-only"]),
        "steps": state["step"],
        "minutes": state["seconds"] / 60,
        "longest": Schedule(1).longest,
        "hardware": _hardware_line(),
        "words": len(vocabulary()),
    }
    parameters = sum(weight.numel() for weight in weights.values())
    write_card(folder, shape, cells, heads, parameters=parameters, training=training)
    if folder_bytes(folder) > LARGEST_BYTES:
        wrong.append(f"{folder_bytes(folder):,} bytes, the limit is {LARGEST_BYTES:,}")
    return wrong


def _hardware_line() -> str:
    machine = hardware()
    return str(machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, and model/")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training alone")
    parser.add_argument("--steps", type=int, help="train so many steps instead: repeatable")
    parser.add_argument("--seed", type=int, default=0, help="draws start and training rows")
    parser.add_argument("--limit", type=int, default=1000, help="most documents of a measured cell")
    parser.add_argument("--eval-only", action="store_true", help="measure the last checkpoint")
    return parser.parse_args(arguments)


def main() -> int:
    """Train, write, measure; return the exit code."""
    arguments = parse_arguments()
    keep_freed_memory()
    shape = Shape(vocab=len(token_ids()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.eval_only:
        schedule = Schedule(arguments.minutes, arguments.steps)
        train_together(shape, schedule, arguments.seed, arguments.out)
    state = read_checkpoint(arguments.out)
    if state is None:
        sys.exit(f"{arguments.out} has no checkpoint: train first, without --eval-only")
    wrong = write_and_measure(arguments.out / "model", shape, state, arguments)
    console = Console()
    for sentence in wrong:
        console.print(sentence, style="red")
    console.print(f"written to {arguments.out / 'model'}", soft_wrap=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
