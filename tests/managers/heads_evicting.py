"""Stores inside retrieval heads in the simulation: staging, store and queries for each run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from managers.heads import HeadWorker
from managers.packed_worker import PackedWorker
from managers.scheduler import LANES, Simulation
from managers.worker import Run, Worker
from vllm_kvpress.head_groups import HeadLane
from vllm_kvpress.integration.head_lanes import lane_spec
from vllm_kvpress.integration.lanes import StagingSpec, private_lanes
from vllm_kvpress.packed_plan import PackedPlan
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.window_plan import WindowPlan


@dataclass(frozen=True)
class EvictingHeads:
    """A head plan whose retrieval heads evict.

    Attributes:
        retention: What retrieval heads keep.
        retrieval: Runs of retrieval heads.
        streaming: Runs of streaming heads.
        in_flight_tokens: Most tokens scheduled at a time and not yet processed.
    """

    is_pure: ClassVar[bool] = False

    retention: RetentionPlan
    retrieval: int
    streaming: int
    in_flight_tokens: int

    @property
    def block_size(self):
        return self.retention.block_size

    @property
    def window(self):
        plan = self.retention
        return WindowPlan(plan.block_size, plan.sink_tokens, max(1, plan.recent_tokens))


def evicting_specs(plan):
    """The specs of the runs' lanes by name, private ones before their run's staging."""
    stock = FullAttentionSpec(
        block_size=plan.block_size, num_kv_heads=4, head_size=8, dtype=torch.float32
    )
    config = type("Config", (), {"max_in_flight_tokens": plan.in_flight_tokens})
    specs = {}
    for run in range(plan.retrieval):
        lane = lane_spec(stock, HeadLane(run, False, tuple(range(4 - run))), plan.window, config)
        for suffix, spec_cls in private_lanes(plan.retention).items():
            specs[f"{LANES[suffix]}{run}"] = spec_cls.of(lane, plan.retention)
        specs[f"staging{run}"] = StagingSpec.of(lane, plan.retention)
    for run in range(plan.retrieval, plan.retrieval + plan.streaming):
        heads = HeadLane(run, True, (0, 1))
        specs[f"stream{run}"] = replace(
            lane_spec(stock, heads, plan.window, config), shares_outputs=False
        )
    return specs


def least_pool_of(plan, max_model_len):
    """The blocks that start-up sizing wants for one request of the greatest length."""
    config = type("Config", (), {"model_config": type("M", (), {"max_model_len": max_model_len})})
    specs = evicting_specs(plan).values()
    return sum(s.max_memory_usage_bytes(config) // s.page_size_bytes for s in specs)


class RunView(Run):
    """A request as one run of retrieval heads sees it: its own lanes, under their short names."""


class RunWorker(Worker):
    """The worker of one run of retrieval heads; the pool's memory is everyone's."""

    def __init__(self, parent, number):
        super().__init__(parent.plan.retention, self._owned)
        self.parent = parent
        self.number = number
        self.memory = parent.memory
        self.live = self  # asked for a run by its request
        self._views = {}

    def get(self, request_id):
        run = self.parent.live.get(request_id)
        return None if run is None else self.view(run)

    def view(self, run):
        """The request's lanes in this run; the tables are the request's own lists."""
        key = run.request_id, run.number
        if key not in self._views:
            tables = {
                lane.removesuffix(str(self.number)): table
                for lane, table in run.tables.items()
                if lane.endswith(str(self.number)) and not lane.startswith("stream")
            }
            view = RunView(run.request_id, run.number, run.num_prompt_tokens, run.stream, tables)
            self._views[key] = view, run
        return self._views[key][0]

    def _owned(self, view, lane):
        run = self._views[view.request_id, view.number][1]
        return self.parent.owned(run, f"{lane}{self.number}")

    def write(self, block, kind, slot, content):
        super().write(block, f"{kind}{self.number}", slot, content)

    def read(self, block, kind, slot):
        return super().read(block, f"{kind}{self.number}", slot)


class PackedRunWorker(RunWorker, PackedWorker):
    """The worker of one run whose store is packed."""


class EvictingHeadWorker(HeadWorker):
    """All runs: events of every run before any of a step's tokens."""

    def __init__(self, plan, owned):
        super().__init__(plan, owned)
        worker_cls = PackedRunWorker if isinstance(plan.retention, PackedPlan) else RunWorker
        self.workers = [worker_cls(self, number) for number in range(plan.retrieval)]

    def execute(self, steps):
        views = [[(w.view(run), start, end) for run, start, end in steps] for w in self.workers]
        for worker, mine in zip(self.workers, views, strict=True):
            worker.settle(mine)
        for worker, mine in zip(self.workers, views, strict=True):
            worker.forward(mine)
        streams = [
            (run, lane, start, end)
            for run, start, end in steps
            for lane in run.tables
            if lane.startswith("stream")
        ]
        for run, lane, start, end in streams:
            for position in range(start, end):
                self.write_one(run, lane, position)
        for part in streams:
            self.read_lane(*part)
        self.counts = {
            case: sum(worker.counts[case] for worker in self.workers) for case in self.counts
        }

    def content(self, run, position):
        return run.content(position)


class EvictingHeadSimulation(Simulation):
    """A scheduler over the lanes of a head plan whose retrieval heads evict."""

    plan: EvictingHeads
    worker_cls = EvictingHeadWorker
    specs_of = staticmethod(evicting_specs)

    def __init__(self, plan, *args, **kwargs):
        names = evicting_specs(plan)
        self.shared = tuple(name for name in names if name.startswith(("staging", "stream")))
        super().__init__(plan, *args, **kwargs)

    def hit_limit(self, request):
        # Caps stand in the engine's hook: here vLLM leaves the last token alone.
        return self.plan.retention.hit_limit(request.num_prompt_tokens)

    def check_holdings(self, request_id, end):
        """Each lane holds what its plan says, block by block."""
        plan, size = self.plan.retention, self.plan.block_size
        prompt = self.find(request_id).num_prompt_tokens
        known = self.processed[request_id]
        settled = known[-2] if len(known) > 1 else 0
        released = plan.queries_freed(prompt, settled)
        expected = {
            "store": plan.store_need(prompt, end),
            "positions": plan.position_need(prompt, end),
            "queries": 0 if released else plan.query_need(prompt, end),
        }
        # A hit leaves out what its first query does not see, whatever was processed by then.
        processed = max(known[-1], self.starts[request_id][0])
        for name, lane in self.lanes.items():
            blocks = lane.req_to_blocks.get(request_id, [])
            gone = {i for i, b in enumerate(blocks) if b.is_null}
            if name.startswith("stream"):
                assert gone == set(range(*self.plan.window.freed(processed))), name
            elif name.startswith("staging"):
                assert gone == set(range(*plan.freed_staging(prompt, settled))), name
            else:
                assert len(blocks) - len(gone) == expected[name.rstrip("0123456789")], name
                continue
            assert len(blocks) == -(-end // size), name
