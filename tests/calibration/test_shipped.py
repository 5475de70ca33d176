"""The pattern files of the bundled model: what they say, and that the commands still find it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from vllm_kvpress.calibration.models import load_model
from vllm_kvpress.calibration.razor import combined_scores, observe_repeats
from vllm_kvpress.config import load_policy
from vllm_kvpress.policies.heads import HeadPlan, resolve_heads
from vllm_kvpress.testbed import head_pattern, model_path

FILES = {method: head_pattern(method) for method in ("duo", "razor")}


@pytest.fixture(scope="module")
def loaded():
    return load_model("testbed")


def labels(method, shape, choice="threshold=0.5"):
    return resolve_heads(load_policy(f"{method}:file={FILES[method]},{choice}").heads, shape).labels


@pytest.mark.parametrize("method", FILES)
def test_both_find_what_the_models_card_says(method, loaded):
    """By restricting heads it finds three of layer 1 that cannot all stream, and no other."""
    card = (model_path() / "README.md").read_text()
    assert "the other 3 retrieve: 1.0, 1.1, 1.3 (layer.head)" in card

    found = labels(method, loaded.shape)

    assert [row.count("1") for row in found][0::2] == [0, 0]
    assert found[3] == "0000"
    assert found[1].count("1") >= 3


def test_the_two_agree_on_the_layer_at_a_quarter(loaded):
    expected = ("0000", "1111", "0000", "0000")

    assert labels("duo", loaded.shape, "retrieval_ratio=0.25") == expected
    assert labels("razor", loaded.shape, "retrieval_ratio=0.25") == expected


def test_razor_still_finds_the_shipped_heads(loaded):
    settings = json.loads(FILES["razor"].with_suffix(".json").read_text())["settings"]

    scores = observe_repeats(loaded.model, 4, 8, period=settings["tokens"], seed=settings["seed"])

    combined = combined_scores(scores.by_kv_head(4))
    number = sum(score >= 0.5 for row in combined for score in row)
    assert HeadPlan.from_scores(combined, number).labels == labels("razor", loaded.shape)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_each_has_a_record_of_this_model_and_a_picture(file, loaded):
    record = json.loads(file.with_suffix(".json").read_text())

    assert record["model"] == "testbed"
    assert record["shape"] == vars(loaded.shape)
    assert Path(file.with_suffix(".png")).stat().st_size < 100_000
