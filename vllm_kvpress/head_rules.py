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
    if policy.heads.compensation:
        _check_compensation(policy.evict, policy.quantize)
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


def _check_compensation(evict: Evict | None, quantize: Quantize | None) -> None:
    """What the token of a streaming head, which stands for the others, takes."""
    given = {}
    if quantize is not None:
        given["quantize"] = f"keys: {quantize.keys}, values: {quantize.values}"
    if evict is not None:
        given["evict"] = f"the scorer {shown(evict.scorer.label)}"
    if given:
        raise ConfigError(
            f"heads.compensation does not go with {' and '.join(given)} in this version: it adds "
            "up keys and values in the model's own numbers",
            got=", ".join(given.values()),
            allowed="a head plan with quantize: null and evict: null",
            fix=f"Set heads.compensation to false, or remove {' and '.join(given)}",
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
        # To demote is to quantize: said once.
        "evict and quantize at once": quantize is not None and evict.losers == "drop",
    }  # fmt: skip
    found = [what for what, given in beside.items() if given]
    if found:
        raise ConfigError(
            f"heads.plan does not go with {'; nor with '.join(found)}",
            got=f"the scorer {shown(evict.scorer.label)}, every_decode_tokens: "
            f"{evict.when.every_decode_tokens}, losers: {evict.losers}"
            + ("" if quantize is None else f", keys: {quantize.keys}, values: {quantize.values}"),
            allowed="in this version a scorer that ranks each head's tokens by keys, values, "
            "queries, once, at the prompt's end, over the model's own dtype",
            fix="Change that, or set heads.plan to all",
        )
