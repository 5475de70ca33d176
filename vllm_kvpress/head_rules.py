"""What a head plan goes with, and what it does not: the rules beside those of `config.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvpress.errors import ConfigError, shown

if TYPE_CHECKING:
    from vllm_kvpress.config import Policy, ScorerTraits
    from vllm_kvpress.schema import Evict, Quantize

__all__ = ["check_heads_beside"]


def check_heads_beside(policy: Policy, traits: ScorerTraits) -> None:
    """Checks that a head plan goes with the rest of its policy.

    Raises:
        ConfigError: the first broken rule.
    """
    if not policy.heads.splits:
        return
    if policy.heads.compensation and policy.quantize is not None:
        raise ConfigError(
            "heads.compensation does not go with quantize: it adds up keys and values in the "
            "model's own numbers",
            got=f"keys: {policy.quantize.keys}, values: {policy.quantize.values}",
            allowed="quantize: null",
            fix="Remove one of the two",
        )
    if policy.heads.compensation and policy.evict is not None:
        raise ConfigError(
            "heads.compensation does not go with evict in this version",
            got=f"the scorer {shown(policy.evict.scorer.label)}",
            allowed="a head plan without evict",
            fix="Set heads.compensation to false, or remove evict",
        )
    if policy.evict is not None:
        _check_evicting_heads(policy.evict, policy.quantize, traits)
    quantize = policy.quantize
    if quantize is None or quantize.is_fp8:
        return
    if not quantize.packs_on_write or quantize.losers is not None:
        raise ConfigError(
            "heads.plan goes with codecs that pack tokens as they are written only",
            got=f"keys: {quantize.keys}, residual_tokens: {quantize.residual}, exact_sinks: "
            f"{str(quantize.exact_sinks).lower()}"
            + ("" if quantize.losers is None else ", and losers"),
            allowed="fp8, or keys int8, int4, none without residual_tokens, exact_sinks and losers",
            fix="Use int8 or int4 and drop those options, or heads.plan all",
        )


def _check_evicting_heads(evict: Evict, quantize: Quantize | None, traits: ScorerTraits) -> None:
    """What eviction inside the retrieval heads takes."""
    beside = {
        f"the scorer {shown(evict.scorer.label)}, which keeps a window": traits.selects != "tokens",
        f"the scorer {shown(evict.scorer.label)}, which ranks by all heads of a layer":
            traits.scope == "layer",
        f"the scorer {shown(evict.scorer.label)}, which reads positions":
            "positions" in traits.needs,
        "evict.when.every_decode_tokens above 0": evict.when.every_decode_tokens > 0,
        "evict.losers: demote": evict.losers != "drop",
        "evict and quantize at once": quantize is not None,
    }  # fmt: skip
    for what, given in beside.items():
        if given:
            raise ConfigError(
                f"heads.plan does not go with {what} in this version",
                allowed="a scorer that ranks each head's tokens by keys, values, queries, once, at "
                "the prompt's end, over the model's own dtype",
                fix="Change it, or set heads.plan to all",
            )
