"""The retention plan of packed stores: tokens leave staging as their block closes.

Beside the words of `plan.py`:

    unit      tokens that leave staging together: whole blocks, and whole channel groups
    open      the newest tokens, which staging keeps: the residual and what no unit has filled
    closed    floor((n - residual) / unit) units at n tokens, counted behind the exact sinks

    staging   [ exact sinks | free ........... | open | new tokens -> ]
                                                ^ first_block * block_size
    store     [ survivors of the prompt, then every token that closed since ]
                store_tokens, in packed cells

The end of the prompt is an event: of the closed tokens a scorer picks the survivors, or all stay.
From there on each position at which a unit closes is an event as well: its tokens are appended to
the store as they are. A token is quantized once, when it enters the store. As everywhere, events
inside one chunk collapse into the last one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from vllm_kvpress.errors import CapacityError
from vllm_kvpress.plan import Layout, RetentionPlan

GROUP_TOKENS = 32  # tokens of a channel group, KIVI's default


class Move(NamedTuple):
    """What one event moves from staging to the store.

    Attributes:
        survivors: Store tokens that the prompt's end leaves, or None if it lies behind.
        select_end: End of the staging tokens that are chosen from, with `survivors`.
        append_start: First staging token that is appended as it is.
        append_end: End of them.
        append_at: Their first place in the store.
        losers: Tokens that are demoted, with `survivors`: all that are not among them, or none.
    """

    survivors: int | None
    select_end: int
    append_start: int
    append_end: int
    append_at: int
    losers: int = 0


@dataclass(frozen=True)
class PackedPlan(RetentionPlan):
    """Counts and positions of a policy whose store holds packed cells.

    Attributes:
        residual_tokens: Newest tokens that stay in staging at least.
        exact_sinks: Whether the sinks' blocks stay in staging.
        group_tokens: Tokens of a channel group; 1 if scales belong to single tokens.
        cell_tokens: Tokens of a cell.
        num_kv_heads: KV heads, each with its own cells. Of lanes of several sizes, in one ratio
            with the cells in a block, that of the lane that needs the most blocks.
        cells_per_page: Cells in a block.
    """

    residual_tokens: int = 0
    exact_sinks: bool = False
    group_tokens: int = 1
    cell_tokens: int = 16
    num_kv_heads: int = 1
    cells_per_page: int = 1

    @property
    def unit(self) -> int:
        """Tokens that leave staging together."""
        return math.lcm(self.block_size, self.group_tokens)

    @property
    def blocks_per_token(self) -> Fraction:
        """What a generated token takes in the end: in the store."""
        return Fraction(self.num_kv_heads, self.cells_per_page * self.cell_tokens)

    @property
    def exact_tokens(self) -> int:
        """First tokens, in whole blocks, that never leave staging."""
        return self.sink_blocks * self.block_size if self.exact_sinks else 0

    def check(self) -> None:
        """Checks that a block holds a cell, and the budget what is forced.

        Raises:
            CapacityError: if one of them does not.
        """
        if self.cells_per_page < 1:
            raise CapacityError(
                "a block is smaller than one packed cell",
                got=f"--block-size {self.block_size} for cells of {self.cell_tokens} tokens",
                allowed="a block that holds the cell of at least one KV head",
                fix="Use a larger --block-size",
            )
        if self.evicts_tokens:
            super().check()

    # ---- budget and events ---------------------------------------------------------------

    @property
    def least_budget(self) -> int:
        """Smallest budget in tokens that holds sinks, recent and open tokens at any length."""
        open_tokens = self.residual_tokens + self.unit - 1
        sinks = 0 if self.exact_sinks else self.sink_tokens
        return (
            self.exact_tokens + sinks + max(open_tokens, self.recent_tokens) + self.group_tokens - 1
        )

    @property
    def least_budget_text(self) -> str:
        """How the least budget comes about."""
        text = (
            f"{self.sink_blocks * self.block_size if self.exact_sinks else self.sink_tokens} (the "
            f"sinks) + the larger of {self.recent_tokens} (recent_tokens) and "
            f"{self.residual_tokens + self.unit - 1} (the residual and an open block)"
        )
        return text + (f" + {self.group_tokens - 1} (of a group)" if self.group_tokens > 1 else "")

    def closed_end(self, num_tokens: int) -> int:
        """Returns the end of the closed tokens when so many are computed."""
        start = self.exact_tokens
        return start + max(0, num_tokens - self.residual_tokens - start) // self.unit * self.unit

    def survivors(self, num_prompt_tokens: int) -> int:
        """Returns the store tokens that the end of the prompt leaves."""
        closed = self.closed_end(num_prompt_tokens)
        available = closed - self.exact_tokens
        if not self.evicts_tokens:
            return available
        room = self.budget(num_prompt_tokens) - self.exact_tokens - (num_prompt_tokens - closed)
        return min(available, max(0, room) // self.group_tokens * self.group_tokens)

    def store_tokens(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Returns the tokens in the store once every event up to `num_tokens` has run."""
        if num_tokens < num_prompt_tokens:
            return 0
        closed_since = self.closed_end(num_tokens) - self.closed_end(num_prompt_tokens)
        return self.survivors(num_prompt_tokens) + closed_since

    def last_event(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Returns the last position at which tokens entered the store, or 0 if none did."""
        if num_tokens < num_prompt_tokens:
            return 0
        closed = self.closed_end(num_tokens)
        if closed > self.closed_end(num_prompt_tokens):
            return closed + self.residual_tokens
        return num_prompt_tokens if closed > self.exact_tokens else 0

    def move(self, num_prompt_tokens: int, start: int, event: int) -> Move:
        """Returns what the event of a step moves.

        Args:
            num_prompt_tokens: Tokens of the prompt.
            start: Computed tokens at the start of the step in which the event was due.
            event: The event's position.
        """
        in_prompt = start < num_prompt_tokens
        begin = num_prompt_tokens if in_prompt else start
        return Move(
            survivors=self.survivors(num_prompt_tokens) if in_prompt else None,
            select_end=self.closed_end(num_prompt_tokens),
            append_start=self.closed_end(begin),
            append_end=self.closed_end(event),
            append_at=self.store_tokens(num_prompt_tokens, begin),
        )

    # ---- what attention reads ------------------------------------------------------------

    def layout(self, num_prompt_tokens: int, num_computed_tokens: int) -> Layout:
        """Returns what attention reads in a step that starts at `num_computed_tokens`."""
        if not self.last_event(num_prompt_tokens, num_computed_tokens):
            return Layout(0, 0)
        head = self.exact_tokens // self.block_size
        return Layout(
            head_blocks=head,
            first_block=self.closed_end(num_computed_tokens) // self.block_size,
            store_tokens=self.store_tokens(num_prompt_tokens, num_computed_tokens),
        )

    def physical_tokens(self, num_prompt_tokens: int, start: int, end: int) -> int:
        """Returns the tokens that attention reads for the last query of chunk [start, end)."""
        layout = self.layout(num_prompt_tokens, start)
        return super().physical_tokens(num_prompt_tokens, start, end) + layout.store_tokens

    # ---- what the pool holds -------------------------------------------------------------

    def pages(self, num_tokens: int) -> int:
        """Returns the blocks that hold so many packed tokens of a request."""
        cells = -(-num_tokens // self.cell_tokens) * self.num_kv_heads
        return -(-cells // self.cells_per_page)

    def freed_staging(self, num_prompt_tokens: int, settled_tokens: int) -> tuple[int, int]:
        """Returns the half-open range of staging blocks that are free."""
        layout = self.layout(num_prompt_tokens, settled_tokens)
        return layout.head_blocks, layout.first_block

    @property
    def store_grows(self) -> bool:
        """Whether a request takes store blocks again: as its tokens close."""
        return True

    def store_need(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the store blocks needed by a step that computes up to `end`."""
        return self.pages(self.store_tokens(num_prompt_tokens, end))

    def query_need(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the query-lane blocks needed by a step that computes up to `end`."""
        return super().query_need(num_prompt_tokens, end) if self.evicts_tokens else 0

    def store_bound(self, num_tokens: int) -> int:
        """Returns the most store blocks of a request of this length that still holds its prompt.

        The pool is fullest then, up to two tokens behind the prompt's end, when as many units more
        may have closed as two tokens begin; later a request has given back more of staging than
        its store takes.
        """
        closed = self.closed_end(num_tokens) - self.exact_tokens
        if not self.evicts_tokens:
            return self.pages(closed)
        room = self.budget(num_tokens) - self.exact_tokens - self.residual_tokens
        return self.pages(min(closed, max(0, room) + self.closing_tokens))

    @property
    def closing_tokens(self) -> int:
        """Most tokens that close within two tokens behind the prompt's end."""
        return -(-2 // self.unit) * self.unit

    def store_pages_most(self, num_tokens: int) -> int:
        """Returns the most store blocks that any request of at most this length ever holds."""
        return self.pages(num_tokens)
