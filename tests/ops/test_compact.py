"""Compaction: the reference against plain loops, the kernel against the reference."""

import pytest
import torch
from ops.encoded import (
    DEVICE,
    DTYPES,
    awkward,
    fill,
    hadamard,
    make_cells,
    poisoned_pages,
    read,
)
from vllm_kvpress.kernels.compact import compact, move_cells, reference, write_cells
from vllm_kvpress.kernels.compact.triton import launch, variants

NUM_PAGES = 30
BLOCK_SIZE = 16
HEAD_SIZES = (64, 80, 96, 128, 256)
PER_TOKEN = [("int8", "int4-g32"), ("int4-g32", "exact"), ("exact", "int4")]
KIVI = [("kivi4", "int4-g32"), ("kivi2", "int2-g32"), ("kivi2", "exact")]
PLAIN = {"rotation": None, "rotate_keys": False, "rotate_values": False, "nonfinite": None}


def run_kernel(keys, values, kept, table, pages, start, cells, *, blocks=None, **options):
    """Runs the kernel where `DEVICE` is, and writes `pages` on the CPU."""
    moved = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    inputs = [x.to(DEVICE) for x in (keys, values, kept, table)]
    there = pages.to(DEVICE)
    blocks = None if blocks is None else blocks.to(DEVICE)
    launch(*inputs, there, start, cells, blocks=blocks, **{**PLAIN, **moved})
    pages.copy_(there)
    if options.get("nonfinite") is not None:
        options["nonfinite"].copy_(moved["nonfinite"])


def shuffled(length, seed=0):
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def dense(cells, num_tokens, dtype=torch.float32):
    """Returns keys and values [num_kv_heads, num_tokens, head_size]."""
    return awkward((2, cells.num_kv_heads, num_tokens, cells.head_size), dtype).unbind(0)


def paged(numbers, blocks):
    """Returns a cache that holds dense tokens in `blocks`, and NaN in the others."""
    heads, num_tokens, head_size = numbers.shape
    # Wider than a cache, as an engine's keys and values lie in one tensor.
    cache = torch.full((int(blocks.max()) + 2, 2, BLOCK_SIZE, heads, head_size), torch.nan)
    cache = cache.to(numbers.dtype)[:, 1]
    for token in range(num_tokens):
        cache[blocks[token // BLOCK_SIZE], token % BLOCK_SIZE] = numbers[:, token]
    return cache


def choices(cells, num_tokens, num_kept, dtype=torch.int64):
    """Returns another choice for each head, out of order."""
    rows = [shuffled(num_tokens, seed)[:num_kept] for seed in range(cells.num_kv_heads)]
    return torch.stack(rows).to(dtype)


def store_table():
    return shuffled(NUM_PAGES, seed=9).int()


def cell_of(pages, table, position, head, cells):
    """Returns the cell of a position, a view, and the token's row in it."""
    cell = position // cells.tokens * cells.num_kv_heads + head
    page, place = divmod(cell, cells.per_page)
    return pages[
        table[page], place * cells.size : (place + 1) * cells.size
    ], position % cells.tokens


@pytest.mark.parametrize(
    ("keys", "values", "head_size", "dtype", "start", "num_kept"),
    [
        ("int8", "int4-g32", 80, torch.bfloat16, 13, 37),
        ("exact", "int4", 64, torch.float16, 0, 5),
        ("kivi4", "int4-g32", 80, torch.float32, 32, 64),
        ("kivi2", "exact", 64, torch.bfloat16, 0, 32),
    ],
)
def test_reference_writes_what_the_formulas_say(keys, values, head_size, dtype, start, num_kept):
    cells = make_cells(keys, values, head_size, num_kv_heads=3, dtype=dtype)
    source = dense(cells, 100, dtype)
    kept, table = choices(cells, 100, num_kept), store_table()
    pages = poisoned_pages(cells, NUM_PAGES)
    expected = pages.clone()

    compact(*source, kept, table, pages, start, cells)

    chunk = 32 if cells.keys.per_channel else 1
    for head in range(3):
        for i in range(0, num_kept, chunk):
            cell, row = cell_of(expected, table, start + i, head, cells)
            for side, numbers in zip((cells.keys, cells.values), source, strict=True):
                fill(cell.numpy(), cells, side, row, numbers[head, kept[head, i : i + chunk]])
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("run", [run_kernel, compact], ids=["kernel", "reference"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize(("keys", "values"), PER_TOKEN)
def test_paged_tokens_are_encoded_as_dense_ones(run, keys, values, head_size):
    # Every pair of a dtype with formats and with a head size occurs.
    dtype = DTYPES[(PER_TOKEN.index((keys, values)) + HEAD_SIZES.index(head_size)) % 3]
    cells = make_cells(keys, values, head_size, num_kv_heads=3, dtype=dtype)
    source = dense(cells, 50, dtype)
    kept, table = choices(cells, 50, 13, torch.int32), store_table()
    blocks = shuffled(8, seed=5)[:4].int()
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run(*(paged(x, blocks) for x in source), kept, table, pages, 21, cells, blocks=blocks)

    heads = torch.arange(3)[:, None]
    write_cells(*(x[heads, kept.long()] for x in source), expected, table, 21, cells)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize(("keys", "values"), KIVI)
def test_kernel_encodes_groups_along_the_tokens(keys, values, head_size):
    dtype = DTYPES[(KIVI.index((keys, values)) + HEAD_SIZES.index(head_size)) % 3]
    cells = make_cells(keys, values, head_size, num_kv_heads=1, dtype=dtype)
    source = dense(cells, 70, dtype)
    kept, table = choices(cells, 70, 64), store_table()
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run_kernel(*source, kept, table, pages, 32, cells)
    reference.compact(*source, kept, table, expected, 32, cells)

    assert torch.equal(pages, expected)
    assert not torch.equal(pages, poisoned_pages(cells, NUM_PAGES))


@pytest.mark.parametrize("num_kv_heads", [1, 4, 8])
@pytest.mark.parametrize(("start", "num_kept"), [(0, 1), (7, 9), (15, 34)])
def test_kernel_begins_and_ends_anywhere(num_kv_heads, start, num_kept):
    cells = make_cells("int4", "int8", 64, num_kv_heads, cells_per_page=3)
    source = dense(cells, 40)
    kept, table = choices(cells, 40, num_kept), store_table()
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run_kernel(*source, kept, table, pages, start, cells)
    reference.compact(*source, kept, table, expected, start, cells)

    assert torch.equal(pages, expected)


@pytest.mark.parametrize("run", [run_kernel, compact], ids=["kernel", "reference"])
def test_a_cell_may_be_completed_by_another_call(run):
    cells = make_cells("int4-g32", "int8", 80)
    source = dense(cells, 60)
    kept, table = choices(cells, 60, 41), store_table()
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run(*source, kept[:, :19], table, pages, 3, cells)
    run(*source, kept[:, 19:], table, pages, 22, cells)

    compact(*source, kept, table, expected, 3, cells)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("run", [run_kernel, compact], ids=["kernel", "reference"])
@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_not_finite_is_counted_once_if_kept(run, rotated):
    cells = make_cells("kivi2", "int4", 128, num_kv_heads=1)
    keys, values = torch.randn(2, 1, 50, 128).unbind(0)
    keys[0, 3, 5], keys[0, 4], values[0, 9, 127] = torch.nan, torch.inf, -torch.inf
    keys[0, 40:], values[0, 40:] = torch.nan, torch.nan
    kept = shuffled(40)[None, :32]
    kept[0, :4] = torch.tensor([3, 4, 9, 40])
    kept[0, 4:] = torch.arange(10, 38)
    options = {"rotation": hadamard(128), "rotate_keys": rotated, "rotate_values": rotated}
    nonfinite = torch.tensor([7])

    pages = poisoned_pages(cells, NUM_PAGES)
    run(keys, values, kept, store_table(), pages, 0, cells, nonfinite=nonfinite, **options)

    assert nonfinite.item() == 7 + 1 + 128 + 1 + 2 * 128
    assert (
        read(cell_of(pages, store_table(), 0, 0, cells)[0], cells, cells.keys)[0].isfinite().all()
    )


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotated_codes_stand_for_the_same_numbers(head_size):
    """A sum in another order may end on the other side of a code, which is one step away."""
    cells = make_cells("kivi4", "int4-g32", head_size, num_kv_heads=1)
    source = torch.randn(2, 1, 32, head_size, generator=torch.Generator().manual_seed(4)).unbind(0)
    kept, table, rotation = shuffled(32)[None], store_table(), hadamard(head_size)
    options = {"rotation": rotation, "rotate_keys": True, "rotate_values": True}
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run_kernel(*source, kept, table, pages, 0, cells, **options)
    reference.compact(*source, kept, table, expected, 0, cells, **options)

    assert (pages != expected).float().mean() < 0.01
    for side, numbers in zip((cells.keys, cells.values), source, strict=True):
        got, step = read(cell_of(pages, table, 0, 0, cells)[0], cells, side)
        other = read(cell_of(expected, table, 0, 0, cells)[0], cells, side)[0]
        exact = numbers[0, kept[0]].double() @ rotation.double()
        # Zeros and scales of float16 cost at most 2**-11 of the range each.
        slack = exact.abs().max() * 2**-9
        assert ((got - other).abs() <= step * 1.001 + slack).all()
        assert ((got - exact).abs() <= step * 0.501 + slack).all()


def test_only_the_side_that_is_asked_for_is_rotated():
    cells = make_cells("int8", "int8", 64)
    source = torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(6)).unbind(0)
    kept, table = choices(cells, 16, 16), store_table()
    pages = poisoned_pages(cells, NUM_PAGES)

    options = {"rotation": hadamard(64), "rotate_values": True}
    run_kernel(*source, kept, table, pages, 0, cells, **options)

    cell, _ = cell_of(pages, table, 0, 1, cells)
    keys, values = (read(cell, cells, side)[0] for side in (cells.keys, cells.values))
    # Half a step of numbers between -5 and 5 is 0.02; rotating back adds up 64 of them.
    assert (keys - source[0][1, kept[1]]).abs().max() < 0.03
    assert (values @ hadamard(64) - source[1][1, kept[1]]).abs().max() < 0.1
    assert (values - source[1][1, kept[1]]).abs().max() > 1


def test_nothing_kept_writes_nothing():
    cells = make_cells("kivi4", "int4-g32", 64)
    pages = poisoned_pages(cells, NUM_PAGES)
    kept = torch.zeros(2, 0, dtype=torch.int64)

    compact(*dense(cells, 5), kept, store_table(), pages, 32, cells)

    assert torch.equal(pages, poisoned_pages(cells, NUM_PAGES))


@pytest.mark.parametrize(("keys", "values"), [*PER_TOKEN, ("int2-g32", "int8-g32")])
@pytest.mark.parametrize("head_size", [64, 80])
def test_moved_tokens_are_those_that_were_there(keys, values, head_size):
    """As if the survivors alone had been written, and nothing behind them touched."""
    cells = make_cells(keys, values, head_size, num_kv_heads=3)
    source, table = dense(cells, 60), store_table()
    kept = choices(cells, 60, 23)
    pages = poisoned_pages(cells, NUM_PAGES)
    everyone = torch.arange(60).expand(3, -1)
    compact(*source, everyone, table, pages, 0, cells)
    expected = pages.clone()
    compact(*source, kept, table, expected, 0, cells)

    move_cells(pages, table, kept, cells)

    assert torch.equal(pages, expected)


def arguments(**changed):
    cells = changed.pop("cells", make_cells("int8", "exact", 64))
    keys, values = dense(cells, 40)
    base = {
        "keys": keys,
        "values": values,
        "kept": torch.arange(32).expand(2, -1),
        "table": store_table(),
        "pages": poisoned_pages(cells, NUM_PAGES),
        "start": 0,
        "cells": cells,
    }
    return {**base, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"keys": torch.zeros(2, 40, 64).double()}, TypeError, "keys has the wrong dtype"),
        ({"values": torch.zeros(2, 41, 64)}, ValueError, r"values have the wrong shape; got \[2"),
        ({"keys": torch.zeros(3, 40, 64)}, ValueError, r"allowed: \[2, any, 64\]"),
        ({"blocks": torch.zeros(3).int()}, ValueError, r"allowed: \[any, any, 2, 64\]"),
        ({"kept": torch.zeros(1, 3).long()}, ValueError, "kept has the wrong shape"),
        ({"kept": torch.zeros(2, 3)}, TypeError, "allowed: int64 or int32"),
        ({"table": torch.zeros(3).long()}, TypeError, "table has the wrong dtype"),
        ({"table": torch.zeros(6).int()[::2]}, ValueError, "table is not contiguous"),
        ({"start": 2400}, ValueError, "does not hold positions 2400 to 2431; got 30 pages of 5"),
        ({"start": -1}, ValueError, "does not hold positions -1"),
        ({"cells": make_cells("kivi4", "int4", 64), "start": 16}, ValueError, "do not fill groups"),
        (
            {"cells": make_cells("kivi4", "int4", 64), "kept": torch.zeros(2, 31).long()},
            ValueError,
            "got start 0 and 31 tokens; allowed: multiples of 32 and of 32",
        ),
        ({"rotate_values": True}, ValueError, "rotation is missing"),
    ],
)
def test_wrong_arguments_are_refused(changed, error, message):
    with pytest.raises(error, match=message):
        compact(**arguments(**changed))


def test_tokens_of_a_group_cannot_be_moved_alone():
    cells = make_cells("kivi4", "int4-g32", 64)
    with pytest.raises(ValueError, match="allowed: formats per token"):
        move_cells(poisoned_pages(cells, 3), store_table(), torch.zeros(2, 1).long(), cells)


def test_variants_are_launches_with_names_of_their_own():
    every = list(variants())
    assert len({variant.name for variant in every}) == len(every)
    for variant in every:
        named = {*variant.signature, *variant.constants}
        assert named == set(variant.kernel.arg_names)
        assert sum(other.architecture == variant.architecture for other in every) < 50
