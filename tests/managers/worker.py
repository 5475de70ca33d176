"""A worker that follows the rules, over a memory that knows what was last written where.

Memory is a map of block id -> (kind, slot -> content). Lanes alias one pool, so writing a block
as another kind destroys what it held. Every read compares with what the request itself wrote (or,
for prompt tokens, what any request with the same prefix writes): a block that was freed, given
away and overwritten too early is found at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass
class Run:
    """One life of a request, from (re)admission to preemption or end.

    Attributes:
        tables: Block ids of each lane, as the worker has been told; freed ones stay in it.
        store: What the store must hold, in order.
        is_pure: Whether a generated token, too, is what any request makes of the tokens before it.
    """

    request_id: str
    number: int
    num_prompt_tokens: int
    stream: int
    tables: dict[str, list[int]]
    store: list = field(default_factory=list)
    is_pure: bool = False

    def content(self, position):
        """What K/V of a position is: of a prompt, any request's; of an output, this run's."""
        if self.is_pure or position < self.num_prompt_tokens:
            return ("prompt", self.stream, position)
        return ("output", self.request_id, self.number, position)


@dataclass
class Pending:
    """An event that is due: block ids, and what they held when the step began that made it so."""

    run: Run
    event: int
    before: tuple[int, int]
    tables: dict[str, list[int]]
    start: int


class Worker:
    """Executes steps in order.

    Args:
        plan: The plan.
        owned: Returns the blocks that a run still owns in a lane, by the managers.
    """

    def __init__(self, plan, owned) -> None:
        self.plan = plan
        self.owned = owned
        self.memory: dict[int, tuple[str, dict]] = {}
        self.live: dict[str, Run] = {}
        self.pending: list[Pending] = []
        self.counts = {"events": 0, "stale": 0}

    def execute(self, steps) -> None:
        """Runs one step: [(run, start, end)] of every scheduled request."""
        self.settle(steps)
        self.forward(steps)

    def settle(self, steps) -> None:
        """Runs the events that are due, and notes those that this step makes due."""
        pending, self.pending = self.pending, []
        for event in pending:
            self.run_event(event)
        for run, start, end in steps:
            event = self.plan.due_event(run.num_prompt_tokens, start, end)
            if event:
                tables = {lane: list(ids) for lane, ids in run.tables.items()}
                before = self.plan.layout(run.num_prompt_tokens, start)
                self.pending.append(Pending(run, event, before, tables, start))

    def forward(self, steps) -> None:
        """Writes the step's tokens and reads what their attention reads."""
        for run, start, end in steps:
            self.write_tokens(run, start, end)
        for run, start, end in steps:
            self.attend(run, start, end)

    def write(self, block, kind, slot, content) -> None:
        assert block != 0, "a write to the null block"
        if self.memory.get(block, ("",))[0] != kind:
            self.memory[block] = (kind, {})
        self.memory[block][1][slot] = content

    def read(self, block, kind, slot):
        found, slots = self.memory.get(block, ("nothing", {}))
        return slots.get(slot) if found == kind else ("foreign", found)

    def write_tokens(self, run, start, end) -> None:
        size, plan = self.plan.block_size, self.plan
        owned = self.owned(run, "staging")
        for position in range(start, end):
            block = run.tables["staging"][position // size]
            assert block in owned
            self.write(block, "kv", position % size, run.content(position))
        prompt = run.num_prompt_tokens
        if not plan.query_need(prompt, end):
            return
        first = plan.query_start(prompt)
        for position in range(max(start, first), min(end, prompt)):
            row = position - first
            block = run.tables["queries"][row // plan.queries_per_block]
            assert block in self.owned(run, "queries")
            content = ("query", run.request_id, run.number, position)
            self.write(block, "query", row % plan.queries_per_block, content)

    def visible(self, run, layout, end, tables):
        """Yields (lane, block, slot, expected content) of what attention reads up to `end`."""
        size = self.plan.block_size
        head = tables["store" if self.plan.store else "staging"][: layout[0]]
        for index, block in enumerate(head):
            for slot in range(size):
                if self.plan.store:
                    yield "store", block, slot, run.store[index * size + slot]
                else:
                    yield "staging", block, slot, run.content(index * size + slot)
        for position in range(layout[1] * size, end):
            block = tables["staging"][position // size]
            yield "staging", block, position % size, run.content(position)

    def attend(self, run, start, end) -> None:
        layout = self.plan.layout(run.num_prompt_tokens, start)
        if self.plan.store:
            assert layout[0] * self.plan.block_size == len(run.store)
        self.check(run, self.visible(run, layout, end, run.tables))

    def check(self, run, contents) -> None:
        owned = {lane: self.owned(run, lane) for lane in run.tables}
        for lane, block, slot, expected in contents:
            assert block in owned[lane], (lane, block)
            assert self.read(block, "kv", slot) == expected

    def run_event(self, pending) -> None:
        run, event, plan = pending.run, pending.event, self.plan
        size = plan.block_size
        count = plan.store_blocks(run.num_prompt_tokens, event) * size
        store = pending.tables["store"][: count // size]
        alive = self.live.get(run.request_id) is run
        self.counts["events" if alive else "stale"] += 1
        kept = [("garbage",)] * count
        if alive:
            seen = list(self.visible(run, pending.before, event, pending.tables))
            self.check(run, seen)
            self.check_queries(run, pending)
            self.check_positions(run, pending)
            candidates = [content for _, _, _, content in seen[: len(seen) - event % size]]
            chooser = random.Random(f"{run.request_id} {event}")
            chosen = sorted(chooser.sample(range(len(candidates)), count))
            kept = [candidates[index] for index in chosen]
            run.store = kept
            assert set(store) <= self.owned(run, "store")
        for index, content in enumerate(kept):
            self.write(store[index // size], "kv", index % size, content)
        if plan.positions_per_block:
            for index, content in enumerate(kept):
                block = pending.tables["positions"][index // plan.positions_per_block]
                assert not alive or block in self.owned(run, "positions")
                self.write(block, "position", index % plan.positions_per_block, content)

    def check_queries(self, run, pending) -> None:
        plan, prompt = self.plan, run.num_prompt_tokens
        if not plan.query_window or pending.event != prompt:
            return
        for row, position in enumerate(range(plan.query_start(prompt), prompt)):
            block = pending.tables["queries"][row // plan.queries_per_block]
            assert block in self.owned(run, "queries")
            expected = ("query", run.request_id, run.number, position)
            assert self.read(block, "query", row % plan.queries_per_block) == expected

    def check_positions(self, run, pending) -> None:
        per_block = self.plan.positions_per_block
        if not per_block:
            return
        for index, expected in enumerate(run.store):
            block = pending.tables["positions"][index // per_block]
            assert block in self.owned(run, "positions")
            assert self.read(block, "position", index % per_block) == expected
