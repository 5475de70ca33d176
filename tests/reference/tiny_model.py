"""A random Llama checkpoint whose log-probabilities feel every dropped key."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["random_llama", "random_prompt", "write_tokenizer"]

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def random_llama(
    path: Path,
    *,
    layers: int = 4,
    hidden: int = 256,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 64,
    vocab: int = 512,
    intermediate: int = 512,
    max_positions: int = 4096,
    seed: int = 0,
) -> Path:
    """Writes a float32 Llama checkpoint in Hugging Face form under `path` and returns `path`.

    Weights are larger than a trained model's initialisation, so that attention is peaked and a
    dropped key moves log-probabilities by 1e-3 to 1e-1. The tokenizer maps one word to each id.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    write_tokenizer(path, vocab)
    generator = torch.Generator().manual_seed(seed)
    save_file(_weights(config, generator), path / "model.safetensors", metadata={"format": "pt"})
    return path


def random_prompt(length: int, *, vocab: int = 512, seed: int = 0) -> list[int]:
    """Returns `length` token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(_SPECIAL), vocab, (length,), generator=generator).tolist()


def _weights(config: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    weights = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, 1.5),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}input_layernorm.weight": torch.ones(hidden),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden),
            # Queries and keys at 1.3: the standard deviation of attention logits is then about 1.7.
            f"{prefix}self_attn.q_proj.weight": normal(q_size, hidden, 1.3),
            f"{prefix}self_attn.k_proj.weight": normal(kv_size, hidden, 1.3),
            f"{prefix}self_attn.v_proj.weight": normal(kv_size, hidden, 1.5),
            f"{prefix}self_attn.o_proj.weight": normal(hidden, q_size, 1.5),
            f"{prefix}mlp.gate_proj.weight": normal(inner, hidden, 1.0),
            f"{prefix}mlp.up_proj.weight": normal(inner, hidden, 1.0),
            f"{prefix}mlp.down_proj.weight": normal(hidden, inner, 1.0),
        }
    return weights


def write_tokenizer(path: Path, vocab: int) -> None:
    """Writes a tokenizer that maps one word to each id."""
    words = [*_SPECIAL, *(f"w{idx}" for idx in range(len(_SPECIAL), vocab))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": idx,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for idx, word in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: idx for idx, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )
