"""The retention plan of two precisions: what a scorer rejects goes to a second store.

Beside the words of `packed_plan.py`:

    losers    closed tokens of the prompt that do not survive, in whole channel groups

    staging   [ exact sinks | free ........... | open | new tokens -> ]
    store     [ survivors of the prompt, then every token that closed since ]
    demoted   [ losers of the prompt ]      filled once, at the prompt's end

Every token is kept, in one of the three. Losers that would not fill a group survive: the store
holds up to a group less one token more than its budget. Groups run over the losers in the order of
their positions, for each KV head its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_kvpress.errors import CapacityError
from vllm_kvpress.packed_plan import Move, PackedPlan
from vllm_kvpress.plan import Layout


@dataclass(frozen=True)
class DemotingPlan(PackedPlan):
    """Counts and positions of a policy that keeps its losers at fewer bits.

    Attributes:
        loser_group_tokens: Tokens of a channel group of losers; 1 if scales belong to single
            tokens.
        loser_cell_tokens: Tokens of a cell of losers.
        loser_cells_per_page: Such cells in a block.
    """

    loser_group_tokens: int = 1
    loser_cell_tokens: int = 16
    loser_cells_per_page: int = 1

    @property
    def loser_unit(self) -> int:
        """Losers that are demoted together: whole groups, which leave whole groups to survive."""
        return math.lcm(self.group_tokens, self.loser_group_tokens)

    def check(self) -> None:
        """Checks what a packed plan must hold, and that a block holds a cell of losers.

        Raises:
            CapacityError: if it does not.
        """
        super().check()
        if self.loser_cells_per_page < 1:
            raise CapacityError(
                "a block is smaller than one packed cell of losers",
                got=f"--block-size {self.block_size} for cells of {self.loser_cell_tokens} tokens",
                allowed="a block that holds the cell of at least one KV head",
                fix="Use a larger --block-size",
            )

    def losers(self, num_prompt_tokens: int) -> int:
        """Returns the tokens that the end of the prompt demotes, in each KV head."""
        rejected = self._closed(num_prompt_tokens) - super().survivors(num_prompt_tokens)
        return rejected // self.loser_unit * self.loser_unit

    def survivors(self, num_prompt_tokens: int) -> int:
        """Returns the store tokens that the end of the prompt leaves."""
        return self._closed(num_prompt_tokens) - self.losers(num_prompt_tokens)

    def _closed(self, num_prompt_tokens: int) -> int:
        return self.closed_end(num_prompt_tokens) - self.exact_tokens

    def move(self, num_prompt_tokens: int, start: int, event: int) -> Move:
        """Returns what the event of a step moves; arguments as of `PackedPlan.move`."""
        move = super().move(num_prompt_tokens, start, event)
        if move.survivors is None:
            return move
        return move._replace(losers=self.losers(num_prompt_tokens))

    def demoted_tokens(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Returns the tokens in the second store once every event up to `num_tokens` has run."""
        return self.losers(num_prompt_tokens) if num_tokens >= num_prompt_tokens else 0

    def layout(self, num_prompt_tokens: int, num_computed_tokens: int) -> Layout:
        """Returns what attention reads in a step that starts at `num_computed_tokens`."""
        layout = super().layout(num_prompt_tokens, num_computed_tokens)
        demoted = self.demoted_tokens(num_prompt_tokens, num_computed_tokens)
        return layout._replace(demoted_tokens=demoted)

    def physical_tokens(self, num_prompt_tokens: int, start: int, end: int) -> int:
        """Returns the tokens that attention reads for the last query of chunk [start, end)."""
        demoted = self.demoted_tokens(num_prompt_tokens, start)
        return super().physical_tokens(num_prompt_tokens, start, end) + demoted

    def store_bound(self, num_tokens: int) -> int:
        """Returns the most store blocks of a request of this length that still holds its prompt."""
        closed = self.closed_end(num_tokens) - self.exact_tokens
        room = self.budget(num_tokens) - self.exact_tokens - self.residual_tokens
        return self.pages(min(closed, max(0, room) + self.closing_tokens + self.loser_unit))

    def demoted_need(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the blocks of losers needed by a step that computes up to `end`."""
        return self._demoted_pages(self.demoted_tokens(num_prompt_tokens, end))

    def demoted_bound(self, num_tokens: int) -> int:
        """Returns the most blocks of losers of any request of at most this length.

        Losers grow with the prompt: whatever is added beyond the budget is rejected.
        """
        return self._demoted_pages(self.losers(num_tokens))

    def blocks_held(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the blocks that one request holds in a step that computes up to `end`."""
        held = super().blocks_held(num_prompt_tokens, end)
        return held + self.demoted_need(num_prompt_tokens, end)

    def _demoted_pages(self, num_tokens: int) -> int:
        cells = -(-num_tokens // self.loser_cell_tokens) * self.num_kv_heads
        return -(-cells // self.loser_cells_per_page)
