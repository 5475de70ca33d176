import json
import subprocess
import sys
from pathlib import Path

import pytest
import report

REPOSITORY = Path(__file__).resolve().parents[2]

DIVERGENCE = {"kl": 0.5, "standard_error": 0.1, "same_top": 0.75, "tokens": 28, "whole": True}


def write_results(folder: Path) -> None:
    folder.mkdir()
    settings = {"model": "testbed", "limit": 4, "versions": {"vllm": "0.32.0"}}
    engine = {"dtype": "bfloat16", "block_size": 32, "block_bytes": 65536, "device": "a CPU"}
    made = {"settings": settings, "engine": engine, "date_utc": "2026-01-02", "command": "eval"}
    cells = [("full", 1.0, [1, 1, 1, 1], 64), ("random", 0.25, [0, 0, 1, 0], 17)]
    cells += [("snapkv", 0.25, [1, 1, 1, 1], 16), ("knorm", 0.25, [0, 0, 1, 0], 16)]
    lines = [
        {
            **made,
            **{"policy": policy, "keep_ratio": kept, "task": "needle", "length": 2048},
            **{"scores": scores, "accuracy": sum(scores) / 4, "standard_error": 0.02},
            "blocks": {"peak": 70.0, "steady": float(blocks)},
            "divergence": None if policy == "full" else dict(DIVERGENCE),
        }
        for policy, kept, scores, blocks in cells
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    write_results(tmp_path / "results" / "cpu_quality")
    readme = tmp_path / "README.md"
    readme.write_text("before\n\n<!-- results:quality -->\n<!-- /results:quality -->\n\nafter\n")
    return tmp_path


def run(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "report.py"), *options]
    command += ["--readme", str(repository / "README.md")]
    command += ["--results", str(repository / "results")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readme_gets_the_table_between_its_markers(repository):
    assert run(repository).returncode == 0

    text = (repository / "README.md").read_text()
    assert text.startswith("before\n\n<!-- results:quality -->\n| policy |")
    assert text.endswith("<!-- /results:quality -->\n\nafter\n")
    assert "| full cache | 1 | 100 ± 2 | 100 |" in text
    assert "| `snapkv` | 0.25 | 100 ± 2 | 25 |" in text
    assert "| `knorm` | 0.25 | 25 ± 2† | 25 |" in text


def test_codecs_are_compared_with_the_full_cache_question_by_question(repository):
    write_results(repository / "results" / "cpu_codec_divergence")
    name = "<!-- results:codec-divergence -->"
    (repository / "README.md").write_text(f"{name}\n{name.replace('results', '/results')}\n")

    assert run(repository).returncode == 0

    text = (repository / "README.md").read_text()
    assert "| full cache | 1 | 100.0 | - | - | - | 100 |" in text
    assert "| `knorm` | 0.25 | 25.0 | -75.0 ± 34.2 | 0.5 ± 0.1 | 75.0 | 25 |" in text
    assert "Per cent of 4 questions (task `needle`, 2048 tokens, 4 documents)" in text


def test_check_fails_on_a_readme_that_differs_and_changes_nothing(repository):
    old = (repository / "README.md").read_text()

    assert run(repository, "--check").returncode == 1

    assert (repository / "README.md").read_text() == old


def test_check_passes_on_a_readme_just_written(repository):
    run(repository)

    assert run(repository, "--check").returncode == 0


def test_writing_twice_changes_nothing(repository):
    text = "<!-- results:quality -->\nold\n<!-- /results:quality -->\n"
    tables = report.make_tables(repository / "results")

    once = report.fill_markers(text, tables)

    assert report.fill_markers(once, tables) == once


@pytest.mark.parametrize(
    "text",
    [
        "<!-- results:quality -->\n",
        "<!-- /results:quality -->\n<!-- results:quality -->\n",
        "<!-- results:qualty -->\n<!-- /results:qualty -->\n",
    ],
)
def test_broken_markers_are_refused(text):
    with pytest.raises(report.ReportError):
        report.fill_markers(text, {"quality": "a table"})


def test_tables_without_markers_are_left_out():
    assert report.fill_markers("nothing here\n", {"quality": "a table"}) == "nothing here\n"


def test_the_headline_says_what_was_seen():
    text = " ".join(report.headline(report.read_record(report.RESULTS / "cpu_memory.json")).split())

    assert text.startswith("In the same ")
    assert "where stock vLLM runs 5" in text
    assert "answers are right" in text


def test_the_readme_in_the_repository_agrees_with_the_records():
    command = [sys.executable, str(REPOSITORY / "scripts" / "report.py"), "--check"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [n for n in report.make_tables(report.RESULTS) if n != "headline"])
def test_every_record_in_the_repository_makes_its_table(name):
    file, read, table = report.TABLES[name]
    text = table(read(report.RESULTS / file))

    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) > 3
