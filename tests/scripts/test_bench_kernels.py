"""The kernels' bench: its toy run in the interpreter, and the arithmetic of what it reports."""

import os
import subprocess
import sys
from pathlib import Path

import bench_kernels
import kernel_cases
import pytest
import records
import torch
from vllm_kvpress.kernels import __path__ as kernel_folders

SHAPE = bench_kernels.SHAPES["8B"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The record of the toy run, made as a user makes it."""
    path = tmp_path_factory.mktemp("kernels") / "toy.json"
    script = records.REPOSITORY / "scripts" / "bench_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "--sizes", "toy", "--output", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "60% from 32768 tokens on; not measured here" in " ".join(done.stdout.split())
    return records.read_record(path)


def test_the_toy_run_meets_every_kernel_and_times_none(toy):
    folder = Path(next(iter(kernel_folders)))
    every = {path.parent.name for path in folder.glob("*/triton.py")}

    assert {result["kernel"] for result in toy["results"]} == every
    assert {result["seconds"] for result in toy["results"]} == {bench_kernels.INTERPRETED}
    assert toy["settings"]["copy_bandwidth"] == bench_kernels.INTERPRETED


def test_kernels_of_the_toy_run_equal_their_references(toy):
    for result in toy["results"]:
        writes = result["kernel"] in ("quantize_on_write", "compact", "physical_tables")
        assert result["error"] <= (0 if writes else 2e-6), result


def test_a_result_that_differs_is_seen():
    case = kernel_cases.tables(SHAPE, 64, 2).make(torch.device("cpu"))
    case.run()
    assert case.error() == 0

    case.run.args[-1][1] += 1

    assert case.error() == 1


def test_bytes_of_packed_attention_are_those_of_the_codes_and_scales():
    """4 bits of 64 channels, and a scale and a zero for each 32 of them."""
    case = kernel_cases.attention("int4", bench_kernels.TOY_SHAPES["toy"], 96, 2)
    made = case.make(torch.device("cpu"))
    cells = 2 * 96 * 2 * 2 * (64 // 2 + 2 * 4)
    tail = 2 * kernel_cases.TAIL * 2 * 2 * 64 * 4
    queries = 2 * 2 * 4 * 64 * 4

    assert made.num_bytes == cells + tail + queries


def test_only_measured_attention_over_packed_cells_is_held_to_the_target():
    cell = {"kernel": "paged_attention", "variant": "int4", "shape": "8B", "batch": 1}
    slow = cell | {"tokens": 32768, "bandwidth_share": 0.59}

    assert len(bench_kernels.shortcomings([slow])) == 1
    for fine in (
        slow | {"bandwidth_share": 0.6},
        slow | {"tokens": 8192},
        slow | {"variant": "exact"},
        slow | {"kernel": "compact"},
        cell | {"tokens": 32768, "seconds": "not run: no room"},
    ):
        assert bench_kernels.shortcomings([fine]) == []


def test_full_sizes_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        bench_kernels.parse_arguments([])
    assert "got full on a machine without a GPU; allowed there: toy" in capsys.readouterr().err
