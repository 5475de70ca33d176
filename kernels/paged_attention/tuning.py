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

__all__ = ["Config", "config", "constants", "device_facts", "merge_step", "num_splits"]

# A split takes at least so many tokens: below, its partial result is as large as what it reads.
SHORTEST = 256
# A split takes at most so many if memory allows: a long request must not outlast all others.
LONGEST = 4096
# Programs wanted per processor: about four run at once, and two rounds even out the last one.
PROGRAMS_PER_PROCESSOR = 8
# Bytes of partial results, float32: the splits of a batch with many queries stay few.
WORKSPACE_BYTES = 64 * 2**20
# Left alone, ptxas spills a few registers of `attend` to fit one more program on a processor.
MAX_REGISTERS = 255
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


# (decode or prefill, padded head size) -> (rows, tokens of a tile, warps, stages) with a packed
# part, then without one. A product takes 16 rows a warp, so more warps would do the same twice.
UNTUNED = {
    ("decode", 64): ((16, 32, 4, 3), (16, 64, 4, 3)),
    ("decode", 128): ((16, 32, 4, 3), (16, 32, 4, 3)),
    ("decode", 256): ((16, 16, 4, 3), (16, 32, 4, 3)),
    ("prefill", 64): ((128, 32, 8, 2), (128, 64, 8, 2)),
    ("prefill", 128): ((128, 32, 8, 2), (128, 32, 8, 2)),
    ("prefill", 256): ((64, 16, 4, 2), (64, 16, 4, 2)),
}
# mma.sync keeps products in registers that wgmma and tcgen05 need not: fewer rows, or they spill.
UNTUNED_MMA = UNTUNED | {
    ("prefill", 128): ((32, 32, 4, 2), (128, 32, 8, 2)),
    ("prefill", 256): ((32, 16, 4, 2), (64, 16, 8, 2)),
}
# Compute capability -> its table; newer ones than the last take the last's.
TABLES = {80: UNTUNED_MMA, 89: UNTUNED_MMA, 90: UNTUNED, 100: UNTUNED}


def config(
    architecture: int, head_size: int, is_packed: bool, group: int, max_query_len: int
) -> Config:
    """Returns the table's entry, with more rows where a token has more heads than that.

    Args:
        architecture: Compute capability, like 90; below the first, its table.
        head_size: Channels of a head.
        is_packed: Whether there is a packed part.
        group: Query heads of a KV head.
        max_query_len: Queries of a request.
    """
    padded = max(64, 1 << (head_size - 1).bit_length())
    known = max((each for each in TABLES if each <= architecture), default=min(TABLES))
    # Few queries of a few heads are decode, too; many heads of one query are not.
    phase = "decode" if group * max_query_len <= 16 else "prefill"
    rows, *others = TABLES[known][phase, padded][0 if is_packed else 1]
    return Config(max(rows, 1 << (group - 1).bit_length()), *others)


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
