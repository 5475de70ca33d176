import importlib
import textwrap

import pytest

from vllm_kvpress.config import ScorerSpec, load_policy
from vllm_kvpress.errors import ConfigError
from vllm_kvpress.policies import known_scorers, resolve
from vllm_kvpress.policies.registry import make_scorer

OUTSIDE = """
    from dataclasses import dataclass
    import torch
    from vllm_kvpress.policies import Scorer

    @dataclass(frozen=True)
    class Good(Scorer):
        sharpness: float = 1.0
        def __post_init__(self):
            if self.sharpness <= 0:
                raise ValueError("sharpness must be above 0")
        def score(self, observation):
            return observation.keys.float().sum(-1) * self.sharpness

    class Stranger:  # derives from nothing
        needs = {"keys", "queries"}
        scope = "layer"
        selects = "tokens"
        query_window = 3
        def score(self, observation):
            return observation.keys.float().sum(-1)

    class Anything(Good):
        def __init__(self, **params): pass

    class NoNeeds: pass
    class OddNeeds(Good): needs = frozenset({"hidden_states"})
    class OddScope(Good): scope = "model"
    class OddSelects(Good): selects = "blocks"
    class OddWindow(Good): query_window = 4
    class NoWindow(Good): needs = frozenset({"queries"})
    class NoScore:
        needs = frozenset(); scope = "head"; selects = "tokens"; query_window = 0
    number = 3
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module `outside_scorers` that is no part of us, and one that cannot be imported."""
    (tmp_path / "outside_scorers.py").write_text(textwrap.dedent(OUTSIDE))
    (tmp_path / "outside_broken.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def spec(**fields):
    return ScorerSpec.model_validate(fields)


def test_known_scorers():
    built_in = {"keydiff", "knorm", "position", "random", "snapkv", "value_key_norm"}

    assert built_in <= set(known_scorers())


def test_scorer_by_path(outside):
    policy = load_policy(
        {
            "evict": {
                "scorer": {"path": "outside_scorers:Good", "sharpness": 2.0},
                "budget": {"tokens": 100},
            }
        }
    )

    scorer = resolve(policy)

    assert scorer.sharpness == 2.0
    assert (scorer.needs, scorer.scope, scorer.selects) == ({"keys"}, "head", "tokens")
    assert scorer.query_window == 0


def test_scorer_need_not_derive_from_ours(outside):
    assert make_scorer(spec(path="outside_scorers:Stranger")).query_window == 3


def test_scorer_that_takes_any_parameter(outside):
    make_scorer(spec(path="outside_scorers:Anything", whatever=3))


def test_scorer_by_entry_point(outside):
    info = outside / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm_kvpress.scorers]\ngood = outside_scorers:Good\nknorm = outside_scorers:Good\n"
    )
    importlib.invalidate_caches()

    assert "good" in known_scorers()
    assert type(make_scorer(spec(name="good", sharpness=3.0))).__name__ == "Good"
    # An installed package cannot take the place of a built-in name.
    assert type(make_scorer(spec(name="knorm"))).__name__ == "KnormScorer"


WRONG = [
    ({"name": "snpakv"}, ["'snpakv' is not known", "Did you mean 'snapkv'?", "path:"]),
    ({"path": "no_such_module:X"}, ["cannot be imported", "ModuleNotFoundError"]),
    ({"path": "outside_broken:X"}, ["cannot be imported", "RuntimeError: no licence"]),
    ({"path": "outside_scorers:Goood"}, ["no class 'Goood'", "Did you mean 'Good'?"]),
    ({"path": "outside_scorers:number"}, ["no class 'number'", "got 3"]),
    ({"path": "outside_scorers:NoNeeds"}, ["no usable 'needs'", "keys, positions, queries"]),
    ({"path": "outside_scorers:OddNeeds"}, ["no usable 'needs'", "hidden_states"]),
    ({"path": "outside_scorers:OddScope"}, ["no usable 'scope'", "'model'", "head or layer"]),
    ({"path": "outside_scorers:OddSelects"}, ["no usable 'selects'", "'blocks'"]),
    ({"path": "outside_scorers:OddWindow"}, ["no usable 'query_window'", "got 4"]),
    ({"path": "outside_scorers:NoWindow"}, ["no usable 'query_window'", "above 0"]),
    ({"path": "outside_scorers:NoScore"}, ["no method 'score'"]),
    ({"path": "collections:OrderedDict"}, ["is not a scorer"]),
    ({"path": "outside_scorers:Good", "sharp": 1}, ["sharp", "Did you mean 'sharpness'?"]),
    ({"path": "outside_scorers:Good", "sharpness": -1}, ["sharpness must be above 0"]),
    ({"path": "outside_scorers:Good", "sharpness": "x"}, ["refuses its parameters", "TypeError"]),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=lambda value: str(value)[:50])
def test_unusable_scorer_gives_one_message(outside, fields, words):
    with pytest.raises(ConfigError) as caught:
        make_scorer(spec(**fields))

    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
