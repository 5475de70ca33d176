"""Starts the processes that train together: two of one thread on a CPU, one on a GPU.

Threads of one process wait for each other at every operation; processes only once a step.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from testbed_training.loop import Place, Trainer, train
from testbed_training.model import Shape
from testbed_training.schedule import Schedule

__all__ = ["keep_freed_memory", "train_together"]

# glibc gives freed memory back to the system, and half of a step goes into fetching it again.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
_CPU_PROCESSES = 2


def keep_freed_memory() -> None:
    """Start this program again with settings that glibc reads only at the start."""
    if any(name not in os.environ for name in _MALLOC):
        command = [sys.executable, *sys.argv]
        os.execve(sys.executable, command, {**os.environ, **_MALLOC})  # noqa: S606 - itself


def train_together(shape: Shape, schedule: Schedule, seed: int, folder: Path) -> None:
    """Train in as many processes as the machine has use for; the checkpoint has the result."""
    if torch.cuda.is_available():
        train(Trainer(shape, schedule, seed, Place(device="cuda")), folder)
        return
    world = min(_CPU_PROCESSES, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (world, f"file://{meeting}/meeting", shape, schedule, seed, folder)
        mp.spawn(_train_one, arguments, nprocs=world)


def _train_one(
    rank: int, world: int, meeting: str, shape: Shape, schedule: Schedule, seed: int, folder: Path
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    train(Trainer(shape, schedule, seed, Place(rank, world)), folder)
    dist.destroy_process_group()
