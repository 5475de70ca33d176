"""The decoding bench: its toy run on CPU engines, and the arithmetic of what it reports."""

import bench_decode
import pytest
import records

CELL = {"shape": "8B", "tokens": 32768, "batch": 1}


def result(row, milliseconds, **changes):
    return {**CELL, "row": row, "step_ms": {"median": milliseconds}, **changes}


@pytest.mark.engine
def test_the_toy_run_measures_what_runs_and_says_why_the_rest_does_not(tmp_path):
    path = tmp_path / "toy.json"

    assert bench_decode.main(["--sizes", "toy", "--output", str(path)]) == 0

    record = records.read_record(path)
    cells = {(one["row"], one["batch"]): one for one in record["results"]}
    rows = {*bench_decode.ROWS} - {bench_decode.AGAIN}
    assert set(cells) == {(row, batch) for row in rows for batch in (1, 2)}
    assert path.with_suffix(".png").stat().st_size > 1000
    for (row, batch), one in cells.items():
        assert ("step_ms" in one) != ("not_run" in one)
        if row in ("bf16", "int8", "int4", "kivi2", "snapkv", "snapkv-int4"):
            assert one["step_ms"]["repeats"] == 4
            assert one["tokens_per_second"] == pytest.approx(
                1e3 * batch / one["step_ms"]["median"], rel=1e-3
            )
    held = {row: one["bytes"] for (row, batch), one in cells.items() if "bytes" in one}
    assert held["bf16"] > held["int8"] > held["int4"] > held["kivi2"] > held["snapkv-int4"]
    assert held["bf16"] > held["snapkv"]
    assert cells["bf16", 2]["bytes"] == 2 * cells["bf16", 1]["bytes"]
    for row in ("int4_per_token_head", "turboquant_4bit_nc"):
        assert cells[row, 1]["not_run"] == f"CPU_ATTN does not read a cache of {row}"


def test_ratios_are_over_the_full_cache_in_the_same_cell():
    full, packed = result("bf16", 4.0), result("int4", 3.0)
    other = result("int4", 3.0, batch=4)
    failed = {**CELL, "row": "fp8", "not_run": "ValueError: no"}

    found = bench_decode.with_ratios([full, packed, other, failed])

    assert [one.get("ratio") for one in found] == [1.0, 0.75, None, None]


@pytest.mark.parametrize(
    ("results", "missed"),
    [
        ([result("bf16", 4.0), result("fp8", 3.0), result("int4", 2.9)], []),
        ([result("bf16", 4.0), result("fp8", 3.0), result("int4", 3.1)], ["faster than fp8"]),
        ([result("bf16", 4.0), result("kivi2", 4.1)], ["kivi2 is not slower than bf16"]),
        ([result("bf16", 4.0, tokens=8192), result("kivi2", 4.1, tokens=8192)], []),
        ([result("kivi2", 4.1)], []),
    ],
)
def test_cells_that_miss_a_target_are_named(results, missed):
    found = bench_decode.shortcomings(results)

    assert len(found) == len(missed)
    assert all(text in sentence for text, sentence in zip(missed, found, strict=True))


def test_a_reason_is_the_first_line_that_says_something():
    error = ValueError("1 validation error for VllmConfig\n  Value error, no such cache\n more")

    assert bench_decode.reason(error) == "ValueError: Value error, no such cache"


def test_requests_outlast_the_prompts_of_the_others():
    arguments = bench_decode.parse_arguments(["--steps", "8"])

    alone, many = (bench_decode.outputs_of(arguments, 4096, batch) for batch in (1, 64))

    assert alone >= 8 + bench_decode.WARM_UP
    assert many - alone >= 64 * 4096 // bench_decode.BATCHED_TOKENS - 1
