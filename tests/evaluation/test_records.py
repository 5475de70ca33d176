import json

import pytest

from vllm_kvpress.errors import ConfigError
from vllm_kvpress.evaluation.grid import Cell, Settings, Variant
from vllm_kvpress.evaluation.records import (
    append_record,
    cell_key,
    commands,
    read_records,
    read_results,
    record_key,
)


def test_what_was_appended_is_read_again(tmp_path, records):
    for record in records:
        append_record(tmp_path / "new", record)

    assert read_records(tmp_path / "new") == records


def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path, records):
    first, second = records[:2]
    append_record(tmp_path, first)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(json.dumps(second)[:100])

    assert read_records(tmp_path) == [first]
    append_record(tmp_path, second)
    assert read_records(tmp_path) == [first, second]


@pytest.mark.parametrize("line", ["{}", "[]", "no json", '{"policy": "full"}', ""])
def test_a_line_that_is_no_record_is_named(tmp_path, records, line):
    append_record(tmp_path, records[0])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(f"{line}\n")

    with pytest.raises(ConfigError, match=r"line 2 of .* is not a result"):
        read_records(tmp_path)


def test_the_newest_settings_and_the_newest_record_of_a_cell_count(tmp_path, record):
    other = {"settings": {"model": "other"}}
    for one in (
        record("knorm", "00"),
        record("knorm", "11", **other),
        record("full", "11", 1.0),
        record("knorm", "01"),
    ):
        append_record(tmp_path, one)

    found = read_results(tmp_path)

    assert [(r["policy"], r["scores"]) for r in found.records] == [
        ("knorm", [0, 1]),
        ("full", [1, 1]),
    ]
    assert found.num_others == 1


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no results in"):
        read_results(tmp_path)


def test_no_results_of_a_command_is_an_error(tmp_path, record):
    append_record(tmp_path, record("full", "11", 1.0))
    other = Settings("testbed", 3, 0, (), {})

    with pytest.raises(ConfigError, match=r"no results of this command in .*; got 1 that other"):
        read_results(tmp_path, other)


def test_a_record_has_the_key_of_its_cell(record):
    settings = Settings("testbed", 10, 0, ("--dtype", "float16"), {"vllm": "0.32.0"})
    variant = Variant("knorm", 0.5, {"name": "knorm", "sink_tokens": 4})
    made = record(
        "knorm", "11", settings=settings.to_json(), policy_in_full=variant.source, keep_ratio=0.5
    )

    key = cell_key(settings, variant, Cell("needle", 1024))

    assert record_key(json.loads(json.dumps(made))) == key
    assert cell_key(settings, variant, Cell("needle", 2048)) != key
    assert record_key({**made, "policy_in_full": {"name": "knorm", "sink_tokens": 8}}) != key


def test_commands_that_differ_in_policies_alone_are_one_with_what_was_measured(record):
    records = [
        record("full", "11", 1.0, command="eval --policies snapkv,int8,knorm --limit 2"),
        record("snapkv", "11", command="eval --policies snapkv,int8,knorm --limit 2"),
        record("int8:group=32", "11", command="eval --policies=int8:group=32 --limit 2"),
        record("snapkv", "11", 0.25, command="eval --limit 2 --keep-ratio 0.25"),
        record("my policy.yaml", "11", command="eval --policies 'my policy.yaml'"),
        record("random", "11", command="eval --policies keydiff"),
    ]

    assert commands(records) == [
        "eval --policies snapkv,int8:group=32 --limit 2",
        "eval --limit 2 --keep-ratio 0.25",
        "eval --policies 'my policy.yaml'",
    ]
    assert commands(records[-1:]) == ["eval --policies keydiff"]
