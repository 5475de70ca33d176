"""KL divergence of next-token distributions, against formulas in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vllm_kvpress.evaluation.divergence import MOST_TOKENS, Distributions, compare


@dataclass
class Entry:
    logprob: float


@dataclass
class Output:
    token_ids: list
    logprobs: list


def distributions(answers, logits, k, seed=0):
    """What vLLM reports for answers under these logits: the k likeliest tokens and the given."""
    order = np.random.default_rng(seed)
    rows = iter(torch.tensor(logits).double().log_softmax(-1))
    outputs = []
    for answer in answers:
        positions = []
        for token in answer:
            row = next(rows)
            tokens = [token, *row.topk(k).indices.tolist()]
            order.shuffle(tokens)
            positions.append({t: Entry(float(row[t])) for t in tokens})
        outputs.append(Output([7, *answer], [None, *positions]))
    return Distributions.of_outputs(answers, outputs)


@pytest.fixture
def logits():
    return np.random.default_rng(3).normal(size=(2, 6, 50))


ANSWERS = [[1, 2], [3, 4, 5, 6]]


def test_a_whole_vocabulary_gives_the_formula(logits):
    full, ours = (distributions(ANSWERS, side, 50) for side in logits)

    found = compare(full, ours)

    p, q = (torch.tensor(side).log_softmax(-1) for side in logits)
    per_token = (p.exp() * (p - q)).sum(-1)
    errors = [(per_token[:2] - per_token.mean()).sum(), (per_token[2:] - per_token.mean()).sum()]
    assert found["kl"] == pytest.approx(float(per_token.mean()), rel=1e-3)
    assert found["standard_error"] == pytest.approx(np.hypot(*map(float, errors)) / 6, rel=0.1)
    assert found["tokens"] == 6
    assert found["whole"]


def test_equal_distributions_diverge_by_nothing(logits):
    full = distributions(ANSWERS, logits[0], 50, seed=1)

    assert compare(full, distributions(ANSWERS, logits[0], 50, seed=2))["kl"] == 0


@pytest.mark.parametrize("k", [1, 3, 10, 49])
def test_of_a_part_of_the_vocabulary_it_is_a_lower_bound(logits, k):
    whole = compare(*(distributions(ANSWERS, side, 50) for side in logits))
    part = compare(*(distributions(ANSWERS, side, k) for side in logits))

    assert 0 <= part["kl"] <= whole["kl"] * 1.001


def test_more_tokens_bring_the_bound_closer(logits):
    bounds = [
        compare(*(distributions(ANSWERS, side, k) for side in logits))["kl"] for k in (5, 25, 50)
    ]

    assert bounds == sorted(bounds)


def test_the_share_of_equal_tokens_counts_the_likeliest(logits):
    ours = np.zeros_like(logits[0])
    for row, token in enumerate([1, 2, 3, 4, 9, 9]):
        ours[row, token] = 5.0

    found = compare(*(distributions(ANSWERS, side, 50) for side in (logits[0], ours)))

    assert found["same_top"] == pytest.approx(4 / 6, abs=1e-5)


def test_a_vocabulary_that_fills_the_limit_is_not_called_whole():
    full = Distributions([[0]], np.arange(MOST_TOKENS)[None], np.full((1, MOST_TOKENS), -7.0))

    assert not compare(full, full)["whole"]


def test_what_was_saved_is_read(tmp_path, logits):
    full = distributions(ANSWERS, logits[0], 20)

    full.save(tmp_path / "reference" / "cell.npz")
    again = Distributions.load(tmp_path / "reference" / "cell.npz")

    assert again.answers == ANSWERS
    assert np.array_equal(again.tokens, full.tokens)
    assert np.array_equal(again.logprobs, full.logprobs)


def test_engines_that_were_given_other_answers_are_not_compared(logits):
    full = distributions(ANSWERS, logits[0], 50)
    other = distributions([[1, 2], [3, 4, 5, 8]], logits[1], 50)

    with pytest.raises(AssertionError, match="different answers"):
        compare(full, other)
