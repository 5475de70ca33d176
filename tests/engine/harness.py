"""Runs requests through a real engine, step by step, and compares them with the reference.

The engine runs in this process, so a test sees what the scheduler did (chunks, preemptions, prefix
hits), what every pool block is used for after each step, and what each event kept.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reference.dense import DenseLlama, DenseReference, Kept, Rule
from reference.scorers import SCORERS

TOP = 5


@dataclass
class Trace:
    """What the engine did with one request.

    Attributes:
        chunks: [start, end) of every scheduled step, in order; preempted requests start over.
        hits: Tokens found in the prefix cache at each (re)start.
        logprobs: For each output, token id -> log-probability of the engine's top tokens.
        blocks: After each step, blocks held per lane, by the lane's spec class name.
        kept: For each (re)start, what its events kept, in the reference's form.
        run: The (re)start that the last finished step belonged to.
    """

    prompt: list[int]
    outputs: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    blocks: list[dict[str, int]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    run: int = -1
    preemptions: int = 0


class Engine:
    """An in-process engine with its scheduler and worker in view.

    Args:
        model: Path of the model.
        policy: The policy, as `kv_policy=` takes it, or None.
        options: Further options of `LLM`.
    """

    def __init__(self, model: Any, policy: Any = None, **options: Any) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "block_size": 32,
            "num_gpu_blocks_override": 200,
            "disable_log_stats": True,
            "skip_tokenizer_init": True,
        }
        if policy is not None:
            options["kv_policy"] = policy
        self.llm = LLM(str(model), **{**defaults, **options})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.lanes = {
            type(manager.kv_cache_spec).__name__: manager
            for manager in self.manager.coordinator.single_type_managers
        }
        self.max_running = 0
        self.least_free = self.pool.num_gpu_blocks
        self._traces: dict[str, Trace] = {}
        self._ids: dict[str, str] = {}
        self._watch_scheduler()
        if policy is not None and self.runtime.events is not None:
            self.runtime.events.observer = self._observe

    @property
    def runner(self) -> Any:
        """The worker's model runner."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def runtime(self) -> Any:
        """The worker's side of the policy."""
        from vllm_kvpress.integration.worker import find_runtime

        return find_runtime(self.runner.vllm_config)

    def close(self) -> None:
        """Frees the engine's memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.scheduler, self.manager, self.pool, self.lanes
        gc.collect()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        num_outputs: int | Sequence[int] = 16,
        *,
        preempt_at: Callable[[int], int] = lambda step: 0,
        abort_at: dict[int, Sequence[int]] | None = None,
        arrive: Callable[[int], int] | None = None,
    ) -> list[Trace]:
        """Generates greedily for all prompts and returns their traces, in order.

        Args:
            prompts: Token ids.
            num_outputs: Outputs of each request, or of all.
            preempt_at: How many running requests to preempt before step i.
            abort_at: Requests (by index) to abort before step i.
            arrive: How many requests have arrived by step i; all of them by default.
        """
        lengths = [num_outputs] * len(prompts) if isinstance(num_outputs, int) else num_outputs
        traces = [Trace(list(prompt)) for prompt in prompts]
        ids = [f"r{time.monotonic_ns()}-{index}" for index in range(len(prompts))]
        self._traces = dict(zip(ids, traces, strict=True))
        added = step = 0
        engine = self.llm.llm_engine
        while added < len(prompts) or engine.has_unfinished_requests():
            due = len(prompts) if arrive is None else min(len(prompts), arrive(step))
            for index in range(added, due):
                self._add(ids[index], prompts[index], lengths[index])
            added = max(added, due)
            for index in (abort_at or {}).get(step, ()):
                engine.abort_request([ids[index]])
            self._preempt(preempt_at(step))
            for output in engine.step():
                self._collect(output)
            self.check_pool()
            for trace in traces:
                trace.run = len(trace.kept) - 1
            step += 1
            assert step < 5000, "the engine makes no progress"
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1, "blocks leak"
        for manager in self.lanes.values():
            assert not manager.req_to_blocks, "a manager still holds a finished request"
            assert not len(getattr(manager, "progress", ())), "progress of a finished request"
        return traces

    def check_pool(self) -> None:
        """Checks that every block is free, the null block, or owned by whom it may be."""
        owners: Counter[int] = Counter()
        private: Counter[int] = Counter()
        for name, manager in self.lanes.items():
            for blocks in manager.req_to_blocks.values():
                held = [block.block_id for block in blocks if not block.is_null]
                assert len(held) == len(set(held)), "a request holds a block twice"
                owners.update(held)
                if name not in ("StagingSpec", "FullAttentionSpec"):
                    private.update(held)
        for block_id, count in owners.items():
            assert self.pool.blocks[block_id].ref_cnt == count, "owners and references differ"
        assert all(owners[block_id] == 1 for block_id in private), "a private block is shared"
        free = self.pool.get_num_free_blocks()
        assert free + len(owners) + 1 == self.pool.num_gpu_blocks, "blocks are lost"
        self.least_free = min(self.least_free, free)

    def _add(self, request_id: str, prompt: Sequence[int], num_outputs: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=num_outputs,
            ignore_eos=True,
            logprobs=TOP,
            detokenize=False,
        )
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, params)

    def _preempt(self, count: int) -> None:
        scheduler = self.scheduler
        for _ in range(min(count, len(scheduler.running))):
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
            for request_id, num_tokens in output.num_scheduled_tokens.items():
                request = self.scheduler.requests[request_id]
                trace = self._trace_of(request_id)
                if trace is None:
                    continue
                end = request.num_computed_tokens
                trace.preemptions = request.num_preemptions
                restarted = not trace.chunks or end - num_tokens < trace.chunks[-1][1]
                if restarted:
                    trace.hits.append(end - num_tokens)
                    trace.kept.append({})
                trace.chunks.append((end - num_tokens, end))
                trace.blocks.append(
                    {
                        name: sum(
                            not block.is_null for block in lane.req_to_blocks.get(request_id, ())
                        )
                        for name, lane in self.lanes.items()
                    }
                )
            return output

        self.scheduler.schedule = watched

    def _observe(self, event: Any, layer: int, kept: torch.Tensor) -> None:
        """Records an event's choice as positions; prompts of a test differ in length."""
        trace = next(t for t in self._traces.values() if len(t.prompt) == event.num_prompt_tokens)
        size = self.runtime.plan.block_size
        head_tokens = event.before.head_blocks * size
        # A step's event runs at the start of the next one, when its request may have restarted.
        run = trace.kept[trace.run]
        for head, indices in enumerate(kept.tolist()):
            earlier = [key for key in run if key[1:] == (layer, head)]
            stored = run[max(earlier)] if earlier else []
            gap = event.before.first_block * size - head_tokens
            run[event.event, layer, head] = [
                stored[index] if index < head_tokens else index + gap for index in indices
            ]

    def _trace_of(self, request_id: str) -> Trace | None:
        # vLLM appends a random suffix to the id that it was given.
        found = self._traces.get(request_id)
        if found is None:
            found = next((t for key, t in self._traces.items() if request_id.startswith(key)), None)
        return found


def replayed(trace: Trace) -> list[tuple[int, int]]:
    """Returns the chunks as the reference wants them: a restart replays from 0."""
    chunks: list[tuple[int, int]] = []
    for start, end in trace.chunks:
        restarts = not chunks or start < chunks[-1][1]
        chunks.append((0, end) if restarts else (start, end))
    return chunks


@dataclass(frozen=True)
class Comparison:
    """An engine's request against the reference.

    Attributes:
        error: Largest difference of log-probabilities, kept sets as the engine chose them.
        flips: Distances from the cut of the positions that the two chose differently.
        events: Events that took place in the engine.
    """

    error: float
    flips: list[float]
    events: int


def compare(trace: Trace, model: DenseLlama, rule: Rule) -> Comparison:
    """Compares a request with the reference, which is given the engine's own kept sets.

    Near-ties flip between kernels, so the sets themselves are compared by how far from the cut
    they differ.
    """
    reference = DenseReference(model, rule)
    kept = trace.kept if rule.scorer in SCORERS else None
    result = reference.logprobs(trace.prompt, trace.outputs, replayed(trace), kept)
    error = 0.0
    for row, expected in zip(trace.logprobs, result.logprobs, strict=True):
        tokens = torch.tensor(list(row))
        got = torch.tensor(list(row.values()))
        error = max(error, float((expected[tokens] - got).abs().max()))
    events = sum(len({key[0] for key in run}) for run in trace.kept)
    return Comparison(error, result.flips, events)
