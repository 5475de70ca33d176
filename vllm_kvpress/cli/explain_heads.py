"""The part of `explain` for head plans: which heads retrieve, and what a request then holds."""

from rich.console import Console
from rich.table import Table

from vllm_kvpress.config import Policy
from vllm_kvpress.head_figures import HeadFigures
from vllm_kvpress.policies.heads import HeadPlan

__all__ = ["explain_heads", "heads_text"]

# The pool of the concurrency figure: a server's worth of memory, in uncompressed requests.
_POOL_REQUESTS = 10


def explain_heads(
    console: Console,
    policy: Policy,
    heads: HeadPlan,
    figures: HeadFigures,
    head_bytes: tuple[int, int],
    lengths: tuple[int, int],
    num_ranks: int,
) -> None:
    """Prints a head plan and its figures for one request on one rank.

    Args:
        console: Where to print.
        policy: The policy.
        heads: Its plan for the model.
        figures: What requests then hold.
        head_bytes: Bytes of a token in one KV head, without the policy and with it.
        lengths: Prompt and generated tokens.
        num_ranks: Ranks of tensor parallelism.
    """
    groups = figures.groups
    _print_labels(console, policy, heads, figures.retrieval_text)
    promoted = ", ".join(f"{layer}.{head}" for layer, head in groups.promoted)
    if promoted:
        console.print(
            f"{len(groups.promoted)} more {figures.retrieval_text}, so that "
            + ("blocks need less padding" if num_ranks == 1 else "ranks and blocks are alike")
            + f"; as layer.head{'' if num_ranks == 1 else ' of the first rank'}: {promoted}",
            soft_wrap=True,
        )
    console.print(
        f"A block holds {float(groups.width):g} heads, {figures.padding:.1%} of it is padding; "
        f"cache groups: {groups.runs.retrieval} of retrieval heads, {groups.runs.streaming} of "
        "streaming heads",
        soft_wrap=True,
    )
    _print_store(console, figures)
    num_prompt, num_output = lengths
    console.print(
        f"\n[bold]One request of {num_prompt} prompt and {num_output} generated tokens, block size "
        f"{figures.block_size}, {figures.in_flight_tokens} tokens in flight"
        + (f", on each of {num_ranks} ranks[/]" if num_ranks > 1 else "[/]"),
        soft_wrap=True,
    )
    console.print(_table(figures, head_bytes, num_prompt, num_output))
    console.print(_advice(figures, num_prompt, num_output) + "\n", soft_wrap=True)


def _print_store(console: Console, figures: HeadFigures) -> None:
    tokens = figures.tokens_per_store_block
    if tokens is None:
        return
    text = f"A store's block holds {tokens:.4g} tokens of its heads, an exact one "
    text += f"{figures.block_size}"
    if tokens <= figures.block_size:
        text += ": quantizing saves nothing where layers have so few retrieval heads. Use a larger "
        text += "--block-size, or fewer bits"
    console.print(text, soft_wrap=True)


def _advice(figures: HeadFigures, num_prompt: int, num_output: int) -> str:
    drops, streams = figures.drops(num_prompt, num_output)
    packs = figures.tokens_per_store_block is not None
    advice = []
    if not figures.groups.runs.streaming:
        advice.append("No head streams: every rank has a retrieval head in each place.")
    elif streams:
        advice.append(
            "Blocks of streaming heads leave while the prompt is computed: longer prompts fit, too."
        )
    if drops:
        advice.append("Retrieval heads hold the whole prompt until it ends, then their budget.")
    elif packs:
        advice.append("Retrieval heads hold the whole prompt until it ends, then it is packed.")
    if not (drops or streams):
        advice.append("Nothing of such a request is evicted: it is within window and budget.")
    return " ".join(advice)


def heads_text(policy: Policy) -> str:
    """Returns how many tokens a policy without `evict` keeps; its head plan is one of labels."""
    labels = policy.heads.labels
    if labels is None:
        return "every token"
    if any("1" in row for row in labels):
        return "every token, in some heads"
    return "sinks and a window, in every head and for every query, the prompt's own included"


def _print_labels(console: Console, policy: Policy, heads: HeadPlan, retrieval: str) -> None:
    window = (
        f"the first {policy.sink_tokens} and the newest {policy.recent_tokens} tokens, in whole "
        "blocks"
    )
    if policy.heads.compensation:
        window += ", and one token for all others"
    if heads.num_retrieval == 0:
        console.print(f"\n[bold]Every KV head keeps[/] {window}.", soft_wrap=True)
        return
    console.print(
        f"\n[bold]{heads.num_retrieval} of {heads.num_heads} KV heads {retrieval}[/], the "
        f"others {window}. By layer, 1 = "
        + ("every token:" if policy.evict is None else "a retrieval head:"),
        soft_wrap=True,
    )
    for layer, row in enumerate(heads.labels):
        console.print(f"{layer:4}  {row}")


def _table(
    figures: HeadFigures, head_bytes: tuple[int, int], num_prompt: int, num_output: int
) -> Table:
    groups = figures.groups
    full_block, block = (
        int(figures.block_size * one * width)
        for one, width in zip(head_bytes, (groups.num_heads, groups.width), strict=True)
    )
    num_full = -(-(num_prompt + num_output) // figures.block_size)
    pool = _POOL_REQUESTS * num_full * full_block
    running = figures.requests_at_once(pool // block, num_prompt, num_output)
    rows = (
        (
            "bytes per further token",
            full_block,
            int(figures.blocks_per_token * block),
        ),
        (
            "memory at most",
            num_full * full_block,
            figures.peak_blocks(num_prompt, num_output) * block,
        ),
        (
            "memory while it generates",
            num_full * full_block,
            figures.steady_blocks(num_prompt, num_output) * block,
        ),
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("full cache", justify="right")
    table.add_column("policy", justify="right", style="green")
    (name, before, after), *memory = rows
    table.add_row(name, f"{before // figures.block_size:,}", f"{after:,}")
    for name, before, after in memory:
        table.add_row(name, _mib(before), _mib(after))
    table.add_row(f"requests at once in {_mib(pool)}", str(_POOL_REQUESTS), str(running))
    table.add_row("concurrency gained", "1.00x", f"{running / _POOL_REQUESTS:.2f}x")
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
