"""A request under a retention plan, token by token, in the words of the design: slow and plain.

Nothing here is shared with `vllm_kvpress.plan` but the fields of the dataclass.
"""

from __future__ import annotations

import random

import numpy as np
from hypothesis import strategies as st

from vllm_kvpress.plan import RetentionPlan


def budget_of(plan, prompt):
    if plan.keep_ratio is None:
        return plan.budget_tokens
    return max(int(plan.keep_ratio * prompt), least_budget(plan))


def least_budget(plan):
    """The smallest budget from which on every tail leaves room for the forced tokens."""
    enough = plan.sink_tokens + plan.recent_tokens + 3 * plan.block_size
    while enough > 0 and all(has_room(plan, enough - 1, tail) for tail in range(plan.block_size)):
        enough -= 1
    return enough


def has_room(plan, budget, tail):
    """Whether the open block, and in whole blocks the forced tokens outside of it, fit."""
    blocks = (budget - tail) // plan.block_size
    return (
        blocks >= 0
        and plan.sink_tokens + max(0, plan.recent_tokens - tail) <= blocks * plan.block_size
    )


class SlowRequest:
    """The positions that one KV head of one request still sees.

    Attributes:
        store: Positions of the survivors.
        staging: Positions still seen in staging, ascending.
        events: Events that ran, in order.
    """

    def __init__(self, plan: RetentionPlan, prompt: int, seed: int = 0) -> None:
        self.plan = plan
        self.prompt = prompt
        self.store: list[int] = []
        self.staging: list[int] = []
        self.events: list[int] = []
        self.random = random.Random(seed)

    @property
    def visible(self) -> int:
        return len(self.store) + len(self.staging)

    def step(self, start: int, end: int) -> int:
        """Computes positions [start, end); returns how many tokens its last query sees."""
        if not self.plan.store:
            self.slide(start)
        self.staging += range(start, end)
        seen = self.visible
        due = [e for e in range(start + 1, end + 1) if self.is_event(e)]
        if due and due[-1] > budget_of(self.plan, self.prompt):
            self.evict(due[-1])
        return seen

    def is_event(self, position: int) -> bool:
        plan, over = self.plan, position - self.prompt
        if not plan.store or over < 0:
            return False
        if over == 0:
            return plan.prompt_end
        return plan.every_decode_tokens > 0 and over % plan.every_decode_tokens == 0

    def evict(self, event: int) -> None:
        plan, size = self.plan, self.plan.block_size
        tail = event % size
        kept_count = (budget_of(plan, self.prompt) - tail) // size * size
        everything = self.store + self.staging
        closed = [p for p in everything if p < event - tail]
        forced = [p for p in closed if p < plan.sink_tokens or p >= event - plan.recent_tokens]
        rest = [p for p in closed if p not in set(forced)]
        assert len(forced) <= kept_count <= len(closed), (event, forced, kept_count, closed)
        chosen = self.random.sample(rest, kept_count - len(forced))
        # Sinks and recent tokens are never evicted, however often the others are.
        for position in [*range(plan.sink_tokens), *range(event - plan.recent_tokens, event)]:
            assert position in everything
        self.store = sorted(forced + chosen)
        self.staging = [p for p in self.staging if p >= event - tail]
        self.events.append(event)

    def slide(self, start: int) -> None:
        """StreamingLLM: from the end of the prompt on, whole blocks outside the window go."""
        if start < self.prompt:
            return
        size, plan = self.plan.block_size, self.plan
        window = budget_of(plan, self.prompt) - plan.sink_tokens

        def stays(position: int) -> bool:
            block = range(position // size * size, (position // size + 1) * size)
            holds_sink = block[0] < plan.sink_tokens
            return holds_sink or block[-1] >= max(0, start - window)

        self.staging = [p for p in self.staging if stays(p)]


def schedule(prompt: int, outputs: int, chunks: list[int]) -> list[tuple[int, int]]:
    """The prompt in chunks of these lengths (the last for the rest), then token by token."""
    steps, start, sizes = [], 0, iter(chunks)
    while start < prompt:
        end = min(prompt, start + next(sizes, prompt))
        steps.append((start, end))
        start = end
    return steps + [(start + i, start + i + 1) for i in range(outputs)]


def slow_holdings(plan, prompt, steps, *, in_flight) -> list[int]:
    """The blocks that a request holds in each step of a schedule.

    Args:
        plan: The plan.
        prompt: The prompt's length.
        steps: [start, end) of each step.
        in_flight: Steps that have not been processed when the next one is scheduled: 0, or 1
            with asynchronous scheduling.
    """
    held: set[tuple[str, int]] = set()
    freed: set[tuple[str, int]] = set()
    states = {0: None}
    slow = SlowRequest(plan, prompt)
    counts = []
    for index, (start, end) in enumerate(steps):
        # Processed before the last scheduled step: one step further back than what is processed.
        settled = steps[index - 1 - in_flight][0] if index > in_flight else 0
        unseen = states[settled] or set()
        held |= {("staging", block) for block in range(-(-end // plan.block_size))}
        freed |= {("staging", block) for block in unseen}
        if plan.query_window and prompt > budget_of(plan, prompt):
            rows = -(-plan.query_window // plan.queries_per_block)
            if end > prompt - plan.query_window:
                held |= {("query", row) for row in range(rows)}
            if settled >= prompt:
                freed |= {("query", row) for row in range(rows)}
        slow.step(start, end)
        if slow.events:
            held |= {("store", block) for block in range(capacity(plan, prompt))}
            rows = capacity(plan, prompt) * plan.block_size
            if plan.positions_per_block:
                rows = -(-rows // plan.positions_per_block)
                held |= {("position", row) for row in range(rows)}
        after = SlowRequest(plan, prompt)
        after.staging = list(slow.staging)
        if not plan.store:
            after.slide(end)
        seen = {position // plan.block_size for position in after.staging}
        states[end] = set(range(end // plan.block_size)) - seen
        counts.append(len(held - freed))
    return counts


def capacity(plan, prompt):
    """The largest store that any event can need; all are alike if the tail never changes."""
    budget = budget_of(plan, prompt)
    tails = {(prompt + k * plan.every_decode_tokens) % plan.block_size for k in range(64)}
    if plan.every_decode_tokens % plan.block_size == 0:
        assert len(tails) == 1
        return max(0, budget - tails.pop()) // plan.block_size
    return budget // plan.block_size


@st.composite
def plans(draw, stores=(True, False)):
    """Random plans as `RetentionPlan.from_policy` and `check` let them pass."""
    store = draw(st.sampled_from(stores))
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    sinks, recent = draw(st.integers(0, 6)), draw(st.integers(0, 9))
    if not store:
        recent += 1
        return RetentionPlan(size, sinks, recent, sinks + recent, None, store=False)
    every = draw(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 8, 12]))
    plan = RetentionPlan(
        block_size=size,
        sink_tokens=sinks,
        recent_tokens=recent,
        budget_tokens=None,
        keep_ratio=draw(st.floats(0.01, 1.0)),
        every_decode_tokens=every,
        prompt_end=not every or draw(st.booleans()),
        query_window=0 if every else draw(st.integers(0, recent)),
        queries_per_block=draw(st.integers(1, 5)),
        positions_per_block=draw(st.integers(0, 7)) if every else 0,
    )
    if draw(st.booleans()):
        tokens = least_budget(plan) + draw(st.integers(0, 20))
        plan = replace(plan, budget_tokens=tokens, keep_ratio=None)
    return plan


def replace(plan, **changes):
    from dataclasses import replace as replaced

    return replaced(plan, **changes)


def as_array(*values):
    return np.array(values, dtype=np.int64)
