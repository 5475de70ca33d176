"""What a policy may say: its parts put together, and the rules across them.

    name | file | inline JSON | mapping  --load_policy-->  Policy (frozen, validated)

`Policy` knows only the shape. What depends on the scorer (which parameters it takes, whether it
needs queries) is checked by `scorer_rules.py` with the scorer's traits: call
`vllm_kvpress.policies.resolve(policy)`, which does both. This module imports no torch and no vLLM.
"""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.overrides import expand_base, parse_compact
from vllm_kvpress.schema import (
    PARTS,
    Budget,
    Evict,
    Heads,
    Layers,
    Part,
    Quantize,
    ScorerSpec,
    Tokens,
    When,
)
from vllm_kvpress.sources import (
    YAML_SUFFIXES,
    PolicyInfo,
    known_policies,
    nearest,
    parse_json,
    read_file,
    read_named,
)

__all__ = [
    "Budget",
    "Evict",
    "Heads",
    "Layers",
    "Policy",
    "PolicyInfo",
    "Quantize",
    "ScorerSpec",
    "When",
    "known_policies",
    "load_policy",
]


class Policy(Part):
    """One KV-cache policy; equal policies act alike. Make it with `load_policy`."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            description="1 to 64 letters, digits, '.', '_', '-', starting with a letter or digit",
        ),
    ] = "inline"
    sink_tokens: Tokens = 4
    recent_tokens: Tokens = 64
    evict: Annotated[
        Evict | None, Field(description="a mapping with scorer, budget, when, losers, or null")
    ] = None
    quantize: Annotated[
        Quantize | None, Field(description="a mapping with keys and values, or null")
    ] = None
    heads: Annotated[
        Heads, Field(description="a mapping with plan, file, retrieval_ratio or threshold")
    ] = Heads()
    layers: Annotated[Layers, Field(description="a mapping with skip")] = Layers()

    @model_validator(mode="before")
    @classmethod
    def _with_losers(cls, data: Any) -> Any:
        """Demoting needs two precisions: of what is kept, exact by default, and of the losers."""
        evict = data.get("evict") if isinstance(data, dict) else None
        if not (isinstance(evict, dict) and evict.get("losers") == "demote"):
            return data
        quantize = data.get("quantize")
        quantize = {"keys": "none", "values": "none"} if quantize is None else quantize
        if isinstance(quantize, dict) and quantize.get("losers") is None:
            quantize = {**quantize, "losers": {}}
        return {**data, "quantize": quantize}

    @model_validator(mode="after")
    def _check(self) -> "Policy":
        if self.heads.plan != "all" and self.recent_tokens == 0:
            raise ConfigError(
                "recent_tokens is 0 with heads.plan, whose streaming heads keep sinks and recent "
                "tokens only",
                allowed="at least 1",
            )
        if self.heads.plan != "all" and self.layers.skip:
            raise ConfigError(
                "layers.skip does not go with heads.plan, which names heads of every layer",
                got=f"layers.skip {list(self.layers.skip)}, plan: {self.heads.plan}",
                allowed="layers.skip: [] with a head plan",
                fix="Make every head of those layers a retrieval head",
            )
        if self.evict is None:
            return self._check_without_evict()
        self._check_losers(self.evict)
        budget = self.evict.budget
        forced = self.sink_tokens + self.recent_tokens
        if budget is not None and budget.tokens is not None and budget.tokens < forced:
            raise ConfigError(
                "evict.budget.tokens is smaller than sink_tokens + recent_tokens",
                got=f"{budget.tokens} < {self.sink_tokens} + {self.recent_tokens}",
                allowed=f"at least {forced}",
                fix="Raise the budget or lower recent_tokens",
            )
        return self

    def _check_losers(self, evict: Evict) -> None:
        quantize = self.quantize
        losers = None if quantize is None else quantize.losers
        if evict.losers != "demote":
            if losers is not None:
                raise ConfigError(
                    "quantize.losers goes with evict.losers: demote only",
                    got=f"evict.losers: {evict.losers}",
                    fix="Set evict.losers to demote, or quantize.losers to null",
                )
            return
        if quantize is not None and quantize.is_fp8:
            raise ConfigError(
                "evict.losers: demote does not go with fp8, vLLM's own cache of one precision",
                got="quantize fp8",
                allowed="int8, int4, kivi4, kivi2, none for what is kept",
                fix="Use int8 in place of fp8, or losers: drop",
            )
        if evict.when.every_decode_tokens:
            raise ConfigError(
                "evict.losers: demote acts at the prompt's end only",
                got=f"evict.when.every_decode_tokens: {evict.when.every_decode_tokens}",
                allowed="every_decode_tokens: 0, or losers: drop",
                fix="Set evict.when.every_decode_tokens to 0",
            )

    def _check_without_evict(self) -> "Policy":
        if self.quantize is not None and self.quantize.losers is not None:
            raise ConfigError(
                "quantize.losers is the precision of what a scorer rejects",
                got="a policy without evict, which rejects nothing",
                fix="Remove quantize.losers, or add evict with losers: demote",
            )
        if self.heads.plan != "all":
            return self
        if self.quantize is None:
            raise ConfigError(
                "the policy keeps everything as it is",
                allowed="a policy with evict, quantize, or a heads.plan other than all",
                fix="Add evict, quantize or heads",
            )
        if self.quantize.is_fp8:
            raise ConfigError(
                "the policy does nothing beside vLLM's own fp8 cache",
                got="quantize fp8 without evict",
                allowed="fp8 beside evict; int8, int4, kivi4, kivi2 with or without it",
                fix="Start vLLM with --kv-cache-dtype fp8 and no policy",
            )
        return self

    @property
    def packs_on_write(self) -> bool:
        """Whether nothing but a scorer's choice keeps tokens from being packed as they are written.

        Skipped layers keep exact blocks in the same pool, whose size packed ones do not have.
        """
        return self.quantize is not None and self.quantize.packs_on_write and not self.layers.skip

    @property
    def heads_store(self) -> bool:
        """Whether retrieval heads of a head plan move tokens to a store of their own.

        A scorer picks them, or a codec that cannot pack tokens as they are written waits for them.
        """
        packs = self.quantize is not None and not self.quantize.is_fp8
        return self.evict is not None or (packs and not self.packs_on_write)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON-able data from which `from_json` rebuilds an equal policy."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Policy":
        """Returns the policy that `data` describes in full.

        Raises:
            ConfigError: one wrong field, named with dots.
        """
        if not isinstance(data, dict):
            raise ConfigError("the policy is not a mapping", got=shown(data), allowed="a mapping")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _config_error(error) from None


def load_policy(source: "str | dict[str, Any] | Path | Policy") -> Policy:
    """Returns the validated policy that `source` means.

    Args:
        source: the name of a shipped policy (`snapkv`), that name with overrides
            (`snapkv:keep_ratio=0.25,window=16`), a path that ends in .yaml or .yml, inline JSON
            (starts with `{`), a mapping, or a Policy (returned as it is). A mapping with
            `base: NAME` is merged over that shipped policy; in `evict.budget`, `tokens` and
            `keep_ratio` replace each other; a `scorer` with another name replaces the base's.

    Raises:
        ConfigError: `source` is none of these, or a field is wrong.
    """
    if isinstance(source, Policy):
        return source
    if isinstance(source, Path):
        return _from_data(read_file(source), source.stem)
    if isinstance(source, dict):
        return _from_data(source)
    if not isinstance(source, str):
        raise ConfigError(
            "the policy is of the wrong type",
            got=shown(source),
            allowed="a name, a path that ends in .yaml, inline JSON, a mapping",
        )
    text = source.strip()
    if text.startswith("{"):
        return _from_data(parse_json(text, "the inline policy"))
    if text.endswith(YAML_SUFFIXES) or os.sep in text.partition("=")[0]:
        path = Path(text)
        return _from_data(read_file(path), path.stem)
    name, colon, overrides = text.partition(":")
    if colon:
        return _from_data(parse_compact(name, overrides))
    return _from_data(read_named(text), text)


def _from_data(data: dict[str, Any], default_name: str | None = None) -> Policy:
    if default_name is None:
        default_name = f"{data['base']}-custom" if isinstance(data.get("base"), str) else "inline"
    return Policy.from_json({"name": default_name, **expand_base(data)})


def _config_error(error: ValidationError) -> ConfigError:
    """The one most useful of pydantic's findings, in our words."""
    found = error.errors(include_url=False)
    # A misspelt key is both "extra" and, under its right name, "missing": tell the former.
    keys = (one for one in found if one["type"] in ("extra_forbidden", "invalid_key"))
    first = next(keys, found[0])
    own = first.get("ctx", {}).get("error")
    if isinstance(own, ConfigError):
        return own
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "invalid_key"):
        known = list(_model_at(first["loc"][:-1]).model_fields)
        known += [] if len(first["loc"]) > 1 else ["base"]
        return ConfigError(
            f"{field} is not a known key",
            got=shown(first["input"]),
            allowed=", ".join(known),
            fix=nearest(str(first["loc"][-1]), known),
        )
    allowed = _allowed_at(first["loc"]) or first["msg"]
    if first["type"] == "missing":
        return ConfigError(f"{field} is missing", allowed=allowed, fix=f"Add {field}")
    value = first["input"]
    # A one-word choice may be misspelt; a description in words is no candidate.
    choice = allowed.split(" ")[0]
    is_choice = isinstance(value, str) and choice not in ("a", "an", "the")
    fix = nearest(value, [choice]) if is_choice else None
    return ConfigError(f"{field} is not valid", got=shown(value), allowed=allowed, fix=fix)


def _model_at(loc: tuple[int | str, ...]) -> type[Part]:
    model: type[Part] = Policy
    for part in loc:
        model = PARTS[str(part)]
    return model


def _allowed_at(loc: tuple[int | str, ...]) -> str | None:
    names = [part for part in loc if isinstance(part, str)]
    return _model_at(tuple(names[:-1])).model_fields[names[-1]].description
