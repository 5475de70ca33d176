"""Head plans: which KV heads retrieve, by pattern file, seeded draw or labels."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpress.config import load_policy
from vllm_kvpress.errors import ConfigError
from vllm_kvpress.policies import resolve
from vllm_kvpress.policies.heads import (
    HeadPlan,
    HeadShape,
    check_heads,
    inline_heads,
    read_pattern,
    resolve_heads,
    write_pattern,
)

SHAPE = HeadShape(num_layers=2, num_kv_heads=4, num_heads=8, head_size=64)
SCORES = [[0.9, 0.1, 0.5, 0.0], [0.2, 0.8, 0.5, 0.3]]
RECORD = {"shape": {"num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "head_size": 64}}


def heads(**section):
    return load_policy({"heads": section}).heads


def labels(**section):
    return resolve_heads(heads(**section), SHAPE).labels


@pytest.fixture
def pattern(tmp_path):
    """Writes a pattern file and returns its path."""

    def write(scores=SCORES, record=RECORD, name="duo.tsv"):
        write_pattern(tmp_path / name, scores, record)
        return str(tmp_path / name)

    return write


def test_the_highest_scores_retrieve_whatever_their_layer(pattern):
    file = pattern()

    assert labels(plan="duo", file=file, retrieval_ratio=0.25) == ("1000", "0100")
    assert labels(plan=file, retrieval_ratio=0.25) == ("1000", "0100")


def test_a_threshold_keeps_scores_that_reach_it(pattern):
    assert labels(plan="razor", file=pattern(), threshold=0.5) == ("1010", "0110")
    assert labels(plan="razor", file=pattern(), threshold=0.51) == ("1000", "0100")


def test_equal_scores_go_to_the_earlier_layer_and_head(pattern):
    file = pattern([[0.5] * 4, [0.5] * 4])

    assert labels(plan="duo", file=file, retrieval_ratio=0.375) == ("1110", "0000")


def test_no_head_may_retrieve_but_not_every_one(pattern):
    file = pattern()

    assert labels(plan="duo", file=file, retrieval_ratio=0) == ("0000", "0000")
    assert labels(plan="duo", file=file, threshold=2) == ("0000", "0000")
    with pytest.raises(ConfigError, match=r"retrieval_ratio 0\.95 leaves no head to stream"):
        labels(plan="duo", file=file, retrieval_ratio=0.95)
    with pytest.raises(ConfigError, match=r"threshold 0 leaves no head to stream.*8 of 8 KV heads"):
        labels(plan="duo", file=file, threshold=0)


def test_query_heads_are_reduced_to_kv_heads_by_their_maximum(pattern):
    rows = [
        [score for pair in zip(row, [0.05] * 4, strict=True) for score in pair] for row in SCORES
    ]

    assert labels(plan="duo", file=pattern(rows), retrieval_ratio=0.25) == ("1000", "0100")


def test_all_retrieves_everywhere_and_inline_says_it_itself():
    everywhere = resolve_heads(load_policy("knorm").heads, SHAPE)

    assert everywhere.labels == ("1111", "1111")
    assert labels(plan="inline", labels=["0100", "0001"]) == ("0100", "0001")


def test_the_authors_published_format_is_read(tmp_path):
    """Ten digits in exponent form, config.json beside it, no record of ours."""
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text("9.000e-01\t1.0e-01\t5e-1\t0.0\n2.0e-01\t8.000e-01\t5.0e-01\t3.0e-01\n")
    (tmp_path / "config.json").write_text('{"sink_size": 128, "recent_size": 256}')

    assert labels(plan="duo", file=str(file), retrieval_ratio=0.25) == ("1000", "0100")


@given(
    st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(0, 12),
)
def test_a_plan_has_the_asked_number_and_no_streaming_head_outranks_it(scores, number):
    number = min(number, 3 * len(scores))

    plan = HeadPlan.from_scores(scores, number)

    flat = [
        (score, kept)
        for row, kept_row in zip(scores, plan.retrieval, strict=True)
        for score, kept in zip(row, kept_row, strict=True)
    ]
    retrieval = [score for score, kept in flat if kept]
    streaming = [score for score, kept in flat if not kept]
    assert plan.num_retrieval == len(retrieval) == number
    assert HeadPlan.from_labels(plan.labels) == plan
    assert min(retrieval, default=9) >= max(streaming, default=-9)


def test_a_random_plan_is_seeded_and_larger_ones_hold_smaller_ones():
    def kept(seed, ratio):
        plan = resolve_heads(heads(plan="random", seed=seed, retrieval_ratio=ratio), SHAPE)
        return {
            (layer, head)
            for layer, row in enumerate(plan.retrieval)
            for head, retrieval in enumerate(row)
            if retrieval
        }

    assert kept(0, 0.5) == kept(0, 0.5)
    assert len({frozenset(kept(seed, 0.5)) for seed in range(8)}) > 4
    assert kept(3, 0.25) < kept(3, 0.5) < kept(3, 0.75)


def test_inline_carries_labels_and_no_path(pattern):
    policy = load_policy(f"duo:file={pattern()},retrieval_ratio=0.25,compensation=true")

    inline = inline_heads(policy, SHAPE)

    assert inline.to_json()["heads"] == {
        "plan": "inline", "labels": ["1000", "0100"], "seed": 0, "compensation": True,
    }  # fmt: skip
    assert inline.sink_tokens == policy.sink_tokens
    assert load_policy(json.dumps(inline.to_json())) == inline
    assert inline_heads(inline, SHAPE).heads == inline.heads
    assert inline_heads(load_policy("knorm"), SHAPE) == load_policy("knorm")


@pytest.mark.parametrize(("size", "recent"), [({"tokens": 100}, 96), (None, 70)])
def test_a_windowed_prefill_is_a_plan_whose_heads_all_stream(size, recent):
    evict = {"scorer": {"name": "position", "prefill": "windowed"}}
    evict |= {} if size is None else {"budget": size}
    packed = {"keys": "int4", "values": "int8"}
    source = {"name": "mine", "recent_tokens": 70, "evict": evict, "quantize": packed}
    policy = load_policy(source)
    resolve(policy)

    inline = inline_heads(policy, SHAPE)

    assert inline.heads.labels == ("0000", "0000")
    assert (inline.name, inline.sink_tokens, inline.recent_tokens) == ("mine", 4, recent)
    assert inline.evict is None
    assert inline.packs_on_write
    resolve(inline)
    exact = {**evict, "scorer": {"name": "position"}}
    kept = load_policy({"evict": exact})
    assert inline_heads(kept, SHAPE) == kept


def test_a_pattern_file_round_trips_exactly(pattern):
    scores = [[1 / 3, 0.1 + 0.2], [1e-17, 5.0]]

    read = read_pattern(Path(pattern(scores)))

    assert [list(row) for row in read.scores] == scores
    assert dict(read.shape) == RECORD["shape"]


def test_a_plan_without_its_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ConfigError) as none:
        check_heads(load_policy("duo").heads)
    with pytest.raises(ConfigError) as missing:
        check_heads(heads(plan="razor", file=str(tmp_path / "x.tsv"), threshold=0.5))

    assert "in POLICY:file=FILE.tsv" in str(none.value)  # duo-int4 is no duo
    for error in (none, missing):
        assert "vllm-kvpress calibrate-heads --model" in str(error.value)
        assert "\n" not in str(error.value)


WRONG_FILES = [
    ("", ["is not a table", "nothing"]),
    ("1\t2\n3\n", ["is not a table", "[1, 2]"]),
    ("1\tnan\n", ["line 1 of pattern file", "not finite", "nan"]),
    ("1\t2\n1\tinf\n", ["line 2 of pattern file", "not finite"]),
    ("1,2\n", ["no number", "'1,2'", "tab-separated"]),
    ("1\t2\t3\t4\n", ["has not the model's shape", "1 rows of 4", "2 rows (layers) of 4 KV heads"]),
    ("1\t2\n1\t2\n", ["has not the model's shape", "2 rows of 2", "query heads, 8"]),
]


@pytest.mark.parametrize(("text", "words"), WRONG_FILES, ids=lambda value: str(value)[:30])
def test_a_wrong_pattern_file_is_one_line(text, words, tmp_path):
    file = tmp_path / "duo.tsv"
    file.write_text(text)

    with pytest.raises(ConfigError) as error:
        labels(plan="duo", file=str(file), retrieval_ratio=0.5)

    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_a_pattern_of_another_model_is_refused_by_its_record(pattern):
    other = {"shape": {**RECORD["shape"], "head_size": 128, "num_heads": 32}}

    with pytest.raises(ConfigError, match=r"of another model; got num_heads 32, head_size 128"):
        labels(plan="duo", file=pattern(record=other), retrieval_ratio=0.5)


@pytest.mark.parametrize("record", ["[]", "{", '{"shape": 3}', '{"shape": {"num_layers": 2}}'])
def test_a_broken_record_is_named(record, pattern, tmp_path):
    file = pattern()
    (tmp_path / "duo.json").write_text(record)

    with pytest.raises(ConfigError, match=r"record .* has no usable shape"):
        labels(plan="duo", file=file, retrieval_ratio=0.5)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ConfigError, match="1 layers of 2 KV heads; allowed: 2 layers of 4"):
        labels(plan="inline", labels=["01"])
