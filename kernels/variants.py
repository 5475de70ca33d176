"""A kernel as a launcher would start it, for the check that it compiles on every architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Compute capabilities that every variant must compile for, without spilling registers.
ARCHITECTURES = (80, 89, 90, 100)


@dataclass(frozen=True)
class Variant:
    """One entry of a launcher's table, with everything that a compiler needs.

    Attributes:
        name: Unique and readable: operation, architecture, formats, head size.
        kernel: The `triton.jit` function.
        signature: Triton's type of each run-time argument, like "*fp16" or "i32".
        constants: Values of the `tl.constexpr` arguments.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelining.
        architecture: Compute capability, one of `ARCHITECTURES`.
        max_registers: The launch's `maxnreg`, or None for ptxas's own choice.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    architecture: int
    max_registers: int | None = None
