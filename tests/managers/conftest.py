import pytest


@pytest.fixture(scope="session", autouse=True)
def _installed():
    """Registers specs and managers and caps prefix hits, as in an engine; harmless twice."""
    pytest.importorskip("vllm")
    from vllm_kvpress.integration import engine

    engine.install()
    engine.install()
