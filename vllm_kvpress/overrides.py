"""Turns "a shipped policy, but with ..." into the full mapping of a policy.

There are two ways to say it:

    {base: snapkv, evict: {budget: {keep_ratio: 0.25}}}    a mapping merged over the base
    snapkv:keep_ratio=0.25,window=16                       the same idea on a command line
"""

import re
from typing import Any

from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.sources import nearest, read_named

__all__ = ["expand_base", "parse_compact"]

# The short names; any other key is a parameter that the base's scorer has in its file.
_FIELDS = {
    "sink_tokens": ("sink_tokens",),
    "recent_tokens": ("recent_tokens",),
    "tokens": ("evict", "budget", "tokens"),
    "keep_ratio": ("evict", "budget", "keep_ratio"),
    "losers": ("evict", "losers"),
    "every_decode_tokens": ("evict", "when", "every_decode_tokens"),
    "keys": ("quantize", "keys"),
    "values": ("quantize", "values"),
    "group": ("quantize", "group"),
    "rotate": ("quantize", "rotate"),
    "residual_tokens": ("quantize", "residual_tokens"),
    "exact_sinks": ("quantize", "exact_sinks"),
    "plan": ("heads", "plan"),
    "file": ("heads", "file"),
    "retrieval_ratio": ("heads", "retrieval_ratio"),
    "threshold": ("heads", "threshold"),
    "seed": ("heads", "seed"),
    "compensation": ("heads", "compensation"),
}
# Keys that say one thing in two ways: giving one drops the other from the base.
_EITHER = {
    "evict.budget": {"tokens", "keep_ratio"},
    "heads": {"retrieval_ratio", "threshold"},
}
_EXAMPLE = "Write it like snapkv:keep_ratio=0.25,window=16"


def expand_base(data: dict[str, Any]) -> dict[str, Any]:
    """Returns `data` merged over the shipped policy that its key `base` names; `data` without one.

    The base's own name is left out: the result is another policy. Some places are not merged key by
    key: in `evict.budget`, `tokens` and `keep_ratio` replace each other, as in `heads`
    `retrieval_ratio` and `threshold` do; an `evict.scorer` of another name or path replaces the
    base's with all its parameters, as `heads` of a plan that ranks no heads (`all`, `inline`) do.

    Raises:
        ConfigError: `base` is not a known policy's name.
    """
    if "base" not in data:
        return data
    rest = {key: value for key, value in data.items() if key != "base"}
    base = data["base"]
    if not isinstance(base, str):
        raise ConfigError("base is not a name", got=shown(base), allowed="a shipped policy's name")
    named = read_named(base)
    del named["name"]
    return _merge(named, rest)


def parse_compact(name: str, overrides: str) -> dict[str, Any]:
    """Returns the mapping that `name:overrides` means.

    Raises:
        ConfigError: not `key=value,...`, or a key that the shipped policy `name` does not have.
    """
    base = read_named(name)
    scorer = base.get("evict", {}).get("scorer", {})
    scorer_params = [key for key in scorer if key not in ("name", "path")]
    # Codecs and a head plan may be added; eviction needs a scorer, which has no short name.
    fields = {
        key: path
        for key, path in _FIELDS.items()
        if path[0] in base or (path[0] != "evict" and key not in scorer_params)
    }
    known = [*fields, *scorer_params]
    data: dict[str, Any] = {"base": name}
    seen: set[str] = set()
    for item in overrides.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ConfigError(
                f"the override {shown(item)} of policy {name!r} is not key=value", fix=_EXAMPLE
            )
        if key not in known:
            raise ConfigError(
                f"the override {shown(key)} is not known to policy {name!r}",
                allowed=", ".join(known),
                fix=nearest(key, known),
            )
        if key in seen:
            raise ConfigError(f"the override {key} of policy {name!r} stands twice", fix=_EXAMPLE)
        seen.add(key)
        *parents, last = fields.get(key, ("evict", "scorer", key))
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = _scalar(value)
    return data


def _merge(base: dict[str, Any], over: dict[str, Any], path: str = "") -> dict[str, Any]:
    merged: dict[str, Any] = dict(base)
    for key, value in over.items():
        field = f"{path}.{key}" if path else key
        old: Any = merged.get(key)
        both_mappings = isinstance(value, dict) and isinstance(old, dict)
        if not both_mappings or _replaces(field, old, value):
            merged[key] = value
            continue
        either = _EITHER.get(field, set())
        if not either.isdisjoint(value):
            old = {name: kept for name, kept in old.items() if name not in either}
        merged[key] = _merge(old, value, field)
    return merged


def _replaces(field: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a part takes nothing of the base's: what it names has other options."""
    if field == "heads":
        return new.get("plan") in ("all", "inline")
    is_scorer = field == "evict.scorer"
    return is_scorer and any(key in new and new[key] != old.get(key) for key in ("name", "path"))


def _scalar(text: str) -> str | int | float | bool:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[-+]?\d{1,20}", text):
        return int(text)
    if re.fullmatch(r"[-+]?\d{0,20}\.?\d{1,20}([eE][-+]?\d{1,3})?", text):
        return float(text)
    return text
