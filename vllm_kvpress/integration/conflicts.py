"""What each row of `conflict_table.REFUSED` looks like in a VllmConfig, and the check at start."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_kvpress.config import Policy
from vllm_kvpress.conflict_table import FP8_DTYPES, REFUSED, Refusal, check_cache_dtype
from vllm_kvpress.errors import ConflictError, UnsupportedModelError
from vllm_kvpress.planner import make_plan
from vllm_kvpress.policies import resolve
from vllm_kvpress.skip_groups import check_skipped

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["FINDERS", "check", "check_policy", "find"]

# Returns what was found, as `got` of the error, or None where the row does not apply.
Finder = Callable[["VllmConfig"], str | None]


def _above_one(name: str) -> Finder:
    def find(config: "VllmConfig") -> str | None:
        size = getattr(config.parallel_config, name)
        return f"--{name.replace('_', '-')} {size}" if size > 1 else None

    return find


def _speculative_decoding(config: "VllmConfig") -> str | None:
    speculative = config.speculative_config
    return (
        None if speculative is None else f"--speculative-config with method {speculative.method!r}"
    )


def _kv_connector(config: "VllmConfig") -> str | None:
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None or _kv_offloading(config) is not None:
        return None
    return f"--kv-transfer-config with kv_connector {transfer.kv_connector!r}"


def _kv_offloading(config: "VllmConfig") -> str | None:
    size = config.cache_config.kv_offloading_size
    return f"--kv-offloading-size {size}" if size else None


def _hisparse(config: "VllmConfig") -> str | None:
    return "hisparse_config" if config.attention_config.hisparse_config is not None else None


def _hybrid_manager_off(config: "VllmConfig") -> str | None:
    off = config.scheduler_config.disable_hybrid_kv_cache_manager
    return "the hybrid KV cache manager is off" if off else None


def _kv_cache_dtype(config: "VllmConfig") -> str | None:
    cache_dtype = config.cache_config.cache_dtype
    model_dtype = str(config.model_config.dtype).removeprefix("torch.")
    allowed = ("auto", model_dtype, *FP8_DTYPES)
    return None if cache_dtype in allowed else f"--kv-cache-dtype {cache_dtype}"


def _kv_sharing_fast_prefill(config: "VllmConfig") -> str | None:
    return "--kv-sharing-fast-prefill" if config.cache_config.kv_sharing_fast_prefill else None


def _dual_batch_overlap(config: "VllmConfig") -> str | None:
    parallel = config.parallel_config
    if not parallel.use_ubatching:
        return None
    return "--enable-dbo" if parallel.enable_dbo else f"--ubatch-size {parallel.ubatch_size}"


def _prompt_embeds(config: "VllmConfig") -> str | None:
    return "--enable-prompt-embeds" if config.model_config.enable_prompt_embeds else None


def _sleep_mode(config: "VllmConfig") -> str | None:
    return "--enable-sleep-mode" if config.model_config.enable_sleep_mode else None


def _block_size(config: "VllmConfig") -> str | None:
    block_size = config.cache_config.block_size
    return f"--block-size {block_size}" if block_size % 8 else None


def _non_causal(config: "VllmConfig") -> str | None:
    return "use_non_causal" if config.attention_config.use_non_causal else None


def _multimodal(config: "VllmConfig") -> str | None:
    multimodal = config.model_config.multimodal_config
    if multimodal is None or multimodal.language_model_only:
        return None
    return _architecture(config)


def _model_is(attribute: str) -> Finder:
    def find(config: "VllmConfig") -> str | None:
        return _architecture(config) if getattr(config.model_config, attribute) else None

    return find


def _pooling(config: "VllmConfig") -> str | None:
    return _architecture(config) if config.model_config.runner_type == "pooling" else None


def _sliding_window_only(config: "VllmConfig") -> str | None:
    # vLLM sets it only where no layer has full attention.
    window = config.cache_config.sliding_window
    return None if window is None else f"{_architecture(config)} with a window of {window} tokens"


def _chunked_attention(config: "VllmConfig") -> str | None:
    chunk = config.model_config.attention_chunk_size
    return None if chunk is None else f"{_architecture(config)} with chunks of {chunk} tokens"


def _kv_sharing_layers(config: "VllmConfig") -> str | None:
    shared = getattr(config.model_config.hf_text_config, "num_kv_shared_layers", 0) or 0
    return f"{_architecture(config)} with {shared} of them" if shared else None


def _architecture(config: "VllmConfig") -> str:
    return str(config.model_config.architecture)


FINDERS: dict[str, Finder] = {
    "speculative_decoding": _speculative_decoding,
    "kv_connector": _kv_connector,
    "kv_offloading": _kv_offloading,
    "hisparse": _hisparse,
    "decode_context_parallel": _above_one("decode_context_parallel_size"),
    "prefill_context_parallel": _above_one("prefill_context_parallel_size"),
    "pipeline_parallel": _above_one("pipeline_parallel_size"),
    "hybrid_manager_off": _hybrid_manager_off,
    "kv_cache_dtype": _kv_cache_dtype,
    "kv_sharing_fast_prefill": _kv_sharing_fast_prefill,
    "dual_batch_overlap": _dual_batch_overlap,
    "prompt_embeds": _prompt_embeds,
    "sleep_mode": _sleep_mode,
    "block_size": _block_size,
    "non_causal": _non_causal,
    "multimodal": _multimodal,
    "mla": _model_is("use_mla"),
    "pooling": _pooling,
    "encoder_decoder": _model_is("is_encoder_decoder"),
    "attention_free": _model_is("is_attention_free"),
    "mamba_hybrid": _model_is("is_hybrid"),
    "sliding_window_only": _sliding_window_only,
    "chunked_attention": _chunked_attention,
    "kv_sharing_layers": _kv_sharing_layers,
    "alibi": _model_is("uses_alibi"),
    "diffusion": _model_is("is_diffusion"),
}


def find(config: "VllmConfig") -> list[tuple[Refusal, str]]:
    """Returns (row, what was found) for every row that applies: models first, as they stay."""
    found = [(row, FINDERS[row.key](config)) for row in REFUSED]
    applying = [(row, got) for row, got in found if got is not None]
    return sorted(applying, key=lambda pair: not pair[0].is_about_model)


def check(config: "VllmConfig") -> None:
    """Checks that an engine of this configuration can run under a policy.

    Raises:
        UnsupportedModelError: the model is refused.
        ConflictError: an option is refused. Either names the first row that applies, and how many
            more do.
    """
    refused = find(config)
    if not refused:
        return
    row, got = refused[0]
    error = UnsupportedModelError if row.is_about_model else ConflictError
    others = ", ".join(other.what for other, _ in refused[1:])
    raise error(
        f"a KV policy cannot be combined with {row.what}: {row.reason}",
        got=got,
        fix=row.fix + (f". Also refused here: {others}" if others else ""),
    )


def check_policy(policy: Policy, config: "VllmConfig") -> None:
    """Checks that an engine of this configuration can do what the policy asks.

    Raises:
        CapacityError: the budget cannot hold the forced tokens in blocks of this size.
        ConfigError: layers.skip does not fit the model.
        ConflictError: the scorer would need what one rank does not have.
    """
    kinds = getattr(config.model_config.hf_text_config, "layer_types", None) or []
    check_skipped(
        policy.layers.skip,
        config.model_config.get_total_num_hidden_layers(),
        sum(kind == "sliding_attention" for kind in kinds),
    )
    scorer = resolve(policy)
    make_plan(policy, scorer, block_size=config.cache_config.block_size).check()
    check_cache_dtype(policy, config.cache_config.cache_dtype)
    ranks = config.parallel_config.tensor_parallel_size
    if scorer.scope == "layer" and ranks > 1:
        raise ConflictError(
            f"the scorer {type(scorer).__name__} ranks tokens by all heads of a layer, and "
            "a rank has only its own",
            got=f"--tensor-parallel-size {ranks}",
            allowed="1, or a scorer with scope 'head'",
            fix="Use --tensor-parallel-size 1 or another scorer",
        )
