"""Both at once: stores of rounded tokens in retrieval heads, and exact streaming heads."""

from dataclasses import dataclass
from typing import Any

from reference.heads import HeadRule, HeadRun
from reference.packed import DemotingRule, DemotingRun, PackedRule, PackedRun

__all__ = ["DemotingHeadRule", "DemotingHeadRun", "PackedHeadRule", "PackedHeadRun"]


@dataclass(frozen=True)
class PackedHeadRule(HeadRule, PackedRule):
    """A head plan whose retrieval heads round, and may evict, what enters their store."""

    def run(self, model: Any, prompt_len: int, *args: Any) -> "PackedHeadRun":
        return PackedHeadRun(model, self, prompt_len, *args)


class PackedHeadRun(HeadRun, PackedRun):
    """The cache of one request: masked head by head, rounded in retrieval heads alone."""

    rule: PackedHeadRule


@dataclass(frozen=True)
class DemotingHeadRule(HeadRule, DemotingRule):
    """A head plan whose retrieval heads round what a scorer rejects more coarsely."""

    def run(self, model: Any, prompt_len: int, *args: Any) -> "DemotingHeadRun":
        return DemotingHeadRun(model, self, prompt_len, *args)


class DemotingHeadRun(HeadRun, DemotingRun):
    """The cache of one request: masked in streaming heads, rounded in two ways in the others."""

    rule: DemotingHeadRule
