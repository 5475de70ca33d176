"""Each scorer against its formula, written out in plain Python and float64."""

import dataclasses
import math

import pytest
import torch

from vllm_kvpress.errors import ScoreError
from vllm_kvpress.policies.scorers.keydiff import KeyDiffScorer
from vllm_kvpress.policies.scorers.knorm import KnormScorer
from vllm_kvpress.policies.scorers.logquant import LogQuantScorer
from vllm_kvpress.policies.scorers.position import PositionScorer
from vllm_kvpress.policies.scorers.random import RandomScorer
from vllm_kvpress.policies.scorers.snapkv import SnapKVScorer
from vllm_kvpress.policies.scorers.value_key_norm import ValueKeyNormScorer

ALL = [
    PositionScorer(),
    RandomScorer(seed=5),
    LogQuantScorer(),
    KnormScorer(),
    KeyDiffScorer(),
    ValueKeyNormScorer(),
    SnapKVScorer(window=8, pool=5),
    SnapKVScorer(window=8, pool=3, pooling="max"),
]
SHAPES = [
    pytest.param({"num_tokens": t, "num_kv_heads": h, "group": g, "head_dim": d, "dtype": dtype},
                 id=f"T{t}-H{h}-G{g}-D{d}-{str(dtype)[6:]}")
    for t, h, g, d, dtype in (
        (63, 2, 1, 64, torch.float32),
        (50, 2, 4, 80, torch.float32),
        (41, 1, 8, 128, torch.float32),
        (63, 2, 2, 64, torch.bfloat16),
        (40, 3, 2, 16, torch.float16),
    )
]  # fmt: skip


def norm(vector):
    return math.sqrt(sum(x * x for x in vector))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def knorm(obs, _):
    return [[-norm(key) for key in head] for head in obs.keys.double().tolist()]


def value_key_norm(obs, _):
    heads = zip(obs.keys.double().tolist(), obs.values.double().tolist(), strict=True)
    return [
        [norm(value) / norm(key) for key, value in zip(keys, values, strict=True)]
        for keys, values in heads
    ]


def keydiff(obs, _):
    scores = []
    for keys in obs.keys.double().tolist():
        units = [[x / norm(key) for x in key] for key in keys]
        mean = [sum(column) / len(units) for column in zip(*units, strict=True)]
        scores.append([-dot(key, mean) / (norm(key) * norm(mean)) for key in keys])
    return scores


def random(obs, scorer):
    mask = 2**64 - 1

    def mix(z):
        z = (z + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    return [
        [
            (mix(mix(mix(mix(scorer.seed) ^ obs.layer_idx) ^ head) ^ position) >> 40) / 2**24
            for position in positions
        ]
        for head, positions in zip(obs.kv_heads, obs.positions.tolist(), strict=True)
    ]


def logquant(obs, _):
    def window(position, last):
        doublings = 0
        while position and position % 2 ** (doublings + 1) == 0:
            doublings += 1
        return (last - position) / (doublings + 1) if position else 0.0

    return [[-window(p, max(row)) for p in row] for row in obs.positions.tolist()]


def snapkv(obs, scorer):
    num_kv_heads, num_tokens, _ = obs.keys.shape
    group = obs.queries.shape[0] // num_kv_heads
    window = scorer.window
    rest = num_tokens - window
    half = scorer.pool // 2
    scores = []
    for kv_head, keys in enumerate(obs.keys.double().tolist()):
        per_query_head = []
        for q_head in range(kv_head * group, (kv_head + 1) * group):
            received = [0.0] * num_tokens
            for i, query in enumerate(obs.queries[q_head].double().tolist()):
                visible = rest + i + 1
                logits = [dot(query, key) * obs.scale for key in keys[:visible]]
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                for j, weight in enumerate(weights):
                    received[j] += weight / sum(weights) / window
            near = [received[max(0, j - half) : min(rest, j + half + 1)] for j in range(rest)]
            if scorer.pooling == "max":
                per_query_head.append([max(part) for part in near])
            else:
                per_query_head.append([sum(part) / scorer.pool for part in near])
        mean = [sum(column) / group for column in zip(*per_query_head, strict=True)]
        scores.append(mean + [math.inf] * window)
    return scores


FORMULAS = [
    (KnormScorer(), knorm),
    (ValueKeyNormScorer(), value_key_norm),
    (KeyDiffScorer(), keydiff),
    (RandomScorer(seed=0), random),
    (RandomScorer(seed=2**31 - 1), random),
    (LogQuantScorer(), logquant),
    (SnapKVScorer(window=8, pool=1), snapkv),
    (SnapKVScorer(window=8, pool=5), snapkv),
    (SnapKVScorer(window=8, pool=13, pooling="max"), snapkv),
    (SnapKVScorer(window=8, pool=81), snapkv),
]


def formula_id(value):
    return getattr(value, "__name__", str(value)[:45])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scorer", "formula"), FORMULAS, ids=formula_id)
def test_score_is_the_formula(observe, scorer, formula, shape):
    obs = observe(**shape)

    scores = scorer.score(obs)

    expected = torch.tensor(formula(obs, scorer), dtype=torch.float64)
    assert scores.dtype == torch.float32
    assert scores.shape == obs.keys.shape[:2]
    # float32 arithmetic on inputs that both sides share exactly.
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scorer", ALL, ids=repr)
def test_score_is_pure(observe, scorer):
    obs = observe()
    before = observe()

    first, second = scorer.score(obs), scorer.score(obs)

    assert torch.equal(first, second)
    for name in ("keys", "values", "queries", "positions"):
        assert torch.equal(getattr(obs, name), getattr(before, name))


@pytest.mark.parametrize("scorer", ALL, ids=repr)
def test_score_reads_only_what_it_needs(observe, scorer):
    obs = observe()
    poison = {
        name: torch.full_like(getattr(obs, name), float("nan"))
        for name in ("keys", "values")
        if name not in scorer.needs
    }
    poison |= {name: None for name in ("queries", "positions") if name not in scorer.needs}

    poisoned = scorer.score(dataclasses.replace(obs, **poison))

    assert torch.equal(poisoned, scorer.score(obs))


@pytest.mark.parametrize("scorer", ALL, ids=repr)
def test_a_head_scores_alike_on_any_rank(observe, scorer):
    """Scope "head": rank 1 of two sees the second half of the heads only."""
    obs = observe(num_kv_heads=4, group=2)
    rank1 = dataclasses.replace(
        obs,
        keys=obs.keys[2:],
        values=obs.values[2:],
        queries=obs.queries[4:],
        positions=obs.positions[2:],
        kv_heads=obs.kv_heads[2:],
    )

    assert scorer.scope == "head"
    torch.testing.assert_close(scorer.score(rank1), scorer.score(obs)[2:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scorer", ALL, ids=repr)
def test_score_of_strided_views(observe, scorer):
    """The engine may pass views of the cache: transposed, with gaps."""
    obs = observe()

    def spread(tensor):
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] * 2), 99, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2]

    views = {
        name: spread(getattr(obs, name)) for name in ("keys", "values", "queries", "positions")
    }
    strided = dataclasses.replace(obs, **views)

    assert not strided.keys.is_contiguous()
    torch.testing.assert_close(scorer.score(strided), scorer.score(obs), rtol=1e-6, atol=1e-7)


def test_snapkv_of_one_query_without_pooling_is_tova(observe):
    """TOVA's score is the last token's attention row (one head, group of one)."""
    obs = observe(num_kv_heads=1, group=1, window=1)
    logits = (obs.queries[0, -1] @ obs.keys[0].T) * obs.scale

    scores = SnapKVScorer(window=1, pool=1).score(obs)

    torch.testing.assert_close(scores[0, :-1], logits.softmax(-1)[:-1])
    assert scores[0, -1] == math.inf


def test_snapkv_uses_the_last_queries_when_it_gets_fewer_tokens_than_its_window(observe):
    obs = observe(num_tokens=5, window=5)

    assert SnapKVScorer(window=8, pool=3).score(obs).eq(math.inf).all()


def test_snapkv_notices_one_more_query(observe):
    """Window 8 and 7 differ: a wrong window does not pass for a right one."""
    obs = observe(window=8)
    shorter = dataclasses.replace(obs, queries=obs.queries[:, 1:])

    full, short = SnapKVScorer(window=8).score(obs), SnapKVScorer(window=7).score(shorter)

    assert (full[:, :42] - short[:, :42]).abs().max() > 1e-4


def test_snapkv_survives_large_logits(observe):
    obs = observe(dtype=torch.float16)
    large = dataclasses.replace(obs, queries=obs.queries * 1000)

    assert not SnapKVScorer(window=8).score(large).isnan().any()


@pytest.mark.parametrize("name", ["queries", "positions"])
def test_missing_input_is_a_typed_error(observe, name):
    scorer = SnapKVScorer() if name == "queries" else RandomScorer()

    with pytest.raises(ScoreError, match=f"needs {name}"):
        scorer.score(dataclasses.replace(observe(), **{name: None}))


def test_zero_keys_give_numbers(observe):
    obs = dataclasses.replace(observe(), keys=torch.zeros(2, 50, 16))

    for scorer in ALL:
        assert not scorer.score(obs).isnan().any(), scorer


def test_random_differs_by_layer_head_seed_and_position(observe):
    base = RandomScorer(seed=0).score(observe())
    others = [
        RandomScorer(seed=1).score(observe()),
        RandomScorer(seed=0).score(observe(layer_idx=4)),
        RandomScorer(seed=0).score(observe(kv_heads=(2, 5))),
    ]

    assert all((base != other).float().mean() > 0.99 for other in others)
    assert (base[0] != base[1]).float().mean() > 0.99
    assert 0.4 < RandomScorer().score(observe(num_tokens=4000)).mean() < 0.6


def test_random_follows_the_token_not_its_slot(observe):
    obs = observe()
    kept = torch.tensor([0, 3, 17, 49])
    compacted = dataclasses.replace(obs, keys=obs.keys[:, kept], positions=obs.positions[:, kept])

    assert torch.equal(RandomScorer().score(compacted), RandomScorer().score(obs)[:, kept])


def logquant_lists(window, num_tokens):
    """The positions that LogQuant's two lists hold after a prompt, by its own procedure."""
    log, local = [], list(range(num_tokens))
    while len(log + local) >= 3 * window:
        both = log + local
        log, local = both[: 2 * window : 2], both[2 * window :]
    return log + local


def test_the_lists_are_those_of_the_published_example():
    assert logquant_lists(8, 100) == [0, 64, 72, 76, 80, 82, 84, 86, *range(88, 100)]


@pytest.mark.parametrize("window", [8, 16, 64])
@pytest.mark.parametrize("num_windows", [3, 4, 7, 12, 20])
def test_logquant_keeps_what_its_two_lists_hold(observe, window, num_windows):
    """In all windows that have a token or more left, but for a prompt's first."""
    num_tokens = window * num_windows
    obs = observe(num_tokens=num_tokens)
    obs = dataclasses.replace(obs, positions=torch.arange(num_tokens).repeat(2, 1))

    scores = LogQuantScorer().score(obs)[0]

    kept = (scores > -window).nonzero().flatten().tolist()

    lists = logquant_lists(window, num_tokens)
    first = max(window, num_tokens - window * window.bit_length())
    assert [p for p in kept if p >= first] == [p for p in lists if p >= first]
    assert kept[0] == lists[0] == 0


def test_logquant_follows_the_token_not_its_slot(observe):
    obs = observe()
    kept = torch.tensor([0, 3, 17, 49])
    compacted = dataclasses.replace(obs, keys=obs.keys[:, kept], positions=obs.positions[:, kept])

    assert torch.equal(LogQuantScorer().score(compacted), LogQuantScorer().score(obs)[:, kept])
