"""The head bench: its toy run on CPU engines, and the arithmetic of what it reports."""

import argparse
import subprocess
import sys

import bench_heads
import pytest
import records


def memory(**changes):
    result = {"kind": "memory", "ratio": 0.5, "length": 512, "running": 9, "formula": 9.4}
    blocks = {name: {"plan": 20, "seen": 20} for name in ("peak_blocks", "steady_blocks")}
    return {**result, "of_formula": 1.0, **blocks, **changes}


@pytest.mark.full
@pytest.mark.engine
def test_the_toy_run_holds_what_the_plan_says(tmp_path):
    path = tmp_path / "toy.json"
    sizes = "--ratios 1 0.5 --lengths 512 --requests 14 --outputs 96 --rounds 2 --time-outputs 4"

    subprocess.run(
        [sys.executable, bench_heads.__file__, *sizes.split(), "--output", path], check=True
    )

    results = records.read_record(path)["results"]
    stock, plan = (one for one in results if one["kind"] == "memory")
    assert stock["pool_bytes"] == pytest.approx(plan["pool_bytes"], rel=0.05)
    assert stock["running"] == bench_heads.POOL_REQUESTS < plan["running"]
    assert plan["steady_bytes"] < stock["steady_bytes"]
    for one in (stock, plan):
        assert one["steady_blocks"]["seen"] == one["steady_blocks"]["plan"]
    times = [one for one in results if one["kind"] == "time"]
    assert [one["ratio"] for one in times] == [1.0, 0.5]
    assert all(one["decode_ms"]["repeats"] == 2 and one["decode_ms"]["median"] for one in times)
    assert times[0]["prefill_ratio"]["median"] == 1.0


def test_heads_of_a_block_are_those_of_the_plan():
    arguments = argparse.Namespace(shape=(4, 4))

    assert bench_heads.heads_per_block(arguments, 1.0) == (16, 16)
    width, all_heads = bench_heads.heads_per_block(arguments, 0.5)
    assert all_heads == 16
    assert 8 % width == 0


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (memory(), []),
        (memory(kind="time"), []),
        (memory(of_formula=0.9), ["ratio 0.5 at 512 tokens: 9 of 9.4 requests"]),
        (
            memory(steady_blocks={"plan": 20, "seen": 21}),
            ["ratio 0.5 at 512 tokens: a request held more than the plan's steady_blocks"],
        ),
    ],
)
def test_what_falls_short_is_told(result, told):
    assert bench_heads.shortcomings([result]) == told


def test_times_are_compared_turn_by_turn():
    found = bench_heads.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])

    assert (found["median"], found["repeats"]) == (2.0, 3)
