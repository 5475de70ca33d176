"""`vllm-kvpress calibrate-heads`: which KV heads of a model retrieve, as a pattern file."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_kvpress.errors import ConfigError, shown

__all__ = ["add_command"]

_MAX = 2**31 - 1
_PIPE_COLUMNS = 120

# Option, its type, and what it means; each belongs to a method, which has its default.
_COUNTS = (
    ("--tokens", 2, "razor: random tokens in a period (default: up to 2500, all different)"),
    ("--steps", 1, "duo: documents to train on (default: 2000)"),
    ("--length", 1, "duo: tokens of the longest document (default: 4096)"),
    ("--sink-tokens", 0, "duo: first tokens that a streaming head sees (default: 128)"),
    ("--recent-tokens", 1, "duo: newest tokens that it sees (default: 256)"),
    ("--seed", 0, "draws tokens or documents (default: 0)"),
)


def add_command(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "calibrate-heads",
        help="find the KV heads of a model that must keep every token",
        description=(
            "Scores every KV head of a model and writes FILE.tsv for `--kv-policy "
            "duo:file=FILE.tsv` or razor, FILE.json with what it was made from, and FILE.png. "
            "razor looks at attention to repeated random tokens, in seconds; duo trains a gate for "
            "each head on documents with hidden facts, and goes on where it was interrupted."
        ),
    )
    parser.add_argument("--model", required=True, help="testbed, a folder, or a name on the hub")
    parser.add_argument("--method", required=True, choices=("duo", "razor"))
    parser.add_argument(
        "--out", type=Path, metavar="FILE.tsv", help="pattern file (default: METHOD.tsv)"
    )
    for option, least, meaning in _COUNTS:
        parser.add_argument(option, type=_at_least(least), metavar="N", help=meaning)
    parser.add_argument(
        "--reg-weight", type=_weight, metavar="X", help="duo: what a gate costs (default: 0.05)"
    )
    parser.add_argument("--no-plot", action="store_true", help="no picture, no matplotlib")
    parser.set_defaults(run=_run)


def _at_least(least: int) -> Any:
    def integer(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) <= 10
        if not is_number or not least <= int(text) <= _MAX:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not an integer from {least} to {_MAX}"
            )
        return int(text)

    return integer


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0")
    return weight


def _run(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path(f"{arguments.method}.tsv")
    _check_out(out)
    try:
        from vllm_kvpress.calibration.heatmap import check_matplotlib
        from vllm_kvpress.calibration.run import calibrate
    except ImportError as error:
        raise ConfigError(
            "calibrate-heads needs torch", got=str(error), fix="Install vLLM first"
        ) from error
    if not arguments.no_plot:
        check_matplotlib()
    names = [option[2:].replace("-", "_") for option, _, _ in _COUNTS] + ["reg_weight"]
    given = {name: getattr(arguments, name) for name in names}
    options = {name: value for name, value in given.items() if value is not None}
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_COLUMNS)
    try:
        scores = calibrate(
            arguments.method, arguments.model, out, options, console, plot=not arguments.no_plot
        )
    except KeyboardInterrupt:
        where = "at its last checkpoint" if arguments.method == "duo" else "from the beginning"
        print(f"interrupted; the same command starts {where}", file=sys.stderr)
        raise SystemExit(130) from None
    _print(console, arguments.method, scores, out)


def _check_out(out: Path) -> None:
    if out.suffix != ".tsv":
        raise ConfigError("--out has the wrong ending", got=shown(str(out)), allowed=".tsv")
    if not out.parent.is_dir():
        raise ConfigError(
            "--out cannot be used", got=shown(str(out)), fix=f"Make the folder {out.parent} first"
        )


def _print(console: Console, method: str, scores: list[list[float]], out: Path) -> None:
    number = sum(score >= 0.5 for row in scores for score in row)
    console.print(f"layer  scores of its KV heads; {number} of all are at 0.5 or more")
    for layer, row in enumerate(scores):
        console.print(f"{layer:5}  " + " ".join(f"{score:.2f}" for score in row), soft_wrap=True)
    console.print(
        f"{out} is written; use it: --kv-policy {method}:file={out},threshold=0.5", soft_wrap=True
    )
