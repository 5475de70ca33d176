"""The picture of a pattern: layers by KV heads. matplotlib is imported when it is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from vllm_kvpress.errors import KVPressError

__all__ = ["check_matplotlib", "draw_heatmap"]

# Beyond this many, numbers in the cells are too small to read.
_MOST_NUMBERS = 96


def check_matplotlib() -> None:
    """Checks that the picture can be drawn.

    Raises:
        KVPressError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise KVPressError(
            "matplotlib is not installed, and the heat map needs it",
            fix="pip install 'vllm-kvpress[eval]', or give --no-plot",
        )


def draw_heatmap(scores: Sequence[Sequence[float]], title: str, path: Path) -> None:
    """Writes a PNG of scores in [0, 1], [num_layers][num_kv_heads]; same scores, same file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_layers, num_kv_heads = len(scores), len(scores[0])
    size = (1.8 + 0.55 * num_kv_heads, 1.2 + max(1.6, 0.34 * num_layers))
    figure, axis = pyplot.subplots(figsize=size)
    image = axis.imshow(scores, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_xlabel("KV head")
    axis.set_ylabel("layer")
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(0, num_kv_heads, max(1, num_kv_heads // 8)))
    axis.set_yticks(range(0, num_layers, max(1, num_layers // 16)))
    if num_layers * num_kv_heads <= _MOST_NUMBERS:
        for layer, row in enumerate(scores):
            for head, score in enumerate(row):
                color = "black" if score > 0.6 else "white"
                axis.text(
                    head, layer, f"{score:.2f}", ha="center", va="center", color=color, fontsize=8
                )
    figure.colorbar(image, ax=axis, label="score (higher: keep every token)")
    # No date and no version inside.
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
