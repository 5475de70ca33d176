"""Tokens in the dense reference that are rounded as they are written, and read so by everyone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference.dense import DenseLlama, Run
from reference.packed import PackedRule, hadamard

__all__ = ["WrittenRule"]


@dataclass(frozen=True)
class WrittenRule(PackedRule):
    """A policy whose tokens are rounded as they are written.

    Attributes:
        late: A mistake: whether a chunk reads its own tokens before they are rounded.
    """

    late: bool = False

    def run(self, model: DenseLlama, prompt_len: int, *args: Any) -> "WrittenRun":
        return WrittenRun(model, self, prompt_len, *args)

    def read(self, blocks: Tensor, heads: int, channels: int) -> list[Tensor]:
        """Returns the keys and the values in packed blocks, float32 [num_tokens, heads, channels].

        Written anew from the drawing of a cell: 16 tokens of one head.

        Args:
            blocks: uint8 [num_blocks, bytes].
            heads: KV heads.
            channels: Channels of a head.
        """
        widths = [channels * bits // 8 if bits else 4 * channels for bits in self.bits]
        groups = [
            -(-channels // (group or channels)) if bits else 0
            for bits, group in zip(self.bits, self.groups, strict=True)
        ]
        sizes = [*widths, *(2 * count for count in groups for _ in range(2))]
        cells = blocks.view(len(blocks), -1, heads, 16 * sum(sizes))
        sections = cells.split([16 * size for size in sizes], dim=-1)
        rows = [  # [num_tokens, heads, bytes]
            part.unflatten(-1, (16, size)).transpose(2, 3).flatten(0, 2).contiguous()
            for part, size in zip(sections, sizes, strict=True)
        ]
        found = []
        for side, bits in enumerate(self.bits):
            if not bits:
                found.append(rows[side].view(torch.float32))
                continue
            codes = [(rows[side] >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
            step, low = (rows[2 + 2 * side + i].view(torch.float16).float() for i in range(2))
            of_channel = torch.arange(channels) // (self.groups[side] or channels)
            near = torch.cat(codes, dim=-1) * step[..., of_channel] + low[..., of_channel]
            found.append(near @ hadamard(channels) if self.rotated[side] else near)
        return found

    def distances(self, side: int, x: Tensor, given: Tensor) -> list[float]:
        """Returns how far given roundings are from `x`, in steps, row by row; 0 where they agree.

        A number between two steps may fall to either, half a step away; a little more where the
        float16 of a scale or a zero fell to the other side, too.

        Args:
            side: 0 for keys, 1 for values.
            x: What is rounded, [num_rows, channels].
            given: The engine's rounding of it.
        """
        other = ((self.rounded(side, x) - given).abs() > 1e-4).any(dim=1)
        found = torch.zeros(len(x))
        if other.any():
            found[other] = self._steps_off(side, x[other], given[other])
        return found.tolist()

    def _steps_off(self, side: int, x: Tensor, given: Tensor) -> Tensor:
        if not self.bits[side]:
            return torch.full((len(x),), torch.inf)
        if self.rotated[side]:
            x, given = x @ hadamard(x.shape[1]), given @ hadamard(x.shape[1])
        group = self.groups[side] or x.shape[1]
        worst = []
        for part, near in zip(x.split(group, dim=1), given.split(group, dim=1), strict=True):
            step = (part.amax(1) - part.amin(1)) / (2 ** self.bits[side] - 1)
            worst.append((part - near).abs().amax(1) / step)
        return torch.stack(worst).amax(0)


class WrittenRun(Run):
    """The cache of one request whose tokens are rounded as they are written.

    `forced_kept` are the engine's own keys and values, [num_tokens, heads, channels] by (layer,
    side): a number near a tie may round either way, which moves it by a whole step.
    """

    rule: WrittenRule

    def written(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        if self.rule.late:
            return k, v
        return self._rounded(layer, 0, k, start), self._rounded(layer, 1, v, start)

    def step(self, tokens: Sequence[int], start: int) -> Tensor:
        logprobs = super().step(tokens, start)
        if self.rule.late:
            for layer in range(self.model.num_layers):
                for side, cache in enumerate((self.keys, self.values)):
                    cache[layer][start:] = self._rounded(layer, side, cache[layer][start:], start)
        return logprobs

    def _rounded(self, layer: int, side: int, x: Tensor, start: int) -> Tensor:
        rows = x.flatten(0, 1)
        if self.forced_kept is None:
            return self.rule.rounded(side, rows).view(x.shape)
        given = self.forced_kept[layer, side][start : start + len(x)]
        assert given.shape == x.shape
        self.flips += self.rule.distances(side, rows, given.flatten(0, 1))
        return given
