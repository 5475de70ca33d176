"""The result of a head plan: one yes or no for each KV head of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["HeadPlan"]

RETRIEVAL, STREAMING = "1", "0"


@dataclass(frozen=True)
class HeadPlan:
    """Which KV heads of a model keep every token.

    Attributes:
        retrieval: [num_layers][num_kv_heads], true for a retrieval head. Layers are all of the
            model's, KV heads those of the whole model, before they are split over ranks.
    """

    retrieval: tuple[tuple[bool, ...], ...]

    @classmethod
    def from_labels(cls, labels: Sequence[str]) -> "HeadPlan":
        """Returns the plan that strings of 0 and 1 (retrieval), one a layer, describe."""
        return cls(tuple(tuple(label == RETRIEVAL for label in row) for row in labels))

    @classmethod
    def from_scores(cls, scores: Sequence[Sequence[float]], num_retrieval: int) -> "HeadPlan":
        """Returns the plan in which the `num_retrieval` heads with the highest scores retrieve.

        Equal scores: the head of the earlier layer first, then the one of lower index.

        Args:
            scores: [num_layers][num_kv_heads], ranked over all layers at once.
            num_retrieval: how many.
        """
        places = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
        first = set(sorted(places, key=lambda at: -scores[at[0]][at[1]])[:num_retrieval])
        return cls(
            tuple(
                tuple((layer, head) in first for head in range(len(row)))
                for layer, row in enumerate(scores)
            )
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.retrieval)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return len(self.retrieval[0])

    @property
    def num_heads(self) -> int:
        """KV heads of the model, over all layers."""
        return self.num_layers * self.num_kv_heads

    @property
    def num_retrieval(self) -> int:
        """Retrieval heads of the model, over all layers."""
        return sum(map(sum, self.retrieval))

    @property
    def labels(self) -> tuple[str, ...]:
        """One string a layer: 1 for a retrieval head, 0 for a streaming head."""
        return tuple(
            "".join(RETRIEVAL if head else STREAMING for head in row) for row in self.retrieval
        )
