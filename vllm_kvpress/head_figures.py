"""What a head plan costs, in blocks of the pool: one request, and how many at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvpress.head_groups import HeadGroups, Labels, group_heads
from vllm_kvpress.window_plan import WindowPlan

__all__ = ["HeadFigures"]


@dataclass(frozen=True)
class HeadFigures:
    """Figures of a head plan on one rank; a block holds the tokens of `groups.width` KV heads.

    Attributes:
        groups: The lanes.
        window: What streaming heads see.
        step_tokens: Most tokens of a request that one step computes.
    """

    groups: HeadGroups
    window: WindowPlan
    step_tokens: int

    @classmethod
    def of(
        cls, retrieval: Labels, window: WindowPlan, element_bytes: int, step_tokens: int
    ) -> HeadFigures:
        """Returns the figures of a head plan on a single rank.

        Args:
            retrieval: [num_layers][num_kv_heads], true for a retrieval head.
            window: What streaming heads see.
            element_bytes: Of a number in the cache.
            step_tokens: Most tokens of a request that one step computes.
        """
        groups = group_heads(retrieval, rows=window.rows(element_bytes))
        return cls(groups, window, step_tokens)

    # A head plan leaves no layer alone, and its streaming heads drop tokens.
    skipped: ClassVar[None] = None
    is_pure: ClassVar[bool] = False

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.window.block_size

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

    def blocks_held(self, processed: int, end: int) -> int:
        """Returns the blocks of one request in a step that computes up to `end`.

        Args:
            processed: Tokens whose steps were over when this one was scheduled.
            end: Where the step ends.
        """
        runs = self.groups.runs
        held = runs.retrieval * -(-end // self.block_size)
        return held + runs.streaming * self.window.blocks_held(processed, end)

    def peak_blocks(self, num_prompt_tokens: int, num_output_tokens: int = 1) -> int:
        """Returns the most blocks that one request holds at a time."""
        runs, total = self.groups.runs, num_prompt_tokens + num_output_tokens
        # In the prompt's last step, wherever it begins.
        prompt = runs.retrieval * -(-num_prompt_tokens // self.block_size)
        prompt += runs.streaming * self.window.blocks_bound(num_prompt_tokens, self.step_tokens)
        # While it generates it grows by retrieval heads: near its end, wherever a block begins.
        last = range(max(num_prompt_tokens + 1, total - self.block_size), total + 1)
        return max(prompt, *(self.blocks_held(end - 1, end) for end in last))

    def steady_blocks(self, num_prompt_tokens: int, num_output_tokens: int = 1) -> int:
        """Returns the blocks that one request holds once it has generated so many tokens."""
        end = num_prompt_tokens + num_output_tokens
        return self.blocks_held(end - 1, end)

    def evicts(self, max_model_len: int) -> bool:
        """Whether any request of at most this many tokens loses a block."""
        return bool(
            self.groups.runs.streaming and self.window.gap(max_model_len // self.block_size)
        )

    def requests_at_once(
        self, num_blocks: int, num_prompt_tokens: int, num_output_tokens: int = 1
    ) -> int:
        """Returns how many such requests run at once in a pool, the last one still at its peak."""
        peak = self.peak_blocks(num_prompt_tokens, num_output_tokens)
        if peak > num_blocks:
            return 0
        return 1 + (num_blocks - peak) // self.steady_blocks(num_prompt_tokens, num_output_tokens)
