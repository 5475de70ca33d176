"""What a policy may say: the schema, its defaults, and the rules across its fields.

    name | file | inline JSON | mapping  --load_policy-->  Policy (frozen, validated)

`Policy` knows only the shape. What depends on the scorer (which parameters it takes, whether it
needs queries) is checked by `check_policy` with the scorer's traits: call
`vllm_kvpress.policies.resolve(policy)`, which does both. This module imports no torch and no vLLM.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.overrides import expand_base, parse_compact
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
    "ScorerSpec",
    "ScorerTraits",
    "When",
    "check_policy",
    "known_policies",
    "load_policy",
]

MAX_INT = 2**31 - 1

# A field's description is the "allowed" part of its error message.
Tokens = Annotated[int, Field(ge=0, le=MAX_INT, description=f"an integer from 0 to {MAX_INT}")]
Flag = Annotated[bool, Field(description="true or false")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ScorerSpec(_Part):
    """Which scorer ranks the tokens, and its own parameters beside the name."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str | None, Field(description="the name of a scorer")] = None
    path: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
            max_length=256,
            description="module and class, like 'my_package.my_module:MyScorer'",
        ),
    ] = None

    @property
    def params(self) -> dict[str, Any]:
        """The scorer's own parameters, a new dict."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """What users call this scorer: its name or its path."""
        return self.name or self.path or ""

    @model_validator(mode="after")
    def _check(self) -> "ScorerSpec":
        if (self.name is None) == (self.path is None):
            both = "neither" if self.name is None else "both"
            raise ConfigError(
                "evict.scorer needs a name or a path", got=both, allowed="exactly one of name, path"
            )
        for key, value in self.params.items():
            is_number = type(value) in (int, float) and abs(value) <= MAX_INT
            if not (is_number or isinstance(value, str | bool)):
                raise ConfigError(
                    f"evict.scorer.{key} is not a plain value",
                    got=shown(value),
                    allowed=f"a string, true, false, or a number of size up to {MAX_INT}",
                )
        return self


class Budget(_Part):
    """How many tokens each (layer, KV head) keeps, sinks and recent tokens included."""

    name: Annotated[Literal["uniform"], Field(description="uniform")] = "uniform"
    tokens: Annotated[
        int | None, Field(ge=1, le=MAX_INT, description=f"an integer from 1 to {MAX_INT}")
    ] = None
    keep_ratio: Annotated[
        float | None, Field(gt=0, le=1, description="a number above 0, at most 1")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> "Budget":
        if (self.tokens is None) == (self.keep_ratio is None):
            both = "neither" if self.tokens is None else "both"
            raise ConfigError(
                "evict.budget needs a size",
                got=both,
                allowed="exactly one of tokens, keep_ratio (the share of the prompt that is kept)",
            )
        return self


class When(_Part):
    """At which events the losers are dropped."""

    prompt_end: Flag = True
    every_decode_tokens: Tokens = 0

    @model_validator(mode="after")
    def _check(self) -> "When":
        if not self.prompt_end and self.every_decode_tokens == 0:
            raise ConfigError(
                "evict.when never evicts",
                got="prompt_end: false, every_decode_tokens: 0",
                allowed="prompt_end: true, or every_decode_tokens above 0",
            )
        return self


class Evict(_Part):
    """Which tokens are dropped, and when."""

    scorer: Annotated[
        ScorerSpec, Field(description="a mapping with name or path, and its parameters")
    ]
    budget: Annotated[Budget | None, Field(description="a mapping with tokens or keep_ratio")] = (
        None
    )
    when: Annotated[When, Field(description="a mapping with prompt_end, every_decode_tokens")] = (
        When()
    )
    losers: Annotated[
        Literal["drop"],
        Field(description="drop (merge, demote, compensate are not in this version)"),
    ] = "drop"


class Quantize(_Part):
    """Precision in which K and V are kept; it is that of the whole cache."""

    keys: Annotated[
        Literal["fp8"], Field(description="fp8 (int8, int4, kivi are not in this version)")
    ]
    values: Annotated[
        Literal["fp8"], Field(description="fp8 (int8, int4, kivi are not in this version)")
    ]


class Heads(_Part):
    """Which KV heads the policy acts on."""

    plan: Annotated[
        Literal["all"], Field(description="all (head plans are not in this version)")
    ] = "all"


class Layers(_Part):
    """Which layers the policy leaves alone."""

    skip: Annotated[
        list[int],
        Field(max_length=0, description="[] (skipping layers is not in this version)"),
    ] = []


class Policy(_Part):
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
    evict: Annotated[Evict, Field(description="a mapping with scorer, budget, when, losers")]
    quantize: Annotated[
        Quantize | None, Field(description="a mapping with keys and values, or null")
    ] = None
    heads: Annotated[Heads, Field(description="a mapping with plan")] = Heads()
    layers: Annotated[Layers, Field(description="a mapping with skip")] = Layers()

    @model_validator(mode="after")
    def _check(self) -> "Policy":
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


class ScorerTraits(Protocol):
    """What the rules need to know of a scorer; every `policies.Scorer` has it."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the observation that the score reads."""
        ...

    @property
    def selects(self) -> str:
        """Either "tokens" or "window"."""
        ...

    @property
    def query_window(self) -> int:
        """Last queries that the score reads, in tokens."""
        ...


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
    if text.endswith(YAML_SUFFIXES) or os.sep in text:
        path = Path(text)
        return _from_data(read_file(path), path.stem)
    name, colon, overrides = text.partition(":")
    if colon:
        return _from_data(parse_compact(name, overrides))
    return _from_data(read_named(text), text)


def check_policy(policy: Policy, traits: ScorerTraits) -> None:
    """Checks the rules between `policy` and its scorer.

    Raises:
        ConfigError: the first broken rule.
    """
    if traits.selects == "window":
        _check_window_policy(policy)
        return
    label = shown(policy.evict.scorer.label)
    if policy.evict.budget is None:
        raise ConfigError(
            "evict.budget is missing", allowed="a mapping with tokens or keep_ratio",
            fix=f"The scorer {label} ranks tokens: say how many to keep",
        )  # fmt: skip
    every = policy.evict.when.every_decode_tokens
    if "queries" in traits.needs and every > 0:
        raise ConfigError(
            f"evict.when.every_decode_tokens does not go with the scorer {label}, "
            "which needs the prompt's last queries",
            got=shown(every),
            allowed="0",
            fix="Use a scorer without queries (keydiff, knorm, value_key_norm, random)",
        )
    if traits.query_window > policy.recent_tokens:
        raise ConfigError(
            f"recent_tokens is smaller than the observation window of the scorer {label}",
            got=f"{policy.recent_tokens} < {traits.query_window}",
            allowed=f"at least {traits.query_window}",
            fix="Raise recent_tokens or lower evict.scorer.window",
        )


def _check_window_policy(policy: Policy) -> None:
    label = shown(policy.evict.scorer.label)
    when = policy.evict.when
    if policy.recent_tokens == 0:
        raise ConfigError(
            f"recent_tokens is 0 with the scorer {label}, which keeps sinks and recent tokens only",
            allowed="at least 1",
        )
    if not when.prompt_end or when.every_decode_tokens:
        raise ConfigError(
            f"evict.when does not go with the scorer {label}, which acts on every block from the "
            "prompt's end on",
            got=shown(when.model_dump()),
            allowed="prompt_end: true, every_decode_tokens: 0",
            fix="Remove evict.when",
        )


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


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Policy
    for part in loc:
        model = _PARTS[str(part)]
    return model


def _allowed_at(loc: tuple[int | str, ...]) -> str | None:
    names = [part for part in loc if isinstance(part, str)]
    return _model_at(tuple(names[:-1])).model_fields[names[-1]].description


# Where each part of a policy stands: by the last component of its field's name, all unlike.
_PARTS: dict[str, type[BaseModel]] = {
    "evict": Evict,
    "scorer": ScorerSpec,
    "budget": Budget,
    "when": When,
    "quantize": Quantize,
    "heads": Heads,
    "layers": Layers,
}
