"""Kernels run in Triton's interpreter here, mended where it differs from the hardware."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

cast, dot = interpreter_builder.cast_impl, interpreter_builder.create_dot


def cast_with_rounding(source, target):
    """The interpreter cuts float32 to bfloat16; the hardware rounds."""
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
    return cast(source, target)


def dot_of_numbers(left, right, *rest):
    """The interpreter multiplies the bits of bfloat16 as if they were integers."""
    if left.dtype.scalar == tl.bfloat16:
        left, right = cast(left, tl.float32), cast(right, tl.float32)
    return dot(left, right, *rest)


interpreter_builder.cast_impl = cast_with_rounding
interpreter_builder.create_dot = dot_of_numbers
