"""Loads the model whose heads are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_kvpress.errors import ConfigError, UnsupportedModelError, shown
from vllm_kvpress.policies.heads import HeadShape
from vllm_kvpress.testbed import MODEL_NAME, resolve_model

__all__ = ["Loaded", "load_model"]


@dataclass(frozen=True)
class Loaded:
    """A causal language model, ready to be looked at.

    Attributes:
        model: of transformers, in evaluation mode; float32 on a CPU, its own dtype elsewhere.
        tokenizer: its tokenizer.
        shape: its heads.
        max_tokens: longest sequence it was made for.
    """

    model: Any
    tokenizer: Any
    shape: HeadShape
    max_tokens: int


def load_model(name: str) -> Loaded:
    """Returns the model on the GPU if there is one, else on the CPU.

    Args:
        name: `testbed`, a folder, or a name on the Hugging Face hub.

    Raises:
        ConfigError: it cannot be loaded, or transformers is not installed.
        UnsupportedModelError: it is no decoder-only model with KV heads.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConfigError("transformers is not installed", fix="Install vLLM first") from error
    path = resolve_model(name)
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ConfigError(f"the model {shown(name)} is not there", allowed=_ALLOWED)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading; the run has its own
    on_gpu = torch.cuda.is_available()
    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto" if on_gpu else torch.float32, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the hub's and transformers' errors have no common base
        raise ConfigError(
            f"the model {shown(name)} cannot be loaded",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}",
            allowed=_ALLOWED,
        ) from error
    model = model.to("cuda" if on_gpu else "cpu").eval()
    return Loaded(model, tokenizer, _shape(model), _max_tokens(model))


_ALLOWED = f"{MODEL_NAME}, a folder with a model, a name on the Hugging Face hub"


def _shape(model: Any) -> HeadShape:
    config = model.config
    num_heads = getattr(config, "num_attention_heads", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(num_heads, int) or not isinstance(num_layers, int):
        raise UnsupportedModelError(f"{type(model).__name__} does not say how many heads it has")
    return HeadShape(
        num_layers=num_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        num_heads=num_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )


def _max_tokens(model: Any) -> int:
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else 2**31 - 1
