"""An engine's request against the reference: log-probabilities, kept sets, blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from reference.dense import DenseLlama, DenseReference, Kept, Rule
from reference.scorers import SCORERS

from engine.harness import Trace

__all__ = ["Comparison", "compare", "drop_one_key", "expected_blocks", "replayed"]

# float32: the engine's kernels against the reference's einsum.
TOLERANCE = 1e-4
# Distance from the cut, in standard deviations of the scores, within which kernels may differ.
NEAR = 1e-4
# What a mistake must move, so that a comparison could fail.
FELT = 1e-3


@dataclass(frozen=True)
class Comparison:
    """How far an engine's request is from the reference.

    Attributes:
        error: Largest difference of log-probabilities.
        flips: Distances from the cut of the positions that the two chose differently.
        events: Events that took place in the engine.
    """

    error: float
    flips: list[float]
    events: int

    def agrees(self, tolerance: float = TOLERANCE, near: float = NEAR) -> bool:
        """Whether log-probabilities are equal and kept sets differ in near-ties at most."""
        return self.error <= tolerance and max(self.flips, default=0.0) <= near


def replayed(trace: Trace) -> list[tuple[int, int]]:
    """Returns the chunks as the reference wants them: a restart replays from 0."""
    chunks: list[tuple[int, int]] = []
    last = -1
    for start, end in trace.chunks:
        chunks.append((0 if start < last or not chunks else start, end))
        last = end
    return chunks


def compare(
    trace: Trace, model: DenseLlama, rule: Rule, *, kept: list[Kept] | None = None, own=False
) -> Comparison:
    """Compares a request with the reference, which is given the engine's own kept sets.

    Near-ties flip between kernels, so the sets themselves are compared by how far from the cut
    they differ.

    Args:
        trace: The request.
        model: The reference's model.
        rule: The policy.
        kept: Kept sets to force instead of the engine's.
        own: Let the reference choose for itself.
    """
    forced = None if own or rule.scorer not in SCORERS else (kept or trace.kept)
    reference = DenseReference(model, rule)
    result = reference.logprobs(
        trace.prompt, trace.outputs, replayed(trace), forced, trace.delivered
    )
    events = sum(len({key[0] for key in run}) for run in trace.kept)
    return Comparison(max(errors(trace, result.logprobs)), result.flips, events)


def errors(trace: Trace, expected: torch.Tensor) -> list[float]:
    """Returns, for each output, the largest difference from `expected` [num_outputs, vocab]."""
    found = []
    for row, reference in zip(trace.logprobs, expected, strict=True):
        tokens = torch.tensor(list(row))
        got = torch.tensor(list(row.values()))
        found.append(float((reference[tokens] - got).abs().max()))
    return found


def drop_one_key(trace: Trace) -> list[Kept]:
    """Returns the engine's kept sets without one survivor of one layer and KV head.

    It is the newest of the first event, gone from later events too.
    """
    kept = [dict(run) for run in trace.kept]
    for run in kept:
        events = sorted(event for event, layer, head in run if (layer, head) == (0, 0))
        gone = {run[event, 0, 0][-1] for event in events[:1]}
        for event in events:
            run[event, 0, 0] = [position for position in run[event, 0, 0] if position not in gone]
    return kept


def expected_blocks(trace: Trace, rule: Rule) -> list[dict[str, int]]:
    """Returns the blocks that a request must hold after each of its steps, lane by lane.

    In a step [x, y) events up to the start of the step before have been settled.
    """
    expected = []
    settled = restart = -1
    for start, end in trace.chunks:
        if restart < 0 or start < restart:
            settled = 0
        expected.append(_blocks(rule, len(trace.prompt), settled, end))
        settled, restart = start, end
    return expected


def _blocks(rule: Rule, prompt: int, settled: int, end: int) -> dict[str, int]:
    size, budget = rule.block_size, rule.budget_of(prompt)
    held = -(-end // size)
    if rule.scorer == "window":
        first = max(0, settled - (budget - rule.sinks)) // size
        sinks = -(-rule.sinks // size)
        gone = max(0, first - sinks) if settled >= prompt else 0
        return {"StagingSpec": held - gone}
    past = rule.events(prompt, 0, settled)
    due = rule.events(prompt, 0, end)
    # With events at every distance from a block's edge, the roundest one sizes the store.
    tail = 0 if rule.every % size else prompt % size
    blocks = {
        "StagingSpec": held - (past[-1] // size if past else 0),
        "StoreSpec": (budget - tail) // size if due else 0,
    }
    if rule.scorer == "snapkv":
        # Eight query heads of a token fill the page of four KV heads' keys: bs tokens a block.
        window = rule.params["window"]
        near = end > prompt - window and prompt > budget
        blocks["QuerySpec"] = -(-window // size) if near and settled < prompt else 0
    if rule.scorer == "random" and rule.every:
        blocks["PositionSpec"] = 1 if due else 0  # a page holds thousands of positions
    return blocks
