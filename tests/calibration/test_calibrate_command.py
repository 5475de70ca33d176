"""`vllm-kvpress calibrate-heads` on the bundled model: files, use, and wrong options."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from vllm_kvpress.cli import main
from vllm_kvpress.config import load_policy
from vllm_kvpress.policies.heads import HeadShape, resolve_heads

SHAPE = HeadShape(num_layers=4, num_kv_heads=4, num_heads=8, head_size=64)


@pytest.fixture
def run(capsys):
    def command(*words):
        code = main(["calibrate-heads", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_razor_writes_a_pattern_that_a_policy_takes(run, tmp_path):
    out = tmp_path / "razor.tsv"

    code, said, err = run("--model", "testbed", "--method", "razor", "--out", str(out))

    assert (code, err) == (0, "")
    assert f"--kv-policy razor:file={out},threshold=0.5" in said.replace("\n", " ")
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["shape"] == {
        "num_layers": 4, "num_kv_heads": 4, "num_heads": 8, "head_size": 64
    }  # fmt: skip
    assert record["settings"] == {"tokens": 631, "repeats": 4, "seed": 0}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    plan = resolve_heads(load_policy(f"razor:file={out},threshold=0.5").heads, SHAPE)
    assert plan.labels[0] == plan.labels[2] == plan.labels[3] == "0000"
    assert plan.num_retrieval >= 3


def test_duo_writes_its_windows_under_the_authors_names(run, tmp_path):
    out = tmp_path / "duo.tsv"
    few = ("--steps", "2", "--length", "512", "--sink-tokens", "4", "--recent-tokens", "64")

    code, said, _ = run(
        "--model", "testbed", "--method", "duo", "--out", str(out), "--no-plot", *few
    )

    assert code == 0
    assert "step 2, 16 of 16 gates at 0.5 or more" in said
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["sink_size"], record["recent_size"]) == (4, 64)
    assert record["settings"]["reg_weight"] == 0.05
    assert not out.with_suffix(".png").exists()
    assert not out.with_suffix(".checkpoint").exists()


TESTBED = ["--model", "testbed", "--out", "/path/to/nowhere/x.tsv"]
WRONG = [
    (["--method", "duo"], ["--model"]),
    (["--model", "testbed", "--method", "dua"], ["--method", "'dua'", "duo"]),
    (["--model", "testbed", "--method", "duo", "--out", "x.csv"], ["--out", "'x.csv'", ".tsv"]),
    ([*TESTBED, "--method", "duo"], ["--out cannot be used", "Make the folder"]),
    (["--model", "testbed", "--method", "duo", "--steps", "0"], ["--steps", "'0'", "from 1"]),
    (["--model", "testbed", "--method", "duo", "--reg-weight", "-1"], ["--reg-weight", "'-1'"]),
    (
        ["--model", "testbed", "--method", "razor", "--steps", "3"],
        ["--steps does not go with --method razor", "--seed, --tokens"],
    ),
    (["--model", "testbed", "--method", "duo", "--tokens", "9"], ["--tokens does not go with"]),
    (["--model", "testbed", "--method", "razor", "--tokens", "2048"], ["2 to 2047"]),
    (["--model", "testbed", "--method", "duo", "--length", "8000"], ["--length", "512 to 7936"]),
    (
        ["--model", "testbed", "--method", "duo", "--length", "1024", "--recent-tokens", "600"],
        ["--sink-tokens and --recent-tokens", "128 and 600", "less than 512"],
    ),
    (["--model", "./no-such", "--method", "duo"], ["'./no-such' is not there", "testbed"]),
]


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=lambda value: " ".join(value)[-60:])
def test_a_wrong_option_is_one_line(run, words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    code, out, err = run(*words)

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [word for word in expected if word not in err] == []
    assert list(tmp_path.iterdir()) == []
