"""Head plans in the simulation: lanes of retrieval and of streaming heads over one pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from managers.scheduler import Simulation
from managers.worker import Worker
from vllm_kvpress.head_groups import HeadLane
from vllm_kvpress.integration.head_lanes import lane_spec
from vllm_kvpress.window_plan import WindowPlan


@dataclass(frozen=True)
class Heads:
    """A head plan as managers and worker see it: so many runs of each kind.

    Attributes:
        window: What streaming heads see.
        retrieval: Runs of retrieval heads.
        streaming: Runs of streaming heads; the second is of fewer heads, so of another spec.
        in_flight_tokens: Most tokens scheduled at a time and not yet processed.
    """

    is_pure: ClassVar[bool] = False

    window: WindowPlan
    retrieval: int
    streaming: int
    in_flight_tokens: int

    @property
    def block_size(self):
        return self.window.block_size


def specs_of(plan):
    """The specs of the runs by name, retrieval first."""
    stock = FullAttentionSpec(
        block_size=plan.block_size, num_kv_heads=4, head_size=8, dtype=torch.float32
    )
    config = type("Config", (), {"max_in_flight_tokens": plan.in_flight_tokens})
    kinds = [False] * plan.retrieval + [True] * plan.streaming
    lanes = [HeadLane(run, kind, tuple(range(4 - run))) for run, kind in enumerate(kinds)]
    return {
        f"{'stream' if lane.streams else 'full'}{lane.run}": lane_spec(
            stock, lane, plan.window, config
        )
        for lane in lanes
    }


def least_pool(plan, max_model_len):
    """The blocks that start-up sizing wants for one request of the greatest length."""
    config = type("Config", (), {"model_config": type("M", (), {"max_model_len": max_model_len})})
    config.parallel_config = type("P", (), {"decode_context_parallel_size": 1})
    specs = specs_of(plan).values()
    return sum(s.max_memory_usage_bytes(config) // s.page_size_bytes for s in specs)


class HeadWorker(Worker):
    """Writes every lane and reads, query by query, what its heads see."""

    plan: Heads

    def execute(self, steps):
        for run, start, end in steps:
            for lane in run.tables:
                for position in range(start, end):
                    self.write_one(run, lane, position)
        for run, start, end in steps:
            for lane in run.tables:
                self.read_lane(run, lane, start, end)

    def write_one(self, run, lane, position):
        size = self.plan.block_size
        block = run.tables[lane][position // size]
        assert block in self.owned(run, lane)
        self.write(block, lane, position % size, self.content(run, position))
        closed = position // size
        sums = lane.startswith("stream") and self.plan.window.compensates
        if sums and (position + 1) % size == 0 and closed >= self.plan.window.sink_blocks:
            if closed > self.plan.window.sink_blocks:
                self.read_sums(run, lane, closed - 1)
            self.write(block, lane, "sums", (run.stream, closed))

    def read_sums(self, run, lane, block):
        """The sums of a block must be there, and those of this prefix."""
        place = run.tables[lane][block]
        assert place in self.owned(run, lane), (lane, block)
        assert self.read(place, lane, "sums") == (run.stream, block)

    def read_lane(self, run, lane, start, end):
        size, owned = self.plan.block_size, self.owned(run, lane)
        sees = self.plan.window.sees if lane.startswith("stream") else lambda query, key: True
        for query in range(start, end):
            summed = self.plan.window.summed_block(query // size)
            if lane.startswith("stream") and summed is not None:
                self.read_sums(run, lane, summed)
            for key in range(query + 1):
                if sees(query, key):
                    block = run.tables[lane][key // size]
                    assert block in owned, (lane, query, key)
                    assert self.read(block, lane, key % size) == self.content(run, key)

    def content(self, run, position):
        """K and V are a function of the tokens before, whoever computed them."""
        return (run.stream, position)


class HeadSimulation(Simulation):
    """A scheduler over the lanes of a head plan."""

    plan: Heads
    worker_cls = HeadWorker
    specs_of = staticmethod(specs_of)

    def __init__(self, plan, *args, **kwargs):
        self.shared = tuple(specs_of(plan))
        super().__init__(plan, *args, **kwargs)

    def hit_limit(self, request):
        return request.num_tokens - 1

    def check_holdings(self, request_id, end):
        """Each lane holds what the plan says, block by block."""
        # A hit leaves out what its first query does not see, whatever was processed by then.
        processed = max(self.processed[request_id][-1], self.starts[request_id][0])
        for name, lane in self.lanes.items():
            blocks = lane.req_to_blocks[request_id]
            assert len(blocks) == -(-end // self.plan.block_size)
            freed = range(*self.plan.window.freed(processed)) if name.startswith("stream") else ()
            assert {i for i, b in enumerate(blocks) if b.is_null} == set(freed), name
