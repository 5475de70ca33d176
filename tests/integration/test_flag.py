"""How a policy reaches an engine's configuration, and that nothing happens without one."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from vllm import envs
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.selector import get_attn_backend

import vllm_kvpress
from vllm_kvpress.config import load_policy
from vllm_kvpress.errors import ConfigError, ConflictError, UnsupportedVLLMError
from vllm_kvpress.integration import compat, flag, plugin
from vllm_kvpress.policies.heads import write_pattern

MODEL = str(Path(vllm_kvpress.__file__).parent / "testbed" / "model")

WRAPPED_WITHOUT_POLICY = {
    "vllm.engine.arg_utils.EngineArgs.__init__",
    "vllm.engine.arg_utils.AsyncEngineArgs.__init__",
    "vllm.engine.arg_utils.EngineArgs.add_cli_args",
    "vllm.engine.arg_utils.EngineArgs.from_cli_args",
    "vllm.engine.arg_utils.EngineArgs.create_engine_config",
}
WRAPPED_UNDER_POLICY = WRAPPED_WITHOUT_POLICY | {
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs",
    "vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls",
    "vllm.v1.core.kv_cache_utils.get_kv_cache_groups",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.get_computed_blocks",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.initialize_kv_cache",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.initialize_kv_cache",
}


@pytest.fixture(autouse=True)
def _plugin(monkeypatch):
    plugin.register()
    monkeypatch.delenv(compat.POLICY_VARIABLE, raising=False)
    # Restored afterwards: engines of later tests must not find it.
    monkeypatch.setenv(plugin.ACTIVE_VARIABLE, "")


def engine_args(**options):
    return EngineArgs(model=MODEL, enforce_eager=True, max_model_len=1024, **options)


def config_of(**options):
    return engine_args(**options).create_engine_config()


def parsed(*arguments):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--model", MODEL, *arguments])


def in_a_fresh_process(code, **env):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("args_class", [EngineArgs, AsyncEngineArgs])
def test_the_command_line_carries_the_policy_into_the_engine_config(args_class):
    args = args_class.from_cli_args(parsed("--kv-policy", "knorm"))

    config = args.create_engine_config()

    assert plugin.policy_of(config) == load_policy("knorm")


@pytest.mark.parametrize("args_class", [EngineArgs, AsyncEngineArgs])
def test_both_classes_of_engine_arguments_take_the_keyword(args_class):
    assert args_class(model=MODEL, kv_policy="knorm").kv_policy == "knorm"


@pytest.mark.parametrize("form", ["name", "overrides", "file", "path", "json", "mapping"])
def test_every_form_of_a_policy_means_the_same(form, tmp_path):
    policy = load_policy("knorm:tokens=512")
    data = policy.to_json()
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({**data, "name": "mine"}))
    source = {
        "name": data,
        "overrides": "knorm:tokens=512",
        "file": str(file),
        "path": file,
        "json": json.dumps(data),
        "mapping": data,
    }[form]

    stored = config_of(kv_policy=source).additional_config["kv_policy"]

    assert {**stored, "name": data["name"]} == data


def test_additional_config_is_normalized_and_keeps_its_other_keys():
    config = config_of(additional_config={"kv_policy": "knorm", "other": 1})

    assert config.additional_config == {"kv_policy": load_policy("knorm").to_json(), "other": 1}


def test_the_environment_variable_is_the_last_source(monkeypatch):
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        if name not in envs.environment_variables:  # left by engines of other tests
            monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_KV_POLICY", "knorm")

    # vLLM would refuse the variable under this option if it did not know it.
    config = config_of(fail_on_environ_validation=True)

    assert plugin.policy_of(config) == load_policy("knorm")


def test_an_empty_environment_variable_is_none(monkeypatch):
    monkeypatch.setenv("VLLM_KV_POLICY", "")

    assert plugin.policy_of(config_of()) is None


def test_sources_that_agree_are_one_policy(monkeypatch):
    monkeypatch.setenv("VLLM_KV_POLICY", json.dumps(load_policy("knorm").to_json()))

    config = config_of(kv_policy="knorm", additional_config={"kv_policy": "knorm"})

    assert plugin.policy_of(config) == load_policy("knorm")


@pytest.mark.parametrize(
    ("keyword", "additional", "variable", "named"),
    [
        ("knorm", "snapkv", None, ["--kv-policy", "additional_config", "knorm", "snapkv"]),
        ("knorm", None, "snapkv", ["--kv-policy", "VLLM_KV_POLICY", "knorm", "snapkv"]),
        (None, "knorm", "snapkv", ["additional_config", "VLLM_KV_POLICY", "knorm", "snapkv"]),
        ("knorm", None, "knorm:tokens=512", ["--kv-policy", "VLLM_KV_POLICY"]),
    ],
)
def test_two_different_policies_are_an_error_that_names_both(
    monkeypatch, keyword, additional, variable, named
):
    if variable:
        monkeypatch.setenv("VLLM_KV_POLICY", variable)
    args = engine_args(
        kv_policy=keyword, additional_config={"kv_policy": additional} if additional else {}
    )

    with pytest.raises(ConfigError) as error:
        args.create_engine_config()

    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize("policy", ["nosuch", "nosuch.yaml", "{", "knorm:tokens=3", "duo"])
def test_a_wrong_policy_is_a_usage_error_of_the_command_line(policy, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--kv-policy", policy)

    assert ended.value.code == 2
    assert "argument --kv-policy: " in capsys.readouterr().err


def test_a_head_plan_travels_as_labels_and_its_file_is_read_here_alone(tmp_path, monkeypatch):
    file = tmp_path / "duo.tsv"
    write_pattern(file, [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], {})

    config = config_of(kv_policy=f"duo:file={file},threshold=0.5", additional_config={"other": 1})

    assert config.additional_config["other"] == 1
    assert config.additional_config["kv_policy"]["heads"] == {
        "plan": "inline",
        "labels": ["0000", "0111", "0000", "0000"],
        "seed": 0,
        "compensation": False,
    }
    assert plugin.policy_of(config).heads.plan == "inline"


def test_a_head_plan_of_another_model_is_refused_before_the_engine(tmp_path):
    write_pattern(tmp_path / "duo.tsv", [[0, 1]], {})

    with pytest.raises(ConfigError, match=r"model's shape; got 1 rows of 2 .* 4 rows \(layers\)"):
        config_of(kv_policy=f"duo:file={tmp_path}/duo.tsv")


def test_a_wrong_policy_in_python_is_a_typed_error_before_the_engine():
    with pytest.raises(ConfigError, match=r"policy 'nosuch' is not known; allowed: .*snapkv"):
        config_of(kv_policy="nosuch")


def test_a_wrong_policy_names_its_source(monkeypatch):
    monkeypatch.setenv("VLLM_KV_POLICY", "snpakv")

    with pytest.raises(ConfigError, match=r"^VLLM_KV_POLICY: policy 'snpakv'.*mean 'snapkv'"):
        config_of()


@pytest.mark.parametrize("key", ["kv-policy", "kvpolicy", "KV_Policy"])
def test_a_misspelt_key_of_additional_config_is_refused(key):
    with pytest.raises(ConfigError, match=f"got '{key}'.*Did you mean 'kv_policy'"):
        config_of(additional_config={key: "snapkv"})


def test_additional_config_of_another_type_is_refused():
    args = engine_args(kv_policy="knorm")
    args.additional_config = object()

    with pytest.raises(ConflictError, match="additional_config must be a mapping"):
        args.create_engine_config()


def test_the_flag_stands_in_a_group_of_its_own_in_the_help():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())

    (group,) = [group for group in parser._action_groups if group.title == "KVPolicy"]

    assert [action.option_strings for action in group._group_actions] == [["--kv-policy"]]
    assert "NAME|FILE.yaml|JSON" in argparse.ArgumentParser.format_help(parser)


def test_engine_arguments_are_left_as_given():
    args = engine_args(kv_policy="knorm")

    first, second = args.create_engine_config(), args.create_engine_config()

    assert args.additional_config == {}
    assert args.block_size is None
    assert first.additional_config == second.additional_config


def test_quantize_is_the_engines_own_cache_dtype():
    fp8 = {"base": "knorm", "quantize": {"keys": "fp8", "values": "fp8"}}

    assert config_of(kv_policy=fp8).cache_config.cache_dtype == "fp8"
    assert config_of(kv_policy="snapkv-fp8").cache_config.cache_dtype == "fp8"
    given = config_of(kv_policy=fp8, kv_cache_dtype="fp8_e5m2")
    assert given.cache_config.cache_dtype == "fp8_e5m2"
    assert config_of(kv_policy="knorm").cache_config.cache_dtype == "auto"
    with pytest.raises(ConflictError, match="quantize fp8, --kv-cache-dtype bfloat16"):
        config_of(kv_policy=fp8, kv_cache_dtype="bfloat16")


def test_packed_codecs_leave_the_cache_dtype_alone_and_refuse_fp8():
    assert config_of(kv_policy="snapkv-int4").cache_config.cache_dtype == "auto"

    with pytest.raises(ConflictError, match="quantize kivi2, --kv-cache-dtype fp8; allowed: auto"):
        config_of(kv_policy="kivi2", kv_cache_dtype="fp8")


def test_a_policy_sets_a_small_block_size_unless_the_user_did():
    assert config_of(kv_policy="knorm").cache_config.block_size == 32
    assert config_of(kv_policy="knorm", block_size=64).cache_config.block_size == 64
    assert config_of().cache_config.block_size == 128


def test_the_policy_enters_the_compile_cache_key():
    hashes = {
        config_of(kv_policy=policy).compute_hash() for policy in ("knorm", "knorm:tokens=512")
    }

    assert len(hashes) == 2


def test_another_release_of_vllm_is_refused_only_under_a_policy(monkeypatch):
    monkeypatch.setattr("vllm.version.__version__", "0.33.0")

    assert plugin.policy_of(config_of()) is None
    with pytest.raises(UnsupportedVLLMError, match=r"got 0\.33\.0; allowed: 0\.32\.x"):
        config_of(kv_policy="knorm")


def test_a_missing_patch_target_is_named():
    with pytest.raises(UnsupportedVLLMError, match=r"EngineArgs\.no_such_method"):
        compat.wrap(EngineArgs, "no_such_method", lambda original: original)


def test_registering_again_changes_nothing():
    before = EngineArgs.create_engine_config

    plugin.register()
    flag.install()

    assert EngineArgs.create_engine_config is before


def test_streaming_input_is_refused_under_a_policy():
    from types import SimpleNamespace

    process_inputs = compat._without_resumable(lambda self, *_, **options: options["resumable"])
    without = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    under = SimpleNamespace(vllm_config=config_of(kv_policy="knorm"))

    assert process_inputs(without, "id", resumable=True) is True
    assert process_inputs(under, "id") is False
    with pytest.raises(ConflictError, match="streaming-input"):
        process_inputs(under, "id", resumable=True)


_LISTING = """
import json
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm_kvpress.integration import compat
before = EngineArgs(model={model!r}, enforce_eager=True, kv_policy={policy!r})
before.create_engine_config()
print(json.dumps(sorted(compat.patched())))
"""


@pytest.mark.parametrize(
    ("policy", "wrapped"), [(None, WRAPPED_WITHOUT_POLICY), ("knorm", WRAPPED_UNDER_POLICY)]
)
def test_exactly_these_callables_are_wrapped(policy, wrapped):
    # Through the installed entry points: `arm` alone lets the first EngineArgs take the keyword.
    done = in_a_fresh_process(_LISTING.format(model=MODEL, policy=policy))

    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) == wrapped


def chosen_backend(config):
    """The attention backend that an engine of this configuration gives a full-attention layer."""
    with set_current_vllm_config(config):
        return get_attn_backend(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto")


def test_an_engine_without_a_policy_is_stock_after_one_with_a_policy():
    stock = chosen_backend(config_of())

    under_policy = chosen_backend(config_of(kv_policy="knorm"))
    another = chosen_backend(config_of(kv_policy="snapkv"))
    again = chosen_backend(config_of())

    assert under_policy.inner is stock
    assert another.inner is stock
    assert under_policy is not another
    assert again is stock
    assert plugin.ACTIVE_VARIABLE not in os.environ


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, vllm_kvpress; print({'torch', 'vllm', 'yaml'} & set(sys.modules))"

    assert in_a_fresh_process(code).stdout.strip() == "set()"


_WORKER = """
import json
from vllm import LLM
def wrapped(worker):
    from vllm_kvpress.integration import compat
    return sorted(compat.patched())
if __name__ == "__main__":
    from vllm_kvpress.integration import compat
    llm = LLM({model!r}, enforce_eager=True, max_model_len=256)
    print(json.dumps([sorted(compat.patched()), *llm.collective_rpc(wrapped)]))
"""


@pytest.mark.engine
def test_without_a_policy_front_end_engine_and_worker_are_untouched(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_WORKER.format(model=MODEL))

    # The engine core shares the front end's process here; the worker has one of its own.
    done = in_a_fresh_process(
        f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )

    assert done.returncode == 0, done.stderr
    front_end, *workers = json.loads(done.stdout.splitlines()[-1])
    assert len(workers) == 1
    assert all(set(wrapped) == WRAPPED_WITHOUT_POLICY for wrapped in (front_end, *workers))
