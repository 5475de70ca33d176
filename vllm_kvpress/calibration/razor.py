"""RazorAttention's labels: echo and induction heads, seen on repeated random tokens. No data.

    BOS | t_1 ... t_P | t_1 ... t_P | t_1 ... t_P | t_1 ... t_P
                             ^ query i looks at earlier places of its own token (echo), and at the
                               tokens that followed those (induction)

Source: arXiv 2407.15891, section 3: random tokens repeated four times, the first 14 % of induction
heads and 1 % of echo heads, by KV head. Deviations: the random tokens of one period are distinct
where the vocabulary has enough, so that a token's earlier places are those a period before; shares
are rounded up.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_kvpress.calibration.attention import Heads, attending, full_attention, hidden_states

__all__ = ["REPEATS", "RepeatScores", "combined_scores", "observe_repeats", "repeat_scores"]

REPEATS = 4
INDUCTION_SHARE, ECHO_SHARE = 0.14, 0.01
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class RepeatScores:
    """Shares of attention, means over the queries of all repeats but the first.

    Attributes:
        echo: [num_layers, num_heads], on earlier places of the query's own token.
        induction: [num_layers, num_heads], on what followed those.
    """

    echo: Tensor
    induction: Tensor

    def by_kv_head(self, num_kv_heads: int) -> RepeatScores:
        """Returns the highest score of each KV head's query heads, [num_layers, num_kv_heads]."""

        def most(scores: Tensor) -> Tensor:
            return scores.reshape(len(scores), num_kv_heads, -1).amax(-1)

        return RepeatScores(most(self.echo), most(self.induction))


def observe_repeats(
    model: Any, num_layers: int, num_heads: int, *, period: int, seed: int
) -> RepeatScores:
    """Returns how much a model's query heads look back to repeated tokens.

    Args:
        model: a causal language model of transformers.
        num_layers: its layers.
        num_heads: its query heads of a layer.
        period: random tokens that are repeated.
        seed: draws them.
    """
    echo, induction = torch.zeros(num_layers, num_heads), torch.zeros(num_layers, num_heads)

    def look(heads: Heads) -> Tensor:
        if heads.window is None:  # a layer with a sliding window keeps its own cache
            found = _look_back(heads, period)
            echo[heads.layer], induction[heads.layer] = found[0].cpu(), found[1].cpu()
        return full_attention(heads)

    with torch.no_grad(), attending(model, look):
        hidden_states(model, _repeated_tokens(model, period, seed))
    return RepeatScores(echo, induction)


def repeat_scores(attention: Tensor, first_query: int, period: int) -> tuple[Tensor, Tensor]:
    """Returns (echo, induction) sums over some queries, float32 [num_heads] each.

    Args:
        attention: [num_heads, num_queries, num_tokens], of queries that follow one another.
        first_query: index of the first of them in the sequence, whose token 0 is BOS.
        period: distance of two places of a token.
    """
    num_heads, num_queries, num_tokens = attention.shape
    queries = torch.arange(first_query, first_query + num_queries, device=attention.device)
    echo = attention.new_zeros(num_heads)
    induction = attention.new_zeros(num_heads)
    for repeat in range(1, -(-num_tokens // period)):
        places = queries - repeat * period
        seen = places >= 1
        rows = torch.arange(num_queries, device=attention.device)[seen]
        echo += attention[:, rows, places[seen]].sum(-1)
        induction += attention[:, rows, places[seen] + 1].sum(-1)
    return echo, induction


def combined_scores(scores: RepeatScores) -> list[list[float]]:
    """Returns one score a head, such that 0.5 and above is the paper's choice.

    A head of rank r (0 is the strongest of all layers) among the n heads takes the place
    (r + 1/2) / ceil(share * n) in each of the two lists; its score is 1 / (1 + the better place).
    So the ceil(14 %) first induction heads and the ceil(1 %) first echo heads score above 0.5, and
    a lower threshold or a higher ratio takes further heads of both lists in the same proportion.
    """
    places = torch.minimum(
        _places(scores.induction, INDUCTION_SHARE), _places(scores.echo, ECHO_SHARE)
    )
    combined: list[list[float]] = (1 / (1 + places)).tolist()
    return combined


def _places(scores: Tensor, share: float) -> Tensor:
    order = scores.flatten().double().argsort(descending=True, stable=True)
    places = torch.empty(len(order), dtype=torch.float64)
    places[order] = torch.arange(len(order), dtype=torch.float64) + 0.5
    return (places / math.ceil(share * len(order))).view_as(scores)


def _look_back(heads: Heads, period: int) -> tuple[Tensor, Tensor]:
    """(echo, induction) of one layer, [num_heads] each, a few queries at a time."""
    query, key = heads.query[0].float(), heads.key[0].float()
    num_heads, num_tokens, _ = query.shape
    sums = torch.zeros(2, num_heads, device=query.device)
    for start in range(1 + period, num_tokens, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, num_tokens)
        logits = query[:, start:end] @ key[:, :end].transpose(1, 2) * heads.scale
        later = torch.arange(end, device=query.device) > torch.arange(
            start, end, device=query.device
        ).unsqueeze(1)
        attention = logits.masked_fill_(later, -math.inf).softmax(-1)
        sums += torch.stack(repeat_scores(attention, start, period))
    echo, induction = sums / (num_tokens - 1 - period)
    return echo, induction


def _repeated_tokens(model: Any, period: int, seed: int) -> Tensor:
    """BOS, if the model has one, and the random tokens, over and over."""
    config = model.config
    special = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
    words = [word for word in range(config.vocab_size) if word not in special]
    draw = random.Random(f"razor/{seed}")
    distinct = len(words) >= period
    drawn = draw.sample(words, period) if distinct else draw.choices(words, k=period)
    first = words[0] if config.bos_token_id is None else config.bos_token_id
    return torch.tensor([first, *(drawn * REPEATS)], device=model.device)
