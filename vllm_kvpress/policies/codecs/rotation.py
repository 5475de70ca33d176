"""Hadamard rotation of heads: spreads what sticks out of a few channels over all of them.

H is orthonormal and symmetric, so H @ H = I and rotating twice gives the numbers back. Attention
over rotated keys and values is that over the plain ones: (q @ H) @ (K @ H).T = q @ K.T, and
(A @ (V @ H)) @ H = A @ V. Codecs know nothing of it: rotate before `encode`, and the queries.

Source: QuaRot (arXiv 2404.00456), section 4. Deviation: keys and values after RoPE, one head at a
time; where head_size is no power of two, blocks of the largest one that divides it.
"""

import math

import torch

__all__ = ["block_size", "hadamard", "rotate"]


def block_size(head_size: int) -> int:
    """Returns the channels that one rotation mixes: the largest power of two in `head_size`."""
    return head_size & -head_size


def hadamard(head_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns H, float32 [head_size, head_size]: Sylvester's matrices along the diagonal."""
    block = torch.ones(1, 1, device=device)
    while len(block) < block_size(head_size):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    num_blocks = head_size // len(block)
    return torch.kron(torch.eye(num_blocks, device=device), block) / math.sqrt(len(block))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Returns x @ H, float32 [..., head_size]; of a rotated x, the plain one."""
    return x.to(torch.float32) @ hadamard(x.shape[-1], x.device)
