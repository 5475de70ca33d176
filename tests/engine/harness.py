"""Runs requests through a real engine, step by step, and sees what happened inside.

The engine runs in this process, so a test sees what the scheduler did (chunks, preemptions, prefix
hits), what every pool block is used for after each step, and what each event kept. `child.py` runs
the same in a process of its own, for engines that need other environment variables.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from reference.dense import Kept

TOP = 5
BLOCK = 32

# A chunk of 64 tokens cuts every long prompt; 40 blocks hold a prompt of max_model_len and a bit.
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "block_size": BLOCK,
    "num_gpu_blocks_override": 64,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
}
TAKES_GIVEN = {"logits_processors": ["vllm_kvpress.evaluation.forced:ForcedOutputs"]}
SHARED_LANES = (
    "StagingSpec",
    "FullAttentionSpec",
    "SlidingWindowSpec",
    "SkippedSpec",
    "RetrievalSpec",
    "StreamSpec",
)


@dataclass
class Trace:
    """What the engine did with one request.

    Attributes:
        chunks: [start, end) of every scheduled step, in order; preempted requests start over.
        hits: Tokens found in the prefix cache at each (re)start.
        logprobs: For each output, token id -> log-probability of the engine's top tokens.
        held: After each scheduled step, block ids held per lane, by the lane's spec class name.
        steps: The engine's step number of each chunk.
        delivered: Outputs that it had at each restart.
        kept: For each (re)start, what its events kept, in the reference's form.
        preemptions: How often the scheduler preempted it.
    """

    prompt: list[int]
    outputs: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    held: list[dict[str, frozenset[int]]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    delivered: list[int] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    preemptions: int = 0

    @property
    def last_prefill(self) -> tuple[int, int]:
        """The chunk that first reached the end of the prompt."""
        return next(chunk for chunk in self.chunks if chunk[1] >= len(self.prompt))


class Engine:
    """An in-process engine with its scheduler and worker in view.

    Args:
        model: Path of the model.
        policy: The policy, as `kv_policy=` takes it, or None.
        options: Further options of `LLM`.
    """

    def __init__(self, model: Any, policy: Any = None, **options: Any) -> None:
        from vllm import LLM

        if policy is not None:
            options["kv_policy"] = policy
        self.llm = LLM(str(model), **{**DEFAULTS, **options})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.lanes: dict[str, Any] = {}
        for manager in self.manager.coordinator.single_type_managers:
            name = type(manager.kv_cache_spec).__name__
            # A model with a sliding window can have several groups of it.
            self.lanes[name if name not in self.lanes else f"{name}-{len(self.lanes)}"] = manager
        self.max_running = 0
        self.in_flight = 1
        self.least_free = self.pool.num_gpu_blocks
        self._step = 0
        self._traces: dict[str, Trace] = {}
        # Store block -> (trace, restart), as of the step before and of this one.
        self._owners: list[dict[int, tuple[Trace, int]]] = [{}, {}]
        self._watch_scheduler()
        if policy is not None:
            self._watch_events()

    @property
    def runner(self) -> Any:
        """The worker's model runner."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.runner.vllm_config.cache_config.block_size

    @property
    def runtime(self) -> Any:
        """The worker's side of the policy; None for a head plan, which needs none."""
        from vllm_kvpress.integration.worker import find_runtime

        return find_runtime(self.runner.vllm_config)

    def close(self) -> None:
        """Frees the engine's memory."""
        self.llm.llm_engine.engine_core.shutdown()
        self.__dict__.clear()
        gc.collect()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        num_outputs: int | Sequence[int] = 16,
        *,
        chunk: int | None = None,
        preempt_at: Collection[int] = (),
        abort_at: Mapping[int, Sequence[int]] | None = None,
        arrive_at: Sequence[int] | None = None,
        stop: Sequence[int] = (),
        given: Sequence[Sequence[int]] = (),
    ) -> list[Trace]:
        """Generates greedily for all prompts and returns their traces, in order.

        Args:
            prompts: Token ids.
            num_outputs: Outputs of each request, or of all.
            chunk: Tokens of a step, over all requests.
            preempt_at: Steps before which the last running request is preempted.
            abort_at: Step -> requests (by index) to abort before it.
            arrive_at: The step at which each request arrives, ascending; all at 0 by default.
            stop: Token ids that end a request.
            given: First outputs of each request, by an engine with `TAKES_GIVEN` among its options.
        """
        count = len(prompts)
        lengths = [num_outputs] * count if isinstance(num_outputs, int) else num_outputs
        arrivals = list(arrive_at or [0] * count)
        traces = [Trace(list(prompt)) for prompt in prompts]
        ids = [f"r{time.monotonic_ns()}-{index}" for index in range(count)]
        self._traces = dict(zip(ids, traces, strict=True))
        self.scheduler.max_num_scheduled_tokens = chunk or DEFAULTS["max_num_batched_tokens"]
        engine = self.llm.llm_engine
        added = self._step = 0
        while added < count or engine.has_unfinished_requests():
            while added < count and arrivals[added] <= self._step:
                first = given[added] if given else ()
                self._add(ids[added], prompts[added], lengths[added], stop, first)
                added += 1
            engine.abort_request([ids[i] for i in (abort_at or {}).get(self._step, ())])
            if self._step in preempt_at:
                self._preempt()
            for output in engine.step():
                self._collect(output)
            self.check_pool()
            self._step += 1
            assert self._step < 5000, "the engine makes no progress"
        self.check_empty()
        return traces

    def abort_all(self) -> None:
        """Ends every request, after a step that raised."""
        self.llm.llm_engine.abort_request(list(self._traces))

    def check_empty(self) -> None:
        """Checks that nothing is left of finished requests."""
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1, "blocks leak"
        for manager in self.lanes.values():
            assert not manager.req_to_blocks, "a manager still holds a finished request"
            assert not len(getattr(manager, "progress", ())), "progress of a finished request"

    def check_pool(self) -> None:
        """Checks that every block is free, the null block, or owned by whom it may be."""
        owners: Counter[int] = Counter()
        private: Counter[int] = Counter()
        for name, manager in self.lanes.items():
            for blocks in manager.req_to_blocks.values():
                held = [block.block_id for block in blocks if not block.is_null]
                assert len(held) == len(set(held)), "a request holds a block twice"
                owners.update(held)
                if name.partition("-")[0] not in SHARED_LANES:
                    private.update(held)
        for block_id, count in owners.items():
            assert self.pool.blocks[block_id].ref_cnt == count, "owners and references differ"
        assert all(owners[block_id] == 1 for block_id in private), "a private block is shared"
        free = self.pool.get_num_free_blocks()
        assert free + len(owners) + 1 == self.pool.num_gpu_blocks, "blocks are lost"
        self.least_free = min(self.least_free, free)

    def _add(
        self,
        request_id: str,
        prompt: Sequence[int],
        num_outputs: int,
        stop: Sequence[int],
        given: Sequence[int],
    ) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=num_outputs,
            ignore_eos=True,
            stop_token_ids=list(stop),
            logprobs=TOP,
            detokenize=False,
        )
        if given:
            from vllm_kvpress.evaluation.forced import EXTRA_ARG

            params.extra_args = {EXTRA_ARG: list(given)}
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, params)

    def _preempt(self) -> None:
        scheduler = self.scheduler
        if scheduler.running:
            request = scheduler.running.pop()
            scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
            scheduler.prev_step_scheduled_req_ids.discard(request.request_id)

    def _collect(self, output: Any) -> None:
        trace = self._traces[output.request_id]
        completion = output.outputs[0]
        trace.outputs = list(completion.token_ids)
        trace.logprobs = [
            {token: entry.logprob for token, entry in row.items()} for row in completion.logprobs
        ]

    def _watch_scheduler(self) -> None:
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.max_running = max(self.max_running, len(self.scheduler.running))
            self.in_flight = max(self.in_flight, 1 + len(self.core.batch_queue or ()))
            self._owners = [self._owners[1], {}]
            for request_id, num_tokens in output.num_scheduled_tokens.items():
                trace = self._trace_of(request_id)
                if trace is not None:
                    self._note(trace, self.scheduler.requests[request_id], num_tokens)
            return output

        self.scheduler.schedule = watched

    def _watch_events(self) -> None:
        from vllm_kvpress.integration.head_attention import figures_of
        from vllm_kvpress.integration.head_stores import head_runs

        if getattr(self.runtime, "events", None) is not None:
            self.runtime.events.observer = self._observe
        figures = figures_of(self.runner.vllm_config)
        runs = head_runs(self.runner.vllm_config)
        for of_run in runs.runtimes.values() if runs is not None else ():
            for events in of_run.events.runners:
                heads = {
                    pages.layer_idx: lane.heads
                    for pages in events.layers
                    for lane in figures.groups.layers[pages.layer_idx]
                    if lane.run == of_run.run
                }
                events.observer = partial(self._observe, heads=heads)

    def _note(self, trace: Trace, request: Any, num_tokens: int) -> None:
        end = request.num_computed_tokens
        trace.preemptions = request.num_preemptions
        if not trace.chunks or end - num_tokens < trace.chunks[-1][1]:
            trace.delivered += [len(trace.outputs)] if trace.hits else []
            trace.hits.append(end - num_tokens)
            trace.kept.append({})
        trace.chunks.append((end - num_tokens, end))
        trace.steps.append(self._step)
        held = {
            name: frozenset(
                block.block_id
                for block in lane.req_to_blocks.get(request.request_id, ())
                if not block.is_null
            )
            for name, lane in self.lanes.items()
        }
        trace.held.append(held)
        owner = trace, len(trace.kept) - 1
        for lane, ids in held.items():
            if lane.startswith("StoreSpec"):
                self._owners[1].update(dict.fromkeys(ids, owner))

    def _observe(
        self,
        event: Any,
        layer: int,
        kept: torch.Tensor,
        heads: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Records an event's choice as positions.

        The event fell due in the step before: its store's blocks tell whose it is, even if the
        request restarted or ended since.
        """
        if not kept.numel():
            return
        found = self._owners[0].get(int(event.tables["kv_store"][0]))
        if found is None:  # requests that a test did not send through `run`
            return
        trace, restart = found
        size = self.block_size
        head_tokens = event.before.head_blocks * size
        gap = event.before.first_block * size - head_tokens
        run = trace.kept[restart]
        of_layer = range(len(kept)) if heads is None else heads[layer]
        for head, indices in zip(of_layer, kept.tolist(), strict=True):
            earlier = [key for key in run if key[1:] == (layer, head)]
            stored = run[max(earlier)] if earlier else []
            run[event.event, layer, head] = [
                stored[index] if index < head_tokens else index + gap for index in indices
            ]

    def _trace_of(self, request_id: str) -> Trace | None:
        # vLLM appends a random suffix to the id that it was given.
        given, _, _ = request_id.rpartition("-")
        return self._traces.get(request_id) or self._traces.get(given)
