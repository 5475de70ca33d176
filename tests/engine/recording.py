"""An engine that reads its packed cells after each step: tokens that are quantized as written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from engine.harness import BLOCK, Engine, Trace

__all__ = ["RecordingEngine", "Stored"]

Chunk = tuple[int, int]


class Stored(NamedTuple):
    """Some KV heads of a layer, and where they lie.

    Attributes:
        cache: The cache, [num_blocks, heads, BLOCK, content].
        heads: Which KV heads of the layer.
        manager: The manager of their blocks.
    """

    cache: Any
    heads: Sequence[int]
    manager: Any


class RecordingEngine(Engine):
    """An engine that reads, after each step, what its cache holds of the step's tokens.

    A trace's `written` has a dict for each (re)start, as the reference wants it: (layer, side) ->
    float32 [num_tokens, num_kv_heads, channels]. Where a prefix hit leaves blocks out, nobody reads
    them; there stands what the same tokens had when they were computed.

    Args:
        model: Path of the model.
        policy: The policy.
        rule: The same in the reference's words, which knows how cells are read.
        options: Further options of `LLM`.
    """

    def __init__(self, model: Any, policy: Any, rule: Any, **options: Any) -> None:
        super().__init__(model, policy, **options)
        self.rule = rule
        self._due: list[
            tuple[dict[Any, Any], list[int], dict[int, list[int]], tuple[int, int]]
        ] = []
        self._computed: dict[Any, torch.Tensor] = {}

    @property
    def layers(self) -> list[Any]:
        """The attention layers, in the model's order."""
        context = self.runner.vllm_config.compilation_config.static_forward_context
        return [layer for layer in context.values() if hasattr(layer, "num_kv_heads")]

    def stored(self, layer: Any) -> list[Stored]:
        """Returns where the heads of a layer lie."""
        managers = list(self.lanes.values())
        parts = getattr(layer.impl, "parts", None)
        if parts:
            return [
                Stored(part.layer.kv_cache, part.heads.heads, managers[part.heads.run])
                for part in parts
            ]
        heads = range(layer.kv_cache.shape[1])
        return [Stored(layer.kv_cache, heads, self.lanes["StagingSpec"])]

    def _note(self, trace: Trace, request: Any, num_tokens: int) -> None:
        super()._note(trace, request, num_tokens)
        runs = vars(trace).setdefault("written", [])
        if len(runs) < len(trace.hits):
            runs.append({})
        blocks = {
            id(manager): [block.block_id for block in manager.req_to_blocks[request.request_id]]
            for manager in self.lanes.values()
        }
        self._due.append((runs[-1], list(request.all_token_ids), blocks, trace.chunks[-1]))

    def check_pool(self) -> None:
        super().check_pool()
        for run, tokens, blocks, (start, end) in self._due:
            for index, layer in enumerate(self.layers):
                begin = 0 if (index, 0) not in run else start
                self._read(run, tokens, blocks, index, layer, begin, end)
        self._due = []

    def _read(
        self,
        run: dict[Any, torch.Tensor],
        tokens: list[int],
        blocks: dict[int, list[int]],
        index: int,
        layer: Any,
        begin: int,
        end: int,
    ) -> None:
        first, last = begin // BLOCK, -(-end // BLOCK)
        shape = ((last - first) * BLOCK, layer.num_kv_heads, layer.head_size)
        sides = [torch.full(shape, torch.nan) for _ in range(2)]
        for cache, heads, manager in self.stored(layer):
            held = torch.tensor(blocks[id(manager)][first:last])
            content = cache[held].contiguous().view(torch.uint8).flatten(1)
            absent = (held == 0).repeat_interleave(BLOCK)  # the null block
            for side, numbers in enumerate(self.rule.read(content, len(heads), layer.head_size)):
                numbers[absent] = torch.nan
                sides[side][:, list(heads)] = numbers
        for side, numbers in enumerate(sides):
            for block in range(first, end // BLOCK):
                rows = numbers[(block - first) * BLOCK : (block - first + 1) * BLOCK]
                key = (index, side, tuple(tokens[: (block + 1) * BLOCK]))
                rows.copy_(torch.where(rows.isnan(), self._computed.get(key, rows), rows))
                self._computed[key] = rows
            new = numbers[begin - first * BLOCK : end - first * BLOCK]
            before = run.get((index, side), new[:0])
            run[index, side] = torch.cat([before, new])
