"""The blocks of skipped layers: what fits, what is empty, and how far prefix hits are coarsened."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpress.errors import ConfigError, UnsupportedModelError
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.skip_groups import check_skipped, skipped_groups, skipped_groups_of

PAGE = 1000


def padding_of(num_skipped, num_others, groups, multiple, width):
    """The empty share of the pages of a request that keeps a quarter, page by page."""
    pages = max(num_others, width * multiple)
    tokens = 4 * 3 * 5 * 7 * 16 * multiple  # of blocks of one token each, in whole blocks
    blocks = tokens // 4 + groups * tokens // multiple
    return 1 - (num_others * tokens / 4 + num_skipped * tokens) / (blocks * pages)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([8, 16, 32, 64, 128, 512]))
def test_the_groups_hold_every_layer_and_waste_what_they_say(num_skipped, num_others, block_size):
    found = skipped_groups(num_skipped, num_others, block_size, PAGE, PAGE)

    assert found.num_layers == num_skipped
    assert (found.groups - 1) * found.width < num_skipped <= found.groups * found.width
    assert found.block_size == found.multiple * block_size
    assert found.block_size <= max(256, block_size)
    assert found.block_bytes == max(num_others, found.width * found.multiple) * PAGE
    assert found.stock_block_bytes == (num_skipped + num_others) * PAGE
    padding = padding_of(num_skipped, num_others, found.groups, found.multiple, found.width)
    assert found.padding == pytest.approx(padding, abs=1e-9)
    assert found.blocks(1) == found.blocks(found.block_size) == found.groups
    assert found.blocks(found.block_size + 1) == 2 * found.groups


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([16, 32]))
def test_no_smaller_block_would_do(num_skipped, num_others, block_size):
    found = skipped_groups(num_skipped, num_others, block_size, PAGE, PAGE)

    for multiple in range(1, found.multiple):
        for groups in range(1, num_skipped + 1):
            width = -(-num_skipped // groups)
            wasted = padding_of(num_skipped, num_others, groups, multiple, width)
            assert wasted > 0.05 or -(-num_skipped // width) < groups
    if found.padding > 0.05:
        least = padding_of(num_skipped, num_others, found.groups, 256 // block_size, found.width)
        assert found.padding <= least + 1e-9


# Skipped of all layers, block size -> groups, tokens in a block, padding in per cent at most.
SENSIBLE = [
    (1, 4, 32, 1, 96, 0.1),
    (1, 32, 16, 1, 256, 9.8),
    (2, 32, 16, 1, 208, 3.2),
    (2, 32, 32, 1, 256, 15.7),
    (4, 32, 16, 1, 112, 0.1),
    (4, 32, 32, 1, 224, 0.1),
    (8, 32, 16, 1, 48, 0.1),
    (12, 32, 16, 3, 80, 0.1),
    (16, 32, 16, 1, 16, 0.1),
    (2, 28, 16, 1, 176, 4.2),
    (3, 36, 16, 1, 160, 2.7),
]


@pytest.mark.parametrize(("skipped", "layers", "size", "groups", "tokens", "padding"), SENSIBLE)
def test_sensible_lists(skipped, layers, size, groups, tokens, padding):
    found = skipped_groups_of(range(skipped), layers, size, PAGE)

    assert (found.groups, found.block_size) == (groups, tokens)
    assert 100 * found.padding <= padding


def test_no_list_no_groups():
    assert skipped_groups_of((), 32, 16, PAGE) is None


def test_pages_of_another_size_count_in_bytes():
    # The policy's pages have a quarter of the bytes: eight of them are two skipped ones.
    found = skipped_groups(2, 8, 16, 400, 100)

    assert (found.groups, found.multiple, found.block_bytes) == (1, 1, 800)
    assert found.padding == pytest.approx(0, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5), st.integers(6, 30))
def test_peak_and_steady_count_skipped_layers_too(prompt, outputs, num_skipped, num_layers):
    skipped = skipped_groups_of(range(num_skipped), num_layers, 4, PAGE)
    plan = RetentionPlan(4, 1, 4, 12, None, skipped=skipped)
    alone = RetentionPlan(4, 1, 4, 12, None)
    end = prompt + outputs

    held = [alone.blocks_held(prompt, x) + skipped.blocks(x) for x in range(prompt, end + 1)]

    assert plan.peak_blocks(prompt, outputs) == max(held)
    assert plan.blocks_held(prompt, end) == held[-1]


WRONG = [
    ((0, 32), 32, 0, ConfigError, ["does not have", "got [32]", "0 to 31"]),
    ((0, 1), 2, 0, ConfigError, ["every layer", "does nothing", "at most 1"]),
    ((0,), 4, 2, UnsupportedModelError, ["sliding-window layers", "2 of 4", "Set layers.skip"]),
]


@pytest.mark.parametrize(("skip", "layers", "sliding", "kind", "words"), WRONG)
def test_a_list_that_does_not_fit_the_model(skip, layers, sliding, kind, words):
    with pytest.raises(kind) as caught:
        check_skipped(skip, layers, sliding)

    assert [word for word in words if word not in str(caught.value)] == []
