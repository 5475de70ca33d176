import re

import pytest
import records


def test_commands_name_no_absolute_path():
    script = records.REPOSITORY / "scripts" / "report.py"
    arguments = [str(script), "--output", "/somewhere/else/out.json", "--seed", "7"]

    assert records.command(arguments) == "python scripts/report.py --output out.json --seed 7"


def test_a_record_says_how_where_and_with_what(tmp_path):
    record = records.make_record("x", settings={"a": 1}, seeds={"s": 2}, results=[{"b": 3}])
    records.write_record(tmp_path / "deep" / "x.json", record)

    assert records.read_record(tmp_path / "deep" / "x.json") == record
    assert {"command", "date_utc", "hardware", "software", "seeds", "settings"} <= set(record)
    assert {"os", "python", "torch", "vllm", "vllm_kvpress"} == set(record["software"])
    assert {"cpu", "cores", "memory_gib", "gpu"} == set(record["hardware"])


def test_an_interrupted_run_goes_on_with_the_same_settings_only(tmp_path):
    path = tmp_path / "x.json"
    made_with = {"settings": {"lengths": [1]}, "seeds": {"s": 2}}

    assert records.earlier_results(path, **made_with) == []
    records.write_record(path, records.make_record("x", **made_with, results=[{"b": 3}]))
    assert records.earlier_results(path, **made_with) == [{"b": 3}]
    for other in ({"settings": {"lengths": [2]}}, {"seeds": {"s": 3}}):
        with pytest.raises(SystemExit, match=r"^x\.json was made with other settings"):
            records.earlier_results(path, **{**made_with, **other})


def test_spread_gives_median_quartiles_and_extremes():
    figures = records.spread([3.0, 1.0, 2.0])

    assert (figures["least"], figures["median"], figures["most"]) == (1.0, 2.0, 3.0)
    assert figures["least"] <= figures["quartile_1"] <= figures["median"] <= figures["quartile_3"]
    assert figures["repeats"] == 3


def test_spread_of_one_value_is_that_value():
    assert records.spread([2.0])["quartile_1"] == 2.0


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_no_record_names_a_path_of_the_machine_that_made_it(path):
    text = path.read_text()

    assert str(records.REPOSITORY) not in text
    assert '"/' not in text
    commands = re.findall(r'"command": "([^"]*)"', text)
    assert commands
    assert not any(" /" in command for command in commands)
