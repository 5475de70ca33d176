"""Which retention plan a policy has: the one place that chooses among the plan's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vllm_kvpress.demoting_plan import DemotingPlan
from vllm_kvpress.errors import CapacityError
from vllm_kvpress.packed_plan import GROUP_TOKENS, PackedPlan
from vllm_kvpress.plan import RetentionPlan

if TYPE_CHECKING:
    from vllm_kvpress.config import Policy
    from vllm_kvpress.layout import PackedFormat
    from vllm_kvpress.policies.scorer import Scorer
    from vllm_kvpress.schema import Codecs
    from vllm_kvpress.skip_groups import SkippedGroups


def make_plan(
    policy: Policy,
    scorer: Scorer,
    *,
    block_size: int,
    queries_per_block: int = 1,
    positions_per_block: int = 1,
    cells: PackedFormat | None = None,
    loser_cells: PackedFormat | None = None,
    page_bytes: int = 0,
    skipped: SkippedGroups | None = None,
) -> RetentionPlan:
    """Returns the plan of `policy` for an engine with the given geometry.

    Args:
        policy: The policy.
        scorer: Its scorer.
        block_size: Tokens in a block.
        queries_per_block: Query rows that fit in one block of the query lane.
        positions_per_block: Kept positions that fit in one block of the position lane.
        cells: The store's cells if the policy packs; without them the counts of blocks are
            not to be relied on.
        loser_cells: The cells of what is demoted, if the policy demotes.
        page_bytes: Bytes of one block of one layer.
        skipped: The cache groups of the layers that the policy leaves alone, if any.

    Raises:
        CapacityError: no query row fits in a block.
    """
    if scorer.query_window and not queries_per_block:
        raise CapacityError(
            "one token's queries do not fit in a block",
            got=f"--block-size {block_size}",
            allowed="at most 2 * block size query heads for each KV head, half of it with fp8",
            fix="Use a larger --block-size, or a scorer without queries (keydiff, knorm)",
        )
    plan = RetentionPlan.from_policy(
        policy,
        scorer,
        block_size=block_size,
        queries_per_block=queries_per_block,
        positions_per_block=positions_per_block,
    )
    plan = replace(plan, skipped=skipped)
    quantize = policy.quantize
    if quantize is None or quantize.is_fp8:
        return plan
    if policy.packs_on_write and scorer.selects != "tokens":
        return replace(plan, store=False, packs_on_write=True)
    packed = PackedPlan(
        **_fields(plan),
        residual_tokens=quantize.residual,
        exact_sinks=quantize.exact_sinks,
        group_tokens=_group_tokens(quantize),
        cell_tokens=cells.cell_tokens if cells else block_size,
        num_kv_heads=cells.num_kv_heads if cells else 1,
        cells_per_page=cells.cells_per_page(page_bytes) if cells else 1,
    )
    if quantize.losers is None:
        return packed
    return DemotingPlan(
        **_fields(packed),
        loser_group_tokens=_group_tokens(quantize.losers),
        loser_cell_tokens=loser_cells.cell_tokens if loser_cells else block_size,
        loser_cells_per_page=loser_cells.cells_per_page(page_bytes) if loser_cells else 1,
    )


def widest_plan(plans: Sequence[RetentionPlan]) -> RetentionPlan:
    """Returns the plan of those lanes, of one policy, whose stores take the most blocks.

    Lanes of a cache group share block tables but differ in their KV heads, and a page of two heads
    may hold five cells where one of a single head holds two.

    Args:
        plans: One for each number of heads; all alike but for their cells.
    """
    packed = [plan for plan in plans if isinstance(plan, PackedPlan)]
    if not packed:
        return plans[0]
    store = max(packed, key=lambda plan: _blocks_per_cell(plan, plan.cells_per_page))
    demoting = [plan for plan in packed if isinstance(plan, DemotingPlan)]
    if not demoting:
        return store
    losers = max(demoting, key=lambda plan: _blocks_per_cell(plan, plan.loser_cells_per_page))
    # Another lane may be the neediest there: both shares, over one number of heads.
    return replace(
        store,
        num_kv_heads=store.num_kv_heads * losers.num_kv_heads,
        cells_per_page=store.cells_per_page * losers.num_kv_heads,
        loser_cells_per_page=losers.loser_cells_per_page * store.num_kv_heads,
    )


def _blocks_per_cell(plan: PackedPlan, cells_per_page: int) -> Fraction | float:
    """Blocks for one cell of each head; infinite, which `check` refuses, where none fits."""
    return Fraction(plan.num_kv_heads, cells_per_page) if cells_per_page else math.inf


def _group_tokens(codecs: Codecs) -> int:
    return GROUP_TOKENS if codecs.has_channel_groups else 1


def _fields(plan: RetentionPlan) -> dict[str, Any]:
    return {field.name: getattr(plan, field.name) for field in fields(plan)}
