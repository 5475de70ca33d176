"""Where scorers come from: built-in names, entry points, and paths; each imported when asked for.

A policy's `evict.scorer` says which:

    {name: snapkv, ...}               a file of ours
    {name: mine, ...}                 the entry point `mine` of the group `vllm_kvpress.scorers`
    {path: my_pkg.my_module:Mine}     any class that can be imported
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, cast

from pydantic import ValidationError

from vllm_kvpress.config import ScorerSpec
from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.policies.scorer import NEEDS, Scorer
from vllm_kvpress.sources import nearest

__all__ = ["ENTRY_POINT_GROUP", "known_scorers", "make_scorer"]

ENTRY_POINT_GROUP = "vllm_kvpress.scorers"

_SCORERS = "vllm_kvpress.policies.scorers"
_BUILT_IN = {
    "keydiff": f"{_SCORERS}.keydiff:KeyDiffScorer",
    "knorm": f"{_SCORERS}.knorm:KnormScorer",
    "logquant": f"{_SCORERS}.logquant:LogQuantScorer",
    "position": f"{_SCORERS}.position:PositionScorer",
    "random": f"{_SCORERS}.random:RandomScorer",
    "snapkv": f"{_SCORERS}.snapkv:SnapKVScorer",
    "value_key_norm": f"{_SCORERS}.value_key_norm:ValueKeyNormScorer",
}


def known_scorers() -> list[str]:
    """Returns the names that `evict.scorer.name` may have, built-in and installed."""
    return sorted({*_BUILT_IN, *entry_points(group=ENTRY_POINT_GROUP).names})


def make_scorer(spec: ScorerSpec) -> Scorer:
    """Returns the scorer that `spec` describes; runs the code that its path points to.

    Raises:
        ConfigError: it is unknown, cannot be imported, is no scorer, or refuses its parameters.
    """
    what = f"the scorer {shown(spec.label)}"
    scorer_class = _import(spec.path or _path_of(spec.label), what)
    return _checked(_construct(scorer_class, spec.params, what), what)


def _path_of(name: str) -> str:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    # A plugin cannot replace a built-in name: results would depend on what is installed.
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return entry_point.value
    known = known_scorers()
    raise ConfigError(
        f"evict.scorer.name {shown(name)} is not known",
        allowed=f"{', '.join(known)}; or path: my_package.my_module:MyScorer",
        fix=nearest(name, known),
    )


def _import(path: str, what: str) -> Callable[..., object]:
    module_name, _, class_name = path.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(
            f"{what} cannot be imported",
            got=f"{type(error).__name__}: {error}",
            fix=f"Check that `python -c 'import {module_name}'` works in this environment",
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(
            f"{what}: the module {module_name!r} has no class {class_name!r}",
            got="nothing of that name" if found is None else shown(found),
            fix=nearest(class_name, classes),
        )
    return cast("Callable[..., object]", found)


def _construct(scorer_class: Callable[..., object], params: dict[str, Any], what: str) -> object:
    known = _parameters(scorer_class, what)
    for key in params:
        if known is not None and key not in known:
            raise ConfigError(
                f"evict.scorer.{key} is not a parameter of {what}",
                got=shown(params[key]),
                allowed=", ".join(known) or "no parameters",
                fix=nearest(key, known),
            )
    try:
        return scorer_class(**params)
    except ValidationError as error:
        raise _parameter_error(error, what) from None
    except Exception as error:  # the user's own checks, whatever they raise
        raise ConfigError(
            f"{what} refuses its parameters", got=f"{type(error).__name__}: {error}"
        ) from error


def _parameters(scorer_class: Callable[..., object], what: str) -> list[str] | None:
    """The names that the constructor takes; None if it takes any."""
    try:
        parameters = inspect.signature(scorer_class).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} is not a scorer", got=shown(scorer_class)) from error
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _parameter_error(error: ValidationError, what: str) -> ConfigError:
    first = error.errors(include_url=False)[0]
    field = "".join(f".{part}" for part in first["loc"])
    # What is allowed stands behind pydantic's own words.
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    fix = None
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        fix = nearest(first["input"], first["ctx"]["expected"].replace("'", "").split(" or "))
    return ConfigError(
        f"evict.scorer{field} of {what} is not valid",
        got=shown(first["input"]) if first["loc"] else None,
        allowed=message,
        fix=fix,
    )


def _checked(scorer: object, what: str) -> Scorer:
    needs = getattr(scorer, "needs", None)
    if not isinstance(needs, frozenset | set) or not needs <= NEEDS:
        raise ConfigError(
            f"{what} has no usable 'needs'",
            got=shown(needs),
            allowed=f"a frozenset out of {', '.join(sorted(NEEDS))}",
        )
    for name, allowed in (
        ("scope", ("head", "layer")),
        ("selects", ("tokens", "window", "streaming")),
    ):
        value = getattr(scorer, name, None)
        if value not in allowed:
            raise ConfigError(
                f"{what} has no usable {name!r}", got=shown(value), allowed=" or ".join(allowed)
            )
    window = getattr(scorer, "query_window", None)
    if type(window) is not int or window < 0 or (window > 0) != ("queries" in needs):
        raise ConfigError(
            f"{what} has no usable 'query_window'",
            got=f"{shown(window)} with needs {sorted(needs)}",
            allowed="tokens above 0 if it needs queries, else 0",
        )
    if not callable(getattr(scorer, "score", None)):
        raise ConfigError(f"{what} has no method 'score'", allowed="score(observation) -> Tensor")
    return cast("Scorer", scorer)
