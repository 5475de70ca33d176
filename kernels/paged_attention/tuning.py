"""Block sizes per architecture, and how the work is split: untuned, no GPU measured these yet.

Sizes are bounded by registers and by shared memory (99 KiB on the smallest, 89): every entry was
compiled for its architecture and spills none.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from vllm_kvpress.kernels.cells import Cells

__all__ = ["Config", "block_m", "config", "constants", "device_facts", "merge_step", "num_splits"]

# A split takes at least so many tokens: below, its partial result is as large as what it reads.
SHORTEST = 256
# A split takes at most so many if memory allows: a long request must not outlast all others.
LONGEST = 4096
# Programs wanted per processor: about four run at once, and two rounds even out the last one.
PROGRAMS_PER_PROCESSOR = 8
# Bytes of partial results, float32: the splits of a batch with many queries stay few.
WORKSPACE_BYTES = 64 * 2**20
# Rows that a program of `rotate_rows` takes, and channels a step.
ROTATE_ROWS = 16
ROTATE_CHANNELS = 32


class Config(NamedTuple):
    """What the attention kernel is compiled with.

    Attributes:
        block_m: Rows of a program.
        block_n: Tokens of a tile.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelining.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (decode or prefill, padded head size) -> (tokens of a tile, warps, stages) with a packed part,
# then without one. Decode has 16 rows, as long as a KV head has at most 16 query heads.
UNTUNED = {
    ("decode", 64): ((32, 4, 3), (64, 4, 3)),
    ("decode", 128): ((32, 4, 3), (32, 4, 3)),
    ("decode", 256): ((16, 4, 3), (32, 4, 3)),
    ("prefill", 64): ((32, 4, 2), (64, 4, 3)),
    ("prefill", 128): ((32, 8, 2), (32, 8, 2)),
    ("prefill", 256): ((32, 8, 2), (32, 8, 2)),
}
# Compute capability -> its table; newer ones than the last take the last's.
TABLES = dict.fromkeys((80, 89, 90, 100), UNTUNED)


def block_m(group: int, max_query_len: int, head_size: int) -> int:
    """Returns the rows of a program: 16 if all fit, else 64 or 32, but a token's heads at least."""
    if group * max_query_len <= 16:
        return 16
    heads = max(16, 1 << (group - 1).bit_length())
    return heads if max_query_len == 1 else max(heads, 64 if head_size <= 128 else 32)


def config(
    architecture: int, head_size: int, is_packed: bool, group: int, max_query_len: int
) -> Config:
    """Returns the table's entry.

    Args:
        architecture: Compute capability, like 90; below the first, its table.
        head_size: Channels of a head.
        is_packed: Whether there is a packed part.
        group: Query heads of a KV head.
        max_query_len: Queries of a request.
    """
    rows = block_m(group, max_query_len, head_size)
    padded = max(64, 1 << (head_size - 1).bit_length())
    known = max((each for each in TABLES if each <= architecture), default=min(TABLES))
    entry = TABLES[known]["decode" if rows == 16 else "prefill", padded]
    return Config(rows, *entry[0 if is_packed else 1])


def constants(
    chosen: Config,
    cells: Cells | None,
    head_size: int,
    block_size: int | None,
    group: int,
    max_query_len: int,
) -> dict[str, Any]:
    """Returns the kernel's compile-time arguments."""
    return {
        "CELLS": cells,
        "KEYS": None if cells is None else cells.keys,
        "VALUES": None if cells is None else cells.values,
        "SIZE": head_size,
        "BLOCK": block_size,
        "GROUP": group,
        "SINGLE": max_query_len == 1,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "SHORTEST": SHORTEST,
    }


def merge_step(head_size: int) -> int:
    """Returns how many splits' results `merge_splits` holds at a time: 4096 numbers."""
    return 4096 // max(64, 1 << (head_size - 1).bit_length())


def num_splits(programs: int, numbers: int, max_tokens: int, processors: int, least: int) -> int:
    """Returns into how many pieces the tokens of a request are split.

    There is no threshold of the batch size: as the batch grows the pieces become fewer, but never
    so long that one long request keeps the device waiting, as far as the workspace allows.

    Args:
        programs: Query blocks times KV heads: the programs of one split.
        numbers: Numbers of one split's partial result.
        max_tokens: Tokens of the longest request.
        processors: The device's multiprocessors.
        least: 2 if there are two parts, which never share a piece, else 1.
    """
    filling = -(-processors * PROGRAMS_PER_PROCESSOR // max(programs, 1))
    wanted = max(filling, -(-max_tokens // LONGEST))
    possible = min(-(-max_tokens // SHORTEST), WORKSPACE_BYTES // (4 * max(numbers, 1)))
    return max(min(wanted, possible), least)


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """Returns a device's compute capability, like 90, and its multiprocessors."""
    if device.type == "cpu":  # the interpreter
        return 90, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
