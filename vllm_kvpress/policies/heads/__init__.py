"""Head plans: which KV heads keep every token, and which stream (sinks and recent tokens alone)."""

from vllm_kvpress.policies.heads.pattern import (
    HeadPattern,
    HeadShape,
    read_pattern,
    write_pattern,
)
from vllm_kvpress.policies.heads.plan import HeadPlan
from vllm_kvpress.policies.heads.resolve import check_heads, inline_heads, resolve_heads

__all__ = [
    "HeadPattern",
    "HeadPlan",
    "HeadShape",
    "check_heads",
    "inline_heads",
    "read_pattern",
    "resolve_heads",
    "write_pattern",
]
