"""Write the README's tables from the records in scripts/results.

A table stands in README.md between two markers, `<!-- results:NAME -->` and
`<!-- /results:NAME -->`; what is between them belongs to this script. `--check` changes nothing and
exits with 1 if the README says something else than the records.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from records import REPOSITORY, RESULTS, Record, read_record

from vllm_kvpress.evaluation.estimates import SURE
from vllm_kvpress.evaluation.grid import FLOOR, ratio_text
from vllm_kvpress.evaluation.grid import FULL as EVAL_FULL
from vllm_kvpress.evaluation.items import num_prompts
from vllm_kvpress.evaluation.records import Results, by_cell, commands, read_results
from vllm_kvpress.evaluation.tables import (
    difference,
    divergence_cells,
    memory_share,
    not_better_than_floor,
)

README = REPOSITORY / "README.md"
FULL = "none"
HEADLINE_POLICY = "snapkv"
MEMORY_LEGEND = (
    "Memory: bytes of a request when it was last scheduled, as a share of the full cache's."
)
DIVERGENCE_LEGEND = (
    "KL: of next-token distributions from the full cache's, along its answers; ± one standard "
    "error over questions. Same token: share of these tokens that the policy would have chosen. "
)
LABELS = {FULL: "full cache", EVAL_FULL: "full cache"}

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


def quality_table(results: Results) -> str:
    """Return right answers and memory: a row a policy and keep ratio, a column a cell."""
    records = results.records
    cells = by_cell(records)
    doubtful = [id(record) for record in not_better_than_floor(records)]
    rows = []
    for variant in dict.fromkeys((r["policy"], r["keep_ratio"]) for r in records):
        own = [r for r in records if (r["policy"], r["keep_ratio"]) == variant]
        found = {(r["task"], r["length"]): r for r in own}
        shares = [s for r in own if (s := memory_share(records, r)) is not None]
        row = [label(variant[0]), ratio_text(variant[1])]
        row += [percentage(found.get(cell), doubtful) for cell in cells]
        rows.append([*row, f"{100 * statistics.fmean(shares):.0f}"])
    header = ["policy", "kept", *(f"{task}, {length}" for task, length in cells), "memory, %"]
    note = (
        f"Per cent of {records[-1]['settings']['limit']} documents answered right (± standard "
        f"error), the same for all, greedy. {MEMORY_LEGEND} †: not better than `{FLOOR}` at the "
        f"same ratio by {SURE:g} standard errors of the paired difference. {evaluated(records)}"
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def codec_table(results: Results) -> str:
    """Return what each policy loses against the full cache, answer by answer; a row a policy."""
    records = results.records
    (((task, length), cell),) = by_cell(records).items()
    rows = []
    for record in cell:
        held = memory_share(records, record)
        rows.append([label(record["policy"]), ratio_text(record["keep_ratio"])])
        rows[-1] += [f"{100 * record['accuracy']:.1f}", difference(cell, record, EVAL_FULL)]
        rows[-1] += divergence_cells(record)
        rows[-1].append("-" if held is None else f"{100 * held:.0f}")
    number = num_prompts(task) * records[-1]["settings"]["limit"]
    note = (
        f"Per cent of {number:,} questions (task `{task}`, {length} tokens, "
        f"{records[-1]['settings']['limit']} documents) answered right, the same for all, greedy, "
        f"and the paired difference in points; ± one standard error over documents. "
        f"{DIVERGENCE_LEGEND}{MEMORY_LEGEND} {evaluated(records)}"
    )
    header = [
        "policy",
        "kept",
        "right, %",
        "minus full cache",
        "KL, nats",
        "same token, %",
        "memory, %",
    ]
    return f"{markdown_table(header, rows)}\n\n{note}"


def evaluated(records: Sequence[Result]) -> str:
    """Return the sentence that says where the numbers of an evaluation come from."""
    settings, engine = records[-1]["settings"], records[-1]["engine"]
    made_by = ", then ".join(f"`{command}`" for command in commands(records))
    return (
        f"Model `{settings['model']}`, {engine['dtype']}, block size {engine['block_size']}, "
        f"{engine['device']}, vLLM {settings['versions']['vllm']}, {records[-1]['date_utc']}: "
        f"{made_by}."
    )


def heads_table(record: Record) -> str:
    """Return memory and time of head plans: a row a length and share of retrieval heads."""
    found = {(r["length"], r["ratio"], r["kind"]): r for r in record["results"]}
    rows = []
    for length, kept in dict.fromkeys(key[:2] for key in found):
        memory, timed = (found[length, kept, kind] for kind in ("memory", "time"))
        rows.append([str(length), f"{kept:g}", f"{memory['steady_bytes'] / 1e6:.1f}"])
        rows[-1] += [f"**{memory['running']}**", f"{memory['formula']:.1f}"]
        rows[-1] += [timed_cell(timed, what) for what in ("prefill", "decode")]
    header = ["prompt tokens", "retrieval heads", "MB a request", "at once", "formula"]
    header += ["prefill", "decode step"]
    settings = record["settings"]
    note = (
        f"Heads drawn at random, {settings['sink_tokens']} sinks and a window of "
        f"{settings['recent_tokens']} tokens; 1 is stock vLLM. At once: of {settings['requests']} "
        f"prompts, in a pool of the bytes of {settings['pool_requests']} uncompressed requests. "
        f"Times of one request: milliseconds (and their ratio to stock in the same turn), medians "
        f"of {settings['rounds']} turns, beside other work. {made_with(record)}"
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def timed_cell(timed: Result, what: str) -> str:
    """Return a median time with the median of its ratio to stock."""
    milliseconds = timed[f"{what}_ms"]["median"]
    return f"{milliseconds:.1f} ({timed[f'{what}_ratio']['median']:.2f})"


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


def percentage(result: Result | None, doubtful: Sequence[int]) -> str:
    """Return an accuracy with its standard error; a dash where nothing was measured."""
    if result is None:
        return "-"
    mark = "†" if id(result) in doubtful else ""
    return f"{100 * result['accuracy']:.0f} ± {100 * result['standard_error']:.0f}{mark}"


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


# Section -> (record, how to read it, how to write it); a folder is what `vllm-kvpress eval` wrote.
TABLES: dict[str, tuple[str, Callable[[Path], Any], Callable[[Any], str]]] = {
    "headline": ("cpu_memory.json", read_record, headline),
    "memory": ("cpu_memory.json", read_record, memory_table),
    "cost": ("cpu_cost.json", read_record, cost_table),
    "heads": ("cpu_heads.json", read_record, heads_table),
    "quality": ("cpu_quality", read_results, quality_table),
    "tasks": ("cpu_tasks", read_results, quality_table),
    "heads-quality": ("cpu_heads_quality", read_results, quality_table),
    "codec-divergence": ("cpu_codec_divergence", read_results, codec_table),
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


def make_tables(folder: Path) -> dict[str, str]:
    """Return the tables whose records are in a folder."""
    return {
        name: table(read(folder / file))
        for name, (file, read, table) in TABLES.items()
        if (folder / file).exists()
    }


def main() -> int:
    """Write or check the README; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
