"""What the heads of the written model look at: attention sinks, retrieval and streaming heads.

A sink is a first token that draws attention whatever it is. A KV head is a streaming head if it can
do without all but the first tokens and the newest ones; the others retrieve. Heads stand in for one
another, so no head is judged alone: they are restricted one after another, those that look far the
least first, and a head is freed again if answers suffer.

Source: attention sinks, https://arxiv.org/abs/2309.17453; the split of heads by what restricting
them to sinks and a window costs, https://arxiv.org/abs/2410.10819, which trains gates for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from testbed_training.accuracy import Item
from testbed_training.model import EMBEDDING, Attend, Shape, Weights, hidden_states

__all__ = ["SINK_SHARE", "Heads", "observe_heads"]

# A head has a sink if the first token draws this share of the attention of the queries that have
# left it behind by more than the window.
SINK_SHARE = 0.3
SINK_TOKENS, WINDOW = 4, 128
# Restricted heads may cost this share of the answers.
TOLERANCE = 0.02

# Layer and KV head.
Head = tuple[int, int]


@dataclass(frozen=True)
class Heads:
    """What was seen.

    Attributes:
        sinks: Share of attention on the first token, by layer and query head.
        far: Share of attention between the sink tokens and the window, from the tokens of answers,
            by layer and KV head.
        accuracy: Right answers with every head free.
        order: KV heads, those that look far the least first.
        trials: Right answers with a head of `order` restricted, beside those before it that could
            be.
        layers: Right answers with all heads of a layer restricted.
        number: Of documents.
        length: Of their prompts, in tokens.
    """

    sinks: list[list[float]]
    far: list[list[float]]
    accuracy: float
    order: list[Head]
    trials: list[float]
    layers: list[float]
    number: int
    length: int

    @property
    def streaming(self) -> list[Head]:
        """The heads that can be restricted together, in their order."""
        least = self.accuracy - TOLERANCE
        tried = zip(self.order, self.trials, strict=True)
        return [head for head, share in tried if share >= least]

    @property
    def retrieval(self) -> list[Head]:
        """The other heads."""
        return sorted(set(self.order) - set(self.streaming))

    @property
    def num_sinks(self) -> int:
        """How many query heads have a sink."""
        return sum(share >= SINK_SHARE for layer in self.sinks for share in layer)


def observe_heads(folder: Path, shape: Shape, items: Sequence[Item], length: int) -> Heads:
    """Return what the heads of a written model look at.

    Args:
        folder: Of the model.
        shape: Its sizes.
        items: Documents with their answers.
        length: Of the documents' prompts, in tokens.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_file(folder / "model.safetensors")
    weights = {name: weight.to(device) for name, weight in loaded.items()}
    sinks, far = _look(shape, weights, items)
    everything = [(layer, head) for layer in range(shape.layers) for head in range(shape.kv_heads)]
    order = sorted(everything, key=lambda head: far[head[0]][head[1]].item())
    with tqdm(total=1 + len(order) + shape.layers, desc="heads", unit="trial") as bar:

        def share_right(restricted: Iterable[Head]) -> float:
            bar.update()
            return _share_right(shape, weights, items, _restrict(set(restricted)))

        accuracy = share_right([])
        trials, streaming = [], []
        for head in order:
            trials.append(share_right([*streaming, head]))
            if trials[-1] >= accuracy - TOLERANCE:
                streaming.append(head)
        layers = [
            share_right((layer, head) for head in range(shape.kv_heads))
            for layer in range(shape.layers)
        ]
    return Heads(sinks.tolist(), far.tolist(), accuracy, order, trials, layers, len(items), length)


@torch.no_grad()
def _look(shape: Shape, weights: Weights, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Return the shares of attention on the first token, and far away from answers."""
    sinks = torch.zeros(shape.layers, shape.heads)
    far = torch.zeros(shape.layers, shape.kv_heads)
    group = shape.heads // shape.kv_heads
    for item in items:
        asking = [place - 1 for start, end in item.answers for place in range(start, end)]

        def attend(
            layer: int, query: Tensor, key: Tensor, value: Tensor, asking: list[int] = asking
        ) -> Tensor:
            length = query.shape[2]
            scores = query.float() @ key.float().repeat_interleave(group, 1).transpose(-1, -2)
            hidden = ~_causal(length, query.device)
            scores = (scores * shape.head_dim**-0.5).masked_fill_(hidden, float("-inf"))
            shares = scores.softmax(-1)[0]
            sinks[layer] += shares[:, WINDOW:, 0].mean(1).cpu()
            outside = ~_window(length, query.device)
            mass = (shares * outside)[:, asking].sum(-1).mean(-1)
            far[layer] += mass.unflatten(0, (-1, group)).mean(1).cpu()
            return _attention(query, key, value, ~hidden)

        _states(shape, weights, item, attend)
    return sinks / len(items), far / len(items)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _window(length: int, device: torch.device) -> Tensor:
    """Return what a restricted head sees, [query, key]."""
    places = torch.arange(length, device=device)
    behind = places[:, None] - places
    return (behind >= 0) & ((behind < WINDOW) | (places < SINK_TOKENS))


def _attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=True
    )


def _restrict(heads: set[Head]) -> Attend:
    """Return an attention in which some KV heads see sinks and the window alone."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        causal, window = _causal(length, query.device), _window(length, query.device)
        seen = torch.stack(
            [
                window if (layer, head // group) in heads else causal
                for head in range(query.shape[1])
            ]
        )
        return _attention(query, key, value, seen)

    return attend


def _states(shape: Shape, weights: Weights, item: Item, attend: Attend) -> Tensor:
    ids = torch.tensor([item.ids], device=weights[EMBEDDING].device)
    positions = torch.arange(len(item.ids), device=ids.device)[None]
    return hidden_states(shape, weights, ids, positions, attend)[0]


@torch.no_grad()
def _share_right(shape: Shape, weights: Weights, items: Sequence[Item], attend: Attend) -> float:
    """Return the share of documents whose answers are right, by teacher forcing."""
    right = 0
    for item in items:
        states = _states(shape, weights, item, attend)
        places = [place for start, end in item.answers for place in range(start, end)]
        guesses = functional.linear(states[[p - 1 for p in places]], weights[EMBEDDING]).argmax(-1)
        right += guesses.tolist() == [item.ids[place] for place in places]
    return right / len(items)
