"""A worker of packed plans over a memory that knows what was last written where: cells, not blocks.

One KV head stands for all: the cells of the others lie beside its own, and are written with it.
"""

from __future__ import annotations

import random

from managers.worker import Pending, Run, Worker

KIND = {"store": "cell", "demoted": "loser's cell"}


class PackedWorker(Worker):
    """Executes steps in order; stores hold cells of several tokens."""

    def attend(self, run: Run, start: int, end: int) -> None:
        layout = self.plan.layout(run.num_prompt_tokens, start)
        stored = {"store": layout.store_tokens, "demoted": layout.demoted_tokens}
        for lane, num_tokens in stored.items():
            contents = self.stores(run)[lane]
            assert len(contents) == num_tokens, lane
            for index, expected in enumerate(contents):
                for page, slot in self.places(lane, index, run.tables):
                    assert page in self.owned(run, lane)
                    assert self.read(page, KIND[lane], slot) == expected
        size = self.plan.block_size
        first = layout.first_block * size if layout.first_block else 0
        for position in [*range(layout.head_blocks * size), *range(first, end)]:
            self.staged(run, position, run.tables)

    def staged(self, run: Run, position: int, tables):
        """Returns what staging holds at a position, checked."""
        block, slot = divmod(position, self.plan.block_size)
        page = tables["staging"][block]
        assert page in self.owned(run, "staging")
        assert self.read(page, "kv", slot) == run.content(position)
        return run.content(position)

    def stores(self, run: Run) -> dict[str, list]:
        """What the stores of a run must hold, in order."""
        if not hasattr(run, "packed"):
            run.packed = {"store": [], "demoted": []}
        return run.packed

    def places(self, lane: str, index: int, tables):
        """Yields (page, slot) of a token in the cells of every head."""
        plan = self.plan
        tokens, per_page = plan.cell_tokens, plan.cells_per_page
        if lane == "demoted":
            tokens, per_page = plan.loser_cell_tokens, plan.loser_cells_per_page
        for head in range(plan.num_kv_heads):
            cell = index // tokens * plan.num_kv_heads + head
            yield tables[lane][cell // per_page], (cell % per_page, index % tokens)

    def run_event(self, pending: Pending) -> None:
        run, plan = pending.run, self.plan
        alive = self.live.get(run.request_id) is run
        self.counts["events" if alive else "stale"] += 1
        move = plan.move(run.num_prompt_tokens, pending.start, pending.event)
        exact, moved = plan.exact_tokens, {"store": [], "demoted": []}
        if move.survivors is not None:
            if alive:
                self.stores(run).update(store=[], demoted=[])
            closed = list(range(exact, move.select_end))
            chooser = random.Random(f"{run.request_id} {pending.event}")
            kept = set(chooser.sample(closed, move.survivors))
            moved["store"] = [position for position in closed if position in kept]
            if move.losers:
                moved["demoted"] = [position for position in closed if position not in kept]
                assert len(moved["demoted"]) == move.losers
        at = {"store": 0 if move.survivors is not None else move.append_at, "demoted": 0}
        moved["store"] += range(move.append_start, move.append_end)
        for lane, positions in moved.items():
            for index, position in enumerate(positions, at[lane]):
                content = ("garbage",)
                if alive:
                    content = self.staged(run, position, pending.tables)
                    self.stores(run)[lane].append(content)
                for page, slot in self.places(lane, index, pending.tables):
                    assert not alive or page in self.owned(run, lane)
                    self.write(page, KIND[lane], slot, content)
