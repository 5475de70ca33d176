"""Pattern files: a score for each KV head, and beside it a record of what it was made for.

    duo.tsv     one row a layer, one tab-separated number a KV head; higher = retrieval
    duo.json    {"shape": {"num_layers": 4, "num_kv_heads": 4, "num_heads": 8, "head_size": 64}}

The table is the format in which the authors of DuoAttention publish their gates
(`attn_patterns/MODEL/SETTINGS/full_attention_heads.tsv`). It may also have a column for each query
head: a KV head then has the highest score of its group. The record is ours and may be missing.

Source: https://github.com/mit-han-lab/duo-attention (`attn_patterns`), read, not copied.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.sources import read_bytes

__all__ = ["HeadPattern", "HeadShape", "read_pattern", "write_pattern"]

_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What of a model a pattern must fit; None for what is not known.

    Attributes:
        num_layers: layers, those with a sliding window included.
        num_kv_heads: KV heads of a layer, of the whole model.
        num_heads: query heads of a layer.
        head_size: channels of a head.
    """

    num_layers: int
    num_kv_heads: int
    num_heads: int | None = None
    head_size: int | None = None

    def __str__(self) -> str:
        text = f"{self.num_layers} layers of {self.num_kv_heads} KV heads"
        if self.num_heads is not None:
            text += f", {self.num_heads} query heads"
        return text + ("" if self.head_size is None else f", {self.head_size} channels")


@dataclass(frozen=True)
class HeadPattern:
    """The content of a pattern file.

    Attributes:
        scores: [num_rows][num_columns] as they stand in the table, finite.
        shape: what the record says of the model; empty without a record.
        what: the file in words, for errors.
    """

    scores: tuple[tuple[float, ...], ...]
    shape: Mapping[str, int]
    what: str

    def for_model(self, shape: HeadShape) -> list[list[float]]:
        """Returns [num_layers][num_kv_heads] scores for a model.

        Raises:
            ConfigError: the pattern is of another model.
        """
        self._check_record(shape)
        rows, columns = len(self.scores), len(self.scores[0])
        if rows == shape.num_layers and columns == shape.num_kv_heads:
            return [list(row) for row in self.scores]
        if rows == shape.num_layers and columns == shape.num_heads:
            group = columns // shape.num_kv_heads
            return [
                [max(row[head * group : (head + 1) * group]) for head in range(shape.num_kv_heads)]
                for row in self.scores
            ]
        query_heads = "" if shape.num_heads is None else f" (or query heads, {shape.num_heads})"
        raise ConfigError(
            f"{self.what} has not the model's shape",
            got=f"{rows} rows of {columns} numbers",
            allowed=f"{shape.num_layers} rows (layers) of {shape.num_kv_heads} KV heads"
            + query_heads,
            fix="Use a pattern file of this model",
        )

    def _check_record(self, shape: HeadShape) -> None:
        known = {key: value for key, value in asdict(shape).items() if value is not None}
        unlike = [key for key in known if key in self.shape and self.shape[key] != known[key]]
        if unlike:
            raise ConfigError(
                f"{self.what} is of another model",
                got=", ".join(f"{key} {self.shape[key]}" for key in unlike),
                allowed=", ".join(f"{key} {known[key]}" for key in unlike),
                fix="Use a pattern file of this model",
            )


def read_pattern(path: Path) -> HeadPattern:
    """Returns the content of a pattern file and its record.

    Raises:
        ConfigError: there is none, or it is not one; the message names the command that makes one.
    """
    what = f"pattern file {shown(str(path))}"
    if not path.exists():
        raise ConfigError(
            f"{what} is not there",
            fix=f"Make it: vllm-kvpress calibrate-heads --model MODEL --method METHOD --out {path}",
        )
    content = read_bytes(path, what, _MAX_BYTES)
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8", got=f"a bad byte at {error.start}") from error
    rows = [
        _row(line, f"line {number} of {what}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows or len({len(row) for row in rows}) > 1:
        raise ConfigError(
            f"{what} is not a table",
            got=f"rows of {sorted({len(row) for row in rows})} numbers" if rows else "nothing",
            allowed="one row a layer, all of the same length",
        )
    return HeadPattern(tuple(rows), _recorded_shape(path.with_suffix(".json")), what)


def write_pattern(path: Path, scores: Sequence[Sequence[float]], record: Mapping[str, Any]) -> None:
    """Writes a pattern file, and its record beside it under the ending .json."""
    lines = ("\t".join(repr(float(score)) for score in row) for row in scores)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = re.sub(
        r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), json.dumps(record, indent=2)
    )
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def _row(line: str, what: str) -> tuple[float, ...]:
    numbers = []
    for text in line.split("\t"):
        try:
            number = float(text)
        except ValueError:
            raise ConfigError(
                f"{what} has something that is no number",
                got=shown(text),
                allowed="tab-separated numbers",
            ) from None
        if not math.isfinite(number):
            raise ConfigError(f"{what} has a score that is not finite", got=text.strip())
        numbers.append(number)
    return tuple(numbers)


def _recorded_shape(path: Path) -> dict[str, int]:
    """The model's shape in a record of ours; empty where there is no such record."""
    if not path.exists():
        return {}
    what = f"record {shown(str(path))}"
    try:
        record = json.loads(read_bytes(path, what, _MAX_BYTES))
        shape = record.get("shape", {})
        return {field.name: int(shape[field.name]) for field in fields(HeadShape) if shape}
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{what} has no usable shape",
            got=f"{type(error).__name__}: {str(error)[:80]}",
            fix="Make the pattern file anew, or remove the record",
        ) from error
