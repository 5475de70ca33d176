"""The table that an engine logs at start: what the policy will do to this model, in numbers."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vllm_kvpress.integration.plugin import policy_of
from vllm_kvpress.plan import RetentionPlan

# Below vLLM's own logger, so that its format and level apply.
logger = init_logger("vllm.kvpress")

_OUTPUT_TOKENS = 256
_HEADER = "prompt tokens | blocks full | at peak | generating | requests at once: full | policy"


def log_summary(
    plan: RetentionPlan, vllm_config: VllmConfig, num_layers: int, num_blocks: int
) -> None:
    """Logs, on the first rank, the plan's figures for a few prompt lengths.

    Args:
        plan: The retention plan.
        vllm_config: The engine's configuration.
        num_layers: Attention layers under the policy.
        num_blocks: Blocks of the pool, the null block included.
    """
    policy = policy_of(vllm_config)
    if policy is None or get_tensor_model_parallel_rank() != 0:
        return
    pool = stock_pool = num_blocks - 1
    skipped = plan.skipped
    if skipped is not None:
        # Beside skipped layers a block has not the bytes of a stock one.
        stock_pool = pool * skipped.block_bytes // skipped.stock_block_bytes
    lines = [
        f"KV policy {policy.name}: {num_layers} layers, blocks of {plan.block_size} tokens, "
        f"pool of {pool} blocks, {_OUTPUT_TOKENS} generated tokens a request",
        _HEADER,
    ]
    limit = vllm_config.model_config.max_model_len
    for prompt in sorted({limit // 8, limit // 4, limit // 2, limit - _OUTPUT_TOKENS}):
        if prompt > 0:
            output = min(_OUTPUT_TOKENS, limit - prompt)
            lines.append(_row(plan, prompt, output, pool, stock_pool))
    logger.info("\n  ".join(lines))
    if not plan.evicts(limit):
        logger.warning(
            "KV policy %s evicts nothing here: no request of up to %d tokens exceeds its budget.",
            policy.name,
            limit,
        )


def _row(plan: RetentionPlan, prompt: int, output: int, pool: int, stock_pool: int) -> str:
    full = -(-(prompt + output) // plan.block_size)
    figures = (
        (prompt, 13),
        (full, 11),
        (plan.peak_blocks(prompt, output), 7),
        (plan.steady_blocks(prompt, output), 10),
        (stock_pool // full, 22),
        (plan.requests_at_once(pool, prompt, output), 6),
    )
    return " | ".join(f"{value:>{width}}" for value, width in figures)
