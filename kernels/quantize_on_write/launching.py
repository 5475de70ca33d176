"""What a launcher of kernels that encode chooses, and the launches that are checked to compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from vllm_kvpress.kernels.cells import Side
from vllm_kvpress.kernels.variants import ARCHITECTURES, Variant

__all__ = ["Case", "architecture_of", "cases", "constants_of", "variant"]

DOT_TOKENS = 16
HEAD_SIZES = (64, 80, 128, 256)
# Name -> bits and group of keys, then of values; group 0 stands for the whole head.
PER_TOKEN = {"int8": (8, 0), "int4": (4, 0), "int4-g32": (4, 32), "exact": (16, 0)}
PER_CHANNEL = {"kivi4": (4, 32), "kivi2": (2, 32)}


class Case(NamedTuple):
    """Formats of a launch.

    Attributes:
        name: Readable, without the architecture.
        dtype: The model's, as Triton writes it.
        head_size: Channels of a head.
        tokens: Tokens in a cell.
        keys: How keys lie in a cell; where they do is an argument of the launch.
        values: How values do.
        rotated: Whether both sides are rotated.
    """

    name: str
    dtype: str
    head_size: int
    tokens: int
    keys: Side
    values: Side
    rotated: bool


def architecture_of(tensor: torch.Tensor) -> int:
    """Returns the entry of a launcher's table for the tensor's GPU; the first without a GPU.

    Raises:
        ValueError: the GPU is older than every entry.
    """
    if not tensor.is_cuda:  # Triton's interpreter
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(tensor.device)
    known = [chip for chip in ARCHITECTURES if chip <= 10 * major + minor]
    if not known:
        raise ValueError(
            f"the GPU is too old for packed cells; got compute capability {major}.{minor}; "
            f"allowed: {ARCHITECTURES[0] / 10} or newer"
        )
    return max(known)


def constants_of(
    head_size: int,
    tokens: int,
    keys: Side,
    values: Side,
    rotate_keys: bool,
    rotate_values: bool,
    tile: int,
) -> dict[str, Any]:
    """Returns the constants of a kernel that encodes keys and values.

    Args:
        head_size: Channels of a head.
        tokens: Tokens in a cell.
        keys: How keys lie in a cell.
        values: How values do.
        rotate_keys: Whether keys are rotated.
        rotate_values: Whether values are.
        tile: Numbers of one side that a program holds at once, about.
    """
    constants: dict[str, Any] = {"CELL_TOKENS": tokens, "HEAD_SIZE": head_size}
    sides = (("KEY", keys, rotate_keys), ("VALUE", values, rotate_values))
    for prefix, side, rotated in sides:
        block_tokens, width = _block(side, head_size, rotated, tile)
        constants |= {
            f"{prefix}_BITS": side.bits,
            f"{prefix}_GROUP": side.group,
            f"{prefix}_PER_CHANNEL": side.per_channel,
            f"{prefix}_ROTATED": rotated,
            f"{prefix}_TOKENS": block_tokens,
            f"{prefix}_WIDTH": width,
        }
    return constants


def _block(side: Side, head_size: int, rotated: bool, tile: int) -> tuple[int, int]:
    """Returns the tokens of one side's program, and the bytes (padded) of each encoded at once."""
    planes = 8 // side.bits if side.bits < 16 else 1
    width = _padded(head_size // planes)
    if side.per_channel:
        return side.group, min(width, max(1, tile // (side.group * planes)))
    group = side.group if side.bits < 16 else head_size
    numbers = _padded(-(-head_size // group)) * _padded(group)
    return max(DOT_TOKENS if rotated else 1, tile // numbers), width


def _padded(length: int) -> int:
    """Returns the least power of two that is not below `length`."""
    return 1 << (length - 1).bit_length()


def cases(per_channel: bool) -> Iterator[Case]:
    """Yields the formats in use in bfloat16, and one with codes and one without in float16.

    Args:
        per_channel: Whether to yield formats with groups along the tokens, too.
    """
    names = {**PER_TOKEN, **(PER_CHANNEL if per_channel else {})}
    for head_size in HEAD_SIZES:
        for name in names:
            yield _case(name, "bf16", head_size, False)
            if head_size == 128 and name in ("int4", "exact"):
                yield _case(name, "fp16", head_size, False)
        yield _case("int4", "bf16", head_size, True)
    if per_channel:
        yield _case("kivi2", "bf16", 256, True)


def _case(name: str, dtype: str, head_size: int, rotated: bool) -> Case:
    along_tokens = name in PER_CHANNEL
    bits, group = (PER_CHANNEL if along_tokens else PER_TOKEN)[name]
    if bits < 16:
        group = group or head_size
    return Case(
        name=f"{name}{'-rotated' if rotated else ''}-{dtype}-d{head_size}",
        dtype=dtype,
        head_size=head_size,
        tokens=32 if along_tokens else 16,
        keys=Side(bits, group, along_tokens, 0, 0, 0),
        values=Side(bits, group, False, 0, 0, 0),
        rotated=rotated,
    )


def variant(
    operation: str,
    kernel: Any,
    pointers: dict[str, str],
    case: Case,
    constants: dict[str, Any],
    num_warps: int,
    architecture: int,
) -> Variant:
    """Returns a case as its launch; arguments that are no pointers are 32-bit integers.

    Args:
        operation: Its name.
        kernel: The `triton.jit` function, whose arguments that are not in `pointers` nor upper-case
            are integers.
        pointers: Types of the pointers besides keys, values and rotation.
        case: The formats.
        constants: Those of `constants_of`.
        num_warps: Warps of a program.
        architecture: Compute capability.
    """
    kinds = {**pointers, "keys": f"*{case.dtype}", "values": f"*{case.dtype}"}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
    if case.rotated:
        signature["rotation"] = "*fp32"
    else:
        del signature["rotation"]
        constants = {**constants, "rotation": None}
    return Variant(
        name=f"{operation}-sm{architecture}-{case.name}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        num_warps=num_warps,
        num_stages=2,
        architecture=architecture,
    )
