"""Reads what a policy needs to know of a model from its config.json, without loading anything."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvpress.conflict_table import REFUSED
from vllm_kvpress.errors import ConfigError, UnsupportedModelError, shown
from vllm_kvpress.testbed import MODEL_NAME, resolve_model

__all__ = ["ModelShape", "read_model_shape"]

_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_OTHER_STATE = ("linear_attention", "mamba", "recurrent", "conv")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The part of a model that its KV cache depends on.

    Attributes:
        label: architecture, as its authors call it.
        num_full_layers: attention layers that look at every token: those a policy acts on.
        num_sliding_layers: attention layers with a window, left to vLLM.
        num_heads: query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_size: channels of a head.
        dtype: element type of weights and, by default, of the cache.
        max_tokens: longest sequence the model was made for.
    """

    label: str
    num_full_layers: int
    num_sliding_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: str
    max_tokens: int


def read_model_shape(model: str) -> ModelShape:
    """Returns the shape of `model`: a folder, a name in the Hugging Face cache, or `testbed`.

    Raises:
        ConfigError: there is no such model here, or its config.json is not one of a language model.
        UnsupportedModelError: no policy can act on such a model.
    """
    config = _read_json(_config_path(model), model)
    _refuse_unsupported(config, model)
    num_layers = _number(config, model, "num_hidden_layers", "n_layer")
    num_heads = _number(config, model, "num_attention_heads", "n_head")
    num_sliding = _num_sliding(config, num_layers)
    if num_sliding == num_layers:
        _refuse("sliding_window_only", model)
    head_size = (
        config.get("head_dim") or _number(config, model, "hidden_size", "n_embd") // num_heads
    )
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    # vLLM's "auto" runs float32 checkpoints in 16 bits.
    return ModelShape(
        label=str((config.get("architectures") or ["unknown architecture"])[0]),
        num_full_layers=num_layers - num_sliding,
        num_sliding_layers=num_sliding,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_size=head_size,
        dtype=dtype if dtype in ("bfloat16", "float16") else "bfloat16",
        max_tokens=_number(config, model, "max_position_embeddings", "n_positions"),
    )


def _config_path(model: str) -> Path:
    folder = Path(resolve_model(model))
    if folder.is_dir():
        return folder / "config.json"
    cached: object = None
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
    except (ImportError, ValueError):  # not installed, or not a name that a hub could have
        pass
    if isinstance(cached, str):
        return Path(cached)
    raise ConfigError(
        f"the model {shown(model)} is not on this machine",
        allowed=f"a folder with a config.json, a name in the Hugging Face cache, {MODEL_NAME}",
        fix="Download its config.json first, or give its folder",
    )


def _read_json(path: Path, model: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {_MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"the model {shown(model)} has no usable config.json",
            got=reason,
            fix="Check the folder",
        ) from error
    return config


def _number(config: dict[str, Any], model: str, *names: str) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if type(value) is not int or value <= 0:
        raise ConfigError(
            f"{names[0]} in the config.json of {shown(model)} is not usable",
            got=shown(value),
            allowed="an integer above 0",
        )
    return value


def _num_sliding(config: dict[str, Any], num_layers: int) -> int:
    """How many layers have a sliding or chunked window."""
    layer_types = config.get("layer_types")
    if layer_types:
        return sum(kind == "sliding_attention" for kind in layer_types)
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return 0
    if config.get("sliding_window_pattern"):
        return num_layers - num_layers // int(config["sliding_window_pattern"])
    return num_layers - min(num_layers, config.get("max_window_layers") or 0)


def _refuse_unsupported(config: dict[str, Any], model: str) -> None:
    layer_types = config.get("layer_types") or []
    for key, holds in (
        ("mla", config.get("kv_lora_rank") is not None),
        ("encoder_decoder", bool(config.get("is_encoder_decoder"))),
        ("multimodal", "text_config" in config or "vision_config" in config),
        ("alibi", bool(config.get("alibi"))),
        ("chunked_attention", "chunked_attention" in layer_types),
        (
            "mamba_hybrid",
            any(kind.startswith(_OTHER_STATE) for kind in layer_types if isinstance(kind, str)),
        ),
    ):
        if holds:
            _refuse(key, model)


def _refuse(key: str, model: str) -> None:
    row = next(row for row in REFUSED if row.key == key)
    raise UnsupportedModelError(
        f"{shown(model)}: {row.what} cannot be run with a KV policy: {row.reason}", fix=row.fix
    )
