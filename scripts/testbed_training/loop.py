"""The training loop: equal processes that share their gradients, checkpoints, a progress bar."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from testbed_training.data import Batch, make_batch
from testbed_training.model import EMBEDDING, Shape, Weights, hidden_states
from testbed_training.optimiser import Optimiser
from testbed_training.schedule import Schedule
from testbed_training.structured import structured_weights

__all__ = ["CHECKPOINT", "Place", "Trainer", "read_checkpoint", "train"]

CHECKPOINT = "checkpoint.pt"
_CHECKPOINT_SECONDS = 120.0
_LOGGED_EVERY = 100


@dataclass(frozen=True)
class Place:
    """One of the processes that train together.

    Attributes:
        rank: Which one, from 0.
        world: How many there are.
        device: Where it computes.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"


class Trainer:
    """Weights on their way, in one process; every process holds the same.

    Attributes:
        step: Steps taken.
        seconds: Of wall time, those before an interruption included.
    """

    def __init__(self, shape: Shape, schedule: Schedule, seed: int, place: Place) -> None:
        """Start from the structured weights of ``seed``."""
        self.shape, self.schedule, self.seed, self.place = shape, schedule, seed, place
        start = structured_weights(shape, seed)
        masters = {name: weight.to(place.device) for name, weight in start.items()}
        self.optimiser = Optimiser(shape, masters)
        self.step, self.seconds = 0, 0.0

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint needs."""
        settings = {"seed": self.seed, "vocab": self.shape.vocab}
        own = {"step": self.step, "seconds": self.seconds}
        return {"settings": settings, **own, "optimiser": self.optimiser.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it was made with other settings.
        """
        settings = {"seed": self.seed, "vocab": self.shape.vocab}
        if state["settings"] != settings:
            raise ValueError(
                f"the checkpoint was made with {state['settings']}, not with {settings}: "
                "remove it, or choose another --out"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.optimiser.load(state["optimiser"])

    @property
    def share(self) -> float:
        """How much of the training is done."""
        return self.schedule.share(self.step, self.seconds)

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a step."""
        length = self.schedule.length(self.share)
        rows = max(1, self.schedule.tokens_per_step // (self.place.world * length))
        seed = f"{self.seed}/{self.place.rank}/{step}"
        return make_batch(seed, rows, length, self.shape.max_positions)

    def update(self, batch: Batch, last: float) -> tuple[dict[str, float], float]:
        """Take a step; return its loss, its share of answer tokens guessed right, and the time.

        Args:
            batch: This process's rows.
            last: The time that the step before returned, as `time.monotonic` says it.
        """
        copies = {
            name: master.bfloat16().requires_grad_()
            for name, master in self.optimiser.masters.items()
        }
        loss, right = weighted_loss(self.shape, copies, batch.to(self.place.device))
        gradients = torch.autograd.grad(loss, list(copies.values()))
        now = time.monotonic()
        figures = torch.tensor([loss.item(), right.item(), now - last], device=self.place.device)
        flat = torch.cat([figures, *(gradient.flatten().float() for gradient in gradients)])
        if self.place.world > 1:
            dist.all_reduce(flat)
            flat /= self.place.world
        rate = self.schedule.rate(self.share, self.step)
        self.optimiser.step(_unflatten(flat[3:], copies), rate)
        self.step += 1
        # The same figures in every process, so that all go through the curriculum together.
        mean_loss, mean_right, mean_lap = flat[:3].tolist()
        self.seconds += mean_lap
        return {"loss": mean_loss, "right": mean_right}, now


def weighted_loss(shape: Shape, weights: Weights, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean loss over weighted tokens, and the share of answer tokens guessed right."""
    states = hidden_states(shape, weights, batch.ids, batch.positions)[:, :-1]
    targets, counts = batch.ids[:, 1:], batch.weights[:, 1:]
    # The output matrix is applied where something is learned: at about a quarter of the tokens.
    chosen = counts > 0
    logits = functional.linear(states[chosen], weights[EMBEDDING]).float()
    losses = functional.cross_entropy(logits, targets[chosen], reduction="none")
    loss = (losses * counts[chosen]).sum() / counts.sum().clamp_min(1.0)
    answers = batch.is_answer[:, 1:][chosen]
    right = (logits.argmax(-1) == targets[chosen])[answers].float().mean()
    return loss, right


def _unflatten(flat: Tensor, like: Weights) -> Weights:
    pieces = flat.split([weight.numel() for weight in like.values()])
    return {
        name: piece.view(weight.shape)
        for (name, weight), piece in zip(like.items(), pieces, strict=True)
    }


def read_checkpoint(folder: Path, device: str = "cpu") -> dict[str, Any] | None:
    """Return the last checkpoint in a folder, its tensors on a device; None without one."""
    path = folder / CHECKPOINT
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; an interruption never leaves half of one."""
    partial = folder / f"{CHECKPOINT}.partial"
    torch.save(state, partial)
    os.replace(partial, folder / CHECKPOINT)


def train(
    trainer: Trainer,
    folder: Path,
    *,
    stop_at: int | None = None,
    log: Callable[[str], None] = tqdm.write,
) -> None:
    """Train until the schedule ends, from the folder's checkpoint if it has one.

    Args:
        trainer: This process's part.
        folder: For the checkpoints.
        stop_at: A step at which to stop, as an interruption would.
        log: Where a line goes now and then.
    """
    state = read_checkpoint(folder, trainer.place.device)
    if state is not None:
        trainer.load(state)
    writes = trainer.place.rank == 0
    bar = Bar(trainer, hidden=not writes)
    ended = written = time.monotonic()
    while trainer.share < 1 and trainer.step != stop_at:
        batch = trainer.batch(trainer.step)
        figures, ended = trainer.update(batch, ended)
        line = bar.show(batch.ids.shape[1], figures)
        if not writes:
            continue
        if trainer.step % _LOGGED_EVERY == 0:
            log(line)
        if ended - written > _CHECKPOINT_SECONDS:
            write_checkpoint(folder, trainer.state())
            written = ended
    if writes:
        write_checkpoint(folder, trainer.state())
    bar.close()


class Bar:
    """A progress bar over the minutes or the steps of a training."""

    def __init__(self, trainer: Trainer, *, hidden: bool) -> None:
        """Show where a training stands."""
        self._trainer = trainer
        self._loss = self._right = float("nan")
        form = "{percentage:5.1f} % |{bar}| {elapsed} {postfix}"
        self._bar = tqdm(
            total=1.0, initial=min(1.0, trainer.share), bar_format=form, disable=hidden
        )

    def show(self, length: int, figures: Mapping[str, float]) -> str:
        """Move on after a step; return what the bar says."""
        trainer = self._trainer
        self._loss = _blend(self._loss, figures["loss"])
        self._right = _blend(self._right, figures["right"])
        line = (
            f"step {trainer.step}, {trainer.seconds / 60:.1f} min, rows of {length}: "
            f"loss {self._loss:.4f}, answer tokens right {self._right:.4f}"
        )
        self._bar.set_postfix_str(line, refresh=False)
        self._bar.update(min(1.0, trainer.share) - self._bar.n)
        return line

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _blend(average: float, value: float) -> float:
    return value if average != average else 0.95 * average + 0.05 * value
