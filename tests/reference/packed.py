"""Packed stores in the dense reference: what entered the store is rounded in place.

Independent of vllm_kvpress like all of the reference: the rounding is written anew from its
formula, and tokens stay at their positions in dense tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference.dense import DenseLlama, Rule, Run, pick
from reference.scorers import SCORERS

__all__ = ["DemotingRule", "PackedRule", "round_channels", "round_tokens"]


@dataclass(frozen=True)
class PackedRule(Rule):
    """A policy whose store is packed; sizes in tokens.

    Attributes:
        bits: Of keys and of values; 0 leaves them exact.
        key_channels: Whether 32 keys of one channel share a scale.
        groups: Channels of a token that share a scale, of keys and of values; 0 for all.
        residual: Newest tokens that stay exact.
        exact_sinks: Whether the sinks' blocks stay exact.
        rotated: Whether keys, and values, are rounded after a Hadamard rotation.
    """

    bits: tuple[int, int] = (0, 0)
    key_channels: bool = False
    groups: tuple[int, int] = (0, 0)
    residual: int = 0
    exact_sinks: bool = False
    rotated: tuple[bool, bool] = (False, False)

    def run(self, model: DenseLlama, prompt_len: int, *args: Any) -> "PackedRun":
        return PackedRun(model, self, prompt_len, *args)

    def events(self, prompt_len: int, start: int, end: int) -> list[int]:
        return []  # the run sees to them itself

    @property
    def first(self) -> int:
        """The first position that may leave staging."""
        size = self.block_size
        return -(-self.sinks // size) * size if self.exact_sinks else 0

    @property
    def unit(self) -> int:
        """Tokens that leave staging together."""
        if not self.key_channels:
            return self.block_size
        return self.block_size * 32 // _common_divisor(self.block_size, 32)

    def closed(self, num_tokens: int) -> int:
        """Returns where the exact tokens begin again when so many are computed."""
        units = (num_tokens - self.residual - self.first) // self.unit
        return self.first + max(0, units) * self.unit

    def survivors(self, prompt_len: int) -> int:
        """Returns the tokens in the store after the end of the prompt."""
        closed = self.closed(prompt_len)
        if self.scorer == "full":
            return closed - self.first
        room = max(0, self.budget_of(prompt_len) - self.first - (prompt_len - closed))
        return min(closed - self.first, room // 32 * 32 if self.key_channels else room)

    def rounded(self, side: int, x: Tensor) -> Tensor:
        """Returns keys (side 0) or values (1) [num_tokens, head_dim] as the store gives them."""
        if not self.bits[side]:
            return x
        turn = hadamard(x.shape[1]) if self.rotated[side] else torch.eye(x.shape[1])
        turned = x.float() @ turn if self.rotated[side] else x.float()
        if side == 0 and self.key_channels:
            near = round_channels(turned, self.bits[side])
        else:
            near = round_tokens(turned, self.bits[side], self.groups[side])
        return (near @ turn if self.rotated[side] else near).to(x.dtype)


class PackedRun(Run):
    """The cache of one request: dense, with rounded and invisible tokens."""

    rule: PackedRule

    def step(self, tokens: Sequence[int], start: int) -> Tensor:
        logprobs = super().step(tokens, start)
        end, prompt = start + len(tokens), self.prompt_len
        if end < prompt:
            return logprobs
        if start < prompt:
            self._select()
        behind = self.rule.closed(max(start, prompt))
        for first in range(behind, self.rule.closed(end), self.rule.unit):
            closing = torch.arange(first, first + self.rule.unit)
            for layer in self.layers:
                for head in self.evicting_heads(layer):
                    self._round(layer, head, closing)
        return logprobs

    def _select(self) -> None:
        rule, prompt = self.rule, self.prompt_len
        first, closed, count = rule.first, rule.closed(prompt), rule.survivors(prompt)
        for layer in self.layers:
            for head in self.evicting_heads(layer):
                positions = torch.arange(prompt)
                kept = positions[first:closed].tolist()
                if count < closed - first:
                    key = (prompt, layer, head)
                    seen = self._observe(layer, head, positions)
                    scores = SCORERS[rule.scorer](seen, **rule.params)
                    forced = (positions < rule.sinks) | (positions >= prompt - rule.recent)
                    candidates = (positions >= first) & (positions < closed)
                    given = (self.forced_kept or {}).get(key)
                    kept, flips = pick(positions, scores, forced, candidates, count, given)
                    self.kept[key] = kept
                    self.flips += flips
                    self._lose(layer, head, sorted({*range(first, closed)} - {*kept}))
                self._round(layer, head, torch.tensor(kept, dtype=torch.int64))

    def _lose(self, layer: int, head: int, positions: list[int]) -> None:
        self.visible[layer, head, positions] = False

    def _round(
        self, layer: int, head: int, positions: Tensor, rule: PackedRule | None = None
    ) -> None:
        rule = rule or self.rule
        for side, cache in enumerate((self.keys, self.values)):
            cache[layer][positions, head] = rule.rounded(side, cache[layer][positions, head])


@dataclass(frozen=True)
class DemotingRule(PackedRule):
    """A policy that rounds what its scorer rejects more coarsely, instead of hiding it.

    Attributes:
        losers: How they are rounded; the rest of that rule says nothing.
    """

    losers: PackedRule | None = None

    def run(self, model: DenseLlama, prompt_len: int, *args: Any) -> "DemotingRun":
        return DemotingRun(model, self, prompt_len, *args)

    def demoted(self, prompt_len: int) -> int:
        """Returns how many tokens of each head are demoted: as many as fill groups of 32."""
        assert self.losers is not None
        closed = self.closed(prompt_len) - self.first
        rejected = closed - super().survivors(prompt_len)
        grouped = self.key_channels or self.losers.key_channels
        return rejected // 32 * 32 if grouped else rejected

    def survivors(self, prompt_len: int) -> int:
        return self.closed(prompt_len) - self.first - self.demoted(prompt_len)


class DemotingRun(PackedRun):
    """The cache of one request, rounded in two ways; every token stays visible."""

    rule: DemotingRule

    def _lose(self, layer: int, head: int, positions: list[int]) -> None:
        self._round(layer, head, torch.tensor(positions), self.rule.losers)


def round_tokens(x: Tensor, bits: int, group: int) -> Tensor:
    """Returns x [num_tokens, head_dim] rounded with a scale for each group of channels."""
    parts = x.split(group or x.shape[1], dim=1)
    return torch.cat([_round_rows(part, bits) for part in parts], dim=1)


def round_channels(x: Tensor, bits: int) -> Tensor:
    """Returns x [num_tokens, head_dim] rounded with a scale for 32 tokens of each channel."""
    return torch.cat([_round_rows(part.T, bits).T for part in x.split(32)]) if len(x) else x


def _round_rows(rows: Tensor, bits: int) -> Tensor:
    if not rows.numel():
        return rows
    low = rows.min(dim=1, keepdim=True).values.half().float()
    step = ((rows.max(dim=1, keepdim=True).values - low) / (2**bits - 1)).half().float()
    step[step == 0] = 1
    return ((rows - low) / step).round().clamp(0, 2**bits - 1) * step + low


def hadamard(size: int) -> Tensor:
    """Returns the block-diagonal Hadamard matrix: its sign is the parity of shared bits."""
    block = size & -size
    signs = [
        [(-1.0) ** (row & column).bit_count() for column in range(block)] for row in range(block)
    ]
    return torch.block_diag(*[torch.tensor(signs) / block**0.5] * (size // block))


def _common_divisor(a: int, b: int) -> int:
    return a if b == 0 else _common_divisor(b, a % b)
