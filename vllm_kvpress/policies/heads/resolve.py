"""From the `heads` of a policy to the plan of a model; pattern files are read here alone.

The front end calls `inline_heads` once a model is known, so that an engine's workers get labels and
no paths.
"""

import random
from pathlib import Path

from vllm_kvpress.config import Heads, Policy
from vllm_kvpress.errors import ConfigError
from vllm_kvpress.policies.heads.pattern import HeadPattern, HeadShape, read_pattern
from vllm_kvpress.policies.heads.plan import HeadPlan
from vllm_kvpress.policies.heads.windowed import all_streaming
from vllm_kvpress.policies.registry import make_scorer

__all__ = ["check_heads", "inline_heads", "resolve_heads"]


def check_heads(heads: Heads) -> None:
    """Checks what can be checked before the model is known: the pattern file, if one is needed.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    if heads.reads_file:
        _read(heads)


def resolve_heads(heads: Heads, shape: HeadShape) -> HeadPlan:
    """Returns which KV heads of a model retrieve; with plan `all`, every one.

    Args:
        heads: the section of the policy.
        shape: the model's.

    Raises:
        ConfigError: the plan does not fit the model, its pattern file is unusable, or it leaves no
            head to stream.
    """
    if heads.plan == "all":
        return HeadPlan(((True,) * shape.num_kv_heads,) * shape.num_layers)
    if heads.plan == "inline":
        return _inline(heads, shape)
    scores = _scores(heads, shape)
    num_heads = shape.num_layers * shape.num_kv_heads
    if heads.threshold is not None:
        num_retrieval = sum(score >= heads.threshold for row in scores for score in row)
        asked = f"heads.threshold {heads.threshold:g}"
    else:
        assert heads.retrieval_ratio is not None
        num_retrieval = int(heads.retrieval_ratio * num_heads + 0.5)
        asked = f"heads.retrieval_ratio {heads.retrieval_ratio:g}"
    if num_retrieval == num_heads:
        raise ConfigError(
            f"{asked} leaves no head to stream: the plan does nothing",
            got=f"{num_retrieval} of {num_heads} KV heads retrieve",
            fix="Raise heads.threshold, or lower heads.retrieval_ratio",
        )
    return HeadPlan.from_scores(scores, num_retrieval)


def inline_heads(policy: Policy, shape: HeadShape) -> Policy:
    """Returns `policy` with its head plan resolved for a model: plan `inline`, or `all` unchanged.

    A window that holds in the prompt, too, becomes a plan whose heads all stream.

    Raises:
        ConfigError: as `resolve_heads`.
    """
    if policy.evict is not None and make_scorer(policy.evict.scorer).selects == "streaming":
        return all_streaming(policy, shape)
    heads = policy.heads
    if heads.plan == "all":
        return policy
    labels = resolve_heads(heads, shape).labels
    inline = Heads(plan="inline", labels=labels, compensation=heads.compensation)
    return policy.model_copy(update={"heads": inline})


def _inline(heads: Heads, shape: HeadShape) -> HeadPlan:
    assert heads.labels is not None
    plan = HeadPlan.from_labels(heads.labels)
    if (plan.num_layers, plan.num_kv_heads) != (shape.num_layers, shape.num_kv_heads):
        raise ConfigError(
            "heads.labels has not the model's shape",
            got=f"{plan.num_layers} layers of {plan.num_kv_heads} KV heads",
            allowed=f"{shape.num_layers} layers of {shape.num_kv_heads} KV heads",
        )
    return plan


def _scores(heads: Heads, shape: HeadShape) -> list[list[float]]:
    """[num_layers][num_kv_heads], higher = retrieval."""
    if heads.plan == "random":
        draw = random.Random(f"heads/{heads.seed}")
        return [[draw.random() for _ in range(shape.num_kv_heads)] for _ in range(shape.num_layers)]
    return _read(heads).for_model(shape)


def _read(heads: Heads) -> HeadPattern:
    if heads.pattern_file is None:
        raise ConfigError(
            f"heads.file is missing: plan {heads.plan} ranks heads by a pattern file",
            allowed="a path that ends in .tsv",
            fix=f"Make one with `vllm-kvpress calibrate-heads --model MODEL --method {heads.plan} "
            "--out FILE.tsv` and give it as heads.file, or by name as in POLICY:file=FILE.tsv",
        )
    return read_pattern(Path(heads.pattern_file))
