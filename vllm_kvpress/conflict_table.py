"""What a KV policy cannot be combined with: one table, without vLLM, for start-up and `explain`.

`integration/conflicts.py` holds, under the same keys, what each row looks like in a VllmConfig.
Rows stay refused until a test proves that they work.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_kvpress.errors import ConflictError

if TYPE_CHECKING:
    from vllm_kvpress.config import Policy

__all__ = [
    "ALLOWED",
    "REFUSED",
    "Refusal",
    "check_cache_dtype",
    "refused_options",
]

Refuses = Callable[[str], bool]

# Combinations that tests cover.
ALLOWED = (
    "tensor parallelism, data parallelism",
    "prefix caching, chunked prefill, asynchronous scheduling",
    "LoRA",
    "--kv-cache-dtype fp8 without packed codecs",
    "n > 1",
    "prompt_logprobs",
    "structured output",
    "block sizes that are a multiple of 8 and that the attention backend takes",
)


def _given(value: str) -> bool:
    return value.strip().lower() not in ("", "none", "null", "false", "{}")


def _above_one(value: str) -> bool:
    return not value.strip().isdigit() or int(value) > 1


def _above_zero(value: str) -> bool:
    return value.strip() not in ("", "none", "None", "0", "0.0")


# The engine's own 8-bit caches: one scale a layer, no extra bytes, moved as they are.
FP8_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")


def _no_plain_dtype(value: str) -> bool:
    # Whether bfloat16 or float16 is the model's own dtype is known at start only.
    return value not in ("auto", "bfloat16", "float16", *FP8_DTYPES)


def _not_multiple_of_8(value: str) -> bool:
    return not value.strip().isdigit() or int(value) == 0 or int(value) % 8 != 0


def _non_causal(value: str) -> bool:
    return _json_field(value, "use_non_causal")


def _hisparse(value: str) -> bool:
    return _json_field(value, "hisparse_config")


def _json_field(value: str, name: str) -> bool:
    try:
        parsed = json.loads(value)
    except ValueError:
        return False
    return isinstance(parsed, dict) and parsed.get(name) not in (None, False)


@dataclass(frozen=True)
class Refusal:
    """One row: what is refused, why, and what to do instead.

    Attributes:
        key: its name here and in `integration/conflicts.py`.
        what: the subject of the error message.
        reason: why the two cannot both be honoured.
        fix: the next step, as an imperative sentence without its full stop.
        options: vLLM's options that bring it about, without dashes, each with the test of its
            value; empty where the model itself is the reason.
    """

    key: str
    what: str
    reason: str
    fix: str
    options: Mapping[str, Refuses] = field(default_factory=dict)

    @property
    def is_about_model(self) -> bool:
        """True where no option but the model is refused."""
        return not self.options


def _drop(option: str) -> str:
    return f"Drop --{option}, or start without a KV policy"


_OTHER_MODEL = "Use a decoder-only model with full-attention layers, or start without a KV policy"

REFUSED = (
    Refusal(
        "speculative_decoding",
        "speculative decoding",
        "rejected tokens would move the positions at which tokens are evicted",
        _drop("speculative-config"),
        dict.fromkeys(("speculative-config", "spec-method", "spec-model", "spec-tokens"), _given),
    ),
    Refusal(
        "kv_connector",
        "a KV connector (disaggregation, external KV storage)",
        "a connector ships blocks by position, which a compressed cache no longer has",
        _drop("kv-transfer-config"),
        {"kv-transfer-config": _given},
    ),
    Refusal(
        "kv_offloading",
        "KV offloading",
        "it copies blocks by position, which a compressed cache no longer has",
        _drop("kv-offloading-size"),
        {"kv-offloading-size": _above_zero},
    ),
    Refusal(
        "hisparse",
        "HiSparse",
        "it keeps the whole cache on the host, which a policy exists to avoid",
        "Drop hisparse_config from --attention-config, or start without a KV policy",
        {"attention-config": _hisparse},
    ),
    Refusal(
        "decode_context_parallel",
        "decode context parallelism",
        "a request's tokens are spread over ranks, and each rank sees only its share",
        "Use --decode-context-parallel-size 1 (tensor parallelism works)",
        {"decode-context-parallel-size": _above_one},
    ),
    Refusal(
        "prefill_context_parallel",
        "prefill context parallelism",
        "a request's tokens are spread over ranks, and each rank sees only its share",
        "Use --prefill-context-parallel-size 1 (tensor parallelism works)",
        {"prefill-context-parallel-size": _above_one},
    ),
    Refusal(
        "pipeline_parallel",
        "pipeline parallelism",
        "the cache groups of a policy are not yet split by pipeline stage",
        "Use --tensor-parallel-size instead of --pipeline-parallel-size",
        {"pipeline-parallel-size": _above_one},
    ),
    Refusal(
        "hybrid_manager_off",
        "--disable-hybrid-kv-cache-manager",
        "a policy's lanes are cache groups, which only the hybrid manager has",
        _drop("disable-hybrid-kv-cache-manager"),
        {"disable-hybrid-kv-cache-manager": _given},
    ),
    Refusal(
        "kv_cache_dtype",
        "a KV cache of another dtype than the model's or fp8",
        "evicting policies move K and V as they lie in the cache, without scales beside them",
        "Use --kv-cache-dtype auto, or fp8 without packed codecs",
        {"kv-cache-dtype": _no_plain_dtype},
    ),
    Refusal(
        "kv_sharing_fast_prefill",
        "--kv-sharing-fast-prefill",
        "layers that share a cache would be compressed twice",
        _drop("kv-sharing-fast-prefill"),
        {"kv-sharing-fast-prefill": _given},
    ),
    Refusal(
        "dual_batch_overlap",
        "dual batch overlap (ubatching)",
        "eviction runs once a step, over the whole batch",
        _drop("enable-dbo and --ubatch-size"),
        {"enable-dbo": _given, "ubatch-size": _above_one},
    ),
    Refusal(
        "prompt_embeds",
        "prompt embeddings",
        "such prompts are not yet tested with a policy",
        _drop("enable-prompt-embeds"),
        {"enable-prompt-embeds": _given},
    ),
    Refusal(
        "sleep_mode",
        "sleep mode",
        "it discards the cache under requests whose kept tokens cannot be computed again",
        _drop("enable-sleep-mode"),
        {"enable-sleep-mode": _given},
    ),
    Refusal(
        "block_size",
        "this block size",
        "a store's blocks are read by kernels that take multiples of 8 tokens",
        "Use --block-size 16 (on CPU: 32), or leave it out",
        {"block-size": _not_multiple_of_8},
    ),
    Refusal(
        "non_causal",
        "non-causal attention",
        "later tokens would look for keys that are gone",
        "Drop use_non_causal from --attention-config, or start without a KV policy",
        {"attention-config": _non_causal},
    ),
    Refusal(
        "multimodal",
        "multimodal prompts",
        "they are not yet tested with a policy",
        "Add --language-model-only, or start without a KV policy",
    ),
    Refusal("mla", "a model with multi-head latent attention",
            "its cache holds latents, not keys and values per head", _OTHER_MODEL),
    Refusal("pooling", "an embedding, classification or reward model",
            "it generates nothing, so it holds no cache", _OTHER_MODEL),
    Refusal("encoder_decoder", "an encoder-decoder model",
            "the keys of cross-attention do not grow with the output", _OTHER_MODEL),
    Refusal("attention_free", "a model without attention layers",
            "its state does not grow with the context: nothing is left to compress", _OTHER_MODEL),
    Refusal("mamba_hybrid", "a hybrid model with Mamba or linear-attention layers",
            "its cache groups are not yet laid out beside a policy's lanes", _OTHER_MODEL),
    Refusal("sliding_window_only", "a model whose layers all have a sliding window",
            "its cache does not grow with the context: nothing is left to compress", _OTHER_MODEL),
    Refusal("chunked_attention", "a model with chunked local attention",
            "its layers look at positions that compressed blocks no longer have", _OTHER_MODEL),
    Refusal("kv_sharing_layers", "a model whose layers share their KV cache",
            "a layer's cache would be compressed under another's attention", _OTHER_MODEL),
    Refusal("alibi", "a model with ALiBi",
            "it computes distances from slots, and a compressed cache changes them", _OTHER_MODEL),
    Refusal("diffusion", "a diffusion language model",
            "it rewrites tokens that a policy may have evicted", _OTHER_MODEL),
)  # fmt: skip


def refused_options(options: Mapping[str, str]) -> list[tuple[str, Refusal]]:
    """Returns (option, row) for each of the given vLLM options that a policy refuses.

    Args:
        options: vLLM's option names, with or without dashes, to their values as typed; a flag
            without a value is "true".
    """
    plain = {name.lstrip("-").replace("_", "-"): value for name, value in options.items()}
    return [
        (f"--{name}", row)
        for row in REFUSED
        for name, refuses in row.options.items()
        if name in plain and refuses(plain[name])
    ]


def check_cache_dtype(policy: "Policy", cache_dtype: str) -> None:
    """Checks that the policy's precision and vLLM's `--kv-cache-dtype` say the same.

    Raises:
        ConflictError: they contradict each other, or the policy is not run over such a cache.
    """
    quantize = policy.quantize
    is_fp8 = cache_dtype in FP8_DTYPES
    if policy.heads.compensation and is_fp8:
        raise ConflictError(
            "heads.compensation adds up keys and values in the model's own numbers",
            got=f"--kv-cache-dtype {cache_dtype}",
            allowed="auto",
            fix="Drop --kv-cache-dtype, or set heads.compensation to false",
        )
    if quantize is None:
        return
    if is_fp8 != quantize.is_fp8:
        raise ConflictError(
            "the policy's quantize and vLLM's --kv-cache-dtype contradict each other",
            got=f"quantize {quantize.keys}, --kv-cache-dtype {cache_dtype}",
            allowed=", ".join(FP8_DTYPES) if quantize.is_fp8 else "auto",
            fix="Drop --kv-cache-dtype",
        )
