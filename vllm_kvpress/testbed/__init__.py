"""The bundled test model and the documents that it answers questions about."""

from pathlib import Path

MODEL_NAME = "testbed"


def model_path() -> Path:
    """Return the directory of the bundled model."""
    return Path(__file__).resolve().parent / "model"


def head_pattern(method: str) -> Path:
    """Return the bundled model's pattern file by a method, ``duo`` or ``razor``."""
    return Path(__file__).resolve().parent / "heads" / f"{method}.tsv"


def resolve_model(name: str) -> str:
    """Return what to load for a model's name.

    Args:
        name: A path, a hub name, or ``testbed`` for the bundled model.

    Returns:
        The path of the bundled model for its short name, any other name unchanged. A local
        directory called ``testbed`` is written ``./testbed``.
    """
    return str(model_path()) if name == MODEL_NAME else name
