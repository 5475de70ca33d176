import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpress.errors import ScoreError
from vllm_kvpress.policies import select_tokens


def plain_selection(row, num_keep, sink_tokens, recent_tokens):
    """The rule in one line a step: forced tokens, then the best, ties to the lower index."""
    num_tokens = len(row)
    if num_keep == num_tokens:
        return list(range(num_tokens))
    forced = [*range(sink_tokens), *range(num_tokens - recent_tokens, num_tokens)]
    rest = [i for i in range(num_tokens) if i not in forced]
    rest.sort(key=lambda i: (-row[i], i))
    return sorted(forced + rest[: num_keep - len(forced)])


@st.composite
def cases(draw):
    num_heads = draw(st.integers(1, 3))
    num_tokens = draw(st.integers(1, 40))
    num_keep = draw(st.integers(0, num_tokens))
    sink_tokens = draw(st.integers(0, num_keep))
    recent_tokens = draw(st.integers(0, num_keep - sink_tokens))
    # Few distinct values, so that ties are the rule.
    few = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1e-45, 0.5, 1.0, 3e38, math.inf])
    value = draw(st.sampled_from([few, st.floats(width=32, allow_nan=False)]))
    row = st.lists(value, min_size=num_tokens, max_size=num_tokens)
    scores = draw(st.lists(row, min_size=num_heads, max_size=num_heads))
    return scores, num_keep, sink_tokens, recent_tokens


@given(cases())
def test_selection_is_the_plain_rule(case):
    scores, num_keep, sink_tokens, recent_tokens = case
    tensor = torch.tensor(scores, dtype=torch.float32)
    before = tensor.clone()

    kept = select_tokens(tensor, num_keep, sink_tokens, recent_tokens)

    expected = [plain_selection(row, num_keep, sink_tokens, recent_tokens) for row in scores]
    assert kept.tolist() == expected
    assert kept.dtype == torch.int64
    assert kept.is_contiguous()
    assert torch.equal(tensor, before)


def test_selection_at_full_size_equals_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    # 8 bits of mantissa: thousands of ties, as bfloat16 inputs give.
    scores = torch.randn(4, 32768, generator=generator).bfloat16().float()

    kept = select_tokens(scores, 1024, 4, 64)

    middle = scores[:, 4:-64].sort(dim=1, descending=True, stable=True).indices[:, : 1024 - 68] + 4
    forced = torch.tensor([*range(4), *range(32768 - 64, 32768)]).expand(4, -1)
    assert torch.equal(kept, torch.cat([middle, forced], dim=1).sort(dim=1).values)


def test_strided_scores():
    scores = torch.arange(40.0).reshape(20, 2).T

    assert select_tokens(scores, 3, 1, 0).tolist() == [[0, 18, 19], [0, 18, 19]]


def test_forced_tokens_beat_infinity():
    scores = torch.tensor([[-math.inf, math.inf, math.inf, 0.0, -math.inf]])

    assert select_tokens(scores, 3, 1, 1).tolist() == [[0, 1, 4]]


def test_nan_names_who_scored_what():
    scores = torch.zeros(2, 5)
    scores[1, 3] = float("nan")

    with pytest.raises(ScoreError) as caught:
        select_tokens(scores, 2, 0, 0, context="scorer 'mine', layer 7")

    message = str(caught.value)
    assert "scorer 'mine', layer 7 returned NaN" in message
    assert "1 of 10, the first at KV head 1, token 3" in message


def test_nan_among_forced_tokens_or_with_nothing_to_drop_is_an_error_too():
    scores = torch.full((1, 4), float("nan"))

    for num_keep, forced in ((4, 0), (2, 2)):
        with pytest.raises(ScoreError, match="NaN"):
            select_tokens(scores, num_keep, forced, 0)


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(2, 5, dtype=torch.float64), torch.zeros(5), [[1.0]]],
    ids=["float64", "one dimension", "a list"],
)
def test_scores_of_the_wrong_kind(scores):
    with pytest.raises(ScoreError, match="float32"):
        select_tokens(scores, 1, 0, 0)
