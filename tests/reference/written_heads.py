"""Both at once: retrieval and streaming heads, and tokens that are rounded as they are written."""

from dataclasses import dataclass
from typing import Any

from reference.heads import HeadRule, HeadRun
from reference.written import WrittenRule, WrittenRun

__all__ = ["WrittenHeadRule", "WrittenHeadRun"]


@dataclass(frozen=True)
class WrittenHeadRule(HeadRule, WrittenRule):
    """A head plan over tokens that are rounded as they are written."""

    def run(self, model: Any, prompt_len: int, *args: Any) -> "WrittenHeadRun":
        return WrittenHeadRun(model, self, prompt_len, *args)


class WrittenHeadRun(HeadRun, WrittenRun):
    """The cache of one request: rounded numbers, masked head by head."""

    rule: WrittenHeadRule
