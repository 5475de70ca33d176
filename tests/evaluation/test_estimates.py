import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpress.evaluation.estimates import estimate_difference, estimate_mean, wilson_interval


def test_wilson_interval_is_the_textbook_s():
    low, high = wilson_interval(81, 263)

    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert (low, high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


@pytest.mark.parametrize("right", [0, 20])
def test_equal_answers_are_not_certain(right):
    low, high = wilson_interval(right, 20)
    mean = estimate_mean([1] * right + [0] * (20 - right))

    assert 0 <= low < high <= 1
    assert mean.standard_error > 0.02


@given(st.lists(st.integers(0, 1), min_size=100, max_size=300))
def test_standard_error_of_many_answers_is_nearly_the_plain_one(scores):
    share = sum(scores) / len(scores)

    error = estimate_mean(scores).standard_error

    plain = math.sqrt(share * (1 - share) / len(scores))
    assert error == pytest.approx(plain, abs=0.006)


def test_scores_between_0_and_1_have_the_error_of_their_mean():
    rng = random.Random(0)
    scores = [rng.choice((0, 1 / 3, 2 / 3, 1)) for _ in range(400)]

    found = estimate_mean(scores)

    assert found.mean == pytest.approx(statistics.fmean(scores))
    assert found.standard_error == pytest.approx(statistics.stdev(scores) / 20, rel=0.02)


def test_a_paired_difference_ignores_what_both_share():
    easy, hard = [1.0] * 90, [0.0] * 90
    ours, theirs = [*easy, *hard, *[1.0] * 20], [*easy, *hard, *[0.0] * 20]

    found = estimate_difference(ours, theirs)

    assert found.mean == pytest.approx(0.1)
    assert found.standard_error < 0.023
    unpaired = math.hypot(*(estimate_mean(scores).standard_error for scores in (ours, theirs)))
    assert found.standard_error < unpaired / 2


def test_a_paired_difference_of_few_equal_items_is_uncertain():
    assert estimate_difference([1, 1], [0, 0]).standard_error > 0.4


@pytest.mark.parametrize(("ours", "theirs"), [([1], [1, 0]), ([], [])])
def test_unpaired_scores_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="same items"):
        estimate_difference(ours, theirs)


def test_an_item_of_many_answers_can_differ_by_less():
    same = [0.5] * 100

    whole, eighth = (estimate_difference(same, same, step) for step in (1.0, 1 / 8))

    assert whole.mean == eighth.mean == 0
    assert eighth.standard_error == pytest.approx(whole.standard_error / 8)
