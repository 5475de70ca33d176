"""`vllm-kvpress explain`: what a policy keeps and frees on a model; figures from the plan."""

from dataclasses import replace
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_kvpress.cli.explain_heads import explain_heads, heads_text
from vllm_kvpress.cli.model_shape import ModelShape, read_model_shape
from vllm_kvpress.cli.vllm_words import ranks_of, read_options, size_option, steps_in_flight
from vllm_kvpress.config import Policy, load_policy
from vllm_kvpress.conflict_table import (
    ALLOWED,
    FP8_DTYPES,
    check_cache_dtype,
    refused_options,
)
from vllm_kvpress.demoting_plan import DemotingPlan
from vllm_kvpress.errors import ConfigError, ConflictError, UnsupportedModelError
from vllm_kvpress.head_figures import HeadFigures
from vllm_kvpress.layout import (
    DTYPE_BYTES,
    CacheShape,
    PackedFormat,
    positions_per_block,
    queries_per_block,
)
from vllm_kvpress.packed_plan import PackedPlan
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.planner import make_plan
from vllm_kvpress.policies import Scorer, resolve, store_format
from vllm_kvpress.policies.heads import HeadShape, inline_heads, resolve_heads
from vllm_kvpress.skip_groups import SkippedGroups, check_skipped, skipped_groups_of
from vllm_kvpress.window_plan import WindowPlan

__all__ = ["explain"]

_BLOCK_SIZE = 16
_OUTPUT_TOKENS = 256
_STEP_TOKENS = 2048
# The pool of the concurrency figure: a server's worth of memory, in uncompressed requests.
_POOL_REQUESTS = 10
_PIPE_COLUMNS = 120


def explain(
    policy_source: str,
    model: str,
    *,
    max_model_len: int | None = None,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    block_size: int | None = None,
    vllm_words: list[str] | None = None,
) -> None:
    """Prints what the policy does to one request of the model.

    Raises:
        KVPressError: the policy, the model or a length is not usable.
        ConflictError: a given vLLM option is refused with a policy; everything is printed first.
    """
    policy = load_policy(policy_source)
    resolve(policy)
    model_shape = read_model_shape(model)
    policy = inline_heads(policy, _head_shape(model_shape))
    scorer = resolve(policy)
    heads = resolve_heads(policy.heads, _head_shape(model_shape))
    options = read_options(
        policy_source, vllm_words or [], {"block-size": block_size, "max-model-len": max_model_len}
    )
    if block_size is not None:
        options["block-size"] = str(block_size)  # refused alike, wherever it was given
    block_size = block_size or size_option(options, "block-size") or _BLOCK_SIZE
    limit = max_model_len or size_option(options, "max-model-len") or model_shape.max_tokens
    full_cache = CacheShape(
        block_size=block_size,
        num_kv_heads=model_shape.num_kv_heads,
        head_size=model_shape.head_size,
        dtype=model_shape.dtype,
    )
    if options.get("kv-cache-dtype", "auto") != "auto":
        check_cache_dtype(policy, options["kv-cache-dtype"])
    cache = replace(full_cache, dtype=_cache_dtype(policy, model_shape, options))
    check_skipped(
        policy.layers.skip,
        model_shape.num_full_layers + model_shape.num_sliding_layers,
        model_shape.num_sliding_layers,
    )
    cells = _cells(policy, model_shape, cache)
    plan = _plan(policy, scorer, model_shape, cache, cells)
    if policy.heads.splits:
        _check_all_full(model_shape, "a head plan, or prefill: windowed,")
    if plan.packs_on_write:
        _check_all_full(model_shape, "a codec that packs tokens as they are written")
    staging_page = block_size * cache.num_kv_heads * _head_bytes(plan, cache, cells)
    page_bytes = (full_cache.page_bytes, staging_page)
    num_prompt, num_output = _lengths(limit, prompt_tokens, output_tokens)

    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width: 80 columns would break the tables
        console = Console(highlight=False, width=_PIPE_COLUMNS)
    console.print(
        f"[bold]{policy.name}[/] on {escape(model_shape.label)}: {_describe(model_shape)}\n",
        soft_wrap=True,
    )
    console.print(_kept_table(policy, scorer, plan, cache))
    if policy.heads.splits:
        in_flight = steps_in_flight(options) * (
            size_option(options, "max-num-batched-tokens") or _STEP_TOKENS
        )
        head_bytes = (full_cache.bytes_per_head, _head_bytes(plan, cache, cells))
        window = WindowPlan.from_policy(policy, block_size)
        num_ranks = ranks_of(options, model_shape)
        # Query heads of a KV head on a rank: several ranks may share a KV head.
        ranks_of_head = max(1, num_ranks // model_shape.num_kv_heads)
        group = model_shape.num_heads // model_shape.num_kv_heads // ranks_of_head
        of_lane = partial(_lane_plan, policy, scorer, model_shape, cache, group)
        retention_of = of_lane if policy.heads_store else None
        figures = HeadFigures.of(
            heads.retrieval, window, DTYPE_BYTES[cache.dtype], in_flight, retention_of, num_ranks
        )
        lengths = (num_prompt, num_output)
        explain_heads(console, policy, heads, figures, head_bytes, lengths, num_ranks)
        _report_conflicts(console, options)
        return
    console.print(
        f"\n[bold]One request of {num_prompt} prompt and {num_output} generated tokens, "
        f"block size {plan.block_size}[/]",
        soft_wrap=True,
    )
    console.print(_blocks_table(plan, page_bytes, model_shape, num_prompt, num_output, cells))
    console.print(_advice(plan, num_prompt, num_output) + "\n", soft_wrap=True)
    _report_conflicts(console, options)


def _check_all_full(shape: ModelShape, what: str) -> None:
    if shape.num_sliding_layers:
        raise UnsupportedModelError(
            f"{what} needs a model whose layers all have full attention",
            got=f"{shape.num_sliding_layers} layers with a sliding window",
            fix="Use another policy",
        )


def _head_shape(shape: ModelShape) -> HeadShape:
    return HeadShape(
        num_layers=shape.num_full_layers + shape.num_sliding_layers,
        num_kv_heads=shape.num_kv_heads,
        num_heads=shape.num_heads,
        head_size=shape.head_size,
    )


def _cache_dtype(policy: Policy, model_shape: ModelShape, options: dict[str, str]) -> str:
    is_fp8 = policy.quantize is not None and policy.quantize.is_fp8
    if is_fp8 or options.get("kv-cache-dtype") in FP8_DTYPES:
        return "fp8"
    return model_shape.dtype


def _cells(policy: Policy, shape: ModelShape, cache: CacheShape) -> dict[str, PackedFormat]:
    """Returns the packed cells of the store and of what is demoted, where the policy has them."""
    quantize, bits = policy.quantize, 8 * DTYPE_BYTES[shape.dtype]
    both = {"packed": quantize, "demoted": quantize and quantize.losers}
    formats = {
        name: store_format(codecs, cache.num_kv_heads, cache.head_size, bits)
        for name, codecs in both.items()
    }
    return {name: one for name, one in formats.items() if one is not None}


def _plan(
    policy: Policy,
    scorer: Scorer,
    model_shape: ModelShape,
    cache: CacheShape,
    cells: dict[str, PackedFormat],
) -> RetentionPlan:
    plan = make_plan(
        policy,
        scorer,
        block_size=cache.block_size,
        queries_per_block=queries_per_block(
            cache.page_bytes,
            model_shape.num_heads,
            cache.head_size,
            DTYPE_BYTES[model_shape.dtype],
        ),
        positions_per_block=positions_per_block(cache.page_bytes, cache.num_kv_heads),
        cells=cells.get("packed"),
        loser_cells=cells.get("demoted"),
        page_bytes=cache.page_bytes,
        skipped=skipped_groups_of(
            policy.layers.skip, model_shape.num_full_layers, cache.block_size, cache.page_bytes
        ),
    )
    plan.check()
    return plan


def _lane_plan(
    policy: Policy,
    scorer: Scorer,
    shape: ModelShape,
    cache: CacheShape,
    group: int,
    num_kv_heads: int,
) -> RetentionPlan:
    """Returns the plan of a lane of so many KV heads, each with `group` query heads."""
    shape = replace(shape, num_kv_heads=num_kv_heads, num_heads=group * num_kv_heads)
    lane = replace(cache, num_kv_heads=num_kv_heads)
    return _plan(policy, scorer, shape, lane, _cells(policy, shape, lane))


def _head_bytes(plan: RetentionPlan, cache: CacheShape, cells: dict[str, PackedFormat]) -> int:
    """Bytes of a token in one KV head of staging: the cache's own numbers, or packed."""
    return cells["packed"].bytes_per_head if plan.packs_on_write else cache.bytes_per_head


def _lengths(limit: int, prompt: int | None, output: int | None) -> tuple[int, int]:
    num_prompt = prompt if prompt is not None else max(1, limit // 2)
    if num_prompt >= limit:
        raise ConfigError(
            "--prompt-tokens leaves no room for an answer",
            got=str(num_prompt),
            allowed=f"less than {limit} (--max-model-len)",
        )
    return num_prompt, min(output or _OUTPUT_TOKENS, limit - num_prompt)


def _describe(shape: ModelShape) -> str:
    text = (
        f"{shape.num_full_layers} full-attention layers, {shape.num_kv_heads} KV heads "
        f"of {shape.head_size} channels, {shape.dtype}"
    )
    if shape.num_sliding_layers:
        text += f"; {shape.num_sliding_layers} sliding-window layers are left to vLLM"
    return text


def _kept_table(policy: Policy, scorer: Scorer, plan: RetentionPlan, cache: CacheShape) -> Table:
    table = Table("What is kept", "", box=None, header_style="bold", pad_edge=False)
    _add_precision(table, policy, plan, cache)
    if plan.skipped is not None:
        table.add_row("left alone", _skipped_text(policy, plan.skipped))
    if policy.evict is None:
        table.add_row("how many", heads_text(policy))
        return table
    table.add_row(
        "always", f"the first {policy.sink_tokens} and the newest {policy.recent_tokens} tokens"
    )
    if scorer.selects == "window":
        table.add_row("beyond them", "newer tokens up to the budget, in whole blocks")
        table.add_row("how many", _budget_text(plan))
        table.add_row("when", "from the prompt's end on, block by block")
        table.add_row("where", "in place: every layer and KV head keeps the same tokens")
        return table
    table.add_row(
        "beyond them",
        escape(f"the best by {scorer}, which reads {', '.join(sorted(scorer.needs))}"),
    )
    table.add_row("how many", _budget_text(plan))
    events = ["once at the prompt's end"] if plan.prompt_end else []
    if plan.every_decode_tokens:
        events.append(f"every {plan.every_decode_tokens} generated tokens")
    table.add_row("when", " and ".join(events))
    if policy.heads.splits:
        table.add_row("in which heads", "retrieval heads; streaming heads keep the former alone")
    moved = "quantized once" if isinstance(plan, PackedPlan) else "moved as they are"
    table.add_row("where", f"in a store of the request's own, per layer and KV head, {moved}")
    if isinstance(plan, DemotingPlan):
        table.add_row("the others", "in a second store, at fewer bits: no token is evicted")
    return table


def _skipped_text(policy: Policy, skipped: SkippedGroups) -> str:
    layers = ", ".join(map(str, sorted(policy.layers.skip)))
    return (
        f"layers {layers}, every token, in blocks of {skipped.block_size} tokens (prefix hits end "
        f"there; {skipped.padding:.1%} of a request's memory is padding where the other layers "
        "keep a quarter of its tokens)"
    )


def _add_precision(table: Table, policy: Policy, plan: RetentionPlan, cache: CacheShape) -> None:
    quantize = policy.quantize
    if quantize is None or quantize.is_fp8:
        table.add_row("precision", f"{cache.dtype}, the whole cache")
        return
    table.add_row("precision", f"keys {quantize.keys}, values {quantize.values}")
    if not isinstance(plan, PackedPlan):
        sides = {"keys": quantize.keys, "values": quantize.values}
        exact = " and ".join(side for side, codec in sides.items() if codec == "none") or "nothing"
        table.add_row("exact", f"{exact}: tokens are quantized as they are written, and read so")
        return
    if quantize.losers is not None:
        losers = quantize.losers
        table.add_row("of the others", f"keys {losers.keys}, values {losers.values}")
    newest = f"{plan.residual_tokens} to {plan.residual_tokens + plan.unit - 1}"
    exact = f"{cache.dtype}: the prompt until it ends, then the newest {newest} tokens"
    exact += f", and the first {plan.exact_tokens}" if plan.exact_tokens else ""
    exact += "; all that streaming heads keep" if policy.heads.splits else ""
    table.add_row("exact", exact)


def _budget_text(plan: RetentionPlan) -> str:
    if plan.keep_ratio is None:
        return f"{plan.budget_tokens} tokens; a prompt of up to that many is left whole"
    return (
        f"{plan.keep_ratio:g} of the prompt, at least {plan.least_budget} tokens; a prompt of up "
        "to that many is left whole"
    )


def _blocks_table(
    plan: RetentionPlan,
    page_bytes: tuple[int, int],
    shape: ModelShape,
    num_prompt: int,
    num_output: int,
    cells: dict[str, PackedFormat],
) -> Table:
    total = num_prompt + num_output
    full = -(-total // plan.block_size)
    peak = plan.peak_blocks(num_prompt, num_output)
    steady = plan.steady_blocks(num_prompt, num_output)
    token_bytes = [one // plan.block_size * shape.num_full_layers for one in page_bytes]
    block_bytes = [num_bytes * plan.block_size for num_bytes in token_bytes]
    num_layers = shape.num_full_layers
    if plan.skipped is not None:
        block_bytes[1] = plan.skipped.block_bytes
        num_layers -= plan.skipped.num_layers
    in_store = {} if plan.packs_on_write else cells
    packed = {name: round(one.bytes_per_token * num_layers) for name, one in in_store.items()}
    pools = [_POOL_REQUESTS * full * block_bytes[0] // one for one in block_bytes]
    running = plan.requests_at_once(pools[1], num_prompt, num_output)
    read = plan.physical_tokens(num_prompt, total - 1, total)
    apart = "" if plan.skipped is None else ", skipped layers apart"
    rows = (
        ("bytes per token held", *(f"{num_bytes:,}" for num_bytes in token_bytes)),
        *((f"bytes per token {name}{apart}", "-", f"{size:,}") for name, size in packed.items()),
        (f"tokens that attention reads{apart}", total, read),
        ("bytes of a block", *(f"{num_bytes:,}" for num_bytes in block_bytes)),
        ("blocks at most", full, peak),
        ("blocks while it generates", full, steady),
        ("memory while it generates", _mib(full * block_bytes[0]), _mib(steady * block_bytes[1])),
        (f"blocks in {_mib(pools[0] * block_bytes[0])}", *pools),
        ("requests at once there", _POOL_REQUESTS, running),
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("full cache", justify="right")
    table.add_column("policy", justify="right", style="green")
    for name, before, after in rows:
        table.add_row(str(name), str(before), str(after))
    table.add_row("concurrency gained", "1.00x", f"{running / _POOL_REQUESTS:.2f}x")
    return table


def _advice(plan: RetentionPlan, num_prompt: int, num_output: int) -> str:
    if plan.is_pure:
        return (
            "The prompt, too, lies in packed blocks and is read from them: the longest prompt that "
            "fits grows like the number of requests that run at once."
        )
    keeps_all = isinstance(plan, PackedPlan) and not plan.evicts_tokens
    if isinstance(plan, DemotingPlan):
        keeps_all = plan.losers(num_prompt) > 0
    if not keeps_all and plan.physical_tokens(
        num_prompt, num_prompt + num_output - 1, num_prompt + num_output
    ) == (num_prompt + num_output):
        return "Such a request is within the budget: nothing of it is evicted."
    prefilled = "in packed blocks" if plan.packs_on_write else "exactly"
    return (
        f"The prompt is prefilled {prefilled}, and its peak needs the whole of it: evicting "
        "multiplies the requests that run at once, not the longest prompt."
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _report_conflicts(console: Console, options: dict[str, str]) -> None:
    conflicts = refused_options(options)
    if not conflicts:
        text = "no vLLM options were given after --"
        if options:
            text = "none with the given options, whose spelling vLLM checks"
        console.print(
            f"[bold]Conflicts[/]: {text}. Works with: {'; '.join(ALLOWED)}.", soft_wrap=True
        )
        return
    table = Table("Conflicts", "why", "what to do", box=None, header_style="bold", pad_edge=False)
    for option, row in conflicts:
        table.add_row(f"[red]{option}[/]", row.reason, row.fix)
    console.print(table)
    raise ConflictError(
        "vLLM would refuse to start with this policy",
        got=", ".join(option for option, _ in conflicts),
        fix=conflicts[0][1].fix,
    )
