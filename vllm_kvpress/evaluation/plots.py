"""The plots of an evaluation. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_kvpress.errors import KVPressError
from vllm_kvpress.evaluation.grid import FLOOR, FULL, ratio_text
from vllm_kvpress.evaluation.records import Record, Results, by_cell
from vllm_kvpress.evaluation.tables import memory_share

__all__ = ["check_matplotlib", "write_plots"]

_Variant = tuple[str, float | None]

_LEGEND_COLUMNS = 44
# matplotlib's own, without the grey, which is the floor's.
_COLOURS = [
    f"tab:{name}"
    for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
]


def check_matplotlib() -> None:
    """Checks that plots can be drawn.

    Raises:
        KVPressError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise KVPressError(
            "matplotlib is not installed, and plots need it",
            fix="pip install 'vllm-kvpress[eval]', or give --no-plots",
        )


def write_plots(results: Results, folder: Path) -> list[str]:
    """Draw what the results have data for; return the files' names.

    Raises:
        KVPressError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []
    for name, draw in _PLOTS.items():
        figure = draw(pyplot, results.records)
        if figure is not None:
            # No date and no version inside: the same results give the same file.
            figure.savefig(folder / name, dpi=150, bbox_inches="tight", metadata={"Software": None})
            pyplot.close(figure)
            names.append(name)
    return names


def _draw_accuracy(pyplot: Any, records: Sequence[Record]) -> Any:
    """Accuracy against memory kept: a panel a cell, a line a policy."""
    cells = by_cell(records)
    if not any(record["policy"] != FULL for record in records):
        return None
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False, sharey=True
    )
    panels = list(axes.flat)
    for axis in panels[len(cells) :]:
        axis.set_visible(False)
    for axis, ((task, length), cell) in zip(panels, cells.items(), strict=False):
        _draw_cell(axis, cell)
        axis.set_title(f"{task}, {length} tokens")
        axis.set_xlabel("memory of a request, share of full cache")
    for row in axes:
        row[0].set_ylabel("right answers")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(lines, labels, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def legend_text(policy: str) -> str:
    """Return a policy in lines short enough for a legend, files without their folders."""
    short = re.sub(r"[^=,:]*/", "", policy)
    lines = textwrap.wrap(
        short.replace(",", ", "), _LEGEND_COLUMNS, break_long_words=False, break_on_hyphens=False
    )
    return "\n  ".join(line.replace(", ", ",") for line in lines)


def _draw_cell(axis: Any, cell: Sequence[Record]) -> None:
    axis.set_prop_cycle(color=_COLOURS)
    for policy in dict.fromkeys(record["policy"] for record in cell):
        points = [
            (share, record["accuracy"], record["standard_error"])
            for record in cell
            if record["policy"] == policy and (share := memory_share(cell, record)) is not None
        ]
        if policy == FULL:
            axis.axhline(points[0][1], color="black", linestyle="--", label="full cache")
            continue
        if not points:
            continue
        places, heights, errors = zip(*sorted(points), strict=True)
        style = {"color": "grey", "linestyle": ":"} if policy == FLOOR else {}
        style |= {"marker": "o", "capsize": 3, "label": legend_text(policy)}
        axis.errorbar(places, heights, errors, **style)
    axis.set_xlim(0, 1.05)
    axis.set_ylim(-0.05, 1.08)
    axis.grid(alpha=0.3)


def _draw_heat_map(pyplot: Any, records: Sequence[Record]) -> Any:
    """Right answers to single needles by depth and length: a panel a policy and ratio."""
    needles = [record for record in records if record["task"] == "needle"]
    if not needles:
        return None
    variants = _variants(needles)
    lengths = sorted({record["length"] for record in needles})
    depths = sorted({depth for record in needles for depth in record["depths"]})
    columns = min(4, len(variants))
    rows = -(-len(variants) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(2.9 * columns, 2.9 * rows), squeeze=False
    )
    panels = list(axes.flat)
    image = None
    for axis in panels[len(variants) :]:
        axis.set_visible(False)
    for axis, variant in zip(panels, variants, strict=False):
        image = axis.imshow(
            _heat(needles, variant, lengths, depths), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"
        )
        axis.set_title(_label(variant), fontsize=9)
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths], fontsize=7)
    figure.supxlabel("prompt tokens")
    figure.supylabel("depth of the needle")
    figure.tight_layout()
    figure.colorbar(image, ax=panels, label="right answers")
    return figure


def _heat(
    needles: Sequence[Record], variant: _Variant, lengths: Sequence[int], depths: Sequence[float]
) -> list[list[float]]:
    """Mean scores [depth][length]; not a number where nothing was asked."""
    scores: dict[tuple[float, int], list[float]] = {}
    for record in needles:
        if (record["policy"], record["keep_ratio"]) == variant:
            for depth, score in zip(record["depths"], record["scores"], strict=True):
                scores.setdefault((depth, record["length"]), []).append(score)
    empty = [float("nan")]
    return [[fmean(scores.get((depth, n), empty)) for n in lengths] for depth in depths]


def _draw_pareto(pyplot: Any, records: Sequence[Record]) -> Any:
    """Mean accuracy against mean memory of every policy and ratio, and those that none beats."""
    points = pareto_points(records)
    if not points:
        return None
    figure, axis = pyplot.subplots(figsize=(6.4, 4.4))
    axis.set_prop_cycle(color=_COLOURS)
    for policy in dict.fromkeys(policy for policy, _ in points):
        own = [place for variant, place in points.items() if variant[0] == policy]
        marker = {FULL: "s", FLOOR: "x"}.get(policy, "o")
        axis.scatter(*zip(*own, strict=True), marker=marker, label=legend_text(policy))
    for variant, (memory, accuracy) in points.items():
        if variant[0] != FULL:
            axis.annotate(ratio_text(variant[1]), (memory, accuracy), fontsize=7, alpha=0.7)
    front = pareto_front(list(points.values()))
    axis.step(*zip(*front, strict=True), where="post", color="black", alpha=0.5, label="front")
    axis.set_xlabel("memory of a request, share of full cache")
    axis.set_ylabel("right answers, mean over tasks and lengths")
    axis.set_xlim(0, 1.05)
    axis.set_ylim(-0.05, 1.08)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def pareto_points(records: Sequence[Record]) -> dict[_Variant, tuple[float, float]]:
    """Return (memory, accuracy) of every policy and ratio that was measured in every cell."""
    cells = by_cell(records)
    points = {}
    for variant in _variants(records):
        own = [r for r in records if (r["policy"], r["keep_ratio"]) == variant]
        shares = [share for r in own if (share := memory_share(records, r)) is not None]
        if len(own) == len(shares) == len(cells):
            points[variant] = fmean(shares), fmean(record["accuracy"] for record in own)
    return points


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats with less memory and more right answers."""
    front: list[tuple[float, float]] = []
    for memory, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((memory, accuracy))
    return front


def _variants(records: Sequence[Record]) -> list[_Variant]:
    return list(dict.fromkeys((record["policy"], record["keep_ratio"]) for record in records))


def _label(variant: _Variant) -> str:
    policy, ratio = variant
    if policy == FULL:
        return "full cache"
    return policy if ratio is None else f"{policy}, {ratio:g}"


_PLOTS: dict[str, Callable[[Any, Sequence[Record]], Any]] = {
    "accuracy.png": _draw_accuracy,
    "needle_depths.png": _draw_heat_map,
    "pareto.png": _draw_pareto,
}
