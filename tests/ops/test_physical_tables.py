"""Physical tables: the kernel in the interpreter and the reference, against lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_kvpress.kernels.physical_tables import physical_tables, reference
from vllm_kvpress.kernels.physical_tables import triton as kernel

BLOCK_SIZE = 16
POISON = -(10**9)
RUNS = {"kernel": kernel.launch, "reference": reference.physical_tables, "op": physical_tables}

# (head blocks, gap, length) of each request.
ROWS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 200)), max_size=6)


class Batch:
    """Tables with an id of its own in every place, and outputs that nothing has written yet."""

    def __init__(self, rows, width, head_width, num_columns, counts=torch.int32, lens=torch.int32):
        self.rows, num_reqs = rows, len(rows)
        self.logical = 100 + torch.arange(num_reqs * width, dtype=torch.int32).view(num_reqs, width)
        self.head = None
        if head_width is not None:
            ids = torch.arange(num_reqs * head_width, dtype=torch.int32)
            self.head = 50_000 + ids.view(num_reqs, head_width)
        numbers = torch.tensor(rows).view(num_reqs, 3).T.contiguous()
        self.head_blocks, self.gaps = numbers[0].to(counts), numbers[1].to(counts)
        self.lengths = numbers[2].to(lens)
        # The buffers are larger than the step, as those of captured graphs are.
        self.table_buffer = torch.full((num_reqs + 1, num_columns + 3), POISON, dtype=torch.int32)
        self.length_buffer = torch.full((num_reqs + 1,), POISON, dtype=lens)
        self.out_table = self.table_buffer[:num_reqs, :num_columns]
        self.out_lens = self.length_buffer[:num_reqs]

    def arguments(self, **changed):
        names = ("logical", "head", "head_blocks", "gaps")
        given = {name: getattr(self, name) for name in names}
        given |= {"seq_lens": self.lengths, "block_size": BLOCK_SIZE}
        return {**given, "out_table": self.out_table, "out_lens": self.out_lens, **changed}

    def expected(self):
        """Ids and length of each request, by lists."""
        width, num_columns = self.logical.shape[1], self.out_table.shape[1]
        head = self.logical if self.head is None else self.head
        for row, (head_blocks, gap, length) in enumerate(self.rows):
            front = head[row].tolist()[: min(head_blocks, num_columns)]
            behind = range(len(front), num_columns)
            ids = front + [int(self.logical[row, min(c + gap, width - 1)]) for c in behind]
            yield ids, length - gap * BLOCK_SIZE


def check(run, batch):
    run(**batch.arguments())

    for row, (ids, length) in enumerate(batch.expected()):
        assert batch.out_table[row].tolist() == ids
        assert int(batch.out_lens[row]) == length
    num_reqs, num_columns = batch.out_table.shape
    assert batch.table_buffer[num_reqs:].eq(POISON).all()
    assert batch.table_buffer[:, num_columns:].eq(POISON).all()
    assert batch.length_buffer[num_reqs:].eq(POISON).all()


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@settings(max_examples=60)
@given(ROWS, st.integers(1, 8), st.none() | st.integers(0, 8), st.integers(0, 8))
def test_tables_are_those_of_lists(run, rows, width, head_width, num_columns):
    check(run, Batch(rows, width, head_width, num_columns))


@pytest.mark.parametrize("lens", [torch.int32, torch.int64])
@pytest.mark.parametrize("counts", [torch.int32, torch.int64])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_more_columns_than_one_program_writes(run, counts, lens):
    rows = [(700, 90, 30_000), (3, 0, 0), (0, 1500, 25_000)]
    batch = Batch(rows, 1600, 710, 2 * kernel.COLUMNS + 5, counts, lens)

    check(run, batch)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_without_gaps_it_is_a_copy(run):
    batch = Batch([(0, 0, 7), (0, 0, 90)], 6, None, 6)

    check(run, batch)

    assert torch.equal(batch.out_table, batch.logical)
    assert torch.equal(batch.out_lens, batch.lengths)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_tables_that_are_rows_of_larger_ones(run):
    batch = Batch([(2, 2, 90), (1, 3, 70)], 6, 4, 5)
    batch.logical = torch.cat([batch.logical, batch.logical + 1000], dim=1)[:, :6]
    batch.head = torch.cat([batch.head, batch.head + 1000], dim=1)[:, :4]

    check(run, batch)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_lengths_may_be_replaced_in_place(run):
    batch = Batch([(2, 2, 90), (1, 3, 70)], 6, 4, 5)
    batch.length_buffer[:2] = batch.lengths
    batch.lengths = batch.out_lens

    check(run, batch)


def test_wrong_input_is_refused():
    batch = Batch([(2, 2, 90), (1, 3, 70)], 6, 4, 5)
    for error, message, changed in (
        (TypeError, "logical: got torch.int64", {"logical": batch.logical.long()}),
        (TypeError, "head: got torch.int64; allowed: torch.int32", {"head": batch.head.long()}),
        (TypeError, "out_table: got torch.int64", {"out_table": batch.out_table.long()}),
        (TypeError, "gaps: got torch.float32", {"gaps": batch.gaps.float()}),
        (TypeError, "head_blocks: got torch.int16", {"head_blocks": batch.head_blocks.short()}),
        (TypeError, "out_lens: got torch.int64; allowed: torch.int32",
         {"out_lens": batch.out_lens.long()}),
        (ValueError, r"head: got shape \[1, 4\]; allowed: 2 axes, .* 2 requests",
         {"head": batch.head[:1]}),
        (ValueError, r"seq_lens: got shape \[1\]", {"seq_lens": batch.lengths[:1]}),
        (ValueError, r"gaps: got shape \[2, 1\]; allowed: 1 axes", {"gaps": batch.gaps[:, None]}),
        (ValueError, "gaps: got device meta", {"gaps": batch.gaps.to("meta")}),
        (ValueError, "logical: got strides", {"logical": batch.logical.T.contiguous().T}),
        (ValueError, "logical: got shape .*; allowed: 1 column", {"logical": batch.logical[:, :0]}),
        (ValueError, "block_size: got 0; allowed: 1 or more", {"block_size": 0}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            physical_tables(**batch.arguments(**changed))
    assert batch.table_buffer.eq(POISON).all()
