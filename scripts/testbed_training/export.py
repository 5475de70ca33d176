"""The trained model as a folder that transformers and vLLM load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from testbed_training.model import Shape, Weights
from testbed_training.vocabulary import END, PAD, START, write_tokenizer

__all__ = ["LARGEST_BYTES", "folder_bytes", "write_model"]

# The model travels with the package.
LARGEST_BYTES = 16 * 2**20
# The longest answer, of 40 hops, has 87 tokens.
_NEW_TOKENS = 128
# The release whose keys config.json has; newer and older ones read them.
_TRANSFORMERS = "5.2.0"


def write_model(folder: Path, shape: Shape, weights: Weights) -> None:
    """Write configuration, tokenizer and the weights in bfloat16.

    Args:
        folder: Made if it does not exist.
        shape: Sizes of the model.
        weights: By name; the output matrix is the embedding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().cpu().bfloat16() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # It is written for its owner alone, but travels with the package.
    (folder / "model.safetensors").chmod(0o644)
    _write_json(folder / "config.json", configuration(shape))
    generation = {
        "bos_token_id": START,
        "do_sample": False,
        "eos_token_id": END,
        "max_new_tokens": _NEW_TOKENS,
        "pad_token_id": PAD,
        "transformers_version": _TRANSFORMERS,
    }
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder, shape.max_positions)


def configuration(shape: Shape) -> dict[str, Any]:
    """Return what config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": START,
        "dtype": "bfloat16",
        "eos_token_id": END,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": PAD,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        # Release 4 of transformers looks for it here.
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "transformers_version": _TRANSFORMERS,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())
