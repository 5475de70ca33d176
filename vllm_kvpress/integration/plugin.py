"""What vLLM's entry points do: install the flag always, the engine part only under a policy."""

import functools
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from vllm_kvpress.config import Policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["ADDITIONAL_KEY", "activate", "arm", "deactivate", "policy_of", "register"]

ADDITIONAL_KEY = "kv_policy"

# Inherited by the processes that an engine starts. They load plugins before they look at their
# VllmConfig, and must know by then whether there is anything to do.
ACTIVE_VARIABLE = "KVPRESS_ACTIVE"

_ENGINE_ARGS_MODULE = "vllm.engine.arg_utils"


def register() -> None:
    """Installs the flag; in a process of an engine that has a policy, the engine part as well."""
    from vllm_kvpress.integration import flag

    flag.install()
    if os.environ.get(ACTIVE_VARIABLE):
        activate()


def activate() -> None:
    """Installs the engine part here and in the processes that this one starts; re-entrant.

    Raises:
        UnsupportedVLLMError: the installed vLLM is outside the window, or lacks a patch target.
    """
    from vllm_kvpress.integration import compat, engine

    compat.check_version()
    compat.refuse_streaming_input()
    engine.install()
    os.environ[ACTIVE_VARIABLE] = "1"


def deactivate() -> None:
    """Lets the next engine of this process be stock vLLM; an engine that runs keeps its policy."""
    os.environ.pop(ACTIVE_VARIABLE, None)
    if "vllm_kvpress.integration.engine" in sys.modules:
        from vllm_kvpress.integration import engine

        engine.forget_choices()


def policy_of(vllm_config: "VllmConfig") -> Policy | None:
    """Returns the policy that an engine runs under, or None; parsed once a process."""
    additional = vllm_config.additional_config
    stored = additional.get(ADDITIONAL_KEY) if isinstance(additional, dict) else None
    return None if stored is None else _parsed(json.dumps(stored, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _parsed(text: str) -> Policy:
    return Policy.from_json(json.loads(text))


class _FlagOnceDefined(MetaPathFinder):
    """Finds no module; installs the flag at the first import after EngineArgs was defined.

    vLLM looks for its platform in the middle of importing the module that defines EngineArgs, and
    loads general plugins only after `EngineArgs.__init__` has refused unknown arguments. Between
    the two, more modules of vLLM are imported: that is the moment this finder waits for.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns None: the import goes on to the other finders."""
        # AsyncEngineArgs is the later of the two classes.
        if hasattr(sys.modules.get(_ENGINE_ARGS_MODULE), "AsyncEngineArgs"):
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            from vllm_kvpress.integration import flag

            flag.install()
        return None


def arm() -> None:
    """Installs the flag as soon as EngineArgs exists; re-entrant."""
    if not any(isinstance(finder, _FlagOnceDefined) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FlagOnceDefined())
