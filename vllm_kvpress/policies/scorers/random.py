"""Random: a seeded draw, the baseline that every policy must beat."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_kvpress.errors import ScoreError
from vllm_kvpress.policies.observation import LayerObservation
from vllm_kvpress.policies.scorer import Scorer
from vllm_kvpress.policies.scorers.params import STRICT

__all__ = ["RandomScorer"]

# splitmix64's constants, as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True, config=STRICT)
class RandomScorer(Scorer):
    """Scores a token by a hash of (seed, layer, global KV head, position).

    A counter-based hash, not a generator: every rank, device and replay draws the same. With all
    arithmetic modulo 2**64, `>>` on unsigned numbers, and splitmix64's step

        mix(z): z += 0x9E3779B97F4A7C15
                z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
                z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                return z ^ (z >> 31)

        score = (mix(mix(mix(mix(seed) ^ layer) ^ head) ^ position) >> 40) / 2**24   in [0, 1)

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.

    Attributes:
        seed: another seed draws other tokens.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"positions"})

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns the hash of each token, uniform in [0, 1)."""
        if observation.positions is None:
            raise ScoreError("the scorer 'random' needs positions", got="none")
        device = observation.keys.device
        heads = torch.tensor(observation.kv_heads, device=device)
        seed = torch.tensor(self.seed, dtype=torch.int64, device=device)
        state = _mix(_mix(_mix(seed) ^ observation.layer_idx) ^ heads)
        state = _mix(state[:, None] ^ observation.positions)
        return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def _mix(state: torch.Tensor) -> torch.Tensor:
    state = state + _GAMMA
    state = (state ^ _shift_right(state, 30)) * _MULTIPLIER_1
    state = (state ^ _shift_right(state, 27)) * _MULTIPLIER_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: torch.Tensor, num_bits: int) -> torch.Tensor:
    # int64's >> copies the sign; the mask makes it the shift of the unsigned number.
    return (state >> num_bits) & ((1 << (64 - num_bits)) - 1)
