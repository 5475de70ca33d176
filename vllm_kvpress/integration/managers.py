"""Managers: what the scheduler does with the blocks of each lane.

vLLM asks a manager, request by request, how many blocks a step needs, takes them, and lets it
free what the step no longer reads. Ours answer from the retention plan alone.

`remove_skipped_blocks` runs at the head of every `allocate_slots`; there a manager learns the
prompt length and how far the request has been processed. Blocks that an event sets free are
returned one step later than the event, once it has run on the worker for certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)

from vllm_kvpress.demoting_plan import DemotingPlan
from vllm_kvpress.integration.lanes import LaneSpec, PrivateSpec
from vllm_kvpress.plan import RetentionPlan


@dataclass(slots=True)
class Progress:
    """How far a request has come, in tokens.

    Attributes:
        num_prompt_tokens: Length of the prompt.
        settled: Position before the last scheduled step.
        processed: Position after it, as last seen.
    """

    num_prompt_tokens: int
    settled: int
    processed: int


class ProgressBook:
    """The progress of every request that holds or is about to hold blocks."""

    def __init__(self) -> None:
        self._entries: dict[str, Progress] = {}

    def __getitem__(self, request_id: str) -> Progress:
        return self._entries[request_id]

    def __len__(self) -> int:
        return len(self._entries)

    def note(self, request_id: str, processed: int, num_prompt_tokens: int | None) -> Progress:
        """Records where a request stands and returns it.

        A second call within one step (vLLM retries after a preemption) changes nothing.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            assert num_prompt_tokens is not None, "vLLM passes the prompt length"
            entry = self._entries[request_id] = Progress(num_prompt_tokens, 0, processed)
        elif processed > entry.processed:
            entry.settled, entry.processed = entry.processed, processed
        return entry

    def forget(self, request_id: str) -> None:
        self._entries.pop(request_id, None)


class _Progressing(SingleTypeKVCacheManager):
    """A manager that answers from the plan and from how far each request has come."""

    def __init__(self, kv_cache_spec: LaneSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.plan: RetentionPlan = kv_cache_spec.plan
        self.progress = ProgressBook()

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.progress.forget(request_id)
        return super().pop_blocks_for_free(request_id)


class StagingManager(_Progressing, FullAttentionManager):
    """K/V by position: blocks are cached for prefix hits, and leave by the plan."""

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        entry = self.progress.note(request_id, processed_computed_tokens, num_prompt_tokens)
        first, last = self.plan.freed_staging(entry.num_prompt_tokens, entry.settled)
        self._remove_blocks_in_range(request_id, first, last)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        if not self.plan.is_pure:
            # K/V of generated tokens depends on what was evicted: only prompt blocks are shared.
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)


class PrivateManager(_Progressing):
    """A private lane: nothing is shared, hashed or found by a prefix hit.

    A request takes blocks as its plan needs more of them; it never gives back single ones.
    """

    def __init__(self, kv_cache_spec: PrivateSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec

    def need(self, num_prompt_tokens: int, end: int) -> int:
        """Returns the blocks that a step up to position `end` needs in all."""
        raise NotImplementedError

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        held = self.req_to_blocks.get(request_id)
        if apply_admission_cap:
            # The gate asks before the prompt length is known: start-up sizing's bound.
            return max(0, self.spec.blocks_at(num_tokens) - len(held or ()))
        if held and not self.plan.store_grows:
            return 0
        need = self.need(self.progress[request_id].num_prompt_tokens, num_tokens)
        return max(0, need - len(held or ()))

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any
    ) -> None:
        assert not new_computed_blocks, "a private lane has no prefix hits"
        self.num_cached_block[request_id] = 0

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        missing = self.get_num_blocks_to_allocate(request_id, num_tokens)
        if not missing:
            return []
        held = self.req_to_blocks[request_id]
        new_blocks = self.block_pool.get_new_blocks(missing)
        held.extend(new_blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new_blocks)
        return new_blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        self.progress.note(request_id, processed_computed_tokens, num_prompt_tokens)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Private blocks are never hashed."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        *args: Any,
        **kw: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0


class StoreManager(PrivateManager):
    """Survivors: taken when the first event is due, kept until the request ends."""

    def need(self, num_prompt_tokens: int, end: int) -> int:
        return self.plan.store_need(num_prompt_tokens, end)


class DemotedManager(PrivateManager):
    """Losers: taken when the prompt's end is due, kept until the request ends."""

    plan: DemotingPlan

    def need(self, num_prompt_tokens: int, end: int) -> int:
        return self.plan.demoted_need(num_prompt_tokens, end)


class PositionManager(PrivateManager):
    """Positions of the survivors: live as long as the store."""

    def need(self, num_prompt_tokens: int, end: int) -> int:
        return self.plan.position_need(num_prompt_tokens, end)


class QueryManager(PrivateManager):
    """The observation window: taken near the end of the prompt, returned after the event."""

    def need(self, num_prompt_tokens: int, end: int) -> int:
        return self.plan.query_need(num_prompt_tokens, end)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        entry = self.progress.note(request_id, processed_computed_tokens, num_prompt_tokens)
        if self.plan.queries_freed(entry.num_prompt_tokens, entry.settled):
            held = len(self.req_to_blocks.get(request_id, ()))
            self._remove_blocks_in_range(request_id, 0, held)
