"""Physical block tables: what attention reads, in the stock kernels' own form.

    logical table    [ s0 s1 s2 s3 s4 s5 ]    staging, freed columns still filled with stale ids
    store table      [ k0 k1 ]
    layout           head_blocks = 2, first_block = 4
    physical table   [ k0 k1 s4 s5 ]          length shorter by (4 - 2) * block_size

No column that the plan has freed is ever read. Without a store the head comes from staging's own
first columns (the sinks).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress import plan_rows
from vllm_kvpress.kernels.physical_tables import physical_tables
from vllm_kvpress.plan import RetentionPlan


@dataclass(frozen=True)
class QueryWindow:
    """Which rows of a step's query go where in the query lane's pages.

    Attributes:
        rows: int64 [n], rows of the query.
        blocks: int64 [n], block ids.
        offsets: int64 [n], places within a block.
        per_block: Query rows in a block.
        valid: bool [n], False for rows of padding, which name the null block; None if every
            row counts.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    per_block: int
    valid: torch.Tensor | None = None

    def save(self, query: torch.Tensor, pages: torch.Tensor | None) -> None:
        """Writes the window's rows; a row of padding rewrites what is there.

        Args:
            query: [num_tokens, num_heads, head_dim].
            pages: [num_blocks, page_elements] of the layer.
        """
        assert pages is not None
        width = query.shape[1] * query.shape[2]
        places = pages[:, : self.per_block * width].unflatten(1, (self.per_block, width))
        values = query[self.rows].reshape(-1, width).to(pages.dtype)
        if self.valid is not None:
            kept = places[self.blocks, self.offsets]
            values = torch.where(self.valid[:, None], values, kept)
        places[self.blocks, self.offsets] = values


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """What attention reads of each request of a batch; rows of padding read nothing.

    Attributes:
        head_blocks: Whole blocks in front, int64 [num_reqs].
        gaps: Logical blocks that are left out, int64 [num_reqs].
        gap_tokens: The same in tokens, int32 [num_reqs].
        store_tokens: Tokens in the store's packed cells, int64 [num_reqs].
        demoted_tokens: Tokens in packed cells of losers, int64 [num_reqs].
    """

    head_blocks: np.ndarray
    gaps: np.ndarray
    gap_tokens: np.ndarray
    store_tokens: np.ndarray
    demoted_tokens: np.ndarray

    @classmethod
    def of(
        cls, plan: RetentionPlan, prompts: np.ndarray, starts: np.ndarray, num_reqs: int
    ) -> BatchLayout | None:
        """Returns the layout of a step, or None if nothing has been evicted.

        Args:
            plan: The retention plan.
            prompts: Prompt lengths, int64 [num_real_reqs].
            starts: Computed tokens at the start of the step, int64 [num_real_reqs].
            num_reqs: Rows of the step, padding included.
        """
        heads, firsts, stored, demoted = plan_rows.layouts(plan, prompts, starts)
        if not firsts.any():
            return None
        columns = np.zeros((4, num_reqs), np.int64)
        columns[:, : len(heads)] = heads, firsts - heads, stored, demoted
        head_blocks, gaps, store_tokens, demoted_tokens = columns
        gap_tokens = (gaps * plan.block_size).astype(np.int32)
        return cls(head_blocks, gaps, gap_tokens, store_tokens, demoted_tokens)


@dataclass(frozen=True, eq=False)
class _HostTable:
    """A physical table and what it was made from: steps in a row mostly need the same one."""

    layout: BatchLayout
    logical: np.ndarray
    head: np.ndarray
    table: torch.Tensor

    def serves(
        self, layout: BatchLayout, logical: np.ndarray, head: np.ndarray, columns: int
    ) -> bool:
        return (
            layout is self.layout
            and columns == self.table.shape[1]
            and np.array_equal(logical, self.logical)
            and np.array_equal(head, self.head)
        )


class PhysicalTables:
    """Builds physical tables and lengths; on CUDA always in the same buffers, as graphs require.

    Args:
        plan: The retention plan.
        vllm_config: The engine's configuration, for the sizes of the buffers.
        device: Where the caches are.
    """

    def __init__(self, plan: RetentionPlan, vllm_config: VllmConfig, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.persistent = device.type != "cpu"
        self._max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._max_reqs = vllm_config.scheduler_config.max_num_seqs
        self._table: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None
        self._window: tuple[torch.Tensor, ...] | None = None
        self._host_table: _HostTable | None = None

    def replace(
        self,
        common: CommonAttentionMetadata,
        layout: BatchLayout | None,
        store_table: torch.Tensor | None,
    ) -> CommonAttentionMetadata:
        """Returns `common` with physical block table and lengths.

        Args:
            common: The staging lane's logical metadata.
            layout: What attention reads; None if nothing has been evicted. Steps that share
                one may share a table.
            store_table: The store lane's block table, or None if the plan has no store.
        """
        if layout is None:
            return self.untouched(common)
        upper_bound = common.seq_lens_cpu_upper_bound
        assert upper_bound is not None
        ends = upper_bound.numpy() - layout.gap_tokens
        longest = int(ends.max())
        num_columns = -(-longest // self.plan.block_size)
        head = common.block_table_tensor if store_table is None else store_table
        build = self._on_device if self.persistent else self._on_host
        table, lengths = build(common, head[: common.num_reqs], layout, num_columns)
        physical = copy.copy(common)
        physical.block_table_tensor = table
        physical.seq_lens = lengths
        physical.max_seq_len = longest
        physical.seq_lens_cpu_upper_bound = torch.from_numpy(ends)
        physical._num_computed_tokens_cache = None
        return physical

    def _on_host(
        self,
        common: CommonAttentionMetadata,
        head: torch.Tensor,
        layout: BatchLayout,
        num_columns: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns table and lengths; NumPy costs a fifth of torch's dispatch on small arrays."""
        lengths = torch.from_numpy(common.seq_lens.numpy() - layout.gap_tokens)
        logical, heads = common.block_table_tensor.numpy(), head.numpy()
        made = self._host_table
        if made is not None and made.serves(layout, logical, heads, num_columns):
            return made.table, lengths
        columns = np.arange(num_columns)
        source = np.minimum(columns + layout.gaps[:, None], logical.shape[1] - 1)
        table = np.take_along_axis(logical, source, axis=1)  # [num_reqs, num_columns]
        width = min(num_columns, heads.shape[1])
        in_head = columns[:width] < layout.head_blocks[:, None]
        np.copyto(table[:, :width], heads[:, :width], where=in_head)
        made = _HostTable(layout, logical.copy(), heads.copy(), torch.from_numpy(table))
        self._host_table = made
        return made.table, lengths

    def _on_device(
        self,
        common: CommonAttentionMetadata,
        head: torch.Tensor,
        layout: BatchLayout,
        num_columns: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the same, computed by one kernel into the buffers that graphs read."""
        rows = common.num_reqs
        table, lengths = self._buffers(common)
        counts = torch.from_numpy(np.stack([layout.head_blocks, layout.gaps]))
        head_blocks, gaps = counts.to(self.device, non_blocking=True)
        physical_tables(
            common.block_table_tensor[:rows],
            head,
            head_blocks,
            gaps,
            common.seq_lens[:rows],
            self.plan.block_size,
            table[:rows, :num_columns],
            lengths[:rows],
        )
        return table[:rows], lengths[:rows]

    def untouched(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Returns logical metadata, in the buffers that physical metadata uses."""
        if not self.persistent:
            return common
        table, lengths = self._buffers(common)
        rows, columns = common.block_table_tensor.shape
        table[:rows, :columns].copy_(common.block_table_tensor)
        lengths[:rows].copy_(common.seq_lens)
        return common.replace(
            block_table_tensor=table[:rows],
            seq_lens=lengths[:rows],
            _num_computed_tokens_cache=None,
        )

    def _buffers(self, common: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tables and lengths of the largest batch, always the same tensors."""
        if self._table is None or self._lengths is None:
            rows, width = common.block_table_tensor.shape
            most = max(self._max_reqs, rows)
            self._table = torch.zeros(most, width, dtype=torch.int32, device=self.device)
            self._lengths = torch.zeros(most, dtype=common.seq_lens.dtype, device=self.device)
        return self._table, self._lengths

    def query_window(
        self,
        prompts: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        query_starts: np.ndarray,
        table: torch.Tensor,
    ) -> QueryWindow | None:
        """Returns the observation-window rows of a step; None on CPU if there are none."""
        plan = self.plan
        rows: list[int] = []
        requests: list[int] = []
        slots: list[int] = []
        windows = np.maximum(0, prompts - plan.query_window)
        for request in np.flatnonzero((starts < prompts) & (ends > windows)):
            prompt, start = int(prompts[request]), int(starts[request])
            if not plan.query_need(prompt, int(ends[request])):
                continue
            window = plan.query_start(prompt)
            first, last = max(start, window), min(int(ends[request]), prompt)
            offset = int(query_starts[request]) - start
            rows.extend(range(first + offset, last + offset))
            slots.extend(range(first - window, last - window))
            requests.extend([int(request)] * (last - first))
        if not rows and not self.persistent:
            return None
        return self._window_of(rows, requests, slots, table, int(query_starts[-1]))

    def no_window(self, common: CommonAttentionMetadata) -> QueryWindow | None:
        """Returns a window without rows, in the shape that graphs are captured with."""
        if not self.persistent or not self.plan.query_window:
            return None
        return self._window_of([], [], [], common.block_table_tensor, common.num_actual_tokens)

    def _window_of(
        self,
        rows: list[int],
        requests: list[int],
        slots: list[int],
        table: torch.Tensor,
        num_tokens: int,
    ) -> QueryWindow:
        per_block = self.plan.queries_per_block
        row = torch.tensor(rows, dtype=torch.int64)
        request = torch.tensor(requests, dtype=torch.int64)
        slot = torch.tensor(slots, dtype=torch.int64)
        if not self.persistent:
            blocks = table[request, slot // per_block].long()
            return QueryWindow(row, blocks, slot % per_block, per_block)
        # One entry for every token of the batch, at fixed addresses, so that a captured graph
        # replays with this step's values; tokens outside every window rewrite the null block.
        if self._window is None:
            most = self._max_tokens
            self._window = (
                torch.arange(most, device=self.device),
                torch.zeros(most, dtype=torch.int64, device=self.device),
                torch.zeros(most, dtype=torch.int64, device=self.device),
                torch.zeros(most, dtype=torch.bool, device=self.device),
            )
        all_rows, blocks, offsets, valid = self._window
        valid.zero_()
        if rows:
            row, request, slot = (
                t.to(self.device, non_blocking=True) for t in (row, request, slot)
            )
            blocks[row] = table[request, slot // per_block].long()
            offsets[row] = slot % per_block
            valid[row] = True
        blocks.masked_fill_(~valid, 0)
        offsets.masked_fill_(~valid, 0)
        n = num_tokens
        return QueryWindow(all_rows[:n], blocks[:n], offsets[:n], per_block, valid[:n])
