"""Is there such a model, and how long may its prompts be: asked before any engine starts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.testbed import MODEL_NAME, resolve_model

__all__ = ["check_model"]

_ALLOWED = f"{MODEL_NAME}, a folder with a config.json, a name on the Hugging Face hub"


def check_model(model: str, lengths: Sequence[int], answer_tokens: int) -> None:
    """Checks that a model can be found and has room for the prompts.

    Raises:
        ConfigError: The model is missing, its config.json cannot be read, or a prompt with its
            answer is longer than the model allows.
    """
    file = _config_file(model)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"the model {shown(model)} has no usable config.json", got=reason[:200]
        ) from error
    limit = config.get("max_position_embeddings")
    longest = max(lengths) + answer_tokens
    if isinstance(limit, int) and longest > limit:
        raise ConfigError(
            "--lengths leaves no room for an answer",
            got=f"{max(lengths)} tokens and {answer_tokens} for template and answer",
            allowed=f"at most {limit} together ({shown(model)})",
        )


def _config_file(model: str) -> Path:
    folder = Path(resolve_model(model))
    if folder.is_dir():
        return folder / "config.json"
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise ConfigError(f"the model {shown(model)} is not there", allowed=_ALLOWED)
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "config.json"))
    except ImportError as error:
        raise ConfigError("huggingface_hub is not installed", fix="Install vLLM first") from error
    except Exception as error:  # the hub's errors have no common base, and many are long
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        raise ConfigError(
            f"the model {shown(model)} is neither on this machine nor could it be downloaded",
            got=type(error).__name__ + (" (HF_HUB_OFFLINE is set)" if offline else ""),
            allowed=_ALLOWED,
            fix="Check its name, your network and your access to it",
        ) from error
