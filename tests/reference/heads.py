"""Retrieval and streaming heads in the dense reference: a mask for each (layer, KV head, query).

Independent on purpose, as all of this folder. With block size B, a streaming head's query at
position i sees the keys j <= i with

    j < ceil(sinks / B) B    or    j >= (floor(i / B) - ceil(recent / B)) B

and, compensated, one key and value more: the means over the N others, with log N on its logit.
A retrieval head sees every key, but for those that the rule's scorer has evicted, if it has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference.dense import Rule, Run

__all__ = ["HeadRule", "HeadRun"]


@dataclass(frozen=True)
class HeadRule(Rule):
    """A head plan.

    Attributes:
        labels: [num_layers] strings of 0 (streaming) and 1 (retrieval), one for each KV head.
        compensated: Whether one token stands for all that a streaming head does not see.
        counted: Whether it counts as often as there are such tokens.
    """

    labels: Sequence[str] = ()
    compensated: bool = False
    counted: bool = True

    def run(self, model: Any, prompt_len: int, *args: Any) -> "HeadRun":
        return HeadRun(model, self, prompt_len, *args)

    def streaming_mask(self, start: int, num_queries: int) -> Tensor:
        """Returns what a streaming head's queries see, bool [num_queries, start + num_queries]."""
        seen = torch.zeros(num_queries, start + num_queries, dtype=torch.bool)
        for row in range(num_queries):
            query = start + row
            for key in range(query + 1):
                first = (query // self.block_size - -(-self.recent // self.block_size)) * (
                    self.block_size
                )
                is_sink = key < -(-self.sinks // self.block_size) * self.block_size
                seen[row, key] = is_sink or key >= first
        return seen


class HeadRun(Run):
    """The cache of one request under a head plan."""

    rule: HeadRule

    def step(self, tokens: Sequence[int], start: int) -> Tensor:
        self._mask = self.rule.streaming_mask(start, len(tokens))
        return super().step(tokens, start)

    def evicting_heads(self, layer: int) -> Sequence[int]:
        return [head for head, label in enumerate(self.rule.labels[layer]) if label == "1"]

    def _attend(self, layer: int, q: Tensor, start: int) -> Tensor:
        group = q.shape[1] // self.model.num_kv_heads
        causal = torch.ones(self._mask.shape, dtype=torch.bool).tril(start)
        out = torch.empty_like(q)
        for head, label in enumerate(self.rule.labels[layer]):
            mine = slice(head * group, (head + 1) * group)
            seen = causal & self.visible[layer, head] if label == "1" else self._mask
            keys, values = self.keys[layer][:, head], self.values[layer][:, head]
            if self.rule.compensated and label == "0":
                out[:, mine] = self._compensated(q[:, mine], keys, values, causal)
                continue
            logits = torch.einsum("qhd,kd->hqk", q[:, mine], keys) * self.model.head_dim**-0.5
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            out[:, mine] = torch.einsum("hqk,kd->qhd", weights, values)
        return out

    def _compensated(self, q: Tensor, keys: Tensor, values: Tensor, causal: Tensor) -> Tensor:
        """Attention of a streaming head, one query after the other, [num_queries, group, dim]."""
        rows = []
        for row, seen in enumerate(self._mask):
            unseen = causal[row] & ~seen
            ks, vs, bias = keys[seen], values[seen], torch.zeros(int(seen.sum()))
            if unseen.any():
                ks = torch.cat([ks, keys[unseen].mean(0, keepdim=True)])
                vs = torch.cat([vs, values[unseen].mean(0, keepdim=True)])
                weight = unseen.sum() if self.rule.counted else torch.tensor(1)
                bias = torch.cat([bias, weight.float().log()[None]])
            logits = q[row] @ ks.T * self.model.head_dim**-0.5 + bias
            rows.append(logits.softmax(-1) @ vs)
        return torch.stack(rows)
