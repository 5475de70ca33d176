"""Quantize on write: the reference against plain loops, the kernel against the reference."""

import pytest
import torch
from ops.encoded import (
    DEVICE,
    DTYPES,
    FORMATS,
    awkward,
    fill,
    hadamard,
    make_cells,
    poisoned_pages,
    read,
)
from vllm_kvpress.kernels.quantize_on_write import quantize_on_write, reference
from vllm_kvpress.kernels.quantize_on_write.triton import launch, variants

NUM_PAGES = 6
HEAD_SIZES = (64, 80, 96, 128, 256)
PLAIN = {"rotation": None, "rotate_keys": False, "rotate_values": False, "nonfinite": None}


def page_tokens(cells):
    return cells.per_page // cells.num_kv_heads * cells.tokens


def random_slots(cells, num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(NUM_PAGES * page_tokens(cells), generator=generator)[:num_tokens]


def run_kernel(key, value, pages, slots, cells, **options):
    """Runs the kernel where `DEVICE` is, and writes `pages` on the CPU."""
    moved = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    there = pages.to(DEVICE)
    launch(key.to(DEVICE), value.to(DEVICE), there, slots.to(DEVICE), cells, **{**PLAIN, **moved})
    pages.copy_(there)
    if options.get("nonfinite") is not None:
        options["nonfinite"].copy_(moved["nonfinite"])


def cell_of(pages, slot, head, cells):
    """Returns the cell of a slot, a view, and the token's row in it."""
    page, token = divmod(slot, page_tokens(cells))
    cell = token // cells.tokens * cells.num_kv_heads + head
    return pages[page, cell * cells.size : (cell + 1) * cells.size], token % cells.tokens


@pytest.mark.parametrize(
    ("keys", "values", "head_size", "dtype"),
    [
        ("int8", "int4-g32", 64, torch.float32),
        ("int4", "exact", 80, torch.bfloat16),
        ("int4-g32", "int2-g32", 80, torch.float16),
        ("exact", "int8-g32", 96, torch.float32),
    ],
)
def test_reference_writes_what_the_formulas_say(keys, values, head_size, dtype):
    cells = make_cells(keys, values, head_size, dtype=dtype)
    key, value = awkward((2, 40, 2, head_size), dtype).unbind(0)
    slots = random_slots(cells, 40)
    pages = poisoned_pages(cells, NUM_PAGES)
    expected = pages.clone()

    reference.quantize_on_write(key, value, pages, slots, cells)

    for token, slot in enumerate(slots.tolist()):
        for head in range(2):
            cell, row = cell_of(expected, slot, head, cells)
            for side, numbers in ((cells.keys, key), (cells.values, value)):
                fill(cell.numpy(), cells, side, row, numbers[token, head][None])
    assert torch.equal(pages, expected)


NAMES = [*FORMATS, "exact"]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("keys", range(len(NAMES)), ids=NAMES)
def test_kernel_writes_the_bytes_of_the_reference(keys, head_size):
    # Every pair of a dtype with a format and with a head size occurs.
    dtype = DTYPES[(keys + HEAD_SIZES.index(head_size)) % 3]
    cells = make_cells(NAMES[keys], NAMES[keys - 1], head_size, dtype=dtype)
    key, value = awkward((2, 11, 2, head_size), dtype, seed=head_size).unbind(0)
    slots = random_slots(cells, 11)
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run_kernel(key, value, pages, slots, cells)
    reference.quantize_on_write(key, value, expected, slots, cells)

    assert torch.equal(pages, expected)


@pytest.mark.parametrize("num_kv_heads", [1, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, 16, 35])
def test_kernel_writes_any_number_of_tokens_and_heads(num_kv_heads, num_tokens):
    cells = make_cells("int4-g32", "int8", 64, num_kv_heads, cells_per_page=2 * num_kv_heads + 1)
    key, value = awkward((2, num_tokens, num_kv_heads, 64), torch.float32).unbind(0)
    slots = random_slots(cells, num_tokens)
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run_kernel(key, value, pages, slots, cells)
    reference.quantize_on_write(key, value, expected, slots, cells)

    assert torch.equal(pages, expected)
    assert not torch.equal(pages, poisoned_pages(cells, NUM_PAGES))


@pytest.mark.parametrize("run", [run_kernel, quantize_on_write], ids=["kernel", "reference"])
def test_padding_is_neither_written_nor_counted(run):
    cells = make_cells("int8", "int4", 80)
    key, value = awkward((2, 40, 2, 80), torch.float32).unbind(0)
    key[5, 1, 79], key[7, 0, 0], value[9] = torch.nan, -torch.inf, torch.inf
    key[11:13], value[11:13] = torch.nan, torch.nan
    key[30:], value[30:] = torch.nan, torch.nan  # rows past the slots, as in a padded batch
    slots = random_slots(cells, 30)
    slots[11:13] = -1
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)
    nonfinite = torch.tensor([100])

    run(key, value, pages, slots, cells, nonfinite=nonfinite)

    wanted = slots >= 0
    quantize_on_write(key[:30][wanted], value[:30][wanted], expected, slots[wanted], cells)
    assert torch.equal(pages, expected)
    assert nonfinite.item() == 100 + 2 + 2 * 80


@pytest.mark.parametrize("run", [run_kernel, quantize_on_write], ids=["kernel", "reference"])
@pytest.mark.parametrize("slots", [[], [-1, -1, -5]], ids=["empty", "padding"])
def test_nothing_to_write_writes_nothing(run, slots):
    if run is run_kernel and not slots:
        run = quantize_on_write
    cells = make_cells("int8", "int4", 64)
    key, value = awkward((2, len(slots), 2, 64), torch.float32).unbind(0)
    pages = poisoned_pages(cells, NUM_PAGES)

    run(key, value, pages, torch.tensor(slots, dtype=torch.int64), cells)

    assert torch.equal(pages, poisoned_pages(cells, NUM_PAGES))


def test_kernel_reads_keys_and_values_inside_of_a_wider_tensor():
    cells = make_cells("int4", "int4-g32", 64)
    fused = awkward((21, 9, 64), torch.bfloat16)
    key, value = fused[:, 5:7], fused[:, 7:9]
    slots = random_slots(cells, 21)
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run_kernel(key, value, pages, slots, cells)
    quantize_on_write(key.contiguous(), value.contiguous(), expected, slots, cells)

    assert torch.equal(pages, expected)


@pytest.mark.parametrize("run", [run_kernel, quantize_on_write], ids=["kernel", "reference"])
@pytest.mark.parametrize("sizes", [[1] * 23, [16, 7], [5, 13, 1, 4]], ids=str)
@pytest.mark.parametrize(("keys", "values"), [("int8", "int4-g32"), ("int4", "exact")])
def test_pieces_of_any_size_leave_the_same_bytes(keys, values, sizes, run):
    """A token's bytes say nothing of the tokens that were written with it."""
    cells = make_cells(keys, values, 80)
    key, value = awkward((2, 23, 2, 80), torch.float32).unbind(0)
    slots = random_slots(cells, 23)
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run(key, value, expected, slots, cells)
    first = 0
    for size in sizes:
        piece = slice(first, first + size)
        run(key[piece], value[piece], pages, slots[piece], cells)
        first += size

    assert first == 23
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_kernel_rotates_a_token_alike_in_pieces_of_any_size(head_size):
    """PyTorch's product may add up in another order for another number of rows."""
    cells = make_cells("int4", "int8", head_size)
    key, value = awkward((2, 23, 2, head_size), torch.float32).unbind(0)
    slots = random_slots(cells, 23)
    options = {"rotation": hadamard(head_size), "rotate_keys": True, "rotate_values": True}
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)

    run_kernel(key, value, expected, slots, cells, **options)
    for piece in (slice(0, 1), slice(1, 14), slice(14, 23)):
        run_kernel(key[piece], value[piece], pages, slots[piece], cells, **options)

    assert torch.equal(pages, expected)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotated_codes_stand_for_the_same_numbers(head_size):
    """A sum in another order may end on the other side of a code, which is one step away."""
    cells = make_cells("int4", "int8-g32", head_size)
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 18, 2, head_size, generator=generator).unbind(0)
    key[3, 1, 5] = torch.nan
    slots = random_slots(cells, 18)
    rotation = hadamard(head_size)
    options = {"rotation": rotation, "rotate_keys": True, "rotate_values": True}
    pages, expected = poisoned_pages(cells, NUM_PAGES), poisoned_pages(cells, NUM_PAGES)
    nonfinite = torch.zeros(1, dtype=torch.int64)

    run_kernel(key, value, pages, slots, cells, nonfinite=nonfinite, **options)
    reference.quantize_on_write(key, value, expected, slots, cells, **options)

    assert nonfinite.item() == 1
    assert (pages != expected).float().mean() < 0.01
    for token, slot in enumerate(slots.tolist()):
        for side, numbers in ((cells.keys, key), (cells.values, value)):
            cell, row = cell_of(pages, slot, 1, cells)
            got, step = (x[row] for x in read(cell, cells, side))
            other = read(cell_of(expected, slot, 1, cells)[0], cells, side)[0][row]
            exact = numbers[token, 1].nan_to_num(0.0).double() @ rotation.double()
            # Zeros and scales of float16 cost at most 2**-11 of the range each.
            slack = exact.abs().max() * 2**-9
            assert ((got - other).abs() <= step * 1.001 + slack).all()
            assert ((got - exact).abs() <= step * 0.501 + slack).all()


def test_rotated_exact_numbers_are_those_of_the_model():
    cells = make_cells("exact", "int8", 80, dtype=torch.float16)
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, 20, 2, 80, generator=generator).half().unbind(0)
    slots = random_slots(cells, 20)
    pages = poisoned_pages(cells, NUM_PAGES)

    run_kernel(key, value, pages, slots, cells, rotation=hadamard(80), rotate_keys=True)

    for token, slot in enumerate(slots.tolist()):
        cell, row = cell_of(pages, slot, 0, cells)
        stored = cell[cells.keys.codes :][row * 160 : row * 160 + 160].clone().view(torch.float16)
        exact = key[token, 0].double() @ hadamard(80).double()
        assert (stored - exact).abs().max() <= exact.abs().max() * 2**-10


def arguments(**changed):
    cells = changed.pop("cells", make_cells("int8", "exact", 64))
    key, value = torch.zeros(2, 3, 2, 64).unbind(0)
    base = {
        "key": key,
        "value": value,
        "pages": poisoned_pages(cells, NUM_PAGES),
        "slots": torch.arange(3),
        "cells": cells,
    }
    return {**base, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"key": torch.zeros(3, 2, 64).double()}, TypeError, "keys has the wrong dtype"),
        ({"value": torch.zeros(3, 2, 64).half()}, TypeError, "allowed: torch.float32"),
        ({"key": torch.zeros(3, 1, 64)}, ValueError, r"got \[3, 1, 64\]; allowed: \[any, 2, 64\]"),
        ({"key": torch.zeros(3, 2, 128)[..., ::2]}, ValueError, "not contiguous along"),
        ({"slots": torch.arange(3).int()}, TypeError, "slots has the wrong dtype"),
        ({"slots": torch.arange(4)}, ValueError, "got 4 with stride 1; allowed: at most 3"),
        ({"pages": torch.zeros(3, 64).byte()}, ValueError, "pages do not hold 5 cells"),
        ({"pages": torch.zeros(1, 1 << 16).byte().expand(2**27, -1)}, ValueError, "fit 32 bits"),
        ({"cells": make_cells("kivi4", "int4", 64)}, ValueError, "allowed: formats per token"),
        ({"cells": make_cells("int4", "int4", 64, cells_per_page=1)}, ValueError, "got 1 cells"),
        (
            {"cells": make_cells("int8", "exact", 64, dtype=torch.float16)},
            ValueError,
            r"cells.values.bits does not fit torch.float32; got 16; allowed: 2, 4, 8, 32",
        ),
        ({"rotate_keys": True}, ValueError, "rotation is missing"),
        ({"rotation": torch.eye(32)}, ValueError, "rotation has the wrong shape"),
        ({"nonfinite": torch.zeros(1)}, TypeError, "nonfinite has the wrong dtype"),
    ],
)
def test_wrong_arguments_are_refused(changed, error, message):
    with pytest.raises(error, match=message):
        quantize_on_write(**arguments(**changed))


def test_pages_that_kernels_cannot_address_are_refused():
    cells = make_cells("int8", "exact", 64)
    pages = torch.zeros(NUM_PAGES, cells.per_page * cells.size + 21, dtype=torch.uint8)
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        quantize_on_write(**arguments(cells=cells, pages=pages))


def test_variants_are_launches_with_names_of_their_own():
    every = list(variants())
    assert len({variant.name for variant in every}) == len(every)
    for variant in every:
        named = {*variant.signature, *variant.constants}
        assert named == set(variant.kernel.arg_names)
        assert sum(other.architecture == variant.architecture for other in every) < 50
