"""Both at once: stores of rounded tokens in retrieval heads, and exact streaming heads."""

from dataclasses import dataclass
from typing import Any

from reference.heads import HeadRule, HeadRun
from reference.packed import PackedRule, PackedRun

__all__ = ["PackedHeadRule", "PackedHeadRun"]


@dataclass(frozen=True)
class PackedHeadRule(HeadRule, PackedRule):
    """A head plan whose retrieval heads round, and may evict, what enters their store."""

    def run(self, model: Any, prompt_len: int, *args: Any) -> "PackedHeadRun":
        return PackedHeadRun(model, self, prompt_len, *args)


class PackedHeadRun(HeadRun, PackedRun):
    """The cache of one request: masked head by head, rounded in retrieval heads alone."""

    rule: PackedHeadRule
