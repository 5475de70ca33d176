import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_kvpress.config import Heads, Policy, known_policies, load_policy
from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.policies import resolve

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = [
    *(
        "duo",
        "duo-int4",
        "duo-snapkv",
        "duo-snapkv-int4",
        "int4",
        "int8",
        "keydiff",
        "kivi2",
        "kivi4",
        "knorm",
        "logquant",
        "random",
        "razor",
    ),
    *(
        "snapkv",
        "snapkv-demote",
        "snapkv-fp8",
        "snapkv-int4",
        "snapkv-kivi2",
        "streaming_llm",
        "value_key_norm",
    ),
]
KNORM = {"scorer": {"name": "knorm"}, "budget": {"tokens": 100}}
PACKED = {"keys": "int4", "values": "int4"}
FP8 = {"keys": "fp8", "values": "fp8"}
WINDOWED = {"base": "streaming_llm", "evict": {"scorer": {"prefill": "windowed"}}}


def test_every_file_in_configs_is_a_known_policy():
    assert [info.name for info in known_policies()] == NAMES
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_policy_resolves_and_round_trips(name):
    policy = load_policy(name)

    assert policy.name == name
    assert load_policy(CONFIGS / f"{name}.yaml") == policy
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    assert load_policy(json.dumps(policy.to_json())) == policy
    assert load_policy(policy) is policy
    resolve(policy)


def test_shipped_policies_carry_a_title_and_a_paper():
    for info in known_policies():
        assert info.title
        assert re.match(r"arXiv \d{4}\.\d{5}, |none \(baseline\)", info.paper), info


def test_shipped_scorer_parameters_are_all_written_out():
    """The compact form `name:key=value` knows a scorer's parameters from the file."""
    for name in NAMES:
        policy = load_policy(name)
        if policy.evict is not None:
            assert vars(resolve(policy)) == policy.evict.scorer.params


def test_defaults_of_a_short_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("evict:\n  scorer: {name: knorm}\n  budget: {tokens: 100}\n")

    policy = load_policy(str(file))

    assert policy.to_json() == {
        "name": "mine",
        "sink_tokens": 4,
        "recent_tokens": 64,
        "evict": {
            "scorer": {"name": "knorm"},
            "budget": {"name": "uniform", "tokens": 100},
            "when": {"prompt_end": True, "every_decode_tokens": 0},
            "losers": "drop",
        },
        "heads": {"plan": "all", "seed": 0, "compensation": False},
        "layers": {"skip": []},
    }


def test_policy_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_policy("snapkv").sink_tokens = 5


def test_base_is_merged_and_sizes_replace_each_other():
    by_ratio = load_policy({"base": "snapkv", "evict": {"budget": {"keep_ratio": 0.25}}})
    by_tokens = load_policy({"base": "knorm", "evict": {"budget": {"tokens": 500}}})

    assert by_ratio.name == "snapkv-custom"
    assert by_ratio.evict.budget.model_dump(exclude_none=True) == {
        "name": "uniform",
        "keep_ratio": 0.25,
    }
    assert by_ratio.evict.scorer == load_policy("snapkv").evict.scorer
    assert by_tokens.evict.budget.tokens == 500
    assert by_tokens.evict.budget.keep_ratio is None


def test_base_with_another_scorer_takes_none_of_its_parameters():
    policy = load_policy({"base": "snapkv", "evict": {"scorer": {"name": "random", "seed": 7}}})

    assert policy.evict.scorer.params == {"seed": 7}


def test_base_works_in_a_file_and_inline(tmp_path):
    file = tmp_path / "half.yaml"
    file.write_text("base: snapkv\nevict: {budget: {keep_ratio: 0.5}}\n")
    inline = '{"base": "snapkv", "name": "half", "evict": {"budget": {"keep_ratio": 0.5}}}'

    assert load_policy(file) == load_policy(inline)


def test_compact_form():
    policy = load_policy(
        "snapkv:keep_ratio=0.25,window=16,pooling=max,sink_tokens=0,recent_tokens=32"
    )

    assert policy == load_policy(
        {
            "base": "snapkv",
            "sink_tokens": 0,
            "recent_tokens": 32,
            "evict": {
                "budget": {"keep_ratio": 0.25},
                "scorer": {"window": 16, "pooling": "max"},
            },
        }
    )
    assert load_policy("knorm:every_decode_tokens=64").evict.when.every_decode_tokens == 64


# (source, words that its one message must hold)
WRONG = [
    (
        "snapvk",
        ["'snapvk' is not known", "snapkv, snapkv-demote, snapkv-fp8", "Did you mean 'snapkv'?"],
    ),
    ("", ["policy '' is not known"]),
    ("../configs", ["has the wrong ending", ".yaml, .yml"]),
    ("/etc/passwd", ["has the wrong ending"]),
    ("missing.yaml", ["'missing.yaml' cannot be read", "No such file"]),
    ("a\0b.yaml", ["cannot be read"]),
    (Path("missing.yml"), ["cannot be read"]),
    (3, ["wrong type", "got 3"]),
    (None, ["wrong type", "got None"]),
    ("{", ["not valid JSON"]),
    ("{}", ["keeps everything", "Add evict, quantize or heads"]),
    ('{"evict": 1, "evict": 2}', ["'evict'", "twice"]),
    ('{"sink_tokens": NaN}', ["not finite", "NaN"]),
    ("{" * 60000, ["not valid JSON"]),
    ('{"a":' * 13000, ["not valid JSON"]),
    ('{"a": ' + "9" * 50000 + "}", ["not valid JSON"]),
    ("{" + " " * 70000 + "}", ["too large"]),
    ({1: 2}, ["1 is not a known key"]),
    ({"evct": KNORM}, ["evct is not a known key", "Did you mean 'evict'?"]),
    ({"base": "snapkv", "sink_token": 4}, ["sink_token is", "Did you mean 'sink_tokens'?"]),
    ({"base": "snapvk"}, ["'snapvk' is not known", "Did you mean 'snapkv'?"]),
    ({"base": 3}, ["base is not a name", "got 3"]),
    ({"base": "../secret"}, ["is not known"]),
    ({"evict": 3}, ["evict is not valid", "got 3", "a mapping with scorer"]),
    ({"evict": {"budget": {"tokens": 3}}}, ["evict.scorer is missing"]),
    ({"evict": {**KNORM, "lossers": "drop"}}, ["evict.lossers", "Did you mean 'losers'?"]),
    ({"evict": {**KNORM, "losers": "merge"}}, ["evict.losers", "'merge'", "drop"]),
    ({"evict": {"scorer": {}}}, ["evict.scorer needs a name or a path", "neither"]),
    ({"evict": {"scorer": {"name": "a", "path": "b:C"}}}, ["got both"]),
    ({"evict": {"scorer": {"path": "a/b.py"}}}, ["evict.scorer.path", "my_module:MyScorer"]),
    ({"evict": {"scorer": {"name": 3}}}, ["evict.scorer.name", "got 3"]),
    ({"evict": {"scorer": {"name": "knorm", "x": [1]}}}, ["evict.scorer.x", "got [1]"]),
    ({"evict": {"scorer": {"name": "knorm", "x": 2**31}}}, ["evict.scorer.x", "2147483648"]),
    ({"evict": {"scorer": {"name": "knorm", "x": float("nan")}}}, ["evict.scorer.x", "nan"]),
    ({"evict": {"scorer": "knorm"}}, ["evict.scorer is not valid", "'knorm'"]),
    ({"base": "knorm", "evict": {"budget": 5}}, ["evict.budget is not valid", "got 5"]),
    ({"evict": {**KNORM, "budget": {}}}, ["evict.budget needs a size", "got neither"]),
    (
        {"evict": {**KNORM, "budget": {"tokens": 99, "keep_ratio": 0.5}}},
        ["evict.budget needs a size", "got both"],
    ),
    ({"evict": {**KNORM, "budget": {"ratio": 0.5}}}, ["evict.budget.ratio", "'keep_ratio'"]),
    ({"evict": {**KNORM, "budget": {"name": "pyramid", "tokens": 99}}}, ["evict.budget.name"]),
    ("knorm:tokens=0", ["evict.budget.tokens", "got 0", "1 to 2147483647"]),
    ("knorm:tokens=99999999999", ["evict.budget.tokens", "got 99999999999"]),
    ("knorm:tokens=1e3", ["evict.budget.tokens", "got 1000.0"]),
    ("knorm:keep_ratio=0", ["evict.budget.keep_ratio", "above 0, at most 1"]),
    ("knorm:keep_ratio=1.5", ["evict.budget.keep_ratio", "got 1.5"]),
    ("knorm:keep_ratio=half", ["evict.budget.keep_ratio", "'half'"]),
    ("knorm:keep_ration=0.5", ["'keep_ration'", "Did you mean 'keep_ratio'?"]),
    ("snapkv:windw=3", ["'windw'", "window, pool, pooling", "Did you mean 'window'?"]),
    ("snapkv:window", ["is not key=value", "snapkv:keep_ratio=0.25"]),
    ("snapkv:window=", ["is not key=value"]),
    ("snapkv:", ["is not key=value"]),
    ("snapkv:pool=1,pool=3", ["pool", "twice"]),
    ("snapvk:pool=1", ["'snapvk' is not known"]),
    ({"base": "knorm", "sink_tokens": True}, ["sink_tokens", "got True"]),
    ({"base": "knorm", "sink_tokens": "4"}, ["sink_tokens", "got '4'"]),
    ({"base": "knorm", "sink_tokens": 4.0}, ["sink_tokens", "got 4.0"]),
    ({"base": "knorm", "sink_tokens": -1}, ["sink_tokens", "got -1", "0 to 2147483647"]),
    ({"base": "knorm", "sink_tokens": 2**31}, ["sink_tokens", "got 2147483648"]),
    ({"base": "knorm", "sink_tokens": 10**5000}, ["sink_tokens", "cannot be shown"]),
    ({"base": "knorm", "recent_tokens": None}, ["recent_tokens", "got None"]),
    ({"base": "knorm", "evict": {"budget": {"keep_ratio": True}}}, ["keep_ratio", "got True"]),
    ({"base": "knorm", "evict": {"budget": {"keep_ratio": float("nan")}}}, ["got nan"]),
    ({"base": "knorm", "evict": {"budget": {"keep_ratio": float("inf")}}}, ["got inf"]),
    ({"base": "knorm", "evict": {"when": {"prompt_end": 1}}}, ["evict.when.prompt_end", "got 1"]),
    ({"base": "knorm", "evict": {"when": {"prompt_end": False}}}, ["never evicts"]),
    ({"base": "knorm", "evict": {"when": {"decode": 3}}}, ["evict.when.decode", "prompt_end"]),
    ({"base": "knorm", "quantize": {"keys": "fp8"}}, ["quantize.values is missing"]),
    ({"base": "knorm", "quantize": "fp8"}, ["quantize", "a mapping with keys and values"]),
    ({"base": "knorm", "quantize": {"key": "fp8"}}, ["quantize.key", "Did you mean 'keys'?"]),
    (
        {"base": "knorm", "quantize": {"keys": "int4", "values": "fp8"}},
        ["mixes fp8", "int4", "use int8"],
    ),
    ({"quantize": {"keys": "int3", "values": "int4"}}, ["quantize.keys", "'int3'", "kivi2"]),
    ({"quantize": {"keys": "fp8", "values": "fp8"}}, ["nothing beside", "--kv-cache-dtype fp8"]),
    (
        {"base": "snapkv-fp8", "quantize": {"residual_tokens": 32}},
        ["do not go with fp8", "residual_tokens"],
    ),
    (
        {"quantize": {"keys": "kivi2", "values": "kivi2", "group": 32}},
        ["quantize.group", "int8 and int4"],
    ),
    (
        {"quantize": {"keys": "kivi2", "values": "kivi2", "group": 32, "rotate": "both"}},
        ["quantize.group is for int8 and int4, and quantize.rotate: both", "group and quantize.ro"],
    ),
    (
        "duo-int4:keys=fp8,values=fp8",
        ["do not go with fp8; got group, rotate;", "or set group: head, rotate: none"],
    ),
    ("duo-int4:keys=fp8", ["quantize mixes fp8 with a packed codec"]),
    (
        {"base": "duo-int4", "quantize": {"losers": {}}},
        ["quantize.losers is the precision of what a scorer rejects", "without evict"],
    ),
    (
        {"quantize": {"keys": "kivi2", "values": "int4", "rotate": "keys"}},
        ["quantize.rotate", "int8 or int4"],
    ),
    (
        {"quantize": {"keys": "int4", "values": "kivi4", "rotate": "both"}},
        ["quantize.rotate", "kivi4"],
    ),
    (
        {"base": "snapkv-demote", "evict": {"losers": "drop"}},
        ["quantize.losers", "demote only", "evict.losers: drop", "quantize.losers to null"],
    ),
    (
        {"base": "snapkv-fp8", "evict": {"losers": "demote"}},
        ["evict.losers: demote", "fp8", "int8 in place"],
    ),
    (
        {"base": "knorm", "evict": {"losers": "demote", "when": {"every_decode_tokens": 8}}},
        ["evict.losers: demote", "prompt's end only", "every_decode_tokens: 8", "to 0"],
    ),
    (
        {"quantize": {**PACKED, "losers": {"keys": "kivi2", "values": "kivi2"}}},
        ["quantize.losers", "without evict", "Remove"],
    ),
    (
        {"base": "snapkv-demote", "quantize": {"losers": {"keys": "fp8"}}},
        ["quantize.losers.keys", "'fp8'", "kivi2"],
    ),
    (
        {"base": "snapkv-demote", "quantize": {"losers": {"rotate": "keys"}}},
        ["quantize.losers.rotate", "kivi2", "Remove quantize.losers.rotate"],
    ),
    (
        {"base": "snapkv-demote", "quantize": {"losers": {"residual_tokens": 1}}},
        ["quantize.losers.residual_tokens", "keys, values, group, rotate"],
    ),
    ({"base": "snapkv-demote", "quantize": 3}, ["quantize is not valid", "got 3"]),
    ({"evict": {**KNORM, "losers": "demote"}, "quantize": {}}, ["quantize.keys is missing"]),
    ({"quantize": {"keys": "int4", "values": "int4", "group": 64}}, ["quantize.group", "64"]),
    ({"base": "knorm", "heads": {"plan": "dua"}}, ["heads.plan", "'dua'", "all, duo, razor"]),
    ({"heads": {"plan": "duo"}}, ["number of retrieval heads", "neither", "threshold"]),
    ({"heads": {"plan": "random"}}, ["number of retrieval heads", "one of retrieval_ratio"]),
    (
        {"base": "duo", "heads": {"retrieval_ratio": 0.5, "threshold": 0.5}},
        ["number of retrieval heads", "got both"],
    ),
    ("duo:retrieval_ratio=1", ["heads.retrieval_ratio", "got 1", "0 to below 1"]),
    ("duo:retrieval_ratio=-0.1", ["heads.retrieval_ratio", "got -0.1"]),
    ("duo:threshold=high", ["heads.threshold", "'high'", "a number"]),
    ("duo:file=heads.csv", ["heads.file", "'heads.csv'", "ends in .tsv"]),
    ("duo:recent_tokens=0", ["recent_tokens is 0", "heads.plan", "at least 1"]),
    ("duo:seed=1", ["do not go with plan: duo", "seed", "file, retrieval_ratio"]),
    ("duo:keep_ratio=0.5", ["'keep_ratio'", "retrieval_ratio, threshold"]),
    ("snapkv:retrieval_ratio=0.5", ["plan: all", "got retrieval_ratio"]),
    ("duo:keys=int8", ["quantize.values is missing", "Add quantize.values"]),
    ("int4:keep_ratio=0.5", ["the override 'keep_ratio' is not known to policy 'int4'"]),
    ({"base": "knorm", "heads": {"compensation": True}}, ["plan: all", "got compensation"]),
    ({"heads": {"plan": "random", "threshold": 0.5}}, ["plan: random", "got threshold"]),
    (
        {"heads": {"plan": "a.tsv", "file": "b.tsv", "threshold": 0.5}},
        ["plan: a.tsv", "got file"],
    ),
    ({"heads": {"plan": "inline"}}, ["heads.labels", "per layer"]),
    ({"heads": {"plan": "inline", "labels": ["01", "0"]}}, ["heads.labels", "equal length"]),
    ({"heads": {"plan": "inline", "labels": ["02"]}}, ["heads.labels", "'02'", "0 and 1"]),
    ({"heads": {"plan": "inline", "labels": "01"}}, ["heads.labels", "'01'"]),
    ({"heads": {"plan": "inline", "labels": ["11", "11"]}}, ["no head to stream", "plan all"]),
    ({"base": "knorm", "heads": {"plans": "all"}}, ["heads.plans", "Did you mean 'plan'?"]),
    ({"base": "knorm", "layers": {"skip": [-1]}}, ["layers.skip", "-1", "from 0 on"]),
    ({"base": "knorm", "layers": {"skip": [0, 0]}}, ["layers.skip", "twice", "[0, 0]"]),
    ({"base": "knorm", "layers": {"skip": 3}}, ["layers.skip", "got 3", "a list of layer"]),
    ({"base": "knorm", "layers": {"skip": ["1"]}}, ["layers.skip", "'1'"]),
    (
        {"heads": {"plan": "random", "retrieval_ratio": 0.5}, "layers": {"skip": [1]}},
        ["layers.skip does not go with heads.plan", "[1]", "retrieval head"],
    ),
    ({"base": "knorm", "name": "a b"}, ["name is not valid", "'a b'"]),
    ({"base": "knorm", "name": "x" * 65}, ["name is not valid"]),
    ({"base": "snapkv", "recent_tokens": 2000}, ["1024 < 4 + 2000", "at least 2004"]),
]


@pytest.mark.parametrize(("source", "words"), WRONG, ids=lambda value: shown(value)[:40])
def test_wrong_policy_gives_one_message(source, words):
    with pytest.raises(ConfigError) as caught:
        load_policy(source)

    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    assert len(message) < 600


# (source, words) of rules that need the scorer.
WRONG_TOGETHER = [
    (
        {"base": "streaming_llm", "quantize": {"keys": "kivi2", "values": "kivi2"}},
        ["keeps a window", "keys: kivi2", "residual_tokens: 128", "Use int8 or int4"],
    ),
    (
        {"base": "streaming_llm", "quantize": {**PACKED, "exact_sinks": True}},
        ["keeps a window", "exact_sinks: true", "without residual_tokens"],
    ),
    (
        {"base": "streaming_llm", "quantize": PACKED, "layers": {"skip": [1]}},
        ["keeps a window", "layers.skip: [1]", "and layers.skip"],
    ),
    (
        {"base": "knorm", "quantize": PACKED, "evict": {"when": {"every_decode_tokens": 8}}},
        ["evict.when.every_decode_tokens", "packed codecs", "to 0"],
    ),
    (
        "streaming_llm:losers=demote",
        ["evict.losers: demote", "'position'", "ranks tokens", "logquant"],
    ),
    ("snapkv:every_decode_tokens=16", ["evict.when.every_decode_tokens", "got 16", "allowed: 0"]),
    ("snapkv:window=65", ["recent_tokens is smaller", "64 < 65", "at least 65"]),
    ("snapkv:pool=4", ["evict.scorer.pool", "got 4", "odd"]),
    ("snapkv:pool=0", ["evict.scorer.pool", "greater than or equal to 1"]),
    ("snapkv:pool=1e0", ["evict.scorer.pool", "got 1.0"]),
    ("snapkv:window=true", ["evict.scorer.window", "got True"]),
    ("snapkv:pooling=man", ["evict.scorer.pooling", "'man'", "Did you mean 'max'?"]),
    ("random:seed=-1", ["evict.scorer.seed", "got -1"]),
    ("streaming_llm:recent_tokens=0", ["recent_tokens is 0", "at least 1"]),
    ("streaming_llm:every_decode_tokens=8", ["evict.when", "Remove evict.when"]),
    ("streaming_llm:prefill=window", ["evict.scorer.prefill", "'window'", "mean 'windowed'?"]),
    (
        "streaming_llm:prefill=windowed,keep_ratio=0.5",
        ["prefill: windowed", "got evict.budget.keep_ratio: 0.5", "allowed: evict.budget.tokens"],
    ),
    (
        {**WINDOWED, "heads": {"plan": "random", "retrieval_ratio": 0.5}},
        ["prefill: windowed does not go with heads.plan", "got random", "prefill: exact"],
    ),
    (
        {**WINDOWED, "quantize": {"keys": "kivi4", "values": "kivi4"}},
        ["prefill: windowed does not go with codecs that wait", "got kivi4", "fp8, int8 or int4"],
    ),
    ({**WINDOWED, "layers": {"skip": [1]}}, ["does not go with layers.skip", "got [1]"]),
    (
        {**WINDOWED, "evict": {**WINDOWED["evict"], "losers": "demote"}},
        ["does not go with evict.losers", "got demote"],
    ),
    ({**WINDOWED, "recent_tokens": 0}, ["recent_tokens is 0", "at least 1"]),
    ("streaming_llm:prefill=windowed,every_decode_tokens=8", ["Remove evict.when"]),
    ({"evict": {"scorer": {"name": "knorm"}}}, ["evict.budget is missing", "how many to keep"]),
    ({"evict": {**KNORM, "scorer": {"name": "knrm"}}}, ["'knrm'", "Did you mean 'knorm'?"]),
    ({"evict": {**KNORM, "scorer": {"name": "knorm", "x": 1}}}, ["scorer.x", "no parameters"]),
    (
        {"base": "snapkv", "evict": {"scorer": {"windows": 3}}},
        ["evict.scorer.windows is not a parameter", "window, pool, pooling", "mean 'window'?"],
    ),
    (
        {"base": "snapkv", "evict": {"when": {"prompt_end": False, "every_decode_tokens": 8}}},
        ["evict.when.every_decode_tokens", "needs the prompt's last queries"],
    ),
    (
        "duo-snapkv:every_decode_tokens=8",
        ["heads.plan does not go with evict.when.every_decode_tokens", "at the prompt's end"],
    ),
    (
        {"base": "streaming_llm", "heads": {"plan": "random", "retrieval_ratio": 0.5}},
        ["heads.plan does not go with the scorer 'position', which keeps a window"],
    ),
    (
        {"base": "kivi2", "heads": {"plan": "inline", "labels": ["00", "00"]}},
        ["nothing would be quantized", "without retrieval heads, keys: kivi2", "int8, int4"],
    ),
    (
        {"base": "snapkv-int4", "heads": {"plan": "inline", "labels": ["00", "00"]}},
        ["nothing would be evicted", "keys: int4", "without retrieval heads"],
    ),
    (
        "duo-snapkv:plan=random,retrieval_ratio=0",
        ["nothing would be evicted", "Raise heads.retrieval_ratio"],
    ),
    (
        {
            "base": "duo",
            "heads": {"compensation": True},
            "quantize": {"keys": "fp8", "values": "fp8"},
        },
        ["heads.compensation adds up keys", "got keys: fp8", "quantize: null"],
    ),
    (
        {"base": "duo-int4", "heads": {"compensation": True}},
        ["heads.compensation adds up keys", "got keys: int4", "residual_tokens, exact_sinks"],
    ),
    (
        {"base": "duo-snapkv", "heads": {"compensation": True}, "quantize": FP8},
        ["heads.compensation adds up keys", "got keys: fp8"],
    ),
    # What is wrong at once is told at once.
    (
        {
            **WINDOWED,
            "evict": {**WINDOWED["evict"], "losers": "demote"},
            "heads": {"plan": "random", "retrieval_ratio": 0.5},
        },
        ["does not go with heads.plan, evict.losers", "got random, demote", "Remove heads.plan, "],
    ),
    (
        {
            "base": "duo-snapkv",
            "evict": {
                "scorer": {"name": "position"},
                "budget": None,
                "when": {"every_decode_tokens": 8},
            },
        },
        ["which keeps a window; nor with evict.when", "got the scorer 'position', every_decode"],
    ),
]


@pytest.mark.parametrize(("source", "words"), WRONG_TOGETHER, ids=lambda value: shown(value)[:40])
def test_wrong_combination_gives_one_message(source, words):
    policy = load_policy(source)

    with pytest.raises(ConfigError) as caught:
        resolve(policy)

    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_a_plan_that_ranks_no_heads_takes_no_options_of_the_base():
    labels = {"plan": "inline", "labels": ["10", "00"]}

    assert load_policy("duo-int4:plan=all").heads == Heads()
    assert load_policy({"base": "razor", "heads": labels}).heads.labels == ("10", "00")
    with pytest.raises(ConfigError, match=r"got threshold.*Set heads\.retrieval_ratio in its"):
        load_policy("razor:plan=random")


def test_losers_are_demoted_to_2_bits_and_the_others_stay_exact_by_default():
    losers = {"keys": "kivi2", "values": "kivi2", "group": "head", "rotate": "none"}
    short = load_policy("snapkv:losers=demote").quantize
    partly = load_policy(
        {"base": "snapkv-int4", "evict": {"losers": "demote"}, "quantize": {"losers": None}}
    ).quantize

    assert (short.keys, short.values, short.losers.model_dump()) == ("none", "none", losers)
    assert (partly.keys, partly.values, partly.losers.model_dump()) == ("int4", "int4", losers)


def test_codecs_and_a_head_plan_are_added_by_overrides():
    heads = load_policy("kivi2:plan=random,retrieval_ratio=0.25,sink_tokens=8")
    codecs = load_policy("knorm:keys=int8,values=int8,group=32")
    drawn = load_policy("random:seed=7,keys=int4,values=int4")

    assert (heads.heads.plan, heads.heads.retrieval_ratio, heads.sink_tokens) == ("random", 0.25, 8)
    assert heads.quantize == load_policy("kivi2").quantize
    assert (codecs.quantize.keys, codecs.quantize.group) == ("int8", 32)
    # A scorer's own parameter comes before a head plan's of that name.
    assert drawn.evict.scorer.params == {"seed": 7}
    assert drawn.heads == Heads()


def test_streaming_llm_takes_the_budget_that_it_has_anyway():
    resolve(load_policy("streaming_llm:tokens=1024"))


def test_policies_are_found_without_an_installation():
    """The source tree's configs/ serve where `vllm_kvpress.configs` is not mapped."""
    code = (
        "import sys; sys.modules['vllm_kvpress.configs'] = None\n"
        "from vllm_kvpress.config import known_policies\n"
        "print(*[info.name for info in known_policies()])"
    )

    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=CONFIGS.parent,
    )

    assert found.stdout.split() == NAMES


tokens = st.integers(0, 2**31 - 1)
budgets = st.one_of(
    st.fixed_dictionaries({"tokens": st.integers(2**30, 2**31 - 1)}),
    st.fixed_dictionaries({"keep_ratio": st.floats(0, 1, exclude_min=True)}),
)
params = st.dictionaries(
    st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda key: key not in ("name", "path")),
    st.one_of(st.integers(-(2**31) + 1, 2**31 - 1), st.floats(-1e9, 1e9), st.booleans(), st.text()),
    max_size=4,
)


@given(
    sink_tokens=st.integers(0, 2**29),
    recent_tokens=st.integers(0, 2**29),
    scorer_params=params,
    budget=st.none() | budgets,
    every=tokens,
)
def test_any_valid_policy_round_trips(sink_tokens, recent_tokens, scorer_params, budget, every):
    policy = load_policy(
        {
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
            "evict": {
                "scorer": {"name": "knorm", **scorer_params},
                **({} if budget is None else {"budget": budget}),
                "when": {"every_decode_tokens": every},
            },
        }
    )

    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    assert policy.evict.scorer.params == scorer_params


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["evict", "base", "scorer", "budget", "losers", "quantize", "name", "path", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_any_data_is_a_policy_or_a_config_error(data):
    with contextlib.suppress(ConfigError):
        assert isinstance(load_policy(data), Policy)
