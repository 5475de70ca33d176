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
Where streaming heads have more in a block than their tokens (sums, under compensation), runs are of
nearly one size in bytes, counted in rows of one token and head.
A few streaming heads may be promoted to retrieval heads, which costs memory and no quality, if
that makes fewer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

__all__ = ["HeadGroups", "HeadLane", "Labels", "Runs", "choose_runs", "group_heads"]

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
        rows: Of a head in a block, for retrieval and for streaming heads; equal without sums.
    """

    layers: tuple[tuple[HeadLane, ...], ...]
    num_retrieval: int
    num_heads: int
    runs: Runs
    promoted: tuple[tuple[int, int], ...]
    rows: tuple[int, int] = (1, 1)

    @property
    def width(self) -> Fraction:
        """KV heads whose tokens fit in a block: those of the largest run, its sums included."""
        streaming = self.num_heads - self.num_retrieval
        widest = _width(self.num_retrieval, streaming, self.runs, self.rows)
        return Fraction(widest, self.rows[0])

    @property
    def retrieval_sizes(self) -> tuple[int, ...]:
        """How many heads lanes of retrieval heads have, on every rank: each number once."""
        lanes = (lane for layer in self.layers for lane in layer if not lane.streams)
        return tuple(sorted({len(lane.heads) for lane in lanes}))

    @property
    def filled(self) -> Fraction:
        """What the heads of all runs take, in heads of tokens alone."""
        streaming = self.num_heads - self.num_retrieval
        return self.num_retrieval + streaming * Fraction(self.rows[1], self.rows[0])


def group_heads(
    retrieval: Labels, num_ranks: int = 1, rank: int = 0, rows: tuple[int, int] = (1, 1)
) -> HeadGroups:
    """Returns the lanes of one rank.

    Ranks must agree on the size of every lane, so a layer has as many retrieval heads on each of
    them as on the rank that has most; the others promote theirs of lowest index.

    Args:
        retrieval: [num_layers][num_kv_heads] of the whole model, true for a retrieval head.
        num_ranks: Ranks of tensor parallelism; with fewer KV heads than ranks, several hold one.
        rank: The rank.
        rows: Of a head in a block, for retrieval and for streaming heads.
    """
    everyone = [_local(retrieval, num_ranks, other) for other in range(num_ranks)]
    wanted = [max(sum(labels[layer]) for labels in everyone) for layer in range(len(retrieval))]
    per_layer = len(everyone[0][0])
    num_heads = per_layer * len(retrieval)
    runs = choose_runs(sum(wanted), num_heads - sum(wanted), rows)
    for layer in _rounded_layers(wanted, per_layer, runs.promoted):
        wanted[layer] += 1
    labels = [_promote(row, count) for row, count in zip(everyone[rank], wanted, strict=True)]
    promoted = tuple(
        (layer, head)
        for layer, row in enumerate(labels)
        for head, now in enumerate(row)
        if now and not everyone[rank][layer][head]
    )
    return HeadGroups(_lanes(labels, runs), sum(wanted), num_heads, runs, promoted, rows)


def choose_runs(num_retrieval: int, num_streaming: int, rows: tuple[int, int] = (1, 1)) -> Runs:
    """Returns the fewest runs that pad no block by more than 5 %; with sums, blocks on average.

    Of equally many runs, those that promote the fewest heads. At most 3 % of the heads are
    promoted, or one, and never the last. A run for each head needs no padding where all heads have
    as many rows in a block. With sums there may be no such runs, for few heads: then those that pad
    the least.

    Args:
        num_retrieval: Retrieval heads.
        num_streaming: Streaming heads.
        rows: Of a head in a block, for retrieval and for streaming heads.
    """
    best: tuple[float, Runs] | None = None
    num_heads = num_retrieval + num_streaming
    most = min(max(0, num_streaming - 1), max(1, int(MAX_PROMOTED * num_heads)))
    for total in range(1, num_heads + 1):
        for promoted in range(most + 1):
            kept, streams = num_retrieval + promoted, num_streaming - promoted
            for first in range(total + 1):
                runs = Runs(promoted, first, total - first)
                if _covers(kept, runs.retrieval) and _covers(streams, runs.streaming):
                    filled = _filled(kept, streams, runs, rows)
                    if filled >= 1 - MAX_PADDING:
                        return runs
                    if best is None or filled > best[0]:
                        best = filled, runs
    assert best is not None, "there are heads"
    return best[1]


def _covers(heads: int, runs: int) -> bool:
    return runs <= heads and (runs > 0) == (heads > 0)


def _width(retrieval: int, streaming: int, runs: Runs, rows: tuple[int, int]) -> int:
    return max(-(-heads // n) * r for heads, n, r in _used(retrieval, streaming, runs, rows))


def _filled(retrieval: int, streaming: int, runs: Runs, rows: tuple[int, int]) -> float:
    """The share of a block that is no padding: in the worst run, or with sums on average."""
    used, width = _used(retrieval, streaming, runs, rows), _width(retrieval, streaming, runs, rows)
    if rows[0] == rows[1]:
        return min(heads // n * r for heads, n, r in used) / width
    return sum(heads * r for heads, _, r in used) / (width * sum(n for _, n, _ in used))


def _used(
    retrieval: int, streaming: int, runs: Runs, rows: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """(heads, runs, rows of a head) of each kind that there is."""
    kinds = ((retrieval, runs.retrieval, rows[0]), (streaming, runs.streaming, rows[1]))
    return [kind for kind in kinds if kind[1]]


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
