"""A window that holds in the prompt, too (`prefill: windowed`): a plan whose heads all stream."""

from vllm_kvpress.config import Heads, Policy
from vllm_kvpress.errors import ConfigError
from vllm_kvpress.policies.heads.pattern import HeadShape

__all__ = ["all_streaming", "check_windowed"]


def check_windowed(policy: Policy) -> None:
    """Checks the rules of a policy whose window holds in the prompt, too.

    Raises:
        ConfigError: the first broken one.
    """
    assert policy.evict is not None
    what = "evict.scorer.prefill: windowed"
    budget = policy.evict.budget
    if budget is not None and budget.tokens is None:
        raise ConfigError(
            f"{what} needs a window that is known before the prompt's end",
            got=f"evict.budget.keep_ratio: {budget.keep_ratio}",
            allowed="evict.budget.tokens, or no budget: the window is then recent_tokens",
            fix="Set evict.budget.tokens, or prefill: exact",
        )
    quantize = policy.quantize
    waits = quantize is not None and not (quantize.is_fp8 or quantize.packs_on_write)
    beside = {
        "heads.plan": (policy.heads.plan, policy.heads.splits),
        "evict.losers": (policy.evict.losers, policy.evict.losers != "drop"),
        "codecs that wait for the prompt's end": ("" if quantize is None else quantize.keys, waits),
        "layers.skip": (list(policy.layers.skip), bool(policy.layers.skip)),
    }
    found = {other: str(got) for other, (got, given) in beside.items() if given}
    if found:
        others = ", ".join(found)
        raise ConfigError(
            f"{what} does not go with {others}: all heads of all layers keep the window alone",
            got=", ".join(found.values()),
            allowed="nothing beside it, or quantize with fp8, int8 or int4",
            fix=f"Remove {others}, or set prefill: exact",
        )


def all_streaming(policy: Policy, shape: HeadShape) -> Policy:
    """Returns the head plan that `policy` means for a model: no head retrieves."""
    assert policy.evict is not None
    budget, recent = policy.evict.budget, policy.recent_tokens
    if budget is not None:
        assert budget.tokens is not None, "check_windowed refuses a share of the prompt"
        recent = budget.tokens - policy.sink_tokens
    labels = ("0" * shape.num_kv_heads,) * shape.num_layers
    heads = Heads(plan="inline", labels=labels)
    update = {"recent_tokens": recent, "evict": None, "heads": heads}
    return policy.model_copy(update=update)
