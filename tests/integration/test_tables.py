"""Physical tables against lists: what attention reads, block by block."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress import plan_rows
from vllm_kvpress.integration.tables import BatchLayout, PhysicalTables
from vllm_kvpress.plan import RetentionPlan

MAX_LEN = 96
MAX_TOKENS = 256
MAX_REQS = 8
STALE = -(10**6)

PLANS = {
    "store": RetentionPlan(4, 1, 4, 12, None),
    "ratio": RetentionPlan(8, 2, 4, None, 0.4),
    "queries": RetentionPlan(4, 0, 4, 9, None, query_window=4, queries_per_block=3),
    "decode": RetentionPlan(4, 1, 4, 13, None, every_decode_tokens=5, positions_per_block=7),
    "window": RetentionPlan(4, 3, 9, 12, None, store=False),
    "no-sinks": RetentionPlan(2, 0, 5, 5, None, store=False),
}

# (prompt, start, new tokens) of each request.
ROWS = st.lists(
    st.tuples(st.integers(1, 64), st.integers(0, 80), st.sampled_from([1, 1, 1, 2, 7, 16])),
    min_size=1,
    max_size=MAX_REQS - 2,
)


def tables_of(plan, *, persistent=False):
    scheduler = SimpleNamespace(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_REQS)
    config = SimpleNamespace(scheduler_config=scheduler)
    tables = PhysicalTables(plan, config, torch.device("cpu"))
    tables.persistent = persistent
    return tables


class Batch:
    """A step's logical metadata; columns that the plan has freed hold an id out of any range."""

    def __init__(self, plan, rows, padding=0):
        self.plan, self.rows = plan, rows
        size, count = plan.block_size, len(rows) + padding
        width = MAX_LEN // size
        self.staging = 100 + torch.arange(count * width, dtype=torch.int32).view(count, width)
        self.store = 5000 + torch.arange(count * width, dtype=torch.int32).view(count, width)
        self.queries = 9000 + torch.arange(count * width, dtype=torch.int32).view(count, width)
        self.prompts = np.array([prompt for prompt, _, _ in rows], dtype=np.int64)
        self.starts = np.array([start for _, start, _ in rows], dtype=np.int64)
        self.ends = self.starts + np.array([new for _, _, new in rows], dtype=np.int64)
        for row, (prompt, start, _) in enumerate(rows):
            first, last = plan.freed_staging(prompt, start)
            self.staging[row, first:last] = STALE
            self.store[row, plan.layout(prompt, start)[0] if plan.store else 0 :] = STALE
        lengths = torch.tensor([*self.ends, *[0] * padding], dtype=torch.int32)
        starts = [0, *np.cumsum(self.ends - self.starts)]
        query_starts = torch.tensor([*starts, *[starts[-1]] * padding], dtype=torch.int32)
        self.common = CommonAttentionMetadata(
            query_start_loc=query_starts,
            query_start_loc_cpu=query_starts,
            seq_lens=lengths.clone(),
            seq_lens_cpu_upper_bound=lengths.clone(),
            num_reqs=count,
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(new for _, _, new in rows),
            max_seq_len=int(self.ends.max()),
            block_table_tensor=self.staging,
            slot_mapping=torch.arange(int(starts[-1])),
        )
        # Cached by whoever asked first: wrong once the lengths are physical.
        self.common._num_computed_tokens_cache = torch.full((count,), STALE)

    def expected(self):
        """[block ids] and length of each request, by lists."""
        for row, (prompt, start, new) in enumerate(self.rows):
            heads, first, *_ = self.plan.layout(prompt, start)
            end = start + new
            source = self.store if self.plan.store else self.staging
            blocks = source[row].tolist()[:heads]
            blocks += self.staging[row].tolist()[first : -(-end // self.plan.block_size)]
            yield blocks, end - (first - heads) * self.plan.block_size

    def replaced(self, tables):
        store = self.store if self.plan.store else None
        layout = BatchLayout.of(self.plan, self.prompts, self.starts, self.common.num_reqs)
        return tables.replace(self.common, layout, store)


def check(batch, physical):
    lengths = []
    for row, (blocks, length) in enumerate(batch.expected()):
        assert STALE not in blocks
        assert physical.block_table_tensor[row, : len(blocks)].tolist() == blocks
        assert int(physical.seq_lens[row]) == length
        assert int(physical.seq_lens_cpu_upper_bound[row]) == length
        assert len(blocks) == -(-length // batch.plan.block_size)
        lengths.append(length)
    assert physical.max_seq_len >= max(lengths)
    columns = physical.block_table_tensor.shape[1]
    assert columns * batch.plan.block_size >= physical.max_seq_len
    assert physical.block_table_tensor.dtype == torch.int32
    assert physical.seq_lens.dtype == batch.common.seq_lens.dtype
    assert bool((physical.seq_lens[len(batch.rows) :] == 0).all())
    # Positions and slots stay logical.
    assert physical.slot_mapping is batch.common.slot_mapping
    assert physical.query_start_loc is batch.common.query_start_loc


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(0, 2))
def test_tables_are_those_of_lists(plan, rows, padding):
    batch = Batch(plan, rows, padding)
    logical = (batch.common.seq_lens.clone(), batch.common.block_table_tensor.clone())

    physical = batch.replaced(tables_of(plan))

    check(batch, physical)
    if physical is not batch.common:
        # By default it is counted from the lengths, which are physical now.
        assert physical._num_computed_tokens_cache is None
        assert physical.max_seq_len == max(length for _, length in batch.expected())
    assert torch.equal(batch.common.seq_lens, logical[0])
    assert torch.equal(batch.common.block_table_tensor, logical[1])


@pytest.mark.parametrize("persistent", [False, True], ids=["cpu", "persistent"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@settings(max_examples=60, deadline=None)
@given(ROWS, st.lists(st.tuples(st.integers(0, MAX_REQS), st.booleans()), min_size=1, max_size=9))
def test_steps_that_share_a_layout_read_their_own_tables(plan, persistent, rows, changes):
    """Requests decode on, as far as one layout serves; meanwhile others may take their places."""
    rows = [(prompt, prompt + start % 20, 1) for prompt, start, _ in rows]
    batch = Batch(plan, rows)
    layout = BatchLayout.of(plan, batch.prompts, batch.starts, len(rows))
    until = plan_rows.steady_until(plan, batch.prompts, batch.starts)
    tables = tables_of(plan, persistent=persistent)
    for step, (row, in_store) in enumerate(changes):
        if (batch.ends + step >= until).any() or (batch.ends + step > MAX_LEN).any():
            return
        later = Batch(plan, [(prompt, start + step, 1) for prompt, start, _ in rows])
        changed = later.store if in_store else later.staging
        changed[row % len(rows)] += 20000 * (changed[row % len(rows)] != STALE)
        store = later.store if plan.store else None
        check(later, tables.replace(later.common, layout, store))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ROWS, st.integers(0, 2)), min_size=2, max_size=5))
def test_persistent_tables_stay_where_they_are(plan, steps):
    tables, plain = tables_of(plan, persistent=True), tables_of(plan)
    addresses = set()
    for rows, padding in steps:
        batch = Batch(plan, rows, padding)
        physical = batch.replaced(tables)
        check(batch, physical)
        other = batch.replaced(plain)
        assert torch.equal(physical.seq_lens, other.seq_lens)
        assert physical.seq_lens.shape == (len(rows) + padding,)
        addresses.add((physical.block_table_tensor.data_ptr(), physical.seq_lens.data_ptr()))
        assert physical.block_table_tensor.stride(0) == MAX_LEN // plan.block_size
        # A captured graph's metadata lies in the same buffers.
        captured = tables.untouched(batch.common)
        addresses.add((captured.block_table_tensor.data_ptr(), captured.seq_lens.data_ptr()))
        assert torch.equal(captured.block_table_tensor, batch.common.block_table_tensor)
    assert len(addresses) == 1


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_kernel_fills_the_same_buffers(plan, monkeypatch):
    from vllm_kvpress.kernels.physical_tables import reference, triton

    starts = []

    def launch(*arguments):
        starts.append(arguments)
        triton.launch(*arguments)

    monkeypatch.setattr(reference, "physical_tables", launch)
    tables = tables_of(plan, persistent=True)

    for rows in ([(30, 40, 1), (64, 70, 1), (12, 0, 12)], [(33, 50, 1), (60, 61, 1)]):
        batch = Batch(plan, rows, padding=1)
        check(batch, batch.replaced(tables))

    assert len(starts) == 2


@pytest.mark.parametrize("persistent", [False, True])
def test_a_batch_without_evictions_is_untouched(persistent):
    plan = PLANS["store"]
    batch = Batch(plan, [(30, 0, 16), (12, 20, 1)])

    physical = batch.replaced(tables_of(plan, persistent=persistent))

    assert (physical is batch.common) is not persistent
    assert torch.equal(physical.block_table_tensor, batch.common.block_table_tensor)
    assert physical.max_seq_len == batch.common.max_seq_len


def saved_rows(batch, window, query):
    """What the query lane holds after a step: (block, row) -> query, by the real `save`."""
    if window is None:
        return {}
    pages = torch.zeros(20000, 64)
    window.save(query, pages)
    width = query.shape[1] * query.shape[2]
    rows = pages[:, : window.per_block * width].unflatten(1, (window.per_block, width))
    blocks, places = rows.abs().sum(-1).nonzero(as_tuple=True)
    return {
        (block, place): rows[block, place]
        for block, place in zip(blocks.tolist(), places.tolist(), strict=True)
    }


@pytest.mark.parametrize("persistent", [False, True], ids=["cpu", "persistent"])
@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(ROWS, st.integers(0, 2)), min_size=1, max_size=3))
def test_the_query_window_is_that_of_lists(persistent, steps):
    plan = PLANS["queries"]
    tables = tables_of(plan, persistent=persistent)
    addresses = set()
    for rows, padding in steps:
        batch = Batch(plan, rows, padding)
        query = torch.randn(batch.common.num_actual_tokens, 2, 8)
        query_starts = batch.common.query_start_loc_cpu[: len(rows) + 1].numpy()
        window = tables.query_window(
            batch.prompts, batch.starts, batch.ends, query_starts, batch.queries
        )
        expected = {}
        for row, (prompt, start, new) in enumerate(rows):
            first = max(0, prompt - plan.query_window)
            for position in range(start, start + new):
                if first <= position < prompt and prompt > 9:
                    block, place = divmod(position - first, plan.queries_per_block)
                    offset = int(query_starts[row]) + position - start
                    expected[int(batch.queries[row, block]), place] = query[offset].flatten()
        found = saved_rows(batch, window, query)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        if persistent:
            addresses.add(tuple(t.data_ptr() for t in (window.blocks, window.offsets)))
            empty = tables.no_window(batch.common)
            assert saved_rows(batch, empty, query) == {}
            assert empty.blocks.data_ptr() == window.blocks.data_ptr()
    assert len(addresses) <= 1


def test_no_window_without_queries():
    batch = Batch(PLANS["store"], [(8, 0, 8)])

    assert tables_of(PLANS["store"], persistent=True).no_window(batch.common) is None
    assert tables_of(PLANS["queries"]).no_window(batch.common) is None
