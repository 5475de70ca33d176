"""Each row of the table of refusals, on real configurations, without starting an engine."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_kvpress
from vllm_kvpress.conflict_table import REFUSED, refused_options
from vllm_kvpress.errors import ConfigError, ConflictError, KVPressError, UnsupportedModelError
from vllm_kvpress.integration import compat, conflicts, plugin

MODEL = Path(vllm_kvpress.__file__).parent / "testbed" / "model"
LLAMA = json.loads((MODEL / "config.json").read_text())


@pytest.fixture(autouse=True)
def _plugin(monkeypatch):
    plugin.register()
    monkeypatch.delenv(compat.POLICY_VARIABLE, raising=False)
    monkeypatch.setenv(plugin.ACTIVE_VARIABLE, "")


def config_of(model: Path | str = MODEL, **options) -> VllmConfig:
    args = EngineArgs(
        model=str(model), enforce_eager=True, skip_tokenizer_init=True, max_model_len=256, **options
    )
    return args.create_engine_config()


def model_dir(path: Path, **changes) -> Path:
    """Writes a model's config.json: the bundled Llama's with changes; None removes a key."""
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


# Options as a user gives them, the row that refuses them, and what the message must quote.
OPTIONS = [
    (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                "prompt_lookup_max": 3}},
        "speculative_decoding", "'ngram'",
    ),
    (
        {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector",
                                                kv_role="kv_both")},
        "kv_connector", "'ExampleConnector'",
    ),
    ({"kv_offloading_size": 1.0}, "kv_offloading", "--kv-offloading-size 1.0"),
    ({"disable_hybrid_kv_cache_manager": True}, "hybrid_manager_off", "is off"),
    ({"kv_cache_dtype": "fp8_per_token_head"}, "kv_cache_dtype",
     "--kv-cache-dtype fp8_per_token_head"),
    ({"enable_prompt_embeds": True}, "prompt_embeds", "--enable-prompt-embeds"),
    ({"block_size": 20}, "block_size", "--block-size 20"),
    ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
     "pipeline_parallel", "--pipeline-parallel-size 2"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "key", "got"), OPTIONS, ids=[key for _, key, _ in OPTIONS])
def test_an_option_is_refused_by_name_with_the_fix(options, key, got):
    (row,) = [row for row in REFUSED if row.key == key]

    with pytest.raises(ConflictError) as error:
        config_of(kv_policy="knorm", **options)

    message = str(error.value)
    assert row.what in message
    assert f"got {got}" in message or got in message
    assert row.fix in message


@pytest.mark.parametrize(("options", "key", "got"), OPTIONS, ids=[key for _, key, _ in OPTIONS])
def test_the_same_option_is_fine_without_a_policy(options, key, got):
    config_of(**options)


# Options that vLLM itself refuses, or drops, for this model or on this platform: set afterwards.
FIELDS = [
    ("parallel_config", "decode_context_parallel_size", 2, "decode_context_parallel"),
    ("parallel_config", "prefill_context_parallel_size", 2, "prefill_context_parallel"),
    ("parallel_config", "enable_dbo", True, "dual_batch_overlap"),
    ("parallel_config", "ubatch_size", 2, "dual_batch_overlap"),
    ("cache_config", "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
    ("model_config", "enable_sleep_mode", True, "sleep_mode"),
    ("attention_config", "use_non_causal", True, "non_causal"),
    ("attention_config", "hisparse_config", object(), "hisparse"),
]


@pytest.mark.parametrize(("part", "name", "value", "key"), FIELDS, ids=[f[1] for f in FIELDS])
def test_a_field_is_refused_by_its_row(part, name, value, key):
    config = config_of(kv_policy="knorm")
    object.__setattr__(getattr(config, part), name, value)

    assert [row.key for row, _ in conflicts.find(config)] == [key]
    with pytest.raises(ConflictError, match=r"cannot be combined with"):
        conflicts.check(config)


DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": None,
    "num_key_value_heads": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "rope_parameters": None,
    "rope_theta": 10000.0,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 16,
    "intermediate_size": 512,
}
JAMBA = {
    "architectures": ["JambaForCausalLM"],
    "model_type": "jamba",
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_dt_rank": 16,
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "n_layer": 2,
    "n_head": 8,
}
GEMMA3N = {
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "num_kv_shared_layers": 2,
    "layer_types": ["full_attention"] * 4,
}

MODELS = [
    ("mla", DEEPSEEK, {}),
    ("sliding_window_only", MISTRAL, {}),
    ("attention_free", MAMBA, {}),
    ("mamba_hybrid", JAMBA, {}),
    ("pooling", BERT, {}),
    ("pooling", {}, {"runner": "pooling", "convert": "embed"}),
    ("alibi", BLOOM, {}),
    ("kv_sharing_layers", GEMMA3N, {}),
]


@pytest.mark.parametrize(("key", "changes", "options"), MODELS, ids=[m[0] for m in MODELS])
def test_a_model_is_refused_by_its_row(tmp_path, key, changes, options):
    model = model_dir(tmp_path, **changes)

    with pytest.raises(UnsupportedModelError) as error:
        config_of(model, kv_policy="knorm", **options)

    (row,) = [row for row in REFUSED if row.key == key]
    assert row.what in str(error.value)
    assert row.reason in str(error.value)


# Properties of models too large to write down here.
PROPERTIES = [
    ("encoder_decoder", "is_encoder_decoder", True),
    ("chunked_attention", "attention_chunk_size", 8192),
    ("diffusion", "is_diffusion", True),
    ("multimodal", "multimodal_config", SimpleNamespace(language_model_only=False)),
]


@pytest.mark.parametrize(("key", "name", "value"), PROPERTIES, ids=[p[0] for p in PROPERTIES])
def test_a_models_property_is_refused_by_its_row(key, name, value):
    config = config_of(kv_policy="knorm")
    # The instance's own attribute comes before the class's cached property.
    vars(config.model_config)[name] = value

    assert [row.key for row, _ in conflicts.find(config)] == [key]
    with pytest.raises(UnsupportedModelError):
        conflicts.check(config)


def test_a_multimodal_model_without_its_other_modalities_is_allowed():
    config = config_of(kv_policy="knorm")
    vars(config.model_config)["multimodal_config"] = SimpleNamespace(language_model_only=True)

    assert conflicts.find(config) == []


def test_every_row_has_a_case():
    cases = [key for _, key, _ in OPTIONS] + [key for *_, key in FIELDS]
    cases += [key for key, *_ in MODELS] + [key for key, *_ in PROPERTIES]

    assert set(cases) == {row.key for row in REFUSED}


def test_a_model_with_some_full_attention_layers_is_allowed(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    model = model_dir(
        tmp_path,
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        layer_types=kinds,
        use_sliding_window=True,
        sliding_window=64,
        max_window_layers=0,
    )

    assert conflicts.find(config_of(model, kv_policy="knorm")) == []


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"])
def test_the_models_own_dtype_and_fp8_are_no_conflict(dtype):
    assert conflicts.find(config_of(kv_policy="knorm", kv_cache_dtype=dtype)) == []


def test_a_missing_model_is_reported_by_vllm_before_any_engine():
    with pytest.raises(Exception, match="no/such") as error:
        config_of("/no/such/model", kv_policy="knorm")

    assert not isinstance(error.value, KVPressError)


def test_an_option_refused_beside_another_is_mentioned():
    config = config_of(block_size=20, enable_prompt_embeds=True)

    with pytest.raises(ConflictError, match="Also refused here: this block size"):
        conflicts.check(config)


def test_a_refused_engine_leaves_the_process_without_the_engine_part(monkeypatch):
    activated = []
    monkeypatch.setattr(plugin, "activate", lambda: activated.append(True))

    with pytest.raises(ConflictError):
        config_of(kv_policy="knorm", block_size=20)

    assert activated == []


def test_both_halves_of_the_table_have_the_same_rows():
    assert [row.key for row in REFUSED] == list(conflicts.FINDERS)


def test_option_names_of_the_table_exist_in_vllm():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())

    named = {f"--{option}" for row in REFUSED for option in row.options}
    assert named <= set(parser._option_string_actions)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"pipeline-parallel-size": "2"}, ["pipeline_parallel"]),
        ({"--pipeline_parallel_size": "1", "--block-size": "32"}, []),
        ({"block-size": "20", "enable-sleep-mode": "true"}, ["block_size", "sleep_mode"]),
        ({"enable-sleep-mode": "false", "kv-cache-dtype": "auto"}, []),
        ({"kv-cache-dtype": "fp8"}, []),
        ({"kv-cache-dtype": "int8_per_token_head"}, ["kv_cache_dtype"]),
        ({"speculative-config": '{"method": "ngram"}'}, ["speculative_decoding"]),
        ({"attention-config": '{"use_non_causal": true}'}, ["non_causal"]),
        ({"attention-config": '{"flash_attn_version": 3}'}, []),
        ({"tensor-parallel-size": "8", "enable-lora": "true"}, []),
    ],
)
def test_options_as_typed_are_checked_without_vllm(options, refused):
    assert sorted(row.key for _, row in refused_options(options)) == sorted(refused)


@pytest.mark.parametrize(
    ("skip", "words"),
    [([1, 4], ["got [4]", "0 to 3"]), ([0, 1, 2, 3], ["every layer", "does nothing"])],
)
def test_skipped_layers_are_those_of_the_model(skip, words):
    policy = {"base": "knorm", "layers": {"skip": skip}}

    with pytest.raises(ConfigError) as caught:
        config_of(additional_config={"kv_policy": policy})

    assert [word for word in words if word not in str(caught.value)] == []
