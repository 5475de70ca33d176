"""Shared by all engine tests: one tiny model, its reference, and what stock vLLM says."""

import pytest

pytest.importorskip("vllm")

from reference.dense import DenseLlama
from reference.tiny_model import random_llama

from engine.harness import Engine


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/engine" in item.path.as_posix():
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The path of a random model whose log-probabilities feel every dropped key."""
    return random_llama(tmp_path_factory.mktemp("tiny") / "model", max_positions=512)


@pytest.fixture(scope="session")
def dense(tiny):
    return DenseLlama(tiny)


@pytest.fixture
def engine_of(tiny):
    """Makes engines that end with the test."""
    engines = []

    def make(policy, model=tiny, **options):
        engines.append(Engine(model, policy, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
