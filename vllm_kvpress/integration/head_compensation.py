"""RazorAttention's compensation: one token in place of those that a streaming head does not see.

With N such tokens of a head, a query q gets one more key and value,

    k^ = (sum of their k) / N,   v^ = (sum of their v) / N,   logit = scale * q . k^ + log N

The log makes the token count N times: were the N keys equal, the softmax would be that over all
tokens.

    page of a streaming lane   | K, V of block_size tokens, as [heads, tokens, K|V] | sums |
    sums of block i            float32 [heads, K|V] of all tokens in the blocks [sinks, i]

The paper's token is a running mean of its own. Here the sums that a query needs lie in the block
right before its window (`WindowPlan.summed_block`), written when that block closed: its
predecessor's and its own tokens', added in a fixed order. So they are a function of the prefix
alone, shared with the block by prefix caching, and wherever a prompt is cut, found or computed
again, results are the same. A private token could not be made again on a prefix hit, as what it
stands for has left.

Attention over sinks and window is `paged_attention`'s, in PyTorch on CPU and by kernel on CUDA;
the token is put in by the logarithm of its softmax's denominator. Stock kernels give none.

Source: arXiv 2407.15891, section 3.3. Deviations: whole blocks, and the window is the policy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kvpress.errors import UnsupportedModelError
from vllm_kvpress.kernels.paged_attention import ExactPart, paged_attention
from vllm_kvpress.window_plan import WindowPlan
from vllm_kvpress.window_rows import window_rows

__all__ = ["CompensationStep", "compensated_impl", "padded_page", "step_of"]

_SUM = torch.float32


def padded_page(spec: AttentionSpec, window: WindowPlan) -> int:
    """Returns the bytes of a lane's page with its sums behind the tokens.

    Raises:
        UnsupportedModelError: the cache's numbers are not the model's own.
    """
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            "heads.compensation adds up keys and values as they lie in the cache",
            got=f"a cache of {spec.dtype}",
            allowed="--kv-cache-dtype auto, without quantize",
            fix="Set heads.compensation to false",
        )
    if spec.head_size != spec.head_size_v:
        raise UnsupportedModelError(
            "heads.compensation needs keys and values of one size",
            got=f"{spec.head_size} and {spec.head_size_v} channels",
            fix="Set heads.compensation to false",
        )
    tokens, with_sums = window.rows(spec.dtype.itemsize)
    return spec.unpadded_page_size_bytes // tokens * with_sums


@dataclass(frozen=True)
class CompensationStep:
    """What compensated lanes of one cache group do in a step, all rows in the plan's order.

    Attributes:
        starts: Where each row's queries begin, and their number, int32 [num_rows + 1].
        table: Blocks that each row reads, int32 [num_rows, most].
        lengths: Tokens that it reads, int32 [num_rows].
        longest: The most queries and the most tokens of a row.
        row_of: The row of each query, int64 [num_tokens].
        summed: The block with the sums of each row, int64 [num_rows]; any where `counts` is 0.
        counts: Tokens that each row does not see, float32 [num_rows].
        closing: Blocks that the step closes, int64 [num_closing], each request's k-th before any
            request's next one.
        before: The block before each of them, likewise; any where `follows` is false.
        follows: Whether sums go on from the block before, bool [num_closing, 1, 1].
        turns: How many of `closing` are each request's first, second and so on.
    """

    starts: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    longest: tuple[int, int]
    row_of: torch.Tensor
    summed: torch.Tensor
    counts: torch.Tensor
    closing: torch.Tensor
    before: torch.Tensor
    follows: torch.Tensor
    turns: list[int]


def step_of(window: WindowPlan, common: CommonAttentionMetadata) -> CompensationStep | None:
    """Returns what a step does, from its logical metadata; None for a dummy batch."""
    if common.seq_lens_cpu_upper_bound is None:
        return None
    starts = common.query_start_loc_cpu.numpy().astype(np.int64)
    ends = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
    rows = window_rows(window, starts, ends)
    table = common.block_table_tensor
    requests, columns, behind = _closing(window, ends - np.diff(starts), ends)
    follows = columns > window.sink_blocks

    def on_device(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(table.device, non_blocking=True)

    def block(of: Any, column: Any) -> torch.Tensor:
        return table[on_device(of), on_device(column)].long()

    summed = np.maximum(window.sink_blocks + rows.gaps - 1, 0)
    queries = np.diff(rows.query_starts)
    return CompensationStep(
        starts=on_device(rows.query_starts),
        table=table[on_device(rows.requests)[:, None], on_device(rows.columns)].int(),
        lengths=on_device(rows.lengths),
        longest=(max(1, int(queries.max())), int(rows.lengths.max())),
        row_of=on_device(np.repeat(np.arange(len(queries)), queries)),
        summed=block(rows.requests, summed),
        counts=on_device((rows.gaps * window.block_size).astype(np.float32)),
        closing=block(requests, columns),
        before=block(requests, np.maximum(columns - 1, 0)),
        follows=on_device(follows[:, None, None]),
        turns=np.bincount(behind).tolist(),
    )


def _closing(window: WindowPlan, starts: Any, ends: Any) -> tuple[Any, Any, Any]:
    """Returns request, logical block and turn of the blocks behind the sinks that a step closes."""
    firsts = np.maximum(starts // window.block_size, window.sink_blocks)
    counts = np.maximum(ends // window.block_size - firsts, 0)
    requests = np.repeat(np.arange(len(ends)), counts)
    behind = np.arange(len(requests)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort(behind, kind="stable")
    return requests[order], (firsts[requests] + behind)[order], behind[order]


@cache
def compensated_impl(inner_impl: type[Any]) -> type[Any]:
    """Returns a subclass of the stock impl that writes and attends compensated lanes itself."""

    class CompensatedImpl(inner_impl):  # type: ignore[misc, valid-type]
        def do_kv_cache_update(
            self,
            layer: Any,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            slot_mapping: torch.Tensor,
        ) -> None:
            block_size = kv_cache.shape[2]
            tokens = torch.cat([key, value], dim=-1)[: len(slot_mapping)]
            # Padding goes where nobody looks: into the null block.
            slots = slot_mapping.clamp(min=0)
            kv_cache[slots // block_size, :, slots % block_size] = tokens

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            step: CompensationStep | None = attn_metadata.kv_compensation
            if step is not None:
                sums = sums_of(kv_cache)
                add_closing(kv_cache, sums, step)
                self._attend(query, kv_cache, sums, step, output)
            return output

        def _attend(
            self,
            query: torch.Tensor,
            kv_cache: torch.Tensor,
            sums: torch.Tensor,
            step: CompensationStep,
            output: torch.Tensor,
        ) -> None:
            keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
            soft_cap = self.logits_soft_cap or 0.0
            seen, lse = paged_attention(
                query,
                step.starts,
                causal=ExactPart(keys, values, step.table, step.lengths),
                scale=self.scale,
                max_query_len=step.longest[0],
                max_tokens=step.longest[1],
                soft_cap=soft_cap,
                sinks=None if self.sinks is None else self.sinks.float(),
            )
            n = len(step.row_of)
            unseen, logits = unseen_token(query[:n], sums, step, self.scale, soft_cap)
            share = torch.sigmoid(logits - lse[:n]).unsqueeze(-1)
            seen = seen[:n].float()
            output[:n] = (seen + share * (unseen - seen)).to(output.dtype).view_as(output[:n])

    CompensatedImpl.__qualname__ = CompensatedImpl.__name__ = f"Compensated{inner_impl.__name__}"
    return CompensatedImpl


def sums_of(kv_cache: torch.Tensor) -> torch.Tensor:
    """Returns the sums of a lane's blocks, float32 [num_blocks, heads, K|V], aliasing its pages.

    Args:
        kv_cache: The lane's cache, [num_blocks, heads, tokens, K|V], dense inside a block.
    """
    num_blocks, heads, tokens, content = kv_cache.shape
    size = kv_cache.element_size()
    stride, page = kv_cache.stride(0) * size, heads * tokens * content * size
    start = kv_cache.storage_offset() * size + page
    assert stride % _SUM.itemsize == start % _SUM.itemsize == 0, "pages are of whole float32"
    everything = torch.empty(0, dtype=_SUM, device=kv_cache.device)
    everything.set_(kv_cache.untyped_storage())  # type: ignore[call-overload]
    shape, strides = (num_blocks, heads, content), (stride // _SUM.itemsize, content, 1)
    return everything.as_strided(shape, strides, start // _SUM.itemsize)


def add_closing(kv_cache: torch.Tensor, sums: torch.Tensor, step: CompensationStep) -> None:
    """Writes the sums of the blocks that a step closes.

    Args:
        kv_cache: The lane's cache, the step's tokens included.
        sums: Its sums.
        step: What is closed.
    """
    if not step.turns:
        return
    own = _sum_in_pairs(kv_cache[step.closing].to(_SUM))
    first = 0
    for count in step.turns:  # block after block: each needs its predecessor's sums
        turn = slice(first, first + count)
        before = torch.where(step.follows[turn], sums[step.before[turn]], 0.0)
        sums[step.closing[turn]] = before + own[turn]
        first += count


def _sum_in_pairs(tokens: torch.Tensor) -> torch.Tensor:
    """Returns [blocks, heads, K|V], added in an order that depends on the block size alone."""
    while (count := tokens.shape[2]) > 1:
        half = count // 2
        pairs = tokens[:, :, :half] + tokens[:, :, half : 2 * half]
        if count % 2:
            pairs[:, :, 0] += tokens[:, :, -1]
        tokens = pairs
    return tokens[:, :, 0]


def unseen_token(
    query: torch.Tensor,
    sums: torch.Tensor,
    step: CompensationStep,
    scale: float,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns value and logit of the token that stands for what each query does not see.

    Args:
        query: [num_tokens, num_q_heads, head_size].
        sums: Of the lane's blocks.
        step: Rows and counts.
        scale: What logits are multiplied by.
        soft_cap: 0 for none.

    Returns:
        float32 [num_tokens, num_q_heads, head_size] and [num_tokens, num_q_heads], -inf where a
        query sees everything.
    """
    counts = step.counts[:, None, None]
    means = torch.where(counts > 0, sums[step.summed] / counts, 0.0)[step.row_of]
    means = means.repeat_interleave(query.shape[1] // means.shape[1], dim=1)
    keys, values = means.chunk(2, dim=-1)
    logits = (query.float() * keys).sum(-1) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return values, logits + step.counts.log()[step.row_of, None]
