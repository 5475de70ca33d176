"""The flag's surfaces: `--kv-policy`, `LLM(kv_policy=...)`, `additional_config`, VLLM_KV_POLICY.

Five callables of EngineArgs are wrapped, and nothing else: the flag has to exist before anybody
knows whether there is a policy. Without one each wrapper calls the original and returns its result.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vllm_kvpress.config import Policy, load_policy
from vllm_kvpress.errors import ConfigError, ConflictError, KVPressError, shown
from vllm_kvpress.integration import compat, plugin
from vllm_kvpress.integration.plugin import ADDITIONAL_KEY
from vllm_kvpress.policies import resolve
from vllm_kvpress.policies.heads import HeadShape, check_heads, inline_heads

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

__all__ = ["install", "policy_from"]

# What users write, in the order of precedence. Two that differ are an error, so the order only
# says which one is named first.
OPTION = "--kv-policy (kv_policy=)"
ADDITIONAL = f"additional_config[{ADDITIONAL_KEY!r}]"

# The stock kernels run on any of these; a smaller block wastes less of a kept set's last block.
BLOCK_SIZE_CPU = 32
BLOCK_SIZE_CUDA = 16

_HELP = (
    "KV-cache compression policy: a name (see `vllm-kvpress policies`), a YAML file, or inline "
    "JSON. An --attention-backend given with it becomes the backend that the policy runs on."
)

_from_command_line = False


def install() -> None:
    """Teaches EngineArgs and AsyncEngineArgs the flag; re-entrant.

    Raises:
        UnsupportedVLLMError: one of the five callables is missing.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    compat.wrap(EngineArgs, "__init__", _init_with_policy)
    # The dataclass generates it a second time: it does not call the base's.
    compat.wrap(AsyncEngineArgs, "__init__", _init_with_policy)
    compat.wrap(EngineArgs, "add_cli_args", _add_option)
    compat.wrap(EngineArgs, "from_cli_args", _carry_option)
    compat.wrap(EngineArgs, "create_engine_config", _under_policy)


def _init_with_policy(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, kv_policy: Any = None, **kwargs: Any) -> None:  # noqa: N807 - its name
        original(self, *args, **kwargs)
        if kv_policy is not None:
            self.kv_policy = kv_policy

    return __init__


def _add_option(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        group = parser.add_argument_group(
            title="KVPolicy", description="KV-cache compression (vllm-kvpress)."
        )
        group.add_argument(
            "--kv-policy", type=_checked, metavar="NAME|FILE.yaml|JSON", default=None, help=_HELP
        )
        return parser

    return add_cli_args


def _checked(text: str) -> str:
    """Returns `text` itself if it is a valid policy, so that a bad one is a usage error."""
    try:
        _resolved(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _carry_option(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        global _from_command_line
        _from_command_line = True
        engine_args = original(cls, args)
        if getattr(args, "kv_policy", None) is not None:
            engine_args.kv_policy = args.kv_policy
        return engine_args

    return from_cli_args


def _under_policy(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: "EngineArgs", *args: Any, **kwargs: Any) -> "VllmConfig":
        compat.declare_policy_variable()
        try:
            policy = policy_from(self)
            if policy is None:
                plugin.deactivate()
                return original(self, *args, **kwargs)
            return _configured(policy, self, lambda: original(self, *args, **kwargs))
        except KVPressError:
            _hide_traceback()
            raise

    return create_engine_config


def policy_from(engine_args: "EngineArgs", env: Mapping[str, str] = os.environ) -> Policy | None:
    """Returns the policy that the user asked for, wherever they asked for it, or None.

    Raises:
        ConfigError: a source is no valid policy, or two sources give different ones.
    """
    additional = engine_args.additional_config
    _refuse_misspelt(additional)
    sources = {
        OPTION: getattr(engine_args, "kv_policy", None),
        ADDITIONAL: additional.get(ADDITIONAL_KEY) if isinstance(additional, dict) else None,
        compat.POLICY_VARIABLE: env.get(compat.POLICY_VARIABLE) or None,
    }
    given = {source: value for source, value in sources.items() if value is not None}
    resolved = {source: _from_source(source, value) for source, value in given.items()}
    if not resolved:
        return None
    (first, policy), *others = resolved.items()
    for other, other_policy in others:
        # Their names may differ: a file that says what a shipped policy says is no contradiction.
        if other_policy.model_copy(update={"name": policy.name}) != policy:
            raise ConfigError(
                f"{first} and {other} give two different policies",
                got=f"{shown(given[first])} and {shown(given[other])}",
                fix="Give one of them",
            )
    return policy


def _from_source(source: str, value: Any) -> Policy:
    """Returns the policy that a source gives; an error names the source."""
    try:
        return _resolved(value)
    except ConfigError as error:
        what = f"{source}: {error.what}"
        raise ConfigError(what, error.got, error.allowed, error.fix) from error


def _resolved(source: str | dict[str, Any] | Path) -> Policy:
    policy = load_policy(source)
    resolve(policy)
    check_heads(policy.heads)
    return policy


def _configured(
    policy: Policy, engine_args: "EngineArgs", create: Callable[[], "VllmConfig"]
) -> "VllmConfig":
    """Returns the VllmConfig of an engine under `policy`, checked; `engine_args` stay as given."""
    from vllm_kvpress.integration import conflicts

    compat.check_version()
    with _fields(engine_args, _engine_fields(policy, engine_args)):
        vllm_config = create()
    conflicts.check(vllm_config)
    policy = inline_heads(policy, _head_shape(vllm_config))
    vllm_config.additional_config = {
        **_additional(engine_args), ADDITIONAL_KEY: policy.to_json()
    }  # fmt: skip
    conflicts.check_policy(policy, vllm_config)
    # Last: a refused engine leaves this process as it was.
    plugin.activate()
    return vllm_config


def _engine_fields(policy: Policy, engine_args: "EngineArgs") -> dict[str, Any]:
    """Returns what EngineArgs must say for the engine to run under `policy`."""
    from vllm.platforms import current_platform

    block_size = BLOCK_SIZE_CPU if current_platform.is_cpu() else BLOCK_SIZE_CUDA
    cache_dtype = engine_args.kv_cache_dtype
    if policy.quantize is not None and policy.quantize.is_fp8 and cache_dtype == "auto":
        cache_dtype = policy.quantize.keys
    return {
        "kv_cache_dtype": cache_dtype,
        "additional_config": {**_additional(engine_args), ADDITIONAL_KEY: policy.to_json()},
        "block_size": engine_args.block_size or block_size,
    }


def _head_shape(vllm_config: "VllmConfig") -> HeadShape:
    model = vllm_config.model_config.model_arch_config
    return HeadShape(
        num_layers=model.total_num_hidden_layers,
        num_kv_heads=model.total_num_kv_heads,
        num_heads=model.total_num_attention_heads,
        head_size=model.head_size,
    )


def _additional(engine_args: "EngineArgs") -> dict[str, Any]:
    additional = engine_args.additional_config
    if not isinstance(additional, dict):
        raise ConflictError(
            "additional_config must be a mapping to carry a KV policy",
            got=type(additional).__name__,
            allowed="a dict",
        )
    return additional


def _refuse_misspelt(additional: Any) -> None:
    """Refuses a key of additional_config that can only mean ours: vLLM ignores unknown keys."""
    for key in additional if isinstance(additional, dict) else ():
        letters = "".join(letter for letter in str(key).lower() if letter.isalpha())
        if letters in ("kvpolicy", "kvpolicies") and key != ADDITIONAL_KEY:
            raise ConfigError(
                "additional_config has an unknown key",
                got=shown(key),
                allowed=ADDITIONAL_KEY,
                fix=f"Did you mean {ADDITIONAL_KEY!r}?",
            )


@contextlib.contextmanager
def _fields(engine_args: "EngineArgs", values: dict[str, Any]) -> Iterator[None]:
    """Sets fields of `engine_args` for the length of a block: vLLM may create from it again."""
    before = {name: getattr(engine_args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(engine_args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(engine_args, name, value)


def _hide_traceback() -> None:
    """Lets one of our errors end a command of vLLM's with its message alone.

    Installed only when such an error was raised, and only where EngineArgs came from a command
    line: a library's caller gets the ordinary traceback.
    """
    previous = sys.excepthook
    if not _from_command_line or getattr(previous, "is_kvpress", False):
        return

    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, KVPressError):
            print(f"vllm: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    excepthook.is_kvpress = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
