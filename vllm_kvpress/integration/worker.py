"""The worker's side of a policy: from logical to physical, step by step.

vLLM builds the attention metadata of a step group by group; the private lanes' builders leave
their block tables here, the staging lane's builder, which comes last, calls `begin_step`:

    1. run the events that became due in the step before (`events.py`)
    2. note the events that this step makes due
    3. replace block table and lengths by what the plan says attention reads
    4. say which of this step's queries belong to an observation window

RoPE positions and slot mappings stay logical.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvpress.errors import UnsupportedVLLMError
from vllm_kvpress.integration.compat import prompt_lengths
from vllm_kvpress.integration.events import EventRunner, LayerPages, PendingEvent
from vllm_kvpress.integration.lanes import plan_in
from vllm_kvpress.integration.pages import PageMap, flat_pages
from vllm_kvpress.integration.tables import PhysicalTables, QueryWindow
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.policies import Scorer


@dataclass(frozen=True)
class Step:
    """What the stock builder is given, and the query rows to keep."""

    common: CommonAttentionMetadata
    query_window: QueryWindow | None


class LaneRuntime:
    """One worker's lanes: made with the model's first attention layer, bound to its caches later.

    Args:
        scorer: The policy's scorer.
        vllm_config: The engine's configuration.

    Attributes:
        layer_names: Attention layers under the policy, in the model's order.
        tables: Block tables of the private lanes in the step being built,
            each int32 [num_reqs, max_blocks].
        pending: Events that are due, to be run before the next step.
        plan: The retention plan, once the caches exist.
        events: Runs events; None if the plan has no store.
    """

    def __init__(self, scorer: Scorer, vllm_config: VllmConfig) -> None:
        self.scorer = scorer
        self.vllm_config = vllm_config
        self.layer_names: list[str] = []
        self.tables: dict[str, torch.Tensor] = {}
        self.pending: list[PendingEvent] = []
        self.plan: RetentionPlan | None = None
        self._runner: weakref.ref[Any] | None = None
        self.events: EventRunner | None = None
        self._physical: PhysicalTables | None = None

    def attach(self, runner: Any) -> None:
        """Binds the runner and its allocated caches; runs once the engine has made them.

        Raises:
            UnsupportedVLLMError: if lanes of one layer do not share their memory, or a
                backend splits our blocks.
            CapacityError: if the budget cannot hold sinks and recent tokens at this block size.
        """
        self._runner = weakref.ref(runner)
        plan = plan_in(runner.kv_cache_config.kv_cache_groups)
        assert plan is not None
        plan.check()
        self.plan = plan
        self.pending.clear()
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in self.layer_names]
        for name, layer in zip(self.layer_names, layers, strict=True):
            self._check_layer(name, layer, context)
        page_map = PageMap.learn(layers[0]) if plan.store else None
        pages = []
        for name, layer in zip(self.layer_names, layers, strict=True):
            layer_pages = flat_pages(layer.kv_cache)
            if plan.query_window:
                layer.impl.query_pages = layer_pages
            pages.append(LayerPages(name, layer_pages, layer.impl))
        if page_map is not None:
            self.events = EventRunner(plan, self.scorer, page_map, pages, self.vllm_config)
        self._physical = PhysicalTables(plan, self.vllm_config, layers[0].kv_cache.device)

    def _check_layer(self, name: str, layer: Any, context: dict[str, Any]) -> None:
        assert self.plan is not None
        if layer.kv_cache.shape[2] != self.plan.block_size:
            raise UnsupportedVLLMError(
                "the attention backend splits blocks into smaller kernel blocks",
                got=f"kernel blocks of {layer.kv_cache.shape[2]} tokens, --block-size "
                f"{self.plan.block_size}",
                allowed="a block size that the backend takes whole",
                fix=f"Use --block-size {layer.kv_cache.shape[2]}",
            )
        for lane_name, lane in context.items():
            if getattr(lane, "base", None) is not layer:
                continue
            same = (lane.kv_cache.data_ptr(), lane.kv_cache.stride()) == (
                layer.kv_cache.data_ptr(),
                layer.kv_cache.stride(),
            )
            if not same:
                raise UnsupportedVLLMError(
                    f"{lane_name} does not alias the cache of {name}",
                    allowed="lanes of one layer at one address with equal strides",
                    fix="Report this with the model's name: its layers were grouped unevenly",
                )

    def begin_step(self, common: CommonAttentionMetadata) -> Step:
        """Returns the physical metadata of a step that is about to run."""
        assert self._physical is not None
        assert self.plan is not None
        if self.pending:
            assert self.events is not None
            pending, self.pending = self.pending, []
            self.events.run(pending)
        prompts = prompt_lengths(self._runner() if self._runner else None, common)
        if prompts is None:
            return self.capture_step(common)
        num_reqs = len(prompts)
        ends = _upper_bound(common)[:num_reqs]
        query_starts = common.query_start_loc_cpu[: num_reqs + 1].numpy()
        starts = ends - np.diff(query_starts)
        self._note_due_events(prompts, starts, ends, common)
        window = None
        if self.plan.query_window:
            window = self._physical.query_window(
                prompts, starts, ends, query_starts, self.tables["kv_queries"]
            )
        physical = self._physical.replace(common, prompts, starts, self.tables.get("kv_store"))
        return Step(physical, window)

    def capture_step(self, common: CommonAttentionMetadata) -> Step:
        """Returns the metadata of a dummy step, in the buffers that real steps use."""
        if self._physical is None:  # memory profiling runs before the caches exist
            return Step(common, None)
        return Step(self._physical.untouched(common), self._physical.no_window(common))

    def _note_due_events(
        self,
        prompts: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        common: CommonAttentionMetadata,
    ) -> None:
        plan = self.plan
        assert plan is not None
        for row in plan.may_be_due(prompts, starts, ends):
            prompt, start, end = int(prompts[row]), int(starts[row]), int(ends[row])
            event = plan.due_event(prompt, start, end)
            if event:
                self.pending.append(
                    PendingEvent(
                        num_prompt_tokens=prompt,
                        before=plan.layout(prompt, start),
                        event=event,
                        staging=common.block_table_tensor[row].clone(),
                        tables={lane: table[row].clone() for lane, table in self.tables.items()},
                    )
                )


def find_runtime(vllm_config: VllmConfig) -> LaneRuntime | None:
    """Returns the runtime that an engine's attention layers share, if any was made."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        runtime = getattr(getattr(layer, "impl", None), "lane_runtime", None)
        if runtime is not None:
            return runtime  # type: ignore[no-any-return]
    return None


def _upper_bound(common: CommonAttentionMetadata) -> np.ndarray:
    bound = common.seq_lens_cpu_upper_bound
    assert bound is not None, "vLLM 0.32 passes CPU lengths in both runners"
    return bound.numpy().astype(np.int64)
