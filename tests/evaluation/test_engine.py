"""The whole command on a real engine: what it writes, and that it goes on where it stopped."""

import json

import pytest

from vllm_kvpress.cli import main

pytestmark = pytest.mark.engine
pytest.importorskip("vllm")

WORDS = [
    "eval",
    "--model=testbed",
    "--policies=snapkv:pool=13,window=64",
    "--keep-ratio=0.5",
    "--tasks=needle,multi_turn,late_needle",
    "--lengths=1024",
    "--limit=4",
    "--divergence",
    "--no-plots",
]
TASKS = ("needle", "multi_turn", "late_needle")


def command(folder, *more):
    return [*WORDS, "--out", str(folder), *more, "--", "--max-num-seqs=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    assert main(command(folder)) == 0
    return folder


def read(folder):
    text = (folder / "results.jsonl").read_text()
    return {(r["policy"], r["task"]): r for r in map(json.loads, text.splitlines())}


def test_every_cell_is_measured_with_ceiling_and_floor(folder):
    policies = ("full", "random", "snapkv:pool=13,window=64")

    assert set(read(folder)) == {(policy, task) for policy in policies for task in TASKS}


def test_answers_are_right_where_they_must_be_and_wrong_where_chance_decides(folder):
    found = read(folder)

    for task in ("needle", "multi_turn"):
        assert found["full", task]["accuracy"] == 1.0
        assert found["snapkv:pool=13,window=64", task]["accuracy"] == 1.0
        assert found["random", task]["accuracy"] <= 0.5
    assert len(found["full", "multi_turn"]["by_turn"]) == 3


def test_a_late_question_finds_what_the_full_cache_has_and_a_compressed_one_may_have_lost(folder):
    found = read(folder)

    scores = {policy: found[policy, "late_needle"]["accuracy"] for policy, _ in found}
    assert scores["full"] == 1.0
    assert scores["random"] <= 0.5
    late, now = found["full", "late_needle"]["tokens"], found["full", "needle"]["tokens"]
    # The question ("what is the pass code of ...? answer:", 9 to 10 tokens) has moved from the
    # prompt to the outputs.
    assert now["prompt"] - late["prompt"] == late["generated"] - now["generated"]
    assert 8 <= late["generated"] - now["generated"] <= 10


def test_blocks_are_those_of_full_cache_and_plan(folder):
    found = read(folder)
    full, random = found["full", "needle"], found["random", "needle"]

    # 1012 to 1024 tokens and an answer of 7 in blocks of 32; the policy keeps half of the prompt.
    assert 32 <= full["blocks"]["peak"] == full["blocks"]["steady"] <= 33
    assert 15 <= random["blocks"]["steady"] <= 17
    assert random["blocks"]["peak"] > full["blocks"]["peak"]
    assert full["engine"]["block_bytes"] == 32 * 4 * 4 * 64 * 2 * 2
    assert full["bytes_per_token"] == pytest.approx(4096, rel=0.1)
    assert random["requests_at_once"]["in_pool"] > 1.8 * full["requests_at_once"]["in_pool"]


def test_divergence_from_the_full_cache_tells_policies_apart(folder):
    found = read(folder)

    for task in TASKS:
        assert found["full", task]["divergence"] is None
        close = found["snapkv:pool=13,window=64", task]["divergence"]
        far = found["random", task]["divergence"]
        assert far["tokens"] == close["tokens"] >= 4 * 7
        assert 0 < close["kl"] < 0.5 < far["kl"]
        assert far["same_top"] < close["same_top"]
        assert close["whole"]
    report = (folder / "report.md").read_text()
    assert "| KL, nats | same token, % |" in report


def test_options_after_two_dashes_are_vllm_s(folder):
    for record in read(folder).values():
        assert record["requests_at_once"]["seen"] == 3
        assert record["settings"]["vllm_options"] == ["--max-num-seqs=3"]
        assert record["command"].endswith(" -- --max-num-seqs=3")


def test_times_are_of_real_work(folder):
    for record in read(folder).values():
        time = record["time"]
        assert time["prefill_tokens"] > 0
        assert 0 < time["prefill_seconds"] < 300
        assert 0 < time["decode_seconds"] < 300
        assert time["decode_tokens"] >= time["decode_steps"] > 0


def test_a_second_run_only_measures_what_is_missing(folder, monkeypatch, capsys):
    results = folder / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]))
    started = []
    popen = "vllm_kvpress.evaluation.run._run_engine"

    def note(plan, variant, cells, folder, work):
        started.append((variant.title, [cell.task for cell in cells]))
        results.write_text("".join(lines))

    monkeypatch.setattr(popen, note)

    assert main(command(folder)) == 0
    assert main(command(folder)) == 0

    assert started == [("snapkv:pool=13,window=64 at 0.5", ["late_needle"])]
    assert "0 cells to measure on 0 engines, 9 already" in capsys.readouterr().out


def test_other_arguments_are_other_cells(folder, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(
        "vllm_kvpress.evaluation.run._run_engine", lambda *arguments: started.append(arguments)
    )

    main(command(folder, "--seed=1"))

    assert len(started) == 3


def test_an_engine_that_does_not_start_is_one_line_with_its_reason(tmp_path, capsys):
    code = main([*command(tmp_path), "--no-such-option"])

    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert "no-such-option" in error
    assert "logs/full.log" in error
