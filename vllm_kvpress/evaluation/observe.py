"""What an engine's scheduler shows: blocks held by each request, requests at once, step times."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

__all__ = ["Observation", "observe"]


@dataclass
class Observation:
    """What was seen of some requests.

    Attributes:
        running: Most requests that ran at once.
        least_free: Fewest free blocks in the pool.
        preemptions: Times that a request lost its blocks.
        peak: By request, the most blocks it held.
        last: By request, the blocks it held when it was last scheduled.
        prefill_seconds: Time of steps that computed tokens of a prompt, whatever else they did.
        prefill_tokens: Tokens of prompts computed; those found in the prefix cache are not.
        decode_seconds: Time of steps that only generated.
        decode_steps: Number of such steps.
        decode_tokens: Tokens that they generated.
    """

    running: int = 0
    least_free: int = sys.maxsize
    preemptions: int = 0
    peak: Counter[str] = field(default_factory=Counter)
    last: Counter[str] = field(default_factory=Counter)
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    _prefill_scheduled: int = 0
    _decode_scheduled: int = 0

    def time_step(self, step: Callable[[], Any]) -> Any:
        """Run one step of the engine, count its time, and return what it returned."""
        self._prefill_scheduled = self._decode_scheduled = 0
        started = time.perf_counter()
        outputs = step()
        seconds = time.perf_counter() - started
        if self._prefill_scheduled:
            self.prefill_seconds += seconds
            self.prefill_tokens += self._prefill_scheduled
        elif self._decode_scheduled:
            self.decode_seconds += seconds
            self.decode_steps += 1
            self.decode_tokens += self._decode_scheduled
        return outputs

    def note(self, scheduler: Any, scheduled: Any) -> None:
        """Take in what the scheduler decided for one step."""
        manager = scheduler.kv_cache_manager
        self.running = max(self.running, len(scheduler.running))
        self.least_free = min(self.least_free, manager.block_pool.get_num_free_blocks())
        self.preemptions += len(scheduled.preempted_req_ids or ())
        for request in scheduler.running:
            held = _held_blocks(manager, request.request_id)
            self.peak[request.request_id] = max(self.peak[request.request_id], held)
            self.last[request.request_id] = held
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            request = scheduler.requests[request_id]
            if request.num_computed_tokens - num_tokens < request.num_prompt_tokens:
                self._prefill_scheduled += num_tokens
            else:
                self._decode_scheduled += num_tokens

    def figures(self, pool_blocks: int) -> dict[str, Any]:
        """Return the numbers of a record, for a pool of so many blocks.

        Medians over requests: one that ends within three tokens never gives blocks back, and a few
        of those would say nothing about the others.
        """
        peak, steady = median(self.peak.values()), median(self.last.values())
        most = max(self.peak.values())
        return {
            "blocks": {
                "peak": round(peak, 2),
                "steady": round(steady, 2),
                "pool": pool_blocks,
                "least_free": self.least_free,
            },
            "requests_at_once": {
                "seen": self.running,
                # The last one to come still needs its peak.
                "in_pool": 1 + int((pool_blocks - most) / steady) if most <= pool_blocks else 0,
                "preemptions": self.preemptions,
            },
            "time": {
                "prefill_seconds": round(self.prefill_seconds, 3),
                "prefill_tokens": self.prefill_tokens,
                "decode_seconds": round(self.decode_seconds, 3),
                "decode_steps": self.decode_steps,
                "decode_tokens": self.decode_tokens,
            },
        }


def observe(scheduler: Any) -> Observation:
    """Return an observation of a scheduler that goes on until it is observed anew."""
    seen = Observation()
    schedule = type(scheduler).schedule

    def observed(*args: Any, **kwargs: Any) -> Any:
        scheduled = schedule(scheduler, *args, **kwargs)
        seen.note(scheduler, scheduled)
        return scheduled

    scheduler.schedule = observed
    return seen


def _held_blocks(manager: Any, request_id: str) -> int:
    """Return the pool blocks that a request holds in all lanes together."""
    return sum(
        not block.is_null
        for lane in manager.coordinator.single_type_managers
        for block in lane.req_to_blocks.get(request_id, ())
    )
