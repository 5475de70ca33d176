"""The rules between a policy and its scorer: what a ranking goes with, and what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.head_rules import check_heads_beside

if TYPE_CHECKING:
    from vllm_kvpress.config import Policy

__all__ = ["ScorerTraits", "check_policy"]


class ScorerTraits(Protocol):
    """What the rules need to know of a scorer; every `policies.Scorer` has it."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the observation that the score reads."""
        ...

    @property
    def selects(self) -> str:
        """One of "tokens", "window", "streaming", "all"."""
        ...

    @property
    def scope(self) -> str:
        """Either "head" or "layer"."""
        ...

    @property
    def query_window(self) -> int:
        """Last queries that the score reads, in tokens."""
        ...


def check_policy(policy: Policy, traits: ScorerTraits) -> None:
    """Checks the rules between `policy` and its scorer.

    Raises:
        ConfigError: the first broken rule.
    """
    _check_quantize(policy, traits)
    check_heads_beside(policy, traits)
    if policy.evict is None:
        return
    if traits.selects in ("window", "streaming"):
        _check_window_policy(policy)
        return
    label = shown(policy.evict.scorer.label)
    if policy.evict.budget is None:
        raise ConfigError(
            "evict.budget is missing", allowed="a mapping with tokens or keep_ratio",
            fix=f"The scorer {label} ranks tokens: say how many to keep",
        )  # fmt: skip
    every = policy.evict.when.every_decode_tokens
    if "queries" in traits.needs and every > 0:
        raise ConfigError(
            f"evict.when.every_decode_tokens does not go with the scorer {label}, "
            "which needs the prompt's last queries",
            got=shown(every),
            allowed="0",
            fix="Use a scorer without queries (keydiff, knorm, value_key_norm, random)",
        )
    if traits.query_window > policy.recent_tokens:
        raise ConfigError(
            f"recent_tokens is smaller than the observation window of the scorer {label}",
            got=f"{policy.recent_tokens} < {traits.query_window}",
            allowed=f"at least {traits.query_window}",
            fix="Raise recent_tokens or lower evict.scorer.window",
        )


def _check_quantize(policy: Policy, traits: ScorerTraits) -> None:
    quantize = policy.quantize
    if quantize is None or quantize.is_fp8:
        return
    codecs = f"keys: {quantize.keys}, values: {quantize.values}"
    if policy.evict is not None and policy.evict.losers == "demote" and traits.selects == "window":
        raise ConfigError(
            f"evict.losers: demote does not go with the scorer {shown(policy.evict.scorer.label)}, "
            "which keeps a window in place",
            allowed="losers: drop, or a scorer that ranks tokens",
            fix="Use the scorer logquant to demote by position",
        )
    if policy.evict is not None and policy.evict.when.every_decode_tokens:
        raise ConfigError(
            "evict.when.every_decode_tokens does not go with packed codecs: a packed store only "
            "grows, and its tokens are not ranked again",
            got=codecs,
            allowed="every_decode_tokens: 0, or quantize fp8",
            fix="Set evict.when.every_decode_tokens to 0",
        )
    if traits.selects == "window" and not policy.packs_on_write:
        assert policy.evict is not None
        codecs += f", residual_tokens: {quantize.residual}, exact_sinks: {quantize.exact_sinks}"
        codecs += f", layers.skip: {list(policy.layers.skip)}"
        raise ConfigError(
            f"the scorer {shown(policy.evict.scorer.label)} keeps a window in place, so tokens "
            "must be packed as they are written",
            got=codecs.lower(),
            allowed="fp8, or keys int8, int4, none without residual_tokens, exact_sinks and "
            "layers.skip",
            fix="Use int8 or int4 and drop those options, or use a scorer that ranks tokens",
        )


def _check_window_policy(policy: Policy) -> None:
    assert policy.evict is not None
    label = shown(policy.evict.scorer.label)
    when = policy.evict.when
    if policy.recent_tokens == 0:
        raise ConfigError(
            f"recent_tokens is 0 with the scorer {label}, which keeps sinks and recent tokens only",
            allowed="at least 1",
        )
    if not when.prompt_end or when.every_decode_tokens:
        raise ConfigError(
            f"evict.when does not go with the scorer {label}, which acts on every block from the "
            "prompt's end on",
            got=shown(when.model_dump()),
            allowed="prompt_end: true, every_decode_tokens: 0",
            fix="Remove evict.when",
        )
