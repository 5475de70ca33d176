"""The report in Markdown: one table a task and length, and who is not better than chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_kvpress.evaluation.estimates import SURE, Estimate, estimate_difference
from vllm_kvpress.evaluation.grid import FLOOR, FULL, ratio_text
from vllm_kvpress.evaluation.items import num_prompts
from vllm_kvpress.evaluation.records import Record, Results, by_cell, commands

__all__ = [
    "REPORT_NAME",
    "difference",
    "divergence_cells",
    "floor_lines",
    "not_better_than_floor",
    "report_text",
    "write_report",
]

REPORT_NAME = "report.md"
_MARK = "†"
_HEADER = (
    "policy",
    "kept",
    "right, %",
    "minus full",
    f"minus {FLOOR}",
    "blocks: peak",
    "steady",
    "memory, %",
    "bytes a token",
    "at once",
    "prefill, ms",
    "decode step, ms",
)


_DIVERGENCE_HEADER = ("KL, nats", "same token, %")


def write_report(results: Results, folder: Path, images: Sequence[str] = ()) -> Path:
    """Write the report into a folder and return its path."""
    path = folder / REPORT_NAME
    path.write_text(report_text(results, images), encoding="utf-8")
    return path


def report_text(results: Results, images: Sequence[str] = ()) -> str:
    """Return the report of an evaluation."""
    records = results.records
    settings, engine = records[-1]["settings"], records[-1]["engine"]
    parts = [
        f"# `{settings['model']}` under KV policies",
        f"{settings['limit']} documents a cell, seed {settings['seed']}, greedy; "
        f"{engine['dtype']} on {engine['device']}, blocks of {engine['block_size']} tokens; "
        + ", ".join(f"{name} {release}" for name, release in settings["versions"].items())
        + ". Made by\n\n```\n{}\n```".format("\n".join(commands(records))),
        _LEGEND + (_DIVERGENCE_LEGEND if any(map(_has_divergence, records)) else ""),
    ]
    for (task, length), cell in by_cell(records).items():
        parts += [f"## {task}, {length} tokens", _cell_table(cell)]
    parts.append(_floor_paragraph(records))
    if results.num_others:
        parts.append(
            f"The file holds {results.num_others} more results, made with other settings or "
            "releases: they are not shown."
        )
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in images]
    return "\n\n".join(parts) + "\n"


_LEGEND = f"""Every policy answers the same questions. *Minus full* and *minus {FLOOR}*: the paired
difference in percentage points, with its own standard error. *Blocks* of a request as seen in the
engine's pool, median: at its peak, and when it was last scheduled. *Memory*: their bytes as a
share of the full cache's. *Bytes a token*: cache held when last scheduled, for each token of prompt
and answer. *At once*: requests of this size that fit into the pool of the run, by the blocks seen.
*Prefill*: milliseconds for 1,000 prompt tokens, in steps that computed any. *Decode step*: in steps
that only generated, whatever their batch. {_MARK}: not better than `{FLOOR}` at the same ratio,
by {SURE:g} standard errors."""
_DIVERGENCE_LEGEND = """ *KL*: between the full cache's next-token distribution and the policy's,
mean over the tokens of the full cache's answers, which both are given; *same token*: how many of
these tokens are the policy's likeliest, too."""


def not_better_than_floor(records: Sequence[Record]) -> list[Record]:
    """Return the records whose policy is not clearly better than the floor.

    That is where the paired difference is below two of its standard errors. The floor itself and
    the full cache are not judged.
    """
    return [
        record
        for record in records
        if record["policy"] not in (FULL, FLOOR)
        and (floor := _other(records, record, FLOOR)) is not None
        and not _is_better(estimate_difference(record["scores"], floor["scores"]))
    ]


def memory_share(records: Sequence[Record], record: Record) -> float | None:
    """Return the bytes a request holds as a share of the full cache's; None without the latter."""
    full = _other(records, record, FULL)
    return None if full is None else _bytes_held(record) / _bytes_held(full)


def _bytes_held(record: Record) -> float:
    return float(record["blocks"]["steady"] * record["engine"]["block_bytes"])


def _cell_table(cell: Sequence[Record]) -> str:
    flagged = not_better_than_floor(cell)
    header = _HEADER
    rows = [_row(cell, record, record in flagged) for record in cell]
    if any(map(_has_divergence, cell)):
        header = (*_HEADER, *_DIVERGENCE_HEADER)
        rows = [[*row, *divergence_cells(record)] for row, record in zip(rows, cell, strict=True)]
    rule = [":---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _has_divergence(record: Record) -> bool:
    return record.get("divergence") is not None


def divergence_cells(record: Record) -> tuple[str, str]:
    """Return KL divergence with its standard error, and share of equal tokens, or dashes."""
    if not _has_divergence(record):
        return "-", "-"
    found = record["divergence"]
    least = "" if found["whole"] else "≥ "
    kl = f"{least}{found['kl']:.3g} ± {found['standard_error']:.1g}"
    return kl, f"{100 * found['same_top']:.1f}"


def _row(cell: Sequence[Record], record: Record, flagged: bool) -> list[str]:
    error = 100 * record["standard_error"]
    share = memory_share(cell, record)
    time = record["time"]
    return [
        "full cache" if record["policy"] == FULL else f"`{record['policy']}`",
        ratio_text(record["keep_ratio"]),
        f"{100 * record['accuracy']:.1f} ± {error:.1f}{_MARK if flagged else ''}",
        difference(cell, record, FULL),
        difference(cell, record, FLOOR),
        f"{record['blocks']['peak']:.1f}",
        f"{record['blocks']['steady']:.1f}",
        "-" if share is None else f"{100 * share:.0f}",
        f"{record['bytes_per_token']:,.0f}",
        str(record["requests_at_once"]["in_pool"]),
        _per(1e6 * time["prefill_seconds"], time["prefill_tokens"]),
        _per(1e3 * time["decode_seconds"], time["decode_steps"]),
    ]


def difference(cell: Sequence[Record], record: Record, baseline: str) -> str:
    """Return the paired difference in points with its standard error; a dash for the baselines."""
    other = _other(cell, record, baseline)
    if other is None or record["policy"] in (FULL, baseline):
        return "-"
    step = 1 / num_prompts(record["task"])
    found = estimate_difference(record["scores"], other["scores"], step)
    return f"{100 * found.mean:+.1f} ± {100 * found.standard_error:.1f}"


def _other(records: Sequence[Record], record: Record, baseline: str) -> Record | None:
    """Return the baseline's record of the same cell, at the same ratio unless it has but one."""
    return next(
        (
            other
            for other in records
            if other["policy"] == baseline
            and (other["task"], other["length"]) == (record["task"], record["length"])
            and (baseline == FULL or other["keep_ratio"] == record["keep_ratio"])
            and len(other["scores"]) == len(record["scores"])
        ),
        None,
    )


def _is_better(difference: Estimate) -> bool:
    return difference.mean >= SURE * difference.standard_error


def floor_lines(records: Sequence[Record]) -> list[str]:
    """Return for each policy and ratio where it is not better than the floor, in words."""
    flagged: dict[tuple[str, float], list[Record]] = {}
    for record in not_better_than_floor(records):
        flagged.setdefault((record["policy"], record["keep_ratio"]), []).append(record)
    lines = []
    for (policy, ratio), cells in flagged.items():
        own = [r for r in records if (r["policy"], r["keep_ratio"]) == (policy, ratio)]
        where = ", ".join(f"{cell['task']} at {cell['length']}" for cell in cells)
        where = where if len(cells) < len(own) or len(own) == 1 else f"all {len(own)} cells"
        lines.append(f"{policy} at {ratio:g}: {where}")
    return lines


def _floor_paragraph(records: Sequence[Record]) -> str:
    lines = floor_lines(records)
    if not lines:
        return f"Every policy is better than `{FLOOR}` in every cell that has both."
    return "\n".join([f"{_MARK} Not better than `{FLOOR}`:\n", *(f"- {line}" for line in lines)])


def _per(amount: float, count: int) -> str:
    return f"{amount / count:.1f}" if count else "-"
