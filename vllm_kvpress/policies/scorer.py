"""The contract of a scorer: what ranks the tokens of one layer, one KV head at a time."""

from typing import ClassVar, Literal, Protocol

import torch

from vllm_kvpress.policies.observation import LayerObservation

__all__ = ["NEEDS", "KeepAll", "Scorer"]

NEEDS = frozenset({"keys", "values", "queries", "positions"})
"""What a scorer may ask for."""


class Scorer(Protocol):
    """Ranks tokens; frozen, made once per engine from the parameters in the policy.

    Deriving from this class is optional and gives the defaults below. The parameters are those of
    the constructor: a frozen dataclass whose `__post_init__` raises ValueError is enough.
    `score` is pure: the same observation gives the same scores on every rank; it writes nothing.

    Attributes:
        needs: fields of the observation that `score` reads, a subset of `NEEDS`. The engine
            fills no others, and refuses at start what it cannot fill.
        scope: "head" if the scores of a KV head depend on that head alone, so that every rank
            scores its own heads; "layer" if they depend on all heads of the layer.
        selects: "tokens" if the tokens with the highest scores are kept; "window" if sinks and
            recent tokens alone are, by position, from the prompt's end on, and `score` is never
            called; "streaming" if that rule holds in the prompt, too; "all" of a policy that
            evicts nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    scope: ClassVar[Literal["head", "layer"]] = "head"

    @property
    def selects(self) -> Literal["tokens", "window", "streaming", "all"]:
        """Who decides what is kept."""
        return "tokens"

    @property
    def query_window(self) -> int:
        """How many of the last queries `score` reads, in tokens; 0 if none."""
        return 0

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Returns float32 [num_kv_heads, num_tokens] on the keys' device; higher = keep.

        +inf means "keep first of all", -inf "drop first of all". NaN ends the engine.
        """
        ...


class KeepAll(Scorer):
    """What a policy without `evict` has for a scorer: nothing is ranked, nothing is dropped."""

    needs: ClassVar[frozenset[str]] = frozenset()
    selects: ClassVar[Literal["all"]] = "all"

    def __repr__(self) -> str:
        return "none, nothing is ranked"

    def score(self, observation: LayerObservation) -> torch.Tensor:
        """Never called."""
        raise AssertionError("a policy without evict ranks no tokens")
