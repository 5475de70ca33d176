"""Sums of keys and values in the blocks of a compensated lane, and the token made of them."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvpress.config import load_policy
from vllm_kvpress.conflict_table import check_cache_dtype
from vllm_kvpress.errors import ConflictError, UnsupportedModelError
from vllm_kvpress.integration.head_compensation import (
    compensated_impl,
    padded_page,
    step_of,
    sums_of,
)
from vllm_kvpress.window_plan import WindowPlan

HEADS, SIZE = 2, 24
LONGEST = 60


def pool(block_size, num_blocks, dtype=torch.float32, filled=float("nan")):
    """A lane's cache between two other pages, as in a block of the pool; sums start as NaN."""
    page = HEADS * block_size * 2 * SIZE * dtype.itemsize
    with_sums = page + HEADS * 2 * SIZE * 4
    stride = 64 + with_sums + 32
    raw = torch.full((num_blocks * stride // 4,), filled).view(dtype)
    return raw.as_strided(
        (num_blocks, HEADS, block_size, 2 * SIZE),
        (stride // dtype.itemsize, block_size * 2 * SIZE, 2 * SIZE, 1),
        64 // dtype.itemsize,
    )


class Stock:
    """What the compensated impl needs of a stock one."""

    scale, logits_soft_cap, sinks = 0.7, 0.0, None


IMPL = compensated_impl(Stock)()


class Lane:
    """One lane of a few requests, driven as the engine drives it."""

    def __init__(self, window, requests, dtype=torch.float32):
        self.window = window
        self.num_columns = LONGEST // window.block_size + 2
        self.cache = pool(window.block_size, 1 + requests * self.num_columns, dtype)
        order = torch.randperm(requests * self.num_columns) + 1
        self.table = order.view(requests, self.num_columns)

    def step(self, chunks, query, tokens):
        """Computes [start, end) of each request: returns outputs [num_tokens, q heads, size].

        Args:
            chunks: One for each request.
            query: One tensor [LONGEST, q heads, SIZE] for all.
            tokens: K|V [LONGEST, HEADS, 2 * SIZE] for each request.
        """
        size = self.window.block_size
        positions = [torch.arange(start, end) for start, end in chunks]
        common = SimpleNamespace(
            query_start_loc_cpu=torch.tensor([0, *map(len, positions)]).cumsum(0).int(),
            seq_lens_cpu_upper_bound=torch.tensor([end for _, end in chunks]).int(),
            block_table_tensor=self.table.int(),
        )
        slots = torch.cat(
            [row[p // size] * size + p % size for row, p in zip(self.table, positions, strict=True)]
        )
        written = torch.cat([all_of[p] for all_of, p in zip(tokens, positions, strict=True)])
        keys, values = written.to(self.cache.dtype).chunk(2, dim=-1)
        IMPL.do_kv_cache_update(None, keys, values, self.cache, slots)
        queries = query[torch.cat(positions)].to(self.cache.dtype)
        output = torch.empty_like(queries)
        metadata = SimpleNamespace(kv_compensation=step_of(self.window, common))
        IMPL.forward(None, queries, keys, values, self.cache, metadata, output)
        return output

    def sums(self, request, num_blocks):
        return sums_of(self.cache)[self.table[request, :num_blocks]]


def expected(window, query, tokens, position):
    """One query over the tokens it sees, one by one, and the mean of those it does not."""
    seen = [key for key in range(position + 1) if window.sees(position, key)]
    unseen = [key for key in range(position + 1) if key not in set(seen)]
    rows = tokens[seen].double()
    bias = [0.0] * len(seen)
    if unseen:
        rows = torch.cat([rows, tokens[unseen].double().mean(0, keepdim=True)])
        bias.append(float(torch.tensor(len(unseen)).double().log()))
    keys, values = rows.repeat_interleave(2, dim=1).chunk(2, dim=-1)
    logits = (query.double() * keys).sum(-1) * Stock.scale + torch.tensor(bias)[:, None]
    return (logits.softmax(0)[..., None] * values).sum(0)


@st.composite
def schedules(draw):
    """Chunks of two requests, step by step, each of which may also wait."""
    steps, at = [], [0, 0]
    for _ in range(draw(st.integers(1, 12))):
        lengths = [min(draw(st.integers(0, 14)), LONGEST - start) for start in at]
        if sum(lengths):
            steps.append([(start, start + n) for start, n in zip(at, lengths, strict=True)])
            at = [start + n for start, n in zip(at, lengths, strict=True)]
    return steps


WINDOWS = st.builds(
    WindowPlan, st.sampled_from([1, 2, 4, 5]), st.integers(0, 6), st.integers(1, 9), st.just(True)
)


@settings(max_examples=60, deadline=None)
@given(WINDOWS, schedules(), st.integers(0, 9))
def test_every_query_sees_its_window_and_one_token_for_the_others(window, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(LONGEST, 2 * HEADS, SIZE, generator=generator)
    tokens = [torch.randn(LONGEST, HEADS, 2 * SIZE, generator=generator) for _ in range(2)]
    lane = Lane(window, 2)

    for chunks in steps:
        output = iter(lane.step(chunks, query, tokens))
        for mine, (start, end) in zip(tokens, chunks, strict=True):
            for position in range(start, end):
                wanted = expected(window, query[position], mine, position)
                torch.testing.assert_close(next(output).double(), wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(WINDOWS, st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_the_same_bits_wherever_a_prompt_is_cut(dtype, window, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(LONGEST, 2 * HEADS, SIZE, generator=generator)
    tokens = [torch.randn(LONGEST, HEADS, 2 * SIZE, generator=generator)]
    total = min(LONGEST, sum(lengths))
    cut, whole = Lane(window, 1, dtype), Lane(window, 1, dtype)

    whole.step([(0, total)], query, tokens)
    start = 0
    for length in lengths:
        end = min(total, start + length)
        if end > start:
            cut.step([(start, end)], query, tokens)
        start = end

    size, sinks = window.block_size, window.sink_blocks
    closed = total // size
    assert torch.equal(whole.sums(0, closed)[sinks:], cut.sums(0, closed)[sinks:])
    stored = tokens[0].to(dtype).double()
    for block in range(sinks, closed):
        exact = stored[sinks * size : (block + 1) * size].sum(0)
        torch.testing.assert_close(cut.sums(0, closed)[block].double(), exact, atol=1e-5, rtol=1e-5)


def test_the_sums_of_equal_keys_make_a_softmax_over_all_tokens():
    window = WindowPlan(4, 0, 4, compensates=True)
    query = torch.randn(LONGEST, 2 * HEADS, SIZE)
    tokens = torch.ones(LONGEST, HEADS, 2 * SIZE)
    tokens[..., SIZE:] = torch.randn(LONGEST, HEADS, SIZE)

    output = Lane(window, 1).step([(0, 40)], query, [tokens])

    mean = tokens[:40, :, SIZE:].mean(0).repeat_interleave(2, dim=0)
    torch.testing.assert_close(output[39], mean, atol=1e-5, rtol=1e-5)


def test_a_lane_is_read_by_kernel_as_on_a_gpu(monkeypatch):
    """In Triton's interpreter, over pages with sums between them."""
    from vllm_kvpress.kernels import paged_attention
    from vllm_kvpress.kernels.paged_attention import triton

    launches = []

    def launch(query, starts, *, causal, **options):
        launches.append(len(query))
        limits = {
            "max_query_len": int(starts.diff().max()),
            "max_tokens": int(causal.lengths.max()),
        }
        return triton.launch(query, starts, causal=causal, **limits, **options)

    window = WindowPlan(4, 4, 8, compensates=True)
    query = torch.randn(LONGEST, 2 * HEADS, SIZE)
    tokens = [torch.randn(LONGEST, HEADS, 2 * SIZE) for _ in range(2)]
    outputs = []
    for name in ("reference", "kernel"):
        if name == "kernel":
            monkeypatch.setattr(paged_attention.cpu, "paged_attention", launch)
        lane = Lane(window, 2)
        lane.step([(0, 33), (0, 5)], query, tokens)
        outputs.append(lane.step([(33, 34), (5, 40)], query, tokens))

    assert launches == [38, 36]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


def test_nothing_is_written_where_no_block_closes():
    window = WindowPlan(4, 4, 4, compensates=True)
    lane = Lane(window, 1)
    sums = sums_of(lane.cache)

    lane.step([(0, 7)], torch.randn(LONGEST, 4, SIZE), [torch.randn(LONGEST, HEADS, 2 * SIZE)])
    assert sums[1:].isnan().all()
    lane.step([(7, 8)], torch.randn(LONGEST, 4, SIZE), [torch.randn(LONGEST, HEADS, 2 * SIZE)])

    assert (~sums.isnan().flatten(1).any(1)).nonzero().flatten().tolist() == [lane.table[0, 1]]


def test_a_dummy_batch_has_no_step():
    window = WindowPlan(4, 4, 4, compensates=True)

    assert step_of(window, SimpleNamespace(seq_lens_cpu_upper_bound=None)) is None


SPEC = {"block_size": 16, "num_kv_heads": 4, "head_size": 80}


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, 17), (torch.bfloat16, 18), (torch.float16, 18)]
)
def test_a_page_has_room_for_the_sums_behind_its_tokens(dtype, rows):
    spec = FullAttentionSpec(**SPEC, dtype=dtype)

    page = padded_page(spec, WindowPlan(16, 4, 64, compensates=True))

    assert page == 4 * rows * 2 * 80 * dtype.itemsize
    assert page - spec.page_size_bytes == 4 * 2 * 80 * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.uint8}, "a cache of torch.uint8"),
        ({"dtype": torch.float32, "head_size_v": 64}, "80 and 64 channels"),
    ],
)
def test_caches_whose_numbers_cannot_be_added_up_are_refused(changes, words):
    with pytest.raises(UnsupportedModelError, match=words):
        padded_page(FullAttentionSpec(**SPEC, **changes), WindowPlan(16, 4, 64, compensates=True))


def test_an_8_bit_cache_is_refused_at_start():
    policy = load_policy("duo:plan=random,compensation=true")

    with pytest.raises(ConflictError, match=r"adds up keys and values .*fp8_e4m3"):
        check_cache_dtype(policy, "fp8_e4m3")
    check_cache_dtype(policy, "auto")
