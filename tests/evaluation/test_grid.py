import pytest

from vllm_kvpress.config import load_policy
from vllm_kvpress.errors import ConfigError
from vllm_kvpress.evaluation import grid


def test_full_cache_and_floor_are_always_there_and_first():
    assert grid.parse_policies("snapkv") == ["full", "random", "snapkv"]
    assert grid.parse_policies("snapkv,random,full,snapkv") == ["full", "random", "snapkv"]


def test_overrides_of_a_policy_may_have_commas():
    found = grid.parse_policies("knorm,snapkv:pool=13,window=64,keydiff")

    assert found[2:] == ["knorm", "snapkv:pool=13,window=64", "keydiff"]


def test_every_policy_gets_every_ratio_and_the_full_cache_one():
    variants = grid.make_variants(["full", "random", "streaming_llm"], [0.5, 0.25])

    assert [v.title for v in variants] == [
        "full",
        "random at 0.5",
        "random at 0.25",
        "streaming_llm at 0.5",
        "streaming_llm at 0.25",
    ]
    budgets = [load_policy(v.source).evict.budget for v in variants[1:]]
    assert [(b.keep_ratio, b.tokens) for b in budgets] == [(0.5, None), (0.25, None)] * 2


def test_a_ratio_of_a_head_plan_is_its_share_of_retrieval_heads(tmp_path):
    file = tmp_path / "duo.tsv"
    file.write_text("1\t0\n")
    named = [f"duo:file={file},recent_tokens=128", "duo:plan=random,seed=1"]
    policies = grid.parse_policies(",".join(named))

    variants = grid.make_variants(policies, [0.5, 0.0])

    assert policies == ["full", "random", *named]
    assert [(v.policy, v.keep_ratio) for v in variants[:2]] == [("full", 1.0), ("random", 0.5)]
    assert [(v.policy, v.keep_ratio) for v in variants[2:]] == [
        (name, ratio) for name in named for ratio in (0.5, 0.0)
    ]
    asked = load_policy({**load_policy(named[0]).to_json(), "heads": {
        "plan": "duo", "file": str(file), "retrieval_ratio": 0.0}})  # fmt: skip
    assert load_policy(variants[3].source) == asked


def test_a_policy_that_has_no_ratio_is_measured_once_as_it_stands(tmp_path):
    window, file = "streaming_llm:prefill=windowed,tokens=512", tmp_path / "labels.yaml"
    file.write_text("heads: {plan: inline, labels: ['10', '00']}\n")
    policies = grid.parse_policies(f"{window},{file}")

    variants = grid.make_variants(policies, [0.5, 0.25])[3:]

    assert [(v.title, v.keep_ratio) for v in variants] == [(window, None), (str(file), None)]
    assert load_policy(variants[0].source).evict == load_policy(window).evict
    assert load_policy(variants[1].source) == load_policy(file)


def test_a_head_plan_without_its_file_and_a_ratio_of_0_without_head_plan_are_refused():
    with pytest.raises(ConfigError, match=r"heads\.file is missing"):
        grid.parse_policies("razor")
    with pytest.raises(ConfigError, match=r"0 for head plans alone"):
        grid.make_variants(["full", "random", "knorm"], [0.5, 0.0])


def test_a_ratio_changes_nothing_else_of_a_policy(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: snapkv\nrecent_tokens: 80\nevict: {scorer: {window: 48}}\n")

    (variant,) = grid.make_variants([str(file)], [0.1])

    policy = load_policy(variant.source)
    assert (policy.name, policy.recent_tokens) == ("mine", 80)
    assert policy.evict.scorer.model_extra["window"] == 48


def test_lists_are_sorted_and_say_each_thing_once():
    assert grid.parse_ratios("0.1,.5, 0.25,0.5") == [0.5, 0.25, 0.1]
    assert grid.parse_lengths("4096,1024,4096") == [1024, 4096]
    assert grid.parse_tasks("copy,needle,copy") == ["needle", "copy"]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (grid.parse_policies, "snapvk", "Did you mean 'snapkv'"),
        (grid.parse_policies, "snapkv:pool=4", "odd"),
        (grid.parse_policies, "pool=4", "not known"),
        (grid.parse_policies, "", "empty item"),
        (grid.parse_tasks, "needle,niddle", "'niddle' is not known; allowed: needle, multi_key"),
        (grid.parse_tasks, "needle,", "empty item"),
        (grid.parse_ratios, "0.5,1", "got '1'"),
        (grid.parse_ratios, "0.0", "above 0 and below 1"),
        (grid.parse_ratios, "nan", "got 'nan'"),
        (grid.parse_lengths, "1k", "got '1k'"),
        (grid.parse_lengths, "64", "from 128"),
        (grid.parse_lengths, "99999999999", "from 128"),
    ],
)
def test_wrong_lists_are_named(parse, text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
