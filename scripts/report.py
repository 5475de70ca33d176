"""Write the README's tables and the plots from the records in scripts/results.

A table stands in README.md between two markers, `<!-- results:NAME -->` and
`<!-- /results:NAME -->`; what is between them belongs to this script. `--check` changes nothing and
exits with 1 if the README says something else than the records.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from records import REPOSITORY, RESULTS, Record, read_record

README = REPOSITORY / "README.md"
IMAGES = REPOSITORY / "docs" / "images"
FULL = "none"
HEADLINE_POLICY = "snapkv"
LABELS = {FULL: "full cache"}
TASK_TITLES = {"needle": "single needle", "multi_key": "one fact among 8 to 32 alike"}

Result = dict[str, Any]


class ReportError(Exception):
    """The README or a record is not as the report needs it; the message says why."""


def headline(record: Record) -> str:
    """Return the README's one number: what the headline's policy does to one pool."""
    results = {result["policy"]: result for result in record["results"]}
    stock, policy = results[FULL], results[HEADLINE_POLICY]
    settings = record["settings"]
    block = policy["pool_bytes"] / (policy["pool_blocks"] + 1) / 1e6
    held = [result["steady_blocks"]["seen"] * block for result in (policy, stock)]
    right = share(policy["right"], policy["requests"])
    everyone = policy["right"] == policy["requests"]
    sentence = (
        f"In the same {policy['pool_bytes'] / 1e6:.1f} MB of cache memory {policy['running']} "
        f"requests of {settings['num_tokens']:,} tokens run at once, where stock vLLM runs "
        f"{stock['running']}; one request holds {held[0]:.2f} MB in place of {held[1]:.2f} MB, and "
        f"{'all answers' if everyone else right + ' answers'} are right (`{HEADLINE_POLICY}` at "
        f"keep ratio {settings['keep_ratio']}, {model_and_device(record)})."
    )
    return textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False)


def memory_table(record: Record) -> str:
    """Return how many requests ran at once, a row a policy."""
    settings, results = record["settings"], record["results"]
    rows = [
        [
            label(result["policy"]),
            f"**{result['running']}**",
            f"{result['formula']:.1f}",
            f"{result['ratio']:.2f}",
            seen_of_plan(result["peak_blocks"]),
            seen_of_plan(result["steady_blocks"]),
            str(result["least_free_blocks"]),
            share(result["right"], result["requests"]),
            share(result["same_as_alone"], result["requests"]),
        ]
        for result in results
    ]
    header = ["policy", "at once", "formula", "at once / ⌊formula⌋", "peak blocks", "steady blocks"]
    header += ["least free", "answers right", "answers as alone"]
    megabytes = results[0]["pool_bytes"] / 1e6
    note = (
        f"{settings['requests']} prompts of {settings['num_tokens']} tokens arrive at once, each "
        f"generates {settings['outputs']}; pool of {results[0]['pool_blocks']} blocks "
        f"({megabytes:.0f} MB), keep ratio {settings['keep_ratio']}, no preemptions. Blocks: seen "
        f"in the engine / counted by the plan. {made_with(record)}"
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def cost_table(record: Record) -> str:
    """Return step times, a row a model, policy and length, a column a batch size."""
    settings, results = record["settings"], record["results"]
    on_gpu = record["hardware"]["gpu"] is not None
    clock, meaning = ("wall", "wall time") if on_gpu else ("cpu", "processor time")
    found = {(r["model"], r["policy"], r["length"], r["batch"]): r for r in results}
    rows = []
    for row in dict.fromkeys(key[:3] for key in found):
        cells = [found[(*row, batch)] for batch in settings["batch_sizes"]]
        built = [cell["metadata"] for cell in cells]
        name = "stock, twice" if row[1] == FULL else label(row[1])
        rows.append([row[0], name, str(row[2]), *(ratio(cell[clock]) for cell in cells)])
        rows[-1] += [milliseconds(cells[0][clock]), milliseconds(built[0])]
    header = ["model", "policy", "tokens read"]
    header += [f"batch {batch}" for batch in settings["batch_sizes"]]
    first = settings["batch_sizes"][0]
    note = (
        f"Step time ({meaning}) of the policy over that of stock vLLM, medians over twice "
        f"{settings['rounds']} rounds of {settings['steps']} steps that take turns, in brackets "
        f"the quartiles; then milliseconds of stock / policy at batch {first}: the step, and the "
        f"building of attention metadata within it. {made_with(record)}"
    )
    return f"{markdown_table([*header, 'step, ms', 'metadata, ms'], rows)}\n\n{note}"


def quality_table(record: Record) -> str:
    """Return right answers, a row a policy, a column a task and keep ratio."""
    settings, results = record["settings"], record["results"]
    found = {(r["policy"], r["keep_ratio"], r["task"]): r for r in results}
    policies = list(dict.fromkeys(r["policy"] for r in results))
    ratios = sorted({r["keep_ratio"] for r in results if r["policy"] != FULL}, reverse=True)
    columns = [(task, kept) for task in settings["tasks"] for kept in ratios]
    rows = []
    for policy in policies:
        cells = [found.get((policy, 1.0 if policy == FULL else k, t)) for t, k in columns]
        rows.append([label(policy), *(percentage(cell) for cell in cells)])
    header = ["policy", *(f"{task}, keep {kept:g}" for task, kept in columns)]
    note = (
        f"Per cent of {settings['items']} questions answered right (+- standard error), the same "
        f"documents of {settings['num_tokens']} tokens for all, question at the end of the prompt, "
        f"greedy. {made_with(record)}"
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def label(policy: str) -> str:
    """Return a policy's name for people."""
    return LABELS.get(policy, f"`{policy}`")


def seen_of_plan(blocks: dict[str, int]) -> str:
    """Return blocks as the engine held them beside the plan's count."""
    return f"{blocks['seen']} / {blocks['plan']}"


def share(count: int | None, total: int) -> str:
    """Return a count of a total; a dash where nothing was counted."""
    return "-" if count is None else f"{count} of {total}"


def milliseconds(clock: Result) -> str:
    """Return the medians of stock and policy."""
    return f"{clock['stock_ms']['median']:.2f} / {clock['policy_ms']['median']:.2f}"


def ratio(clock: Result) -> str:
    """Return the median ratio with its quartiles."""
    figures = clock["ratio"]
    quartiles = f"{figures['quartile_1']:.2f} to {figures['quartile_3']:.2f}"
    return f"**{figures['median']:.2f}** ({quartiles})"


def percentage(result: Result | None) -> str:
    """Return an accuracy with its standard error; a dash where nothing was measured."""
    if result is None:
        return "-"
    return f"{100 * result['accuracy']:.0f} ± {100 * result['standard_error']:.0f}"


def made_with(record: Record) -> str:
    """Return the sentence that says where a table's numbers come from."""
    made = f"vLLM {record['software']['vllm']}, {record['date_utc']}"
    where = model_and_device(record).removeprefix("model ")
    return f"Model {where}, {made}: `{record['command']}`."


def model_and_device(record: Record) -> str:
    """Return what ran on what."""
    machine, settings = record["hardware"], record["settings"]
    device = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    model = f"model `{settings['model']}`, {settings['dtype']}"
    return f"{model}, block size {settings['block_size']}, {device}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, its first column to the left, all others to the right."""
    rule = [":---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "headline": ("cpu_memory.json", headline),
    "memory": ("cpu_memory.json", memory_table),
    "cost": ("cpu_cost.json", cost_table),
    "quality": ("cpu_quality.json", quality_table),
}


def fill_markers(text: str, tables: dict[str, str]) -> str:
    """Return the text with every table between its markers; what lacks either stays.

    Raises:
        ReportError: If a section has one marker only, or a name that is not known.
    """
    for name in re.findall(r"<!-- /?results:(\S+) -->", text):
        if name not in TABLES:
            raise ReportError(f"no section is called {name!r}; known: {', '.join(TABLES)}")
    for name, table in tables.items():
        start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        if (text.count(start), text.count(end)) not in ((0, 0), (1, 1)):
            raise ReportError(f"the section {name!r} needs one {start} and one {end}")
        before, found, rest = text.partition(start)
        if found:
            _, closed, after = rest.partition(end)
            if not closed:
                raise ReportError(f"{end} stands before {start}")
            text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def plot_quality(record: Record, path: Path) -> None:
    """Draw accuracy against keep ratio: a panel a task, a line a policy, the full cache on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = record["settings"]["tasks"]
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(4.6 * len(tasks) + 1.4, 3.8), sharey=True
    )
    panels = [axes] if len(tasks) == 1 else axes
    for axis, task in zip(panels, tasks, strict=True):
        results = [result for result in record["results"] if result["task"] == task]
        draw_panel(axis, results)
        axis.set_title(TASK_TITLES.get(task, task))
        axis.set_xlabel("share of the prompt kept")
    panels[0].set_ylabel("right answers")
    lines, names = panels[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(lines, names, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version inside: the same record gives the same file.
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def draw_panel(axis: Any, results: Sequence[Result]) -> None:
    """Draw one task's lines."""
    for policy in dict.fromkeys(result["policy"] for result in results):
        points = sorted((r for r in results if r["policy"] == policy), key=kept)
        heights = [point["accuracy"] for point in points]
        if policy == FULL:
            axis.axhline(heights[0], color="black", linestyle="--", label=LABELS[FULL])
            continue
        errors = [point["standard_error"] for point in points]
        positions = [kept(point) for point in points]
        axis.errorbar(positions, heights, errors, marker="o", capsize=3, label=policy)
    ratios = sorted({kept(result) for result in results if result["policy"] != FULL})
    axis.set_xscale("log")
    axis.set_xticks(ratios, [f"{value:g}" for value in ratios])
    axis.minorticks_off()
    axis.set_ylim(-0.05, 1.08)
    axis.grid(alpha=0.3)


def kept(result: Result) -> float:
    """Return a result's keep ratio."""
    return float(result["keep_ratio"])


def make_tables(folder: Path) -> dict[str, str]:
    """Return the tables whose records are in a folder."""
    return {
        name: table(read_record(folder / file))
        for name, (file, table) in TABLES.items()
        if (folder / file).exists()
    }


def main() -> int:
    """Write or check the README; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    old = arguments.readme.read_text(encoding="utf-8")
    try:
        new = fill_markers(old, make_tables(arguments.results))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.check:
        if new != old:
            print("README.md differs from the records: run scripts/report.py", file=sys.stderr)
        return int(new != old)
    if new != old:
        arguments.readme.write_text(new, encoding="utf-8")
    quality = arguments.results / TABLES["quality"][0]
    if quality.exists():
        plot_quality(read_record(quality), arguments.images / "quality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
