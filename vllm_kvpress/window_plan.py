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

With compensation (RazorAttention) a query sees one token more, which stands for the blocks
[S, b - w) that it does not see: their mean key and mean value. The sums of K and V over the blocks
[S, i] lie in block i, beside its tokens, and are written when it closes. So the query's block needs
block b - w - 1, whose tokens it does not see, and that block leaves one block later:

    block     0   1   2   3   4   5   6   7   8
    b = 8    [s]                 (5) [ window  | q]    (5): sums over the blocks 1 to 5

All queries of one block see the same blocks. A stock kernel that is given each block of queries as
a request of its own, with a table of just these blocks, computes exactly this rule under its
causal mask: `window_rows.py` makes these requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_kvpress.config import Policy

__all__ = ["WindowPlan"]

_SUM_BYTES = 4  # of a number in a sum, float32


@dataclass(frozen=True)
class WindowPlan:
    """Counts and positions of what streaming heads keep.

    Attributes:
        block_size: Tokens in a block.
        sink_tokens: First tokens of a request, kept in whole blocks.
        recent_tokens: Tokens before the query's block that it sees at least.
        compensates: Whether one more token stands for those that a query does not see.
    """

    block_size: int
    sink_tokens: int
    recent_tokens: int
    compensates: bool = False

    @classmethod
    def from_policy(cls, policy: Policy, block_size: int) -> WindowPlan:
        """Returns what the streaming heads of a head plan keep, in blocks of this size."""
        compensates = policy.heads.compensation
        return cls(block_size, policy.sink_tokens, policy.recent_tokens, compensates)

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

    def summed_block(self, block: int) -> int | None:
        """Returns the block whose sums a query in `block` needs; None if it sees everything."""
        return block - self.window_blocks - 1 if self.compensates and self.gap(block) else None

    # ---- what the pool holds -------------------------------------------------------------

    @property
    def held_blocks(self) -> int:
        """Blocks before the query's own that it needs: its window, and the one with sums."""
        return self.window_blocks + self.compensates

    def rows(self, element_bytes: int) -> tuple[int, int]:
        """Returns a head's rows in a block of retrieval and of streaming heads.

        A row is the key and value of one token; sums take as many as their bytes.

        Args:
            element_bytes: Of a number in the cache.
        """
        sums = -(-_SUM_BYTES // element_bytes) if self.compensates else 0
        return self.block_size, self.block_size + sums

    def gone(self, block: int) -> int:
        """Returns the blocks that no query in `block` or behind it needs."""
        return max(0, block - self.held_blocks - self.sink_blocks)

    def freed(self, processed: int) -> tuple[int, int]:
        """Returns the half-open range of blocks that no query from `processed` on needs."""
        return self.sink_blocks, self.sink_blocks + self.gone(processed // self.block_size)

    def blocks_held(self, processed: int, end: int) -> int:
        """Returns the blocks of one request in a step that computes up to `end`.

        Args:
            processed: Tokens whose steps were over when this one was scheduled.
            end: Where the step ends.
        """
        return -(-end // self.block_size) - self.gone(processed // self.block_size)

    def blocks_bound(self, num_tokens: int, in_flight_tokens: int) -> int:
        """Returns the most blocks that a request of this length ever holds.

        Args:
            num_tokens: Prompt and output together.
            in_flight_tokens: Most tokens that are scheduled at a time and not yet processed.
        """
        full = -(-num_tokens // self.block_size)
        flying = -(-in_flight_tokens // self.block_size) + 1
        return min(full, self.sink_blocks + self.held_blocks + flying)

    # ---- prefix hits -----------------------------------------------------------------------

    def hit_needs(self, num_blocks: int) -> tuple[int, int]:
        """Returns (sinks, first): a hit of so many blocks needs [0, sinks) and [first, num_blocks).

        They are what the first query behind the hit needs.
        """
        sinks = min(self.sink_blocks, num_blocks)
        return sinks, max(sinks, num_blocks - self.held_blocks)
