import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from vllm_kvpress.cli import main
from vllm_kvpress.evaluation.grid import Settings
from vllm_kvpress.evaluation.records import append_record, versions
from vllm_kvpress.testbed.documents import TASKS

WRONG = [
    ([], ["--model is missing", "--model testbed"]),
    (["--policies", "snpakv"], ["Did you mean 'snapkv'?"]),
    (["--policies", "full,,knorm"], ["--policies has an empty item"]),
    (["--policies", "snapkv:pol=3"], ["'pol' is not known", "Did you mean 'pool'?"]),
    (["--policies", "snapkv:pool=four"], ["pool of the scorer 'snapkv' is not valid", "'four'"]),
    (["--policies", "nothing.yaml"], ["policy file 'nothing.yaml' cannot be read"]),
    (["--tasks", "needles"], ["task 'needles' is not known", "Did you mean 'needle'?"]),
    (["--tasks", ""], ["--tasks has an empty item"]),
    (["--limit", "0"], ["--limit", "'0' is not an integer from 1"]),
    (["--limit", ""], ["--limit", "''"]),
    (["--limit", "ten"], ["--limit", "'ten' is not an integer from 1"]),
    (["--limit"], ["--limit: expected one argument"]),
    (["--seed", "-1"], ["--seed"]),
    (["--keep-ratio", "2"], ["--keep-ratio is not valid", "'2'"]),
    (["--keep-ratio", "0"], ["--keep-ratio is not valid", "above 0 and below 1"]),
    (["--keep-ratio", "nan"], ["--keep-ratio is not valid", "'nan'"]),
    (["--keep-ratio", "0.5,half"], ["--keep-ratio is not valid", "'half'"]),
    (["--lengths", "9000"], ["at most 8192 together"]),
    (["--lengths", "1k"], ["--lengths is not valid", "'1k'", "such as 1024,4096"]),
    (["--lengths", "0"], ["--lengths is not valid", "numbers of tokens from 128"]),
    (["--lengths", ""], ["--lengths has an empty item"]),
    (["--no-such-option"], ["unrecognized arguments: --no-such-option"]),
    (["--model", "/no/such"], ["the model '/no/such' is not there"]),
    (["--model", "no-such"], ["the model 'no-such' is not there", "testbed"]),
    (["--model", "no/such"], ["neither on this machine nor could it be downloaded"]),
    (["--out", "/dev/null/x"], ["--out cannot be used"]),
    (["--", "--kv-policy", "snapkv"], ["--kv-policy", "Use --policies"]),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=lambda value: " ".join(value)[:60])
def test_bad_arguments_are_one_line_and_exit_code_2(words, expected, capsys):
    model = [] if not words or "--model" in words else ["--model", "testbed"]

    code = main(["eval", *model, *words])

    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert [text for text in expected if text not in captured.err] == []


@pytest.mark.parametrize("content", ["not json", "[]", None])
def test_a_folder_that_is_no_model_is_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)

    code = main(["eval", "--model", str(tmp_path), "--out", str(tmp_path)])

    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert "no usable config.json" in error


def test_help_warns_of_loglikelihood_tasks(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])

    assert "NEVER see post-prefill eviction" in " ".join(capsys.readouterr().out.split())


def test_task_path_has_every_task_at_every_length(capsys):
    assert main(["eval", "--task-path"]) == 0

    printed = capsys.readouterr()
    assert printed.err.startswith("WARNING: loglikelihood tasks")
    folder = Path(printed.out.strip())
    found = {}
    for path in folder.glob("kvpress_*.yaml"):
        data = yaml.safe_load(path.read_text())
        assert data["task"] == path.stem
        found[path.stem] = (data["metadata"]["testbed_task"], data["metadata"]["num_tokens"])
    assert found == {f"kvpress_{task}_{k}k": (task, 1024 * k) for task in TASKS for k in (1, 2, 4)}


def test_tasks_are_part_of_the_package():
    """The folder is no package of its own: lm-eval finds its files by path."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())

    patterns = project["tool"]["setuptools"]["package-data"]["vllm_kvpress.evaluation"]
    assert patterns == ["tasks/*.yaml", "tasks/*.py"]


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_kvpress.evaluation.run.run_evaluation", interrupted)

    with pytest.raises(SystemExit) as raised:
        main(["eval", "--model", "testbed", "--out", str(tmp_path), "--no-plots"])

    assert raised.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"


def test_a_command_whose_cells_are_all_measured_reports_them_not_the_newest(
    tmp_path, monkeypatch, record
):
    monkeypatch.setattr("vllm_kvpress.evaluation.run.run_evaluation", lambda *arguments: None)
    settings = Settings("testbed", 2, 0, (), versions())
    for limit in (2, 3):
        own = replace(settings, limit=limit).to_json()
        append_record(tmp_path, record("full", "1" * limit, 1.0, settings=own))

    main(["eval", "--model", "testbed", "--limit", "2", "--out", str(tmp_path), "--no-plots"])

    assert "2 documents a cell" in (tmp_path / "report.md").read_text()


def test_without_vllm_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    code = main(["eval", "--model", "testbed", "--out", str(tmp_path), "--no-plots"])

    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert "vLLM is not installed" in error


def test_importing_the_command_needs_neither_vllm_nor_matplotlib():
    code = "import sys; sys.modules['vllm'] = sys.modules['matplotlib'] = None\n"
    code += "from vllm_kvpress.cli import main; main(['eval', '--task-path'])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)

    assert done.returncode == 0, done.stderr
