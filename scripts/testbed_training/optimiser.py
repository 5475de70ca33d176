"""Muon for the matrices inside of the layers, Adam for the embedding and the norms.

Source: Muon, https://kellerjordan.github.io/posts/muon. Masters and moments are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from testbed_training.model import Shape, Weights

__all__ = ["Optimiser"]

_MUON_RATE, _MUON_MOMENTUM, _MUON_DECAY = 0.003, 0.95, 0.02
_ADAM_RATE, _ADAM_BETAS, _ADAM_EPSILON = 1e-3, (0.9, 0.98), 1e-8
# Newton and Schulz: a quintic that sends every singular value close to 1 in five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Optimiser:
    """Masters of all weights, and what their updates remember.

    Attributes:
        masters: The weights, float32, updated in place by `step`.
    """

    def __init__(self, shape: Shape, masters: Weights) -> None:
        """Take over ``masters``."""
        self.masters = masters
        self._matrices = set(shape.matrices())
        self._first = {name: torch.zeros_like(weight) for name, weight in masters.items()}
        self._second = {
            name: torch.zeros_like(weight)
            for name, weight in masters.items()
            if name not in self._matrices
        }
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Weights, rate: float) -> None:
        """Update the masters; ``rate`` is a share of the full learning rates."""
        self._steps += 1
        for name, gradient in gradients.items():
            if name in self._matrices:
                self._muon(name, gradient, rate * _MUON_RATE)
            else:
                self._adam(name, gradient, rate * _ADAM_RATE)

    def _muon(self, name: str, gradient: Tensor, rate: float) -> None:
        momentum, master = self._first[name], self.masters[name]
        momentum.lerp_(gradient, 1 - _MUON_MOMENTUM)
        update = orthogonalised(gradient.lerp(momentum, _MUON_MOMENTUM))
        rows, columns = master.shape
        master.mul_(1 - rate * _MUON_DECAY)
        master.add_(update.to(master.dtype), alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _adam(self, name: str, gradient: Tensor, rate: float) -> None:
        first, second = self._first[name], self._second[name]
        beta_1, beta_2 = _ADAM_BETAS
        first.lerp_(gradient, 1 - beta_1)
        second.lerp_(gradient.square(), 1 - beta_2)
        mean = first / (1 - beta_1**self._steps)
        deviation = (second / (1 - beta_2**self._steps)).sqrt_().add_(_ADAM_EPSILON)
        self.masters[name].addcdiv_(mean, deviation, value=-rate)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs, masters included."""
        return {
            "masters": self.masters,
            "first": self._first,
            "second": self._second,
            "steps": self._steps,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state` returned."""
        self.masters, self._first = state["masters"], state["first"]
        self._second, self._steps = state["second"], state["steps"]


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors, and all singular values near 1; bfloat16."""
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_NEWTON_SCHULZ_STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x
