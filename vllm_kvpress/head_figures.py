"""What a head plan costs, in blocks of the pool: one request, and how many at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from vllm_kvpress.head_groups import HeadGroups, Labels, group_heads
from vllm_kvpress.packed_plan import PackedPlan
from vllm_kvpress.planner import widest_plan
from vllm_kvpress.window_plan import WindowPlan

if TYPE_CHECKING:
    from vllm_kvpress.plan import RetentionPlan

__all__ = ["HeadFigures"]


@dataclass(frozen=True)
class HeadFigures:
    """Figures of a head plan on one rank; a block holds the tokens of `groups.width` KV heads.

    Attributes:
        groups: The lanes.
        window: What streaming heads see.
        in_flight_tokens: Most tokens of a request that are scheduled at a time and not yet
            processed.
        retention: What retrieval heads keep; None for every token.
    """

    groups: HeadGroups
    window: WindowPlan
    in_flight_tokens: int
    retention: RetentionPlan | None = None

    @classmethod
    def of(
        cls,
        retrieval: Labels,
        window: WindowPlan,
        element_bytes: int,
        in_flight_tokens: int,
        retention_of: Callable[[int], RetentionPlan] | None = None,
        num_ranks: int = 1,
    ) -> HeadFigures:
        """Returns the figures of a head plan on the first rank.

        Args:
            retrieval: [num_layers][num_kv_heads], true for a retrieval head.
            window: What streaming heads see.
            element_bytes: Of a number in the cache.
            in_flight_tokens: Most tokens of a request that are scheduled at a time and not yet
                processed.
            retention_of: What retrieval heads keep, by their number in a lane; None for every
                token.
            num_ranks: Ranks of tensor parallelism.
        """
        groups = group_heads(retrieval, num_ranks, rows=window.rows(element_bytes))
        retention = None
        if retention_of is not None and groups.retrieval_sizes:
            retention = widest_plan([retention_of(size) for size in groups.retrieval_sizes])
        return cls(groups, window, in_flight_tokens, retention)

    # A head plan leaves no layer alone, and its streaming heads drop tokens.
    skipped: ClassVar[None] = None
    is_pure: ClassVar[bool] = False

    @property
    def retrieval_text(self) -> str:
        """What retrieval heads do, in words."""
        if self.retention is None:
            return "keep every token"
        then = "their budget of it" if self.retention.evicts_tokens else "pack every token"
        return f"keep the prompt until it ends, then {then}"

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.window.block_size

    @property
    def tokens_per_store_block(self) -> float | None:
        """Tokens of its run's heads that a packed store's block holds; None without such stores.

        Pages are whole, those of lanes of few heads too, and the neediest lane decides.
        """
        if not isinstance(self.retention, PackedPlan):
            return None
        return float(1 / self.retention.blocks_per_token)

    @property
    def blocks_per_token(self) -> Fraction:
        """What a generated token takes in the end, in all retrieval heads."""
        if self.retention is None:
            return Fraction(self.groups.runs.retrieval, self.block_size)
        return self.groups.runs.retrieval * self.retention.blocks_per_token

    @property
    def padding(self) -> float:
        """The share of a block that is padding, on average over the runs."""
        runs = self.groups.runs
        blocks = (runs.retrieval + runs.streaming) * self.groups.width
        return float(1 - self.groups.filled / blocks)

    def full_blocks(self, num_tokens: int) -> int:
        """Returns the blocks of this pool that hold so many tokens in all heads."""
        pages = -(-num_tokens // self.block_size) * self.groups.num_heads
        return -(-pages // self.groups.width)

    def _retained(self, num_prompt_tokens: int, end: int) -> int:
        """Blocks of one run of retrieval heads in a step that computes up to `end`."""
        if self.retention is None:
            return -(-end // self.block_size)
        return self.retention.blocks_held(num_prompt_tokens, end)

    def _decoding(self, num_prompt_tokens: int, end: int) -> int:
        """Blocks of a request in the step that generates the token before `end`."""
        runs = self.groups.runs
        held = runs.retrieval * self._retained(num_prompt_tokens, end)
        return held + runs.streaming * self.window.blocks_held(end - 1, end)

    def peak_blocks(self, num_prompt_tokens: int, num_output_tokens: int = 1) -> int:
        """Returns the most blocks that one request holds at a time."""
        runs, total = self.groups.runs, num_prompt_tokens + num_output_tokens
        # In the prompt's last step, wherever it begins.
        prompt = runs.retrieval * self._retained(num_prompt_tokens, num_prompt_tokens)
        prompt += runs.streaming * self.window.blocks_bound(
            num_prompt_tokens, self.in_flight_tokens
        )
        # While it generates it grows by retrieval heads: near its end, wherever a block begins.
        unit = self.block_size if self.retention is None else self.retention.unit
        last = range(max(num_prompt_tokens + 1, total - unit), total + 1)
        # Where heads evict, the prompt's blocks come back a few tokens behind its end.
        first = range(num_prompt_tokens + 1, min(total, num_prompt_tokens + 3) + 1)
        return max(prompt, *(self._decoding(num_prompt_tokens, end) for end in (*first, *last)))

    def steady_blocks(self, num_prompt_tokens: int, num_output_tokens: int = 1) -> int:
        """Returns the blocks that one request holds once it has generated so many tokens."""
        if self.retention is not None:
            num_output_tokens = max(3, num_output_tokens)
        return self._decoding(num_prompt_tokens, num_prompt_tokens + num_output_tokens)

    def evicts(self, max_model_len: int) -> bool:
        """Whether any request of at most this many tokens loses a block."""
        streams = self.groups.runs.streaming and self.window.gap(max_model_len // self.block_size)
        return bool(streams or (self.retention and self.retention.evicts(max_model_len)))

    def drops(self, num_prompt_tokens: int, num_output_tokens: int = 1) -> tuple[bool, bool]:
        """Returns whether retrieval heads, and streaming heads, drop tokens of such a request."""
        total, plan = num_prompt_tokens + num_output_tokens, self.retention
        evicts = (
            plan is not None and plan.physical_tokens(num_prompt_tokens, total - 1, total) < total
        )
        last_block = (total - 1) // self.block_size
        return evicts, bool(self.groups.runs.streaming and self.window.gap(last_block))

    def requests_at_once(
        self, num_blocks: int, num_prompt_tokens: int, num_output_tokens: int = 1
    ) -> int:
        """Returns how many such requests run at once in a pool, the last one still at its peak."""
        peak = self.peak_blocks(num_prompt_tokens, num_output_tokens)
        if peak > num_blocks:
            return 0
        return 1 + (num_blocks - peak) // self.steady_blocks(num_prompt_tokens, num_output_tokens)
