"""What a streaming head sees: sinks and a window, in whole blocks, by the query's position alone.

    B   block_size
    S   sink_blocks    ceil(sink_tokens / B)
    w   window_blocks  ceil(recent_tokens / B)

A query in block b sees the blocks [0, S) and [b - w, b], up to itself:

    block     0   1   2   3   4   5   6   7   8        S = 1, w = 2
    b = 8    [s]                      [ window  | q]
    b = 3    [s] [ window  | q]                        the two meet: nothing is left out

Neither the prompt's length nor where a step cuts it matters. So K and V are a function of the
tokens before, those of generated tokens included, and may be shared between requests.

All queries of one block see the same blocks. A stock kernel that is given each block of queries as
a request of its own, with a table of just these blocks, computes exactly this rule under its
causal mask: `window_rows.py` makes these requests.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WindowPlan"]


@dataclass(frozen=True)
class WindowPlan:
    """Counts and positions of what streaming heads keep.

    Attributes:
        block_size: Tokens in a block.
        sink_tokens: First tokens of a request, kept in whole blocks.
        recent_tokens: Tokens before the query's block that it sees at least.
    """

    block_size: int
    sink_tokens: int
    recent_tokens: int

    @property
    def sink_blocks(self) -> int:
        """Blocks at the start of a request that every later query sees."""
        return -(-self.sink_tokens // self.block_size)

    @property
    def window_blocks(self) -> int:
        """Blocks before the query's own that it sees."""
        return -(-self.recent_tokens // self.block_size)

    def sees(self, query: int, key: int) -> bool:
        """Whether the query at one position sees the key at another."""
        in_window = key // self.block_size >= query // self.block_size - self.window_blocks
        return key <= query and (key // self.block_size < self.sink_blocks or in_window)

    def gap(self, block: int) -> int:
        """Returns the blocks between sinks and window that a query in `block` does not see."""
        return max(0, block - self.window_blocks - self.sink_blocks)

    # ---- what the pool holds -------------------------------------------------------------

    def freed(self, processed: int) -> tuple[int, int]:
        """Returns the half-open range of blocks that no query from `processed` on sees."""
        return self.sink_blocks, self.sink_blocks + self.gap(processed // self.block_size)

    def blocks_held(self, processed: int, end: int) -> int:
        """Returns the blocks of one request in a step that computes up to `end`.

        Args:
            processed: Tokens whose steps were over when this one was scheduled.
            end: Where the step ends.
        """
        return -(-end // self.block_size) - self.gap(processed // self.block_size)

    def blocks_bound(self, num_tokens: int, in_flight_tokens: int) -> int:
        """Returns the most blocks that a request of this length ever holds.

        Args:
            num_tokens: Prompt and output together.
            in_flight_tokens: Most tokens that are scheduled at a time and not yet processed.
        """
        full = -(-num_tokens // self.block_size)
        flying = -(-in_flight_tokens // self.block_size) + 1
        return min(full, self.sink_blocks + self.window_blocks + flying)

    # ---- prefix hits -----------------------------------------------------------------------

    def hit_needs(self, num_blocks: int) -> tuple[int, int]:
        """Returns (sinks, first): a hit of so many blocks needs [0, sinks) and [first, num_blocks).

        They are what the first query behind the hit sees.
        """
        sinks = min(self.sink_blocks, num_blocks)
        return sinks, max(sinks, num_blocks - self.window_blocks)
