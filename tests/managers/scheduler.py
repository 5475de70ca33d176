"""A scheduler in the manner of vLLM's, small enough to read, over a real `KVCacheManager`.

It does to the manager what `vllm.v1.core.sched.scheduler` does, synchronously or with one step in
flight, and checks the manager's books after each operation.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from managers.worker import Run, Worker
from vllm_kvpress.integration.lanes import StagingSpec, private_lanes

LANES = {
    "kv_queries": "queries",
    "kv_positions": "positions",
    "kv_store": "store",
    "kv_demoted": "demoted",
}
STREAMS = 3


def lane_specs(plan):
    """The specs of a plan's lanes by short name, in the order of the engine's groups."""
    stock = FullAttentionSpec(
        block_size=plan.block_size, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    specs = {LANES[name]: cls.of(stock, plan) for name, cls in private_lanes(plan).items()}
    return specs | {"staging": StagingSpec.of(stock, plan)}


def sizing(plan, max_model_len):
    """The blocks that start-up sizing wants for one request of the greatest length."""
    config = type("Config", (), {"model_config": type("M", (), {"max_model_len": max_model_len})})
    specs = lane_specs(plan).values()
    return sum(s.max_memory_usage_bytes(config) // s.page_size_bytes for s in specs)


@functools.cache
def sampling(max_tokens):
    return SamplingParams(max_tokens=max_tokens)


def new_request(name, stream, prompt, outputs, block_size, start=0):
    """Request on one of a few token streams; its outputs continue the stream."""
    init_none_hash(sha256)
    return Request(
        name,
        [stream * 1000 + position for position in range(start, prompt)],
        sampling(outputs),
        None,
        block_hasher=get_request_block_hasher(block_size, sha256),
    )


@dataclass
class Step:
    """What was scheduled: run, start, end and whether a token is sampled, by request."""

    parts: dict[str, tuple[Run, int, int, bool]] = field(default_factory=dict)


class Simulation:
    """One engine without a model.

    Args:
        plan: The plan.
        num_blocks: Blocks of the pool, the null block included.
        max_model_len: Longest request.
        caching: Whether prefix caching is on.
        in_flight: 0, or 1 for asynchronous scheduling.
        by_priority: Preempt the newest arrival wherever it stands, as the priority policy does,
            even one that is already scheduled in this step (without prefix caching only: with
            it, vLLM itself leaves blocks hashed that were never computed).
    """

    worker_cls: type = Worker
    specs_of = staticmethod(lane_specs)
    shared = ("staging",)

    def __init__(
        self, plan, num_blocks, max_model_len, *, caching=True, in_flight=0, by_priority=False
    ):
        self.plan = plan
        specs = self.specs_of(plan)
        self.names = list(specs)
        groups = [KVCacheGroupSpec([f"layers.0.{n}"], s) for n, s in specs.items()]
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=max_model_len,
            scheduler_block_size=plan.block_size,
            hash_block_size=plan.block_size,
            max_in_flight_tokens=max_model_len,
            enable_caching=caching,
        )
        self.lanes = dict(
            zip(self.names, self.manager.coordinator.single_type_managers, strict=True)
        )
        self.caching = caching
        self.in_flight = in_flight
        self.by_priority = by_priority
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.flight: list[Step] = []
        self.runs: Counter[str] = Counter()
        # Of each request's present run: starts of its steps, and what was processed whenever the
        # manager was asked.
        self.starts: dict[str, list[int]] = {}
        self.processed: dict[str, list[int]] = {}
        self.worker = self.worker_cls(plan, self.owned)
        self.counts: Counter[str] = Counter()

    def owned(self, run, lane):
        """The blocks that the managers say a run owns."""
        if self.worker.live.get(run.request_id) is not run:
            return set()
        held = self.lanes[lane].req_to_blocks.get(run.request_id, ())
        return {b.block_id for b in held if not b.is_null}

    @property
    def idle(self):
        return not (self.waiting or self.running or self.flight)

    # ---- what a scheduler does -----------------------------------------------------------

    def step(self, token_budget, chunk):
        """Schedules, executes and, in time, processes one step."""
        step = self.schedule(token_budget, chunk)
        for request_id, (_, start, end, samples) in step.parts.items():
            request = self.find(request_id)
            request.num_computed_tokens += end - start
            request.num_in_flight_tokens += end - start
            request.num_output_placeholders += samples and self.in_flight
        if step.parts:
            self.worker.execute([part[:3] for part in step.parts.values()])
            self.flight.append(step)
        if len(self.flight) > self.in_flight or not step.parts:
            self.process(self.flight.pop(0) if self.flight else Step())

    def schedule(self, token_budget, chunk):
        step = Step()
        preempted = False
        for request in list(self.running):
            if request not in self.running or token_budget <= 0:
                continue
            flying = request.num_output_placeholders
            last = request.num_prompt_tokens + request.max_tokens
            if flying and request.num_computed_tokens + 2 - flying >= last:
                continue
            new = request.num_tokens + flying - request.num_computed_tokens
            new = min(new, chunk, token_budget)
            if new <= 0:
                continue
            self.heard(request, 0)
            while (blocks := self.manager.allocate_slots(request, new)) is None:
                preempted = True
                victim = self.running[-1]
                if self.by_priority:
                    safe = [r for r in self.running if not (self.caching and self.named(step, r))]
                    victim = max(safe, key=lambda r: r.arrival_time)
                if self.named(step, victim):
                    _, start, end, _ = step.parts.pop(victim.request_id)
                    token_budget += end - start
                    self.starts[victim.request_id].pop()
                    self.counts["scheduled then preempted"] += 1
                self.preempt(victim)
                if victim is request:
                    break
            if blocks is None:
                break
            token_budget -= new
            self.note(step, request, new, blocks)
        while self.waiting and token_budget > 0 and not preempted:
            token_budget -= self.admit(step, self.waiting[0], token_budget, chunk) or token_budget
        return step

    def named(self, step, request):
        return request.request_id in step.parts

    def admit(self, step, request, token_budget, chunk):
        """Returns the tokens scheduled, 0 if the request has to wait."""
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        assert hit <= self.hit_limit(request)
        assert hit % self.plan.block_size == 0
        new = min(request.num_tokens - hit, chunk, token_budget)
        got = self.manager.allocate_slots(
            request,
            new,
            num_new_computed_tokens=hit,
            new_computed_blocks=blocks,
            full_sequence_must_fit=True,
            has_scheduled_reqs=bool(self.running),
        )
        self.check_books()
        if got is None:
            self.counts["refused"] += 1
            return 0
        self.counts["hits"] += hit > 0
        self.counts["hit tokens"] += hit
        self.waiting.remove(request)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hit
        self.runs[request.request_id] += 1
        self.starts[request.request_id] = []
        self.processed[request.request_id] = []
        self.heard(request, 0)
        self.worker.live[request.request_id] = Run(
            request.request_id,
            self.runs[request.request_id],
            request.num_prompt_tokens,
            request.prompt_token_ids[0] // 1000,
            {name: [] for name in self.names},
            is_pure=self.plan.is_pure,
        )
        self.note(step, request, new, self.manager.get_blocks(request.request_id))
        return new

    def hit_limit(self, request):
        if self.plan.is_pure:
            return request.num_tokens - 1
        return self.plan.hit_limit(request.num_prompt_tokens)

    def heard(self, request, hit):
        """Keeps what the manager learns of a request's progress, as it may ask twice a step."""
        processed = max(0, request.num_computed_tokens + hit - request.num_in_flight_tokens)
        known = self.processed[request.request_id]
        if processed > max(known, default=-1):
            known.append(processed)

    def note(self, step, request, new, blocks):
        """Books a request for this step and tells the worker its new blocks."""
        run = self.worker.live[request.request_id]
        for name, ids in zip(self.names, blocks.get_block_ids(), strict=True):
            run.tables[name] += ids
        start = request.num_computed_tokens
        flying = request.num_output_placeholders
        samples = start + new == request.num_tokens + flying
        step.parts[request.request_id] = (run, start, start + new, samples)
        self.starts[request.request_id].append(start)
        self.check_books()
        self.check_holdings(request.request_id, start + new)

    def preempt(self, request):
        self.counts["preemptions"] += 1
        self.running.remove(request)
        self.release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.num_output_placeholders = 0
        self.waiting.insert(0, request)

    def abort(self, request):
        self.counts["aborts"] += 1
        (self.running if request in self.running else self.waiting).remove(request)
        request.status = RequestStatus.FINISHED_ABORTED
        self.release(request)

    def release(self, request):
        self.manager.free(request)
        self.worker.live.pop(request.request_id, None)
        self.check_books()

    def process(self, step):
        """What `update_from_output` does: outputs arrive, requests end."""
        for request_id, (_, start, end, samples) in step.parts.items():
            request = self.find(request_id)
            if request is None:
                continue
            request.num_in_flight_tokens -= end - start
            stale = request.num_stale_output_tokens > 0
            if stale:
                request.num_stale_output_tokens -= end - start
            if not samples:
                continue
            token = request.prompt_token_ids[0] + request.num_tokens
            request.append_output_token_ids(token)
            if not stale:
                request.num_output_placeholders -= self.in_flight
            was_running = request.status == RequestStatus.RUNNING
            if was_running and self.in_flight:
                computed = request.num_computed_tokens - request.num_output_placeholders
                self.manager.cache_blocks(request, computed)
            if request.num_output_tokens >= request.max_tokens:
                (self.running if was_running else self.waiting).remove(request)
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED
                self.release(request)
                self.counts["finished"] += 1
            self.check_books()

    def find(self, request_id):
        both = [*self.running, *self.waiting]
        return next((r for r in both if r.request_id == request_id), None)

    # ---- what must hold ------------------------------------------------------------------

    def check_books(self):
        pool = self.manager.block_pool
        owners: Counter[int] = Counter()
        for name, lane in self.lanes.items():
            for blocks in lane.req_to_blocks.values():
                real = [b for b in blocks if not b.is_null]
                owners.update([b.block_id for b in real])
                if name not in self.shared:
                    assert all(b.ref_cnt == 1 and b.block_hash is None for b in real)
        used = {b.block_id: b.ref_cnt for b in pool.blocks if b.ref_cnt and not b.is_null}
        assert used == owners, "reference counts differ from the number of owners"
        assert pool.get_num_free_blocks() + len(used) + 1 == pool.num_gpu_blocks

    def check_holdings(self, request_id, end):
        """Each lane holds what the plan says at (settled, end), block by block."""
        plan, prompt = self.plan, self.find(request_id).num_prompt_tokens
        known, starts = self.processed[request_id], self.starts[request_id]
        settled = known[-2] if len(known) > 1 else 0
        # Every event up to there has run: a later step of the request has been built since.
        assert settled <= (starts[-2] if len(starts) > 1 else 0)
        staging = self.lanes["staging"].req_to_blocks[request_id]
        freed = set(range(*plan.freed_staging(prompt, settled)))
        assert len(staging) == -(-end // plan.block_size)
        assert {i for i, b in enumerate(staging) if b.is_null} == freed
        released = plan.queries_freed(prompt, settled)
        expected = {
            "store": plan.store_need(prompt, end),
            "positions": plan.position_need(prompt, end),
            "queries": 0 if released else plan.query_need(prompt, end),
        }
        if "demoted" in self.names:
            expected["demoted"] = plan.demoted_need(prompt, end)
        for name in self.names[:-1]:
            held = self.lanes[name].req_to_blocks.get(request_id, [])
            assert sum(not b.is_null for b in held) == expected[name], name

    def check_nothing_is_left(self):
        assert self.idle
        self.check_books()
        pool = self.manager.block_pool
        free = {b.block_id for b in pool.free_block_queue.get_all_free_blocks()}
        assert free == set(range(1, pool.num_gpu_blocks))
        for lane in self.lanes.values():
            assert not lane.req_to_blocks
            assert not lane.num_cached_block
            assert not len(getattr(lane, "progress", ()))
