"""RazorAttention's scores: on attention made by hand, and on a model with a planted head."""

import math

import pytest
import torch

from vllm_kvpress.calibration.razor import (
    REPEATS,
    RepeatScores,
    combined_scores,
    observe_repeats,
    repeat_scores,
)

PERIOD = 6
NUM_TOKENS = 1 + REPEATS * PERIOD


def planted(offset):
    """One head, each query all on the token `offset` after its last earlier place."""
    attention = torch.zeros(1, NUM_TOKENS, NUM_TOKENS)
    for query in range(1 + PERIOD, NUM_TOKENS):
        attention[0, query, query - PERIOD + offset] = 1
    return attention


def sums(attention, start=1 + PERIOD):
    echo, induction = repeat_scores(attention[:, start:], start, PERIOD)
    return echo.item(), induction.item()


def test_a_head_on_its_own_token_echoes_and_one_on_the_next_token_inducts():
    queries = NUM_TOKENS - 1 - PERIOD

    assert sums(planted(0)) == (queries, 0)
    assert sums(planted(1)) == (0, queries)
    assert sums(planted(2)) == (0, 0)


def test_all_earlier_places_count_and_the_first_repeat_has_none():
    attention = torch.full((1, NUM_TOKENS, NUM_TOKENS), 0.125)
    by_hand = [
        sum(0.125 for place in range(1, query) if (query - place) % PERIOD == 0)
        for query in range(1 + PERIOD, NUM_TOKENS)
    ]

    echo, induction = sums(attention)

    assert echo == induction == sum(by_hand) == 0.125 * PERIOD * (1 + 2 + 3)


def test_queries_in_pieces_give_the_same_sums():
    attention = torch.rand(3, NUM_TOKENS, NUM_TOKENS, dtype=torch.float64)
    whole = repeat_scores(attention[:, 7:], 7, PERIOD)

    pieces = [
        repeat_scores(attention[:, at : at + 5], at, PERIOD) for at in range(7, NUM_TOKENS, 5)
    ]

    for number in range(2):
        torch.testing.assert_close(sum(piece[number] for piece in pieces), whole[number])


def test_a_kv_head_has_the_best_of_its_query_heads():
    scores = RepeatScores(torch.tensor([[0.1, 0.4, 0.3, 0.2]]), torch.tensor([[0.9, 0, 0, 0.5]]))

    by_kv_head = scores.by_kv_head(2)

    torch.testing.assert_close(by_kv_head.echo, torch.tensor([[0.4, 0.3]]))
    torch.testing.assert_close(by_kv_head.induction, torch.tensor([[0.9, 0.5]]))


@pytest.mark.parametrize(("num_layers", "num_heads"), [(4, 4), (32, 8), (3, 50)])
def test_a_half_and_more_is_the_papers_choice(num_layers, num_heads):
    torch.manual_seed(1)
    echo, induction = torch.rand(2, num_layers, num_heads)
    number = num_layers * num_heads

    combined = torch.tensor(combined_scores(RepeatScores(echo, induction))).flatten()

    first = set(induction.flatten().topk(math.ceil(0.14 * number)).indices.tolist())
    first |= set(echo.flatten().topk(math.ceil(0.01 * number)).indices.tolist())
    assert set((combined >= 0.5).nonzero().flatten().tolist()) == first
    assert ((combined > 0) & (combined < 1)).all()


CODE = 20  # channels of a token's code


def plant_induction_head(model):
    """Makes query head 2 of layer 1 an induction head, and all other heads of the layer uniform.

    A token is a constant, its random code of signs, and room for the code of the token before. In
    layer 0 a head looks one token back, by RoPE alone, and copies that token's code into the room.
    In layer 1 the head compares its own token's code with that room, in channels that RoPE hardly
    turns.
    """
    own, before = slice(1, 1 + CODE), slice(1 + CODE, 1 + 2 * CODE)
    generator = torch.Generator().manual_seed(0)
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, 0] = 1
    embedding[:, own] = torch.randint(0, 2, (64, CODE), generator=generator) * 2.0 - 1
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    first, second = (layer.self_attn for layer in model.model.layers)
    turns = 1e8 ** (-torch.arange(16) / 16)
    first.k_proj.weight[:16, 0] = 8
    first.q_proj.weight[:16, 0], first.q_proj.weight[16:32, 0] = 8 * turns.cos(), -8 * turns.sin()
    first.v_proj.weight[:CODE, own] = torch.eye(CODE)
    first.o_proj.weight[before, :CODE] = torch.eye(CODE)
    slow = [*range(6, 16), *range(22, 32)]
    second.q_proj.weight[[64 + at for at in slow], own] = 2 * torch.eye(CODE)
    second.k_proj.weight[[32 + at for at in slow], before] = 2 * torch.eye(CODE)


@torch.no_grad()
def test_a_planted_induction_head_of_a_model_is_found(tiny_llama):
    plant_induction_head(tiny_llama)

    scores = observe_repeats(tiny_llama, 2, 4, period=40, seed=0)

    assert scores.induction[1, 2] > 0.9
    assert sorted(scores.induction.flatten().tolist())[-2] < 0.1
    (retrieval,) = (torch.tensor(combined_scores(scores.by_kv_head(2)))[1] > 0.5).nonzero()
    assert retrieval == 1


def test_the_model_computes_as_before_afterwards(tiny_llama):
    ids = torch.arange(3, 40)[None]
    before = tiny_llama(ids).logits

    observe_repeats(tiny_llama, 2, 4, period=10, seed=0)

    assert tiny_llama.config._attn_implementation == "sdpa"
    assert tiny_llama(ids).logits.equal(before)
