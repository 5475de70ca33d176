"""The retention plan for the rows of a batch at once, in a few array operations.

The worker asks once a step. `RetentionPlan` says the same of one request, and in words.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_kvpress.demoting_plan import DemotingPlan
from vllm_kvpress.packed_plan import PackedPlan
from vllm_kvpress.plan import RetentionPlan

IntArray = npt.NDArray[np.int64]
Layouts = tuple[IntArray, IntArray, IntArray, IntArray]

_NEVER = np.iinfo(np.int64).max


def layouts(
    plan: RetentionPlan, num_prompt_tokens: IntArray, num_computed_tokens: IntArray
) -> Layouts:
    """Returns `RetentionPlan.layout` of each row.

    Args:
        plan: The retention plan.
        num_prompt_tokens: int64 [num_reqs].
        num_computed_tokens: int64 [num_reqs], at the start of the step.

    Returns:
        (head_blocks, first_block, store_tokens, demoted_tokens), each int64 [num_reqs].
    """
    if isinstance(plan, PackedPlan):
        return _packed_layouts(plan, num_prompt_tokens, num_computed_tokens)
    unpacked = np.zeros_like(num_prompt_tokens)
    if not plan.evicts_tokens:
        return unpacked, unpacked, unpacked, unpacked
    budgets = _budgets(plan, num_prompt_tokens)
    over = num_computed_tokens - num_prompt_tokens
    if plan.store:
        if plan.every_decode_tokens:
            events = num_computed_tokens - over % plan.every_decode_tokens
            happened = (over >= 0) & (plan.prompt_end | (events > num_prompt_tokens))
        else:
            events = num_prompt_tokens
            happened = over >= 0
        events = np.where(happened & (events > budgets), events, 0)
        heads = np.maximum(0, budgets - events % plan.block_size) // plan.block_size
        return np.where(events > 0, heads, 0), events // plan.block_size, unpacked, unpacked
    window = budgets - plan.sink_tokens
    first = np.maximum(0, num_computed_tokens - window) // plan.block_size
    sinks = plan.sink_blocks
    dropped = (over >= 0) & (first > sinks)
    return np.where(dropped, sinks, 0), np.where(dropped, first, 0), unpacked, unpacked


def _packed_layouts(
    plan: PackedPlan, num_prompt_tokens: IntArray, num_computed_tokens: IntArray
) -> Layouts:
    closed_prompt = _closed_ends(plan, num_prompt_tokens)
    closed = _closed_ends(plan, num_computed_tokens)
    available = survivors = closed_prompt - plan.exact_tokens
    losers = np.zeros_like(available)
    if plan.evicts_tokens:
        open_tokens = num_prompt_tokens - closed_prompt
        room = _budgets(plan, num_prompt_tokens) - plan.exact_tokens - open_tokens
        room = np.maximum(0, room) // plan.group_tokens * plan.group_tokens
        survivors = np.minimum(available, room)
    if isinstance(plan, DemotingPlan):
        losers = (available - survivors) // plan.loser_unit * plan.loser_unit
        survivors = available - losers
    happened = (num_computed_tokens >= num_prompt_tokens) & (closed > plan.exact_tokens)
    return (
        np.where(happened, plan.exact_tokens // plan.block_size, 0),
        np.where(happened, closed // plan.block_size, 0),
        np.where(happened, survivors + closed - closed_prompt, 0),
        np.where(happened, losers, 0),
    )


def _closed_ends(plan: PackedPlan, num_tokens: IntArray) -> IntArray:
    behind = np.maximum(0, num_tokens - plan.residual_tokens - plan.exact_tokens)
    return plan.exact_tokens + behind // plan.unit * plan.unit


def may_be_due(
    plan: RetentionPlan, num_prompt_tokens: IntArray, starts: IntArray, ends: IntArray
) -> IntArray:
    """Returns the rows whose chunk [start, end) holds a position of an event.

    A cheap sieve: `RetentionPlan.due_event` says whether the event of such a row is effective.
    """
    if not plan.store:
        return np.empty(0, np.int64)
    crossing = (starts < num_prompt_tokens) & (ends >= num_prompt_tokens)
    if isinstance(plan, PackedPlan):
        closes = _closed_ends(plan, ends) > _closed_ends(plan, starts)
        return np.flatnonzero(crossing | (closes & (starts >= num_prompt_tokens)))
    if plan.every_decode_tokens:
        every = plan.every_decode_tokens
        past = (ends - num_prompt_tokens) // every > (starts - num_prompt_tokens) // every
        crossing |= past & (starts >= num_prompt_tokens)
    return np.flatnonzero(crossing)


def steady_until(plan: RetentionPlan, num_prompt_tokens: IntArray, starts: IntArray) -> IntArray:
    """Returns how far each row may go before anything about it changes, int64 [num_reqs].

    A chunk [x, y) of the same prompt with start <= x and y < the returned position has the layout
    of `start`, holds no event and no query of an observation window. 0 for a row that is still in
    its prompt: there every chunk is looked at.
    """
    over = starts - num_prompt_tokens
    if isinstance(plan, PackedPlan):
        until = _closed_ends(plan, starts) + plan.unit + plan.residual_tokens
    elif plan.is_pure:
        until = np.full_like(starts, _NEVER)
    elif not plan.store:
        window = _budgets(plan, num_prompt_tokens) - plan.sink_tokens
        dropped = np.maximum(0, starts - window) // plan.block_size
        until = (dropped + 1) * plan.block_size + window
    elif plan.every_decode_tokens:
        until = starts + plan.every_decode_tokens - over % plan.every_decode_tokens
    else:
        until = np.full_like(starts, _NEVER)
    return np.where(over < 0, 0, until)


def _budgets(plan: RetentionPlan, num_prompt_tokens: IntArray) -> IntArray:
    if plan.budget_tokens is not None:
        return np.full_like(num_prompt_tokens, plan.budget_tokens)
    assert plan.keep_ratio is not None
    kept = (plan.keep_ratio * num_prompt_tokens).astype(np.int64)
    return np.maximum(kept, plan.least_budget)
