"""What a policy is made of: pure functions of tensors. Imports torch, never vLLM."""

from vllm_kvpress.config import Policy
from vllm_kvpress.policies.codecs import store_format
from vllm_kvpress.policies.heads.windowed import check_windowed
from vllm_kvpress.policies.observation import LayerObservation
from vllm_kvpress.policies.registry import known_scorers, make_scorer
from vllm_kvpress.policies.scorer import KeepAll, Scorer
from vllm_kvpress.policies.selection import select_tokens
from vllm_kvpress.scorer_rules import check_policy

__all__ = [
    "LayerObservation",
    "Scorer",
    "known_scorers",
    "resolve",
    "select_tokens",
    "store_format",
]


def resolve(policy: Policy) -> Scorer:
    """Returns the policy's scorer, with every rule between the two checked.

    Raises:
        ConfigError: the scorer is unknown or unusable, or does not go with the policy.
    """
    scorer = KeepAll() if policy.evict is None else make_scorer(policy.evict.scorer)
    if scorer.selects == "streaming":
        check_windowed(policy)
    check_policy(policy, scorer)
    return scorer
