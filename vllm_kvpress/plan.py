"""The retention plan: which blocks of a request live where, as pure integers.

One function of (prompt length, computed tokens, policy) decides what is freed. The
scheduler-side managers and the worker-side metadata builder both call it, so no message
ever travels from the device to the scheduler. Which *tokens* survive is data and is decided
on the worker; *how many* survive is decided here.

Words used below, all in tokens unless a name says blocks:

    P         num_prompt_tokens
    x         num_computed_tokens at the start of a step
    event     a position E = P (end of the prompt) or P + k * every_decode_tokens at which a
              scorer picks survivors; an event with E <= budget does nothing
    tail      E mod block_size: tokens of the open block, which stay in staging
    store     floor((budget - tail) / block_size) whole blocks of survivors

    staging   [ free ........... | tail | new tokens -> ]
                                 ^ first_block * block_size
    store     [ survivors ...... ]
                head_blocks
    attention reads head_blocks (of the store, or of staging's sinks), then staging from
    first_block on.

An event at E is due in the step whose chunk [x, y) has x < E <= y, takes place before the next
step, and shapes attention from there on. Managers free its blocks one step later still.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from vllm_kvpress.errors import CapacityError
from vllm_kvpress.layout import CELL_TOKENS

if TYPE_CHECKING:
    from vllm_kvpress.config import Policy
    from vllm_kvpress.policies.scorer import Scorer
    from vllm_kvpress.skip_groups import SkippedGroups


class Layout(NamedTuple):
    """What attention reads of one request: `head_blocks` blocks, then staging's blocks.

    Attributes:
        head_blocks: Whole blocks in front: of the store when the plan has one, else the
            first blocks of staging (the sinks).
        first_block: Index of the first staging block that follows them.
        store_tokens: Tokens in the store's packed cells, beside all of that.
        demoted_tokens: Tokens in the packed cells of a second store.
    """

    head_blocks: int
    first_block: int
    store_tokens: int = 0
    demoted_tokens: int = 0


@dataclass(frozen=True)
class RetentionPlan:
    """Counts and positions of everything a policy keeps.

    Attributes:
        block_size: Tokens in a block.
        sink_tokens: First tokens of a request, never evicted.
        recent_tokens: Newest tokens at an event, never evicted.
        budget_tokens: Tokens kept per layer and KV head, or None when `keep_ratio` rules.
        keep_ratio: Share of the prompt kept, fixed at the end of the prompt; with neither of the
            two every token is kept.
        store: True if survivors move to a private store; False if the plan alone decides
            and only sinks and a sliding window of staging stay (StreamingLLM), or everything.
        packs_on_write: Whether staging itself consists of packed cells, in which each token is
            quantized as it is written.
        prompt_end: Whether the end of the prompt is an event.
        every_decode_tokens: Distance of decode events; 0 for none.
        query_window: Last prompt queries that the scorer needs; 0 for none.
        queries_per_block: Query rows that fit in one block of the query lane.
        positions_per_block: Kept positions (for all KV heads) that fit in one block of the
            position lane; 0 if the scorer needs no positions.
        skipped: The cache groups of the layers that the policy leaves alone, if any.
    """

    block_size: int
    sink_tokens: int
    recent_tokens: int
    budget_tokens: int | None
    keep_ratio: float | None
    store: bool = True
    packs_on_write: bool = False
    prompt_end: bool = True
    every_decode_tokens: int = 0
    query_window: int = 0
    queries_per_block: int = 0
    positions_per_block: int = 0
    skipped: SkippedGroups | None = None

    @classmethod
    def from_policy(
        cls,
        policy: Policy,
        scorer: Scorer,
        *,
        block_size: int,
        queries_per_block: int = 1,
        positions_per_block: int = 1,
    ) -> RetentionPlan:
        """Returns the plan of `policy` for an engine with the given block geometry."""
        evict = policy.evict
        if evict is None:
            return cls(
                block_size=block_size,
                sink_tokens=policy.sink_tokens,
                recent_tokens=policy.recent_tokens,
                budget_tokens=None,
                keep_ratio=None,
            )
        needs_positions = "positions" in scorer.needs and evict.when.every_decode_tokens > 0
        budget = evict.budget
        tokens = policy.sink_tokens + policy.recent_tokens if budget is None else budget.tokens
        return cls(
            block_size=block_size,
            sink_tokens=policy.sink_tokens,
            recent_tokens=policy.recent_tokens,
            budget_tokens=tokens,
            keep_ratio=None if budget is None else budget.keep_ratio,
            store=scorer.selects == "tokens",
            prompt_end=evict.when.prompt_end,
            every_decode_tokens=evict.when.every_decode_tokens,
            query_window=scorer.query_window,
            queries_per_block=queries_per_block if scorer.query_window else 0,
            positions_per_block=positions_per_block if needs_positions else 0,
        )

    def check(self) -> None:
        """Checks that blocks hold whole cells, and the budget the forced tokens in whole blocks.

        Raises:
            CapacityError: if one of them cannot.
        """
        if self.packs_on_write and self.block_size % CELL_TOKENS:
            raise CapacityError(
                "blocks of packed cells hold whole cells",
                got=f"--block-size {self.block_size}",
                allowed=f"multiples of {CELL_TOKENS}",
                fix=f"Use --block-size {CELL_TOKENS} (on CPU: {2 * CELL_TOKENS}), or leave it out",
            )
        if not self.store or self.budget_tokens is None or self.budget_tokens >= self.least_budget:
            return
        raise CapacityError(
            "evict.budget.tokens cannot hold sink_tokens + recent_tokens in whole blocks",
            got=f"{self.budget_tokens} tokens at a block size of {self.block_size}",
            allowed=f"at least {self.least_budget}, which is {self.least_budget_text}",
            fix="Raise the budget, lower recent_tokens, or use a smaller --block-size",
        )

    # ---- budget and events ---------------------------------------------------------------

    @property
    def evicts_tokens(self) -> bool:
        """Whether tokens are ever dropped."""
        return self.budget_tokens is not None or self.keep_ratio is not None

    @property
    def is_pure(self) -> bool:
        """Whether K and V of any token are a function of the tokens before it alone.

        Nothing is ever dropped or moved: blocks of generated tokens can be shared, too.
        """
        return not self.store and not self.evicts_tokens

    @property
    def unit(self) -> int:
        """Tokens that leave staging together."""
        return self.block_size

    @property
    def blocks_per_token(self) -> Fraction:
        """What a generated token takes in the end."""
        return Fraction(1, self.block_size)

    @property
    def least_budget(self) -> int:
        """Smallest budget in tokens that can hold sinks and recent tokens in whole blocks.

        At worst the open block is one token short of full. It holds recent tokens alone, the
        sinks need whole blocks of the store beside it.
        """
        forced = max(self.sink_tokens + self.recent_tokens, self.sink_blocks * self.block_size)
        return forced + self.block_size - 1

    @property
    def least_budget_text(self) -> str:
        """How the least budget comes about."""
        return (
            f"block size - 1 + the larger of {self.sink_tokens + self.recent_tokens} (sink_tokens "
            f"+ recent_tokens) and {self.sink_blocks * self.block_size} (the sinks' blocks)"
        )

    def budget(self, num_prompt_tokens: int) -> int:
        """Returns the tokens kept per layer and KV head for a prompt of this length."""
        if self.budget_tokens is not None:
            return self.budget_tokens
        assert self.keep_ratio is not None
        return max(int(self.keep_ratio * num_prompt_tokens), self.least_budget)

    def last_event(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Returns the last effective event at or before `num_tokens`, or 0 if there is none."""
        over = num_tokens - num_prompt_tokens
        if not self.store or over < 0:
            return 0
        if self.every_decode_tokens:
            event = num_tokens - over % self.every_decode_tokens
            if event == num_prompt_tokens and not self.prompt_end:
                return 0
        else:
            event = num_prompt_tokens
        return event if event > self.budget(num_prompt_tokens) else 0

    def due_event(self, num_prompt_tokens: int, start: int, end: int) -> int:
        """Returns the event of a step that computes [start, end), or 0 if there is none.

        Several events inside one chunk collapse into the last one.
        """
        event = self.last_event(num_prompt_tokens, end)
        return event if event > start else 0

    def store_blocks(self, num_prompt_tokens: int, event: int) -> int:
        """Returns the whole blocks that the store holds after the event at `event`."""
        if not event:
            return 0
        budget = self.budget(num_prompt_tokens)
        return max(0, budget - event % self.block_size) // self.block_size

    # ---- what attention reads ------------------------------------------------------------

    def layout(self, num_prompt_tokens: int, num_computed_tokens: int) -> Layout:
        """Returns what attention reads in a step that starts at `num_computed_tokens`."""
        if self.store:
            event = self.last_event(num_prompt_tokens, num_computed_tokens)
            return Layout(self.store_blocks(num_prompt_tokens, event), event // self.block_size)
        if num_computed_tokens < num_prompt_tokens or not self.evicts_tokens:
            return Layout(0, 0)
        window = self.budget(num_prompt_tokens) - self.sink_tokens
        first = max(0, num_computed_tokens - window) // self.block_size
        return Layout(self.sink_blocks, first) if first > self.sink_blocks else Layout(0, 0)

    @property
    def sink_blocks(self) -> int:
        """Blocks that the sinks occupy in staging."""
        return -(-self.sink_tokens // self.block_size)

    def physical_tokens(self, num_prompt_tokens: int, start: int, end: int) -> int:
        """Returns the tokens that attention reads for the last query of chunk [start, end)."""
        layout = self.layout(num_prompt_tokens, start)
        return end - (layout.first_block - layout.head_blocks) * self.block_size

    # ---- what the pool holds -------------------------------------------------------------

    def freed_staging(self, num_prompt_tokens: int, settled_tokens: int) -> tuple[int, int]:
        """Returns the half-open range of staging blocks that are free.

        Args:
            num_prompt_tokens: Tokens of the prompt.
            settled_tokens: Position before the last scheduled step: every event up to it
                has run, or runs before anything that is scheduled from now on.
        """
        layout = self.layout(num_prompt_tokens, settled_tokens)
        return (0 if self.store else layout.head_blocks), layout.first_block

    def store_capacity(self, num_prompt_tokens: int) -> int:
        """Returns the store blocks a request ever holds, in whole blocks.

        They are taken at the first event and kept until the request ends.
        """
        if not self.store:
            return 0
        budget = self.budget(num_prompt_tokens)
        if self.every_decode_tokens % self.block_size:
            return budget // self.block_size
        return max(0, budget - num_prompt_tokens % self.block_size) // self.block_size

    @property
    def store_grows(self) -> bool:
        """Whether a request takes store blocks again after its first event."""
        return False

    def store_need(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the store blocks needed by a step that computes up to `end`."""
        if not self.last_event(num_prompt_tokens, end):
            return 0
        return self.store_capacity(num_prompt_tokens)

    def position_need(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the position-lane blocks needed by a step that computes up to `end`."""
        if not self.positions_per_block:
            return 0
        tokens = self.store_need(num_prompt_tokens, end) * self.block_size
        return -(-tokens // self.positions_per_block)

    @property
    def query_blocks(self) -> int:
        """Query-lane blocks that hold one observation window."""
        if not self.query_window:
            return 0
        return -(-self.query_window // self.queries_per_block)

    def query_start(self, num_prompt_tokens: int) -> int:
        """Returns the first position whose query is kept for the event."""
        return max(0, num_prompt_tokens - self.query_window)

    def query_need(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the query-lane blocks needed by a step that computes up to `end`.

        A prompt within its budget has no event and needs none.
        """
        if not self.query_window or num_prompt_tokens <= self.budget(num_prompt_tokens):
            return 0
        return self.query_blocks if end > self.query_start(num_prompt_tokens) else 0

    def queries_freed(self, num_prompt_tokens: int, settled_tokens: int) -> bool:
        """Whether the query window has served its event."""
        return settled_tokens >= num_prompt_tokens

    def hit_limit(self, num_prompt_tokens: int) -> int:
        """Returns the longest prefix-cache hit, in tokens, that leaves every event to come.

        A resumed request has more tokens than its prompt; a hit that reached the end of the
        prompt would skip the event there, or the queries that it needs.
        """
        return max(0, num_prompt_tokens - max(1, self.query_window))

    # ---- figures for sizing and for people -----------------------------------------------

    def store_bound(self, num_tokens: int) -> int:
        """Returns an upper bound on store blocks for a sequence of this length.

        It covers every split of `num_tokens` into prompt and output: the admission gate,
        which does not know the split, and start-up sizing use the same figure.
        """
        least = self.least_budget if self.budget_tokens is None else self.budget_tokens
        if not self.store or num_tokens <= least:
            return 0
        return min(self.budget(num_tokens), num_tokens) // self.block_size

    def store_pages_most(self, num_tokens: int) -> int:
        """Returns the most store blocks that any request of at most this length ever holds."""
        return self.store_bound(num_tokens)

    def position_bound(self, num_tokens: int) -> int:
        """Returns an upper bound on position-lane blocks for a sequence of this length."""
        if not self.positions_per_block:
            return 0
        return -(-self.store_bound(num_tokens) * self.block_size // self.positions_per_block)

    def query_bound(self, num_tokens: int) -> int:
        """Returns an upper bound on query-lane blocks for a sequence of this length."""
        return self.query_blocks if self.store_bound(num_tokens) else 0

    def blocks_held(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the blocks that one request holds in a step that computes up to `end`.

        It generates token by token, and one step is in flight while the next is scheduled
        (vLLM's asynchronous scheduling): what is freed lags `end` by three tokens.
        """
        settled = max(0, end - 3)
        freed_from, freed_to = self.freed_staging(num_prompt_tokens, settled)
        held = -(-end // self.block_size) - (freed_to - freed_from)
        held += self.store_need(num_prompt_tokens, end)
        held += self.position_need(num_prompt_tokens, end)
        if not self.queries_freed(num_prompt_tokens, settled):
            held += self.query_need(num_prompt_tokens, end)
        if self.skipped is not None:
            held += self.skipped.blocks(end)
        return held

    def full_blocks(self, num_tokens: int) -> int:
        """Returns the blocks that hold so many tokens without a policy."""
        return -(-num_tokens // self.block_size)

    def peak_blocks(self, num_prompt_tokens: int, num_output_tokens: int = 1) -> int:
        """Returns the most blocks that one request holds at a time.

        The maximum falls two tokens behind an event, before its blocks come back, or near the
        end of the request.
        """
        end = num_prompt_tokens + num_output_tokens
        every = self.every_decode_tokens or max(1, num_output_tokens)
        ends = [
            *range(num_prompt_tokens + 2, end, every),
            *range(max(num_prompt_tokens, end - self.unit + 1), end + 1),
        ]
        return max(self.blocks_held(num_prompt_tokens, end) for end in ends)

    def steady_blocks(self, num_prompt_tokens: int, num_output_tokens: int = 3) -> int:
        """Returns the blocks that one request holds when it has generated so many tokens.

        With fewer than three, what it holds once the blocks of the prompt have come back.
        """
        return self.blocks_held(num_prompt_tokens, num_prompt_tokens + max(3, num_output_tokens))

    def evicts(self, max_model_len: int) -> bool:
        """Whether any request of at most this many tokens exceeds its budget."""
        last = max_model_len - 1
        return any(self.layout(prompt, last).first_block > 0 for prompt in (1, last))

    def requests_at_once(
        self, num_blocks: int, num_prompt_tokens: int, num_output_tokens: int = 1
    ) -> int:
        """Returns how many such requests run at once in a pool, the last one still at its peak."""
        peak = self.peak_blocks(num_prompt_tokens, num_output_tokens)
        if peak > num_blocks:
            return 0
        return 1 + (num_blocks - peak) // self.steady_blocks(num_prompt_tokens, num_output_tokens)
