"""The table that an engine logs at start: what the policy will do to this model, in numbers."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vllm_kvpress.head_figures import HeadFigures
from vllm_kvpress.integration.plugin import policy_of
from vllm_kvpress.plan import RetentionPlan

# Below vLLM's own logger, so that its format and level apply.
logger = init_logger("vllm.kvpress")

_OUTPUT_TOKENS = 256
_HEADER = "prompt tokens | blocks full | at peak | generating | requests at once: full | policy"


def log_summary(
    plan: RetentionPlan | HeadFigures,
    vllm_config: VllmConfig,
    num_layers: int,
    num_blocks: int,
    *notes: str,
    stock_blocks: int | None = None,
) -> None:
    """Logs, on the first rank, the plan's figures for a few prompt lengths.

    Args:
        plan: What a request holds.
        vllm_config: The engine's configuration.
        num_layers: Attention layers under the policy.
        num_blocks: Blocks of the pool, the null block included.
        notes: Further lines above the table.
        stock_blocks: Blocks of the full cache in the memory of the pool; by default as many.
    """
    policy = policy_of(vllm_config)
    if policy is None or get_tensor_model_parallel_rank() != 0:
        return
    pool = num_blocks - 1
    stock_pool = pool if stock_blocks is None else stock_blocks
    skipped = plan.skipped
    if skipped is not None:
        # Beside skipped layers a block has not the bytes of a stock one.
        stock_pool = pool * skipped.block_bytes // skipped.stock_block_bytes
    same_memory = "" if stock_pool == pool else f" (the memory of {stock_pool} full ones)"
    lines = [
        f"KV policy {policy.name}: {num_layers} layers, blocks of {plan.block_size} tokens, "
        f"pool of {pool} blocks{same_memory}, {_OUTPUT_TOKENS} generated tokens a request",
        *notes,
        _HEADER,
    ]
    limit = vllm_config.model_config.max_model_len
    for prompt in sorted({limit // 8, limit // 4, limit // 2, limit - _OUTPUT_TOKENS}):
        if prompt > 0:
            output = min(_OUTPUT_TOKENS, limit - prompt)
            lines.append(_row(plan, prompt, output, pool, stock_pool))
    logger.info("\n  ".join(lines))
    if not plan.is_pure and not plan.evicts(limit):
        logger.warning(
            "KV policy %s evicts nothing here: no request of up to %d tokens exceeds its budget.",
            policy.name,
            limit,
        )


def head_note(figures: HeadFigures) -> str:
    """Returns how many heads keep every token, which were promoted, and how blocks are cut."""
    groups = figures.groups
    text = f"{groups.num_retrieval} of {groups.num_heads} KV heads {figures.retrieval_text}"
    if groups.num_retrieval == 0:
        text = "every KV head keeps sinks and a window, in the prompt, too"
    if groups.promoted:
        where = ", ".join(f"{layer}.{head}" for layer, head in groups.promoted)
        text += f" (promoted, as layer.head: {where})"
    if figures.window.compensates:
        text += "; in the others one token stands for what they drop"
    return (
        f"{text}; cache groups: {groups.runs.retrieval} of such heads, {groups.runs.streaming} of "
        f"others; a block holds {float(groups.width):g} heads, "
        f"{figures.padding:.1%} of it is padding"
    )


def _row(
    plan: RetentionPlan | HeadFigures, prompt: int, output: int, pool: int, stock_pool: int
) -> str:
    full = plan.full_blocks(prompt + output)
    figures = (
        (prompt, 13),
        (full, 11),
        (plan.peak_blocks(prompt, output), 7),
        (plan.steady_blocks(prompt, output), 10),
        (stock_pool // full, 22),
        (plan.requests_at_once(pool, prompt, output), 6),
    )
    return " | ".join(f"{value:>{width}}" for value, width in figures)
