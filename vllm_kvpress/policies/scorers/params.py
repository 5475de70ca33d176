"""How the built-in scorers declare their parameters: strict, frozen, nothing unknown."""

from pydantic import ConfigDict

__all__ = ["STRICT"]

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
