"""The model card: what the model is, what it answers, how often, and how it looks inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from testbed_training.accuracy import FIRST_SEED, Cell
from testbed_training.heads import SINK_SHARE, SINK_TOKENS, TOLERANCE, WINDOW, Head, Heads
from testbed_training.model import Shape
from vllm_kvpress.testbed.documents import TASKS
from vllm_kvpress.testbed.language import (
    ASSIGNMENTS,
    NUMBERED_FACTS,
    NUMBERED_QUESTIONS,
    PASS_CODE_FACTS,
    PASS_CODE_QUESTIONS,
    PASSAGE_FACTS,
    PASSAGE_QUESTIONS,
    VALUE_QUESTIONS,
)

__all__ = ["write_card"]

_TEMPLATE = Path(__file__).with_name("card.md")


def write_card(
    folder: Path,
    shape: Shape,
    cells: Sequence[Cell],
    heads: Heads,
    *,
    parameters: int,
    training: dict[str, str | int | float],
) -> None:
    """Write README.md.

    Args:
        folder: Of the model.
        shape: Its sizes.
        cells: How often it is right.
        heads: What its heads look at.
        parameters: How many numbers it has.
        training: ``command``, ``steps``, ``minutes``, ``longest``, ``hardware`` and ``words``.
    """
    size = (folder / "model.safetensors").stat().st_size
    text = _TEMPLATE.read_text(encoding="utf-8").format(
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        theta=shape.rope_theta,
        parameters=parameters,
        megabytes=size / 1e6,
        positions=shape.max_positions,
        vocab=shape.vocab,
        seed=f"{FIRST_SEED:,}",
        accuracy=_accuracy_table(cells),
        **_wordings(),
        **_head_figures(heads),
        **training,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _wordings() -> dict[str, str]:
    return {
        "pass_code_facts": _examples(PASS_CODE_FACTS),
        "pass_code_questions": _examples(PASS_CODE_QUESTIONS),
        "numbered_facts": _examples(NUMBERED_FACTS, ordinal="two", value="23456"),
        "numbered_questions": _examples(NUMBERED_QUESTIONS, ordinal="two"),
        "assignments": _examples(ASSIGNMENTS, key="kip", value="zor"),
        "value_questions": _examples(VALUE_QUESTIONS, key="kip"),
        "passage_facts": _examples(PASSAGE_FACTS, key="felix", value="garden old river"),
        "passage_questions": _examples(PASSAGE_QUESTIONS, key="felix"),
    }


def _examples(wordings: Sequence[str], **fields: str) -> str:
    fields = {"key": "alice", "value": "48213", **fields}
    return "<br>".join(f"`{wording.format(**fields)}`" for wording in wordings)


def _accuracy_table(cells: Sequence[Cell]) -> str:
    found = {(cell.length, cell.task): cell for cell in cells}
    lengths = sorted({cell.length for cell in cells})
    numbers = {length: found[length, TASKS[0]].number for length in lengths}
    columns = [f"{length:,} tokens (n = {numbers[length]})" for length in lengths]
    lines = [f"| task | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for task in TASKS:
        row = [_percent(found[length, task]) for length in lengths]
        lines.append(f"| `{task}` | {' | '.join(row)} |")
    return "\n".join(lines)


def _percent(cell: Cell) -> str:
    return f"{100 * cell.share:.1f} % ({100 * cell.error:.1f})"


def _head_figures(heads: Heads) -> dict[str, str | int | float]:
    streaming, retrieval = heads.streaming, heads.retrieval
    return {
        "number": heads.number,
        "length": f"{heads.length:,}",
        "num_sinks": heads.num_sinks,
        "query_heads": sum(len(layer) for layer in heads.sinks),
        "sink_share": SINK_SHARE,
        "window": WINDOW,
        "sinks": SINK_TOKENS,
        "tolerance": TOLERANCE,
        "num_heads": len(heads.order),
        "num_streaming": len(streaming),
        "num_retrieval": len(retrieval),
        "retrieval": ", ".join(map(_name, retrieval)) or "none",
        "accuracy_free": heads.accuracy,
        "trials": ", ".join(
            f"{_name(head)}: {share:.0%}"
            for head, share in zip(heads.order, heads.trials, strict=True)
        ),
        "by_layer": ", ".join(f"{n}: {share:.0%}" for n, share in enumerate(heads.layers)),
        "heads_table": _heads_table(heads),
    }


def _name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


def _heads_table(heads: Heads) -> str:
    count = len(heads.sinks[0])
    lines = [
        f"| layer | attention on the first token, query heads 0 to {count - 1} "
        "| attention of answers beyond sinks and window, KV heads |",
        "|---|---|---|",
    ]
    for layer, (sinks, far) in enumerate(zip(heads.sinks, heads.far, strict=True)):
        shown = [" ".join(f"{share:.2f}" for share in shares) for shares in (sinks, far)]
        lines.append(f"| {layer} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)
