"""How retrieval and streaming heads share one pool of blocks: pure integers.

vLLM's cache groups take blocks of one size from one pool. So the retrieval heads of all layers, one
after the other, are cut into runs, and the streaming heads into runs of about the same number; each
run is a cache group, and a block holds the tokens of one run's heads:

    layer              0        1        2        3
    retrieval heads    0 2      1 -      -        0 1 2
    runs               [  A  ][      ][      B        ]      5 to 6 heads each
    streaming heads    1 3      0 2 3    0 1 2 3  3
    runs               [    C       ][     D         ]

A layer's part of a run is a lane; a layer that straddles a cut has two lanes of a kind. Runs are
of nearly one length, as the longest sets the bytes of a block and what the others lack is padding.
A few streaming heads may be promoted to retrieval heads, which costs memory and no quality, if
that makes fewer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["HeadGroups", "HeadLane", "Runs", "choose_runs", "group_heads"]

MAX_PADDING = 0.05
MAX_PROMOTED = 0.03

Labels = Sequence[Sequence[bool]]


class HeadLane(NamedTuple):
    """Some KV heads of one layer, in one run.

    Attributes:
        run: The run, retrieval runs first.
        streams: Whether its heads keep sinks and a window alone.
        heads: KV heads, as this rank numbers them, ascending.
    """

    run: int
    streams: bool
    heads: tuple[int, ...]


class Runs(NamedTuple):
    """How many runs there are of each kind.

    Attributes:
        promoted: Streaming heads that become retrieval heads.
        retrieval: Runs of retrieval heads.
        streaming: Runs of streaming heads.
    """

    promoted: int
    retrieval: int
    streaming: int


@dataclass(frozen=True)
class HeadGroups:
    """The lanes of one rank. All ranks have equally many heads in each lane.

    Attributes:
        layers: The lanes of each layer, those of retrieval heads first.
        num_retrieval: Retrieval heads of this rank, promoted ones included.
        num_heads: KV heads of this rank, over all layers.
        runs: How many runs there are.
        promoted: (layer, head) of this rank that were streaming in the plan and are not here.
    """

    layers: tuple[tuple[HeadLane, ...], ...]
    num_retrieval: int
    num_heads: int
    runs: Runs
    promoted: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """KV heads whose tokens fit in a block: those of the longest run."""
        streaming = self.num_heads - self.num_retrieval
        return _width(self.num_retrieval, streaming, self.runs)


def group_heads(retrieval: Labels, num_ranks: int = 1, rank: int = 0) -> HeadGroups:
    """Returns the lanes of one rank.

    Ranks must agree on the size of every lane, so a layer has as many retrieval heads on each of
    them as on the rank that has most; the others promote theirs of lowest index.

    Args:
        retrieval: [num_layers][num_kv_heads] of the whole model, true for a retrieval head.
        num_ranks: Ranks of tensor parallelism; with fewer KV heads than ranks, several hold one.
        rank: The rank.
    """
    everyone = [_local(retrieval, num_ranks, other) for other in range(num_ranks)]
    wanted = [max(sum(labels[layer]) for labels in everyone) for layer in range(len(retrieval))]
    per_layer = len(everyone[0][0])
    num_heads = per_layer * len(retrieval)
    runs = choose_runs(sum(wanted), num_heads - sum(wanted))
    for layer in _rounded_layers(wanted, per_layer, runs.promoted):
        wanted[layer] += 1
    labels = [_promote(row, count) for row, count in zip(everyone[rank], wanted, strict=True)]
    promoted = tuple(
        (layer, head)
        for layer, row in enumerate(labels)
        for head, now in enumerate(row)
        if now and not everyone[rank][layer][head]
    )
    return HeadGroups(_lanes(labels, runs), sum(wanted), num_heads, runs, promoted)


def choose_runs(num_retrieval: int, num_streaming: int) -> Runs:
    """Returns the fewest runs that pad no block by more than 5 %.

    Of equally many runs, those that promote the fewest heads. At most 3 % of the heads are
    promoted, or one, and never the last: a run for each head needs none, so there is always an
    answer.
    """
    num_heads = num_retrieval + num_streaming
    most = min(max(0, num_streaming - 1), max(1, int(MAX_PROMOTED * num_heads)))
    for total in range(1, num_heads + 1):
        for promoted in range(most + 1):
            kept, streams = num_retrieval + promoted, num_streaming - promoted
            for first in range(total + 1):
                runs = Runs(promoted, first, total - first)
                if _covers(kept, runs.retrieval) and _covers(streams, runs.streaming):
                    width = _width(kept, streams, runs)
                    shortest = _shortest(kept, streams, runs)
                    if shortest >= (1 - MAX_PADDING) * width:
                        return runs
    raise AssertionError("a run for each head pads nothing")


def _covers(heads: int, runs: int) -> bool:
    return runs <= heads and (runs > 0) == (heads > 0)


def _width(retrieval: int, streaming: int, runs: Runs) -> int:
    return max(-(-heads // n) for heads, n in _used(retrieval, streaming, runs))


def _shortest(retrieval: int, streaming: int, runs: Runs) -> int:
    return min(heads // n for heads, n in _used(retrieval, streaming, runs))


def _used(retrieval: int, streaming: int, runs: Runs) -> list[tuple[int, int]]:
    """(heads, runs) of each kind that there is."""
    pairs = ((retrieval, runs.retrieval), (streaming, runs.streaming))
    return [(heads, n) for heads, n in pairs if n]


def _local(retrieval: Labels, num_ranks: int, rank: int) -> list[list[bool]]:
    num_heads = len(retrieval[0])
    count = max(1, num_heads // num_ranks)
    first = rank * num_heads // num_ranks
    return [list(row[first : first + count]) for row in retrieval]


def _rounded_layers(wanted: list[int], per_layer: int, promoted: int) -> list[int]:
    """The layers, first ones first, whose streaming heads make up the promoted ones."""
    free = [layer for layer, count in enumerate(wanted) for _ in range(per_layer - count)]
    return free[:promoted]


def _promote(row: list[bool], count: int) -> list[bool]:
    missing = count - sum(row)
    promoted = [head for head, retrieves in enumerate(row) if not retrieves][:missing]
    return [retrieves or head in promoted for head, retrieves in enumerate(row)]


def _lanes(labels: Labels, runs: Runs) -> tuple[tuple[HeadLane, ...], ...]:
    layers: list[list[HeadLane]] = [[] for _ in labels]
    first_run = 0
    for streams, num_runs in ((False, runs.retrieval), (True, runs.streaming)):
        places = [
            (layer, head)
            for layer, row in enumerate(labels)
            for head, retrieves in enumerate(row)
            if retrieves != streams
        ]
        for run in range(num_runs):
            part = places[run * len(places) // num_runs : (run + 1) * len(places) // num_runs]
            for layer in sorted({layer for layer, _ in part}):
                heads = tuple(head for at, head in part if at == layer)
                layers[layer].append(HeadLane(first_run + run, streams, heads))
        first_run += num_runs
    return tuple(map(tuple, layers))
