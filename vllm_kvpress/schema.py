"""The parts of a policy: fields, their defaults, and the rules inside each part.

A field's description is the "allowed" part of its error message. `config.Policy` puts the parts
together and checks the rules across them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_kvpress.errors import ConfigError, shown

__all__ = [
    "PARTS",
    "Budget",
    "Codecs",
    "Evict",
    "Flag",
    "Heads",
    "Layers",
    "Losers",
    "Part",
    "Quantize",
    "ScorerSpec",
    "Tokens",
    "When",
]

MAX_INT = 2**31 - 1

Tokens = Annotated[int, Field(ge=0, le=MAX_INT, description=f"an integer from 0 to {MAX_INT}")]
Flag = Annotated[bool, Field(description="true or false")]


class Part(BaseModel):
    """Frozen, strict, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ScorerSpec(Part):
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


class Budget(Part):
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


class When(Part):
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


class Evict(Part):
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
        Literal["drop", "demote"],
        Field(description="drop, demote (merge, compensate are not in this version)"),
    ] = "drop"


CodecName = Annotated[
    Literal["fp8", "int8", "int4", "kivi4", "kivi2", "none"],
    Field(description="fp8, int8, int4, kivi4, kivi2, none (the model's own numbers)"),
]
PackedName = Annotated[
    Literal["int8", "int4", "kivi4", "kivi2", "none"],
    Field(description="int8, int4, kivi4, kivi2, none (the model's own numbers)"),
]
PER_TOKEN = ("int8", "int4")
PER_CHANNEL = ("kivi4", "kivi2")


class Codecs(Part):
    """Precision of the keys and values of one store.

    `fp8` is the engine's own cache dtype. The others are packed by us: `int8` and `int4` with a
    scale for each token and KV head, `kivi4` and `kivi2` with a scale for each channel of 32 keys
    and for each token of 32 channels of values.
    """

    keys: CodecName
    values: CodecName
    group: Annotated[
        Literal["head", 32],
        Field(description="head (one scale for a token's whole head) or 32 (channels a scale)"),
    ] = "head"
    rotate: Annotated[
        Literal["none", "keys", "both"],
        Field(description="none, keys, both: what a Hadamard rotation is applied to"),
    ] = "none"

    @property
    def is_fp8(self) -> bool:
        """Whether this is the engine's own fp8 cache."""
        return self.keys == "fp8"

    @property
    def has_channel_groups(self) -> bool:
        """Whether keys are grouped along the tokens, so that they wait for their group."""
        return self.keys in PER_CHANNEL

    @model_validator(mode="after")
    def _check_codecs(self) -> "Codecs":
        if "fp8" in (self.keys, self.values):
            return self  # all that does not go with fp8 is told at once, by `Quantize`
        where = self._where()
        wrong = {}
        if self.group != "head" and not {self.keys, self.values} & set(PER_TOKEN):
            wrong[f"{where}.group"] = f"{where}.group is for int8 and int4"
        rotated = {"none": [], "keys": [self.keys], "both": [self.keys, self.values]}[self.rotate]
        if not set(rotated) <= set(PER_TOKEN):
            what = f"{where}.rotate: {self.rotate} rotates what has no scale per token"
            wrong[f"{where}.rotate"] = what
        if wrong:
            raise ConfigError(
                ", and ".join(wrong.values()),
                got=f"keys: {self.keys}, values: {self.values}",
                allowed="int8 or int4 for all that is rotated, and for one that has a group",
                fix=f"Remove {' and '.join(wrong)} (group: head, rotate: none over a base): "
                "channel groups and exact numbers gain nothing by it",
            )
        return self

    def _where(self) -> str:
        return "quantize"


class Losers(Codecs):
    """Precision of what a scorer rejects, with `evict.losers: demote`."""

    keys: PackedName = "kivi2"
    values: PackedName = "kivi2"

    def _where(self) -> str:
        return "quantize.losers"


class Quantize(Codecs):
    """Precision in which keys and values are kept, and of what is demoted."""

    residual_tokens: Annotated[
        int | None,
        Field(ge=0, le=MAX_INT, description=f"an integer from 0 to {MAX_INT}"),
    ] = None
    exact_sinks: Flag = False
    losers: Annotated[
        Losers | None, Field(description="a mapping with keys, values, group, rotate, or null")
    ] = None

    @property
    def packs_on_write(self) -> bool:
        """Whether nothing keeps a token from being packed as it is written.

        Channel groups have to fill first; a residual and exact sinks need an exact cache.
        """
        waits = self.has_channel_groups or self.residual > 0 or self.exact_sinks
        return not self.is_fp8 and not waits

    @property
    def residual(self) -> int:
        """Newest tokens that stay exact; 128 for keys per channel unless the policy says so."""
        if self.residual_tokens is not None:
            return self.residual_tokens
        return 128 if self.has_channel_groups else 0

    @model_validator(mode="after")
    def _check(self) -> "Quantize":
        both = f"keys: {self.keys}, values: {self.values}"
        if (self.keys == "fp8") != (self.values == "fp8"):
            raise ConfigError(
                "quantize mixes fp8 with a packed codec", got=both,
                allowed="fp8 for both, or int8, int4, kivi4, kivi2, none for each",
                fix="fp8 is the dtype of vLLM's whole cache: use int8 for the other side",
            )  # fmt: skip
        given = {
            name: {None: "null", False: "false"}.get(field.default, field.default)
            for name, field in sorted(type(self).model_fields.items())
            if name not in ("keys", "values", "losers") and getattr(self, name) != field.default
        }
        if self.is_fp8 and given:
            defaults = ", ".join(f"{name}: {default}" for name, default in given.items())
            raise ConfigError(
                "quantize has options that do not go with fp8",
                got=", ".join(given),
                allowed="keys, values",
                fix=f"Remove them, or set {defaults}: fp8 is the engine's own cache, without "
                "groups or a residual",
            )
        return self


class Heads(Part):
    """Which KV heads keep every token (retrieval heads); the others stream.

    A streaming head keeps the policy's `sink_tokens` and `recent_tokens` alone. `duo`, `razor` and
    a path rank the heads by the scores in a pattern file, `random` by a seeded draw; `inline` has
    the result, one string of 0 and 1 (retrieval) per layer, and is what an engine's workers get.
    """

    plan: Annotated[
        str,
        Field(
            pattern=r"^(?:all|duo|razor|random|inline|.+\.tsv)$",
            max_length=4096,
            description="all, duo, razor, random, inline, or a pattern file's path.tsv",
        ),
    ] = "all"
    file: Annotated[
        str | None,
        Field(
            pattern=r".\.tsv$",
            max_length=4096,
            description="a pattern file's path, which ends in .tsv",
        ),
    ] = None
    retrieval_ratio: Annotated[
        float | None, Field(ge=0, lt=1, description="a number from 0 to below 1")
    ] = None
    threshold: Annotated[float | None, Field(description="a number")] = None
    seed: Tokens = 0
    compensation: Flag = False
    labels: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[01]+$", max_length=4096)], ...] | None,
        Field(
            strict=False,
            min_length=1,
            max_length=4096,
            description="a list of one string of 0 and 1 per layer, like ['0110', '0000']",
        ),
    ] = None

    @property
    def splits(self) -> bool:
        """Whether some heads of a layer stream beside others that keep every token."""
        return self.plan != "all"

    @property
    def pattern_file(self) -> str | None:
        """The path of the pattern file that the plan reads; None if it reads none, or has none."""
        return self.plan if self.plan.endswith(".tsv") else self.file

    @property
    def reads_file(self) -> bool:
        """Whether the plan ranks heads by a pattern file."""
        return self.plan not in ("all", "random", "inline")

    @model_validator(mode="after")
    def _check(self) -> "Heads":
        self._check_options()
        if self.plan == "inline":
            self._check_labels(self.labels or ())
        elif self.plan != "all" and (self.retrieval_ratio is None) == (self.threshold is None):
            given = "neither" if self.threshold is None else "both"
            sizes = "retrieval_ratio" if self.plan == "random" else "retrieval_ratio, threshold"
            raise ConfigError(
                "heads needs a number of retrieval heads",
                got=given,
                allowed=f"exactly one of {sizes}",
                fix="Set heads.retrieval_ratio, the share of KV heads that keep every token",
            )
        return self

    def _check_options(self) -> None:
        own = {
            "all": set(),
            "random": {"retrieval_ratio", "seed", "compensation"},
            "inline": {"labels", "compensation"},
            "duo": {"file", "retrieval_ratio", "threshold", "compensation"},
        }
        own["razor"] = own["duo"]
        allowed = own.get(self.plan, own["duo"] - {"file"})
        given = {
            name
            for name, field in type(self).model_fields.items()
            if name != "plan" and getattr(self, name) != field.default
        }
        if given - allowed:
            raise ConfigError(
                f"heads has options that do not go with plan: {self.plan}",
                got=", ".join(sorted(given - allowed)),
                allowed=", ".join(sorted(allowed)) or "none",
                fix="Set heads.retrieval_ratio in its place"
                if given - allowed == {"threshold"} and "retrieval_ratio" in allowed
                else "Remove them",
            )

    def _check_labels(self, labels: tuple[str, ...]) -> None:
        if not labels or len({len(row) for row in labels}) > 1:
            raise ConfigError(
                "heads.labels is not one string of equal length per layer",
                got=shown(list(labels) or None),
                allowed="a list like ['0110', '0000']",
            )
        if not any("0" in row for row in labels):
            raise ConfigError(
                "heads.labels leaves no head to stream: the plan does nothing",
                got="1 everywhere",
                allowed="at least one 0",
                fix="Use heads.plan all",
            )


class Layers(Part):
    """Which layers the policy leaves alone: they keep every token, as stock vLLM does."""

    skip: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MAX_INT)], ...],
        Field(strict=False, description="a list of layer indices from 0 on, like [0, 1]"),
    ] = ()

    @model_validator(mode="after")
    def _check(self) -> "Layers":
        if len(set(self.skip)) < len(self.skip):
            raise ConfigError(
                "layers.skip names a layer twice",
                got=shown(list(self.skip)),
                allowed="each index once",
            )
        return self


# Where each part of a policy stands: by the last component of its field's name, all unlike.
PARTS: dict[str, type[Part]] = {
    "evict": Evict,
    "scorer": ScorerSpec,
    "budget": Budget,
    "when": When,
    "quantize": Quantize,
    "losers": Losers,
    "heads": Heads,
    "layers": Layers,
}
