"""`vllm-kvpress eval` and `report`: measure policies on the engine, and show what was measured."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_kvpress.errors import ConfigError, shown

__all__ = ["add_commands"]

LOGLIKELIHOOD_WARNING = (
    "WARNING: loglikelihood tasks (multiple choice, perplexity, most of the usual leaderboards) "
    "score the prompt, which is prefilled exactly: they NEVER see post-prefill eviction, look "
    "lossless under any policy and prove nothing. Use tasks that generate, as this command does."
)
_MAX = 2**31 - 1
_PIPE_COLUMNS = 120


def add_commands(commands: Any) -> None:
    """Adds both commands to the parser's subcommands."""
    evaluate = commands.add_parser(
        "eval",
        help="measure answers, memory and speed of policies on the engine",
        description=(
            "Asks every policy the same questions about generated documents, on the real engine, "
            "and writes results.jsonl, report.md and plots. An interrupted run goes on where it "
            "stopped. The full cache and the policy `random` are always measured too."
        ),
        epilog=LOGLIKELIHOOD_WARNING + " Options of vLLM may follow after --.",
    )
    evaluate.add_argument("--model", help="testbed, a folder, or a name on the Hugging Face hub")
    evaluate.add_argument(
        "--policies",
        metavar="LIST",
        help="names, names:with=overrides, FILE.yaml; by default all shipped ones without files",
    )
    evaluate.add_argument("--keep-ratio", default="0.5,0.25,0.1", metavar="LIST")
    evaluate.add_argument("--tasks", default="needle,multi_key", metavar="LIST")
    evaluate.add_argument("--lengths", default="2048", metavar="LIST", help="tokens of a prompt")
    evaluate.add_argument(
        "--limit", type=_positive, default=50, metavar="N", help="documents in a cell (default: 50)"
    )
    evaluate.add_argument("--seed", type=_natural, default=0, metavar="S", help="draws them")
    evaluate.add_argument(
        "--out", type=Path, default=Path("kvpress-eval"), metavar="DIR", help="where results go"
    )
    evaluate.add_argument(
        "--divergence",
        action="store_true",
        help="compare next-token distributions with the full cache's, too",
    )
    evaluate.add_argument("--no-plots", action="store_true", help="no plots, no matplotlib")
    evaluate.add_argument(
        "--task-path", action="store_true", help="print the folder of our lm-eval tasks and exit"
    )
    evaluate.set_defaults(run=_run_eval)

    report = commands.add_parser("report", help="make table and plots of results.jsonl anew")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--no-plots", action="store_true", help="no plots, no matplotlib")
    report.set_defaults(run=_run_report)


def _positive(text: str) -> int:
    return _integer(text, 1)


def _natural(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) <= 10
    if not is_number or not least <= int(text) <= _MAX:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer from {least} to {_MAX}")
    return int(text)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)


def _run_eval(arguments: argparse.Namespace) -> None:
    if arguments.task_path:
        # On its way into an lm_eval command line: stdout has the path alone.
        print(LOGLIKELIHOOD_WARNING, file=sys.stderr)
        print(Path(__file__).resolve().parents[1] / "evaluation" / "tasks")
        return
    if arguments.model is None:
        raise ConfigError("--model is missing", fix="Name one, such as --model testbed")
    from vllm_kvpress.evaluation.run import run_evaluation

    plan = _plan(arguments)
    _check_folder(arguments.out)
    if not arguments.no_plots:
        from vllm_kvpress.evaluation.plots import check_matplotlib

        check_matplotlib()
    console = _console()
    try:
        run_evaluation(plan, arguments.out, console)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    _report(arguments.out, arguments.no_plots, console, plan.settings)


def _plan(arguments: argparse.Namespace) -> Any:
    """What to run; every argument is checked before anything starts."""
    from vllm_kvpress.evaluation import grid
    from vllm_kvpress.evaluation.items import room_tokens
    from vllm_kvpress.evaluation.models import check_model
    from vllm_kvpress.evaluation.records import versions
    from vllm_kvpress.evaluation.run import Plan

    tasks = grid.parse_tasks(arguments.tasks)
    lengths = grid.parse_lengths(arguments.lengths)
    text = grid.default_policies() if arguments.policies is None else arguments.policies
    policies = grid.parse_policies(text)
    variants = grid.make_variants(policies, grid.parse_ratios(arguments.keep_ratio))
    check_model(arguments.model, lengths, room_tokens(tasks, arguments.model))
    if any(word.startswith(("--kv-policy", "--kv_policy")) for word in arguments.vllm_options):
        raise ConfigError("--kv-policy stands among vLLM's options", fix="Use --policies")
    settings = grid.Settings(
        model=arguments.model,
        limit=arguments.limit,
        seed=arguments.seed,
        vllm_options=tuple(arguments.vllm_options),
        versions=versions(),
        divergence=arguments.divergence,
    )
    cells = [grid.Cell(task, length) for length in lengths for task in tasks]
    return Plan(settings, variants, cells, _command(arguments))


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command line in full, defaults included; where results go is not part of it."""
    from vllm_kvpress.evaluation.grid import default_policies

    words = ["vllm-kvpress", "eval", "--model", arguments.model]
    words += ["--policies", arguments.policies or default_policies()]
    words += ["--keep-ratio", arguments.keep_ratio, "--tasks", arguments.tasks]
    words += ["--lengths", arguments.lengths, "--limit", str(arguments.limit)]
    words += ["--seed", str(arguments.seed)]
    words += ["--divergence"] if arguments.divergence else []
    return [*words, "--", *arguments.vllm_options] if arguments.vllm_options else words


def _check_folder(folder: Path) -> None:
    """Results must have a place before hours are spent on them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "--out cannot be used", got=f"{shown(str(folder))}: {error.strerror}"
        ) from error


def _run_report(arguments: argparse.Namespace) -> None:
    _report(arguments.folder, arguments.no_plots, _console())


def _report(folder: Path, no_plots: bool, console: Console, settings: Any = None) -> None:
    from vllm_kvpress.evaluation.plots import write_plots
    from vllm_kvpress.evaluation.records import read_results
    from vllm_kvpress.evaluation.tables import floor_lines, write_report

    results = read_results(folder, settings)
    images = [] if no_plots else write_plots(results, folder)
    path = write_report(results, folder, images)
    for line in floor_lines(results.records):
        console.print(f"not better than random: {line}", markup=False, soft_wrap=True)
    console.print(f"{path}" + "".join(f", {folder / name}" for name in images), soft_wrap=True)
