import json
import sys

import pytest

from vllm_kvpress.cli import main
from vllm_kvpress.evaluation.plots import legend_text, pareto_front, pareto_points
from vllm_kvpress.evaluation.records import Results, append_record
from vllm_kvpress.evaluation.tables import floor_lines, not_better_than_floor, report_text


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_report_has_a_table_for_each_task_and_length(records):
    text = report_text(Results(records, 0))

    assert text.count("## needle, ") == 2
    assert "10 documents a cell, seed 0" in text
    assert "| full cache | 1 | 100.0 ± 10.0 | - | - | 40.0 | 40.0 | 100 |" in text


def test_differences_are_paired_with_full_cache_and_floor(records):
    cells = row(report_text(Results(records, 0)), "| `snapkv:pool=13").split(" | ")

    assert cells[3].startswith("-10.0 ± ")
    assert cells[4].startswith("+80.0 ± ")
    assert cells[7] == "50"


def test_who_is_not_better_than_random_is_flagged(records):
    flagged = not_better_than_floor(records)
    text = report_text(Results(records, 0))

    assert [(r["policy"], r["length"]) for r in flagged] == [("knorm", 1024), ("knorm", 2048)]
    assert "20.0 ± 10.0†" in row(text, "| `knorm`")
    assert "\n- knorm at 0.5: all 2 cells\n" in text


def test_where_a_policy_is_not_better_is_said_cell_by_cell(records, record):
    better = record("knorm", "1111111110", length=2048)

    assert floor_lines([*records[:-1], better]) == ["knorm at 0.5: needle at 1024"]


def test_a_cell_without_floor_is_not_judged(record):
    lonely = [record("full", "11", 1.0), record("knorm", "00"), record("random", "00", 0.25)]

    assert not_better_than_floor(lonely) == []


def test_report_says_what_it_left_out(records):
    assert "3 more results" in report_text(Results(records, 3))


def test_pareto_front_is_what_nothing_beats():
    points = [(0.5, 0.6), (0.1, 0.2), (0.5, 0.9), (0.3, 0.2), (1.0, 0.9)]

    assert pareto_front(points) == [(0.1, 0.2), (0.5, 0.9)]


def test_pareto_points_are_of_policies_measured_everywhere(records):
    points = pareto_points(records[:-1])

    assert points["full", 1.0] == (1.0, 1.0)
    assert points["snapkv:pool=13,window=64", 0.5] == (0.5, pytest.approx(0.9))
    assert ("knorm", 0.5) not in points


def test_report_command_makes_table_and_plots_anew(tmp_path, records, capsys):
    pytest.importorskip("matplotlib")
    for record in records:
        append_record(tmp_path, record)

    assert main(["report", str(tmp_path)]) == 0

    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl",
        "report.md",
        "accuracy.png",
        "needle_depths.png",
        "pareto.png",
    }
    assert "not better than random: knorm at 0.5: all 2 cells" in capsys.readouterr().out
    assert "![pareto](pareto.png)" in (tmp_path / "report.md").read_text()


def test_a_policy_without_a_ratio_is_shown_with_a_dash(tmp_path, records, record):
    pytest.importorskip("matplotlib")
    for one in records:
        own = record("windowed", "1" * 10, length=one["length"], keep_ratio=0.5)
        for made in (one, {**own, "keep_ratio": None}):
            append_record(tmp_path, made)

    assert main(["report", str(tmp_path)]) == 0

    assert "| `windowed` | - | 100.0" in (tmp_path / "report.md").read_text()


def test_without_needles_there_is_no_heat_map(tmp_path, record, capsys):
    pytest.importorskip("matplotlib")
    for one in (record("full", "11", 1.0, task="copy"), record("random", "01", task="copy")):
        append_record(tmp_path, one)

    assert main(["report", str(tmp_path)]) == 0

    assert not (tmp_path / "needle_depths.png").exists()


def test_missing_matplotlib_is_one_line_that_names_the_extra(
    tmp_path, records, capsys, monkeypatch
):
    append_record(tmp_path, records[0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    code = main(["report", str(tmp_path)])

    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert "vllm-kvpress[eval]" in error
    assert main(["report", str(tmp_path), "--no-plots"]) == 0


def test_records_are_plain_json(records):
    assert json.loads(json.dumps(records)) == records


def test_legends_are_narrow_and_name_files_without_their_folders():
    policy = "duo-int4:file=some/where/duo.tsv,sink_tokens=4,recent_tokens=128,keys=kivi2"

    lines = legend_text(policy).split("\n  ")

    assert "".join(lines) == policy.replace("some/where/", "")
    assert len(lines) > 1
    assert max(map(len, lines)) <= 44
    assert legend_text("snapkv") == "snapkv"
