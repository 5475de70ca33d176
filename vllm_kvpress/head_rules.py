"""What a head plan goes with, and what it does not: rules beside those of `scorer_rules.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvpress.errors import ConfigError, shown

if TYPE_CHECKING:
    from vllm_kvpress.config import Policy
    from vllm_kvpress.schema import Evict, Quantize
    from vllm_kvpress.scorer_rules import ScorerTraits

__all__ = ["check_heads_beside"]


def check_heads_beside(policy: Policy, traits: ScorerTraits) -> None:
    """Checks that a head plan goes with the rest of its policy.

    Raises:
        ConfigError: the first broken rule.
    """
    if not policy.heads.splits:
        return
    if policy.heads.compensation and policy.quantize is not None:
        _check_compensation(policy, policy.quantize)
    if policy.evict is not None:
        _check_evicting_heads(policy.evict, traits)
    if policy.heads_store:
        _check_retrieval_heads(policy)


def _check_retrieval_heads(policy: Policy) -> None:
    """What acts in retrieval heads alone needs one."""
    labels, ratio, quantize = policy.heads.labels, policy.heads.retrieval_ratio, policy.quantize
    retrieves = ratio != 0 if labels is None else any("1" in row for row in labels)
    if retrieves:
        return
    done = "evicted" if policy.evict is not None else "quantized"
    got = "a head plan without retrieval heads"
    if quantize is not None:
        got += f", keys: {quantize.keys}, values: {quantize.values}"
    raise ConfigError(
        f"nothing would be {done}: streaming heads keep their window, and keep it exact beside "
        "evict and beside codecs that wait for channel groups or a residual",
        got=got,
        allowed="a plan with retrieval heads; a head plan alone; or int8, int4 without "
        "residual_tokens, exact_sinks and evict, which pack every head",
        fix="Raise heads.retrieval_ratio, or remove evict and such a codec",
    )


def _check_compensation(policy: Policy, quantize: Quantize) -> None:
    """Streaming heads must stay exact: one token's sums stand for what they drop."""
    if policy.heads_store and not quantize.is_fp8:
        return
    raise ConfigError(
        "heads.compensation adds up keys and values in the model's own numbers, and this codec "
        "rounds those of streaming heads, too",
        got=f"keys: {quantize.keys}, values: {quantize.values}",
        allowed="quantize: null; or codecs that retrieval heads alone take: those that wait "
        "(kivi, residual_tokens, exact_sinks), any packed codec beside evict",
        fix="Set heads.compensation to false, or use such a codec",
    )


def _check_evicting_heads(evict: Evict, traits: ScorerTraits) -> None:
    """What eviction inside the retrieval heads takes."""
    beside = {
        f"the scorer {shown(evict.scorer.label)}, which keeps a window": traits.selects != "tokens",
        f"the scorer {shown(evict.scorer.label)}, which ranks by all heads of a layer":
            traits.scope == "layer",
        "evict.when.every_decode_tokens above 0": evict.when.every_decode_tokens > 0,
    }  # fmt: skip
    found = [what for what, given in beside.items() if given]
    if found:
        raise ConfigError(
            f"heads.plan does not go with {'; nor with '.join(found)}",
            got=f"the scorer {shown(evict.scorer.label)}, every_decode_tokens: "
            f"{evict.when.every_decode_tokens}",
            allowed="a scorer that ranks each head's tokens, once, at the prompt's end",
            fix="Change that, or set heads.plan to all",
        )
