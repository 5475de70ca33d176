"""Every error that vllm-kvpress raises on purpose.

    KVPressError (ValueError)
    ├── ConfigError            a policy, or a scorer's parameter, is not what the schema allows
    ├── ConflictError          a vLLM option and the policy cannot both be honoured
    ├── UnsupportedModelError  the model has no cache that this policy could compress
    ├── UnsupportedVLLMError   the installed vLLM lacks something that we build on
    ├── CapacityError          the cache is too small for what the policy must hold
    └── ScoreError             a scorer returned something that cannot be ranked

One error is one line: what is wrong, what was got, what is allowed, and the next step.
"""

__all__ = [
    "CapacityError",
    "ConfigError",
    "ConflictError",
    "KVPressError",
    "ScoreError",
    "UnsupportedModelError",
    "UnsupportedVLLMError",
    "shown",
]

_MAX_SHOWN_CHARS = 80


def shown(value: object) -> str:
    """Returns `repr(value)` on one line, cut to 80 characters, for use as `got`."""
    try:
        text = repr(value)
    except Exception as error:  # a repr of the user's own class, or an integer too long to print
        text = f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
    if len(text) > _MAX_SHOWN_CHARS:
        text = text[: _MAX_SHOWN_CHARS - 3] + "..."
    return text


class KVPressError(ValueError):
    """The base of all our errors; survives pickling between vLLM's processes.

    Args:
        what: what is wrong, led by the name of the field, option or object.
        got: what was found, already formatted (see `shown`).
        allowed: what would have been accepted.
        fix: the next step, as an imperative sentence without its full stop.
    """

    def __init__(
        self,
        what: str,
        got: str | None = None,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        # The four arguments are `args`, so that pickle rebuilds the error from them.
        super().__init__(what, got, allowed, fix)
        self.what = what
        self.got = got
        self.allowed = allowed
        self.fix = fix

    def __str__(self) -> str:
        text = self.what
        if self.got is not None:
            text += f"; got {self.got}"
        if self.allowed is not None:
            text += f"; allowed: {self.allowed}"
        if self.fix is not None:
            text += f". {self.fix}"
        return text + ("" if text.endswith(("?", ".", "!")) else ".")


class ConfigError(KVPressError):
    """A policy, or a scorer's parameter, is not what the schema allows."""


class ConflictError(KVPressError):
    """A vLLM option and the policy cannot both be honoured."""


class UnsupportedModelError(KVPressError):
    """The model has no cache that this policy could compress."""


class UnsupportedVLLMError(KVPressError):
    """The installed vLLM lacks something that we build on."""


class CapacityError(KVPressError):
    """The cache is too small for what the policy must hold."""


class ScoreError(KVPressError):
    """A scorer returned something that cannot be ranked."""
