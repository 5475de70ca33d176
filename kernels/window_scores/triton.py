"""The kernels of window scores and their launcher; `README.md` has the math and the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from vllm_kvpress.kernels.variants import ARCHITECTURES, Variant

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["launch", "variants"]

LOG2_E = 1.4426950408889634
# What is checked to compile; for fp8 keys each entry of the table once.
HEAD_SIZES = (64, 80, 96, 128, 256)
FP8_HEAD_SIZES = (64, 128, 256)
# Tokens of a block: the scorer's, which has the keys in a row, and vLLM's.
BLOCK_SIZES = (1, 16)
# Tiles and queries that a merging program reads at a time, and tokens of a program that pools.
MERGE_ROWS, MERGE_QUERIES, POOL_TOKENS = 64, 32, 256


class Blocks(NamedTuple):
    """Sizes of a program's tiles.

    Attributes:
        tokens: Keys of a program.
        queries: Queries of one product, of one query head.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelining.
    """

    tokens: int
    queries: int
    num_warps: int
    num_stages: int


# By bytes of a query's element and padded head size; small enough for the smallest shared memory.
# untuned: no GPU measured these yet.
SMALL_TABLE = {
    (2, 64): Blocks(128, 32, 8, 2),
    (2, 128): Blocks(128, 32, 8, 2),
    (2, 256): Blocks(32, 32, 4, 2),
    (4, 64): Blocks(64, 16, 4, 1),
    (4, 128): Blocks(32, 16, 4, 1),
    (4, 256): Blocks(16, 16, 4, 1),
}
# Tensor cores of 10.x take 128 rows at once; half of them spills. untuned as well.
WIDE_TABLE = {**SMALL_TABLE, (2, 256): Blocks(128, 32, 8, 2)}
WIDE = (100, 103)


def blocks_for(architecture: int, element_bytes: int, head_size: int) -> Blocks:
    """Returns the table's entry; architectures that it does not know get the small one."""
    table = WIDE_TABLE if architecture in WIDE else SMALL_TABLE
    return table[element_bytes, padded(head_size)]


def padded(head_size: int) -> int:
    """Returns the channels of a tile."""
    return max(64, triton.next_power_of_2(head_size))


def architecture_of(tensor: Tensor) -> int:
    """Returns the compute capability of a tensor's GPU, like 90; 0 in Triton's interpreter."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@triton.jit
def load_keys(
    keys, table, strides, first, length, head,
    HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Returns keys of tokens from `first` on, [TOKENS, PADDED]; zeros from `length` on."""
    token = first + tl.arange(0, TOKENS)
    channel = tl.arange(0, PADDED)
    block = tl.load(table + token // BLOCK, mask=token < length, other=0).to(tl.int64)
    place = block * strides[0] + (token % BLOCK) * strides[1] + head * strides[2]
    inside = (token < length)[:, None] & (channel < HEAD_SIZE)[None, :]
    return tl.load(keys + place[:, None] + channel[None, :], mask=inside, other=0.0)


@triton.jit
def logits_of(
    query, k, strides, head, start, window, scale,
    HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Returns base-2 logits of queries from `start` on of one head, float32 [TOKENS, QUERIES]."""
    row = start + tl.arange(0, QUERIES)
    channel = tl.arange(0, PADDED)
    place = row.to(tl.int64) * strides[1] + head * strides[2]
    inside = (row < window)[None, :] & (channel < HEAD_SIZE)[:, None]
    q = tl.load(query + place[None, :] + channel[:, None], mask=inside, other=0.0)
    return tl.dot(k.to(q.dtype), q, input_precision="ieee") * scale


@triton.jit(do_not_specialize=["window", "num_q_heads"])
def sum_tiles(
    partials, query, keys, tables, num_tokens, scale, window, num_q_heads,
    query_strides, key_strides, table_stride,
    HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Writes the softmax's denominator over one tile of keys: maximum and sum of each query.

    partials: float32 [num_reqs, num_tiles, num_q_heads, 2, window].
    """
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    length = tl.load(num_tokens + request)
    first = (tile * TOKENS).to(tl.int32)
    if (first >= length) | (length <= window):
        return
    table = tables + request * table_stride
    k = load_keys(
        keys, table, key_strides, first, length, kv_head, HEAD_SIZE, PADDED, BLOCK, TOKENS
    )
    token = first + tl.arange(0, TOKENS)
    group = num_q_heads // tl.num_programs(1)
    out = partials + (request * tl.num_programs(0) + tile) * num_q_heads * 2 * window
    for member in range(group):
        head = kv_head * group + member
        for start in range(0, window, QUERIES):
            logits = logits_of(
                query + request * query_strides[0], k, query_strides, head, start, window, scale,
                HEAD_SIZE, PADDED, QUERIES,
            )  # fmt: skip
            row = start + tl.arange(0, QUERIES)
            last = tl.minimum(length - window + row, length - 1)
            logits = tl.where(token[:, None] <= last[None, :], logits, float("-inf"))
            top = tl.max(logits, axis=0)
            base = tl.where(top > float("-inf"), top, 0.0)
            total = tl.sum(tl.exp2(logits - base[None, :]), axis=0)
            place = out + head * 2 * window + row
            tl.store(place, top, mask=row < window)
            tl.store(place + window, total, mask=row < window)


@triton.jit(do_not_specialize=["window", "num_tiles", "tokens"])
def merge_tiles(
    wholes, partials, num_tokens, window, num_tiles, tokens,
    ROWS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Writes maximum and 1 / sum of each query over all tiles of `tokens` keys.

    wholes: float32 [num_reqs, num_q_heads, 2, window].
    """
    start = tl.program_id(0) * QUERIES
    head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    num_q_heads = tl.num_programs(1)
    length = tl.load(num_tokens + request)
    if length <= window:
        return
    row = start + tl.arange(0, QUERIES)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    used = tl.cdiv(length, tokens)
    for first in range(0, used, ROWS):
        tile = first + tl.arange(0, ROWS)
        place = ((request * num_tiles + tile) * num_q_heads + head) * 2 * window
        place = partials + place[:, None] + row[None, :]
        inside = (tile < used)[:, None] & (row < window)[None, :]
        part_top = tl.load(place, mask=inside, other=float("-inf"))
        part_total = tl.load(place + window, mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        part = tl.sum(part_total * tl.exp2(part_top - base[None, :]), axis=0)
        total = total * tl.exp2(top - base) + part
        top = new_top
    out = wholes + (request * num_q_heads + head) * 2 * window + row
    tl.store(out, top, mask=row < window)
    tl.store(out + window, 1.0 / tl.where(row < window, total, 1.0), mask=row < window)


@triton.jit(do_not_specialize=["window", "num_q_heads"])
def mean_attention(
    means, wholes, query, keys, tables, num_tokens, scale, window, num_q_heads, max_tokens,
    query_strides, key_strides, table_stride,
    HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Writes the mean weight of each token before the window, one query head at a time.

    means: float32 [num_reqs, num_q_heads, max_tokens].
    """
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    rest = tl.load(num_tokens + request) - window
    first = (tile * TOKENS).to(tl.int32)
    if first >= rest:
        return
    table = tables + request * table_stride
    k = load_keys(keys, table, key_strides, first, rest, kv_head, HEAD_SIZE, PADDED, BLOCK, TOKENS)
    token = first + tl.arange(0, TOKENS)
    group = num_q_heads // tl.num_programs(1)
    for member in range(group):
        head = kv_head * group + member
        line = request * num_q_heads + head
        total = tl.zeros([TOKENS], tl.float32)
        for start in range(0, window, QUERIES):
            logits = logits_of(
                query + request * query_strides[0], k, query_strides, head, start, window, scale,
                HEAD_SIZE, PADDED, QUERIES,
            )  # fmt: skip
            row = start + tl.arange(0, QUERIES)
            place = wholes + line * 2 * window + row
            top = tl.load(place, mask=row < window, other=0.0)
            share = tl.load(place + window, mask=row < window, other=0.0)
            total += tl.sum(tl.exp2(logits - top[None, :]) * share[None, :], axis=1)
        tl.store(means + line * max_tokens + token, total / window, mask=token < rest)


@triton.jit(do_not_specialize=["window", "group", "pool_size"])
def pool_and_reduce(
    scores, means, num_tokens, window, group, max_tokens, pool_size,
    AVG: tl.constexpr, MEAN: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes every score, float32 [num_reqs, num_kv_heads, max_tokens]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    kv_head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    length = tl.load(num_tokens + request)
    rest = length - window
    NOTHING: tl.constexpr = 0.0 if AVG else float("-inf")
    result = tl.full([TOKENS], 0.0 if MEAN else float("-inf"), tl.float32)
    line = request * tl.num_programs(1) + kv_head
    for member in range(group):
        row = means + (line * group + member) * max_tokens
        pooled = tl.full([TOKENS], NOTHING, tl.float32)
        for tap in range(pool_size):
            near = token + tap - pool_size // 2
            inside = (near >= 0) & (near < rest) & (token < rest)
            mean = tl.load(row + near, mask=inside, other=NOTHING)
            if AVG:
                pooled += mean
            else:
                pooled = tl.maximum(pooled, mean, propagate_nan=tl.PropagateNan.ALL)
        if AVG:
            pooled = pooled / pool_size
        if MEAN:
            result += pooled
        else:
            result = tl.maximum(result, pooled, propagate_nan=tl.PropagateNan.ALL)
    if MEAN:
        result = result / group
    edge = tl.where(token < length, float("inf"), float("-inf"))
    score = tl.where(token < rest, result, edge)
    tl.store(scores + line * max_tokens + token, score, mask=token < max_tokens)


def launch(
    query: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    num_tokens: Tensor,
    scale: float,
    *,
    pool: str,
    pool_size: int,
    reduce: str,
    max_tokens: int,
) -> Tensor:
    """Returns the scores; arguments as in the public operation, which has checked them."""
    num_reqs, window, num_q_heads, head_size = query.shape
    block_size, num_kv_heads = keys.shape[1:3]
    new = {"dtype": torch.float32, "device": query.device}
    scores = torch.empty(num_reqs, num_kv_heads, max_tokens, **new)
    if not scores.numel():
        return scores
    blocks = blocks_for(architecture_of(query), query.element_size(), head_size)
    num_tiles = triton.cdiv(max_tokens, blocks.tokens)
    partials = torch.empty(num_reqs, num_tiles, num_q_heads, 2, window, **new)
    wholes = torch.empty(num_reqs, num_q_heads, 2, window, **new)
    means = torch.empty(num_reqs, num_q_heads, max_tokens, **new)
    inputs = (query, keys, block_tables, num_tokens, scale * LOG2_E, window, num_q_heads)
    strides = (query.stride()[:3], keys.stride()[:3], block_tables.stride(0))
    tiles = {
        "HEAD_SIZE": head_size,
        "PADDED": padded(head_size),
        "BLOCK": block_size,
        "TOKENS": blocks.tokens,
        "QUERIES": blocks.queries,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    grid = (num_tiles, num_kv_heads, num_reqs)
    sum_tiles[grid](partials, *inputs, *strides, **tiles)
    merge_tiles[(triton.cdiv(window, MERGE_QUERIES), num_q_heads, num_reqs)](
        wholes, partials, num_tokens, window, num_tiles, blocks.tokens,
        ROWS=MERGE_ROWS, QUERIES=MERGE_QUERIES,
    )  # fmt: skip
    mean_attention[grid](means, wholes, *inputs, max_tokens, *strides, **tiles)
    pool_and_reduce[(triton.cdiv(max_tokens, POOL_TOKENS), num_kv_heads, num_reqs)](
        scores, means, num_tokens, window, num_q_heads // num_kv_heads, max_tokens, pool_size,
        AVG=pool == "avg", MEAN=reduce == "mean", TOKENS=POOL_TOKENS,
    )  # fmt: skip
    return scores


POINTERS = {2: "bf16", 4: "fp32"}
FLOATS = ("partials", "wholes", "means", "scores")


def variants() -> Iterator[Variant]:
    """Yields every kernel as `launch` starts it, for the check that all of them compile."""
    for arch in ARCHITECTURES:
        for size, dtype in POINTERS.items():
            for head_size in HEAD_SIZES:
                for block in BLOCK_SIZES:
                    yield from _tile_variants(arch, head_size, size, dtype, block)
        yield from _small_variants(arch)
        # On 8.0 there is no conversion from e4m3, nor does vLLM offer an fp8 cache.
        for head_size in FP8_HEAD_SIZES if arch > 80 else ():
            yield from _tile_variants(arch, head_size, 2, "fp8e4nv", BLOCK_SIZES[-1])


def _tile_variants(
    arch: int, head_size: int, size: int, key_dtype: str, block: int
) -> Iterator[Variant]:
    blocks = blocks_for(arch, size, head_size)
    constants = {
        "HEAD_SIZE": head_size,
        "PADDED": padded(head_size),
        "BLOCK": block,
        "TOKENS": blocks.tokens,
        "QUERIES": blocks.queries,
    }
    types = {"query": f"*{POINTERS[size]}", "keys": f"*{key_dtype}"}
    for kernel in (sum_tiles, mean_attention):
        name = f"{kernel.__name__} sm_{arch} keys {key_dtype} head {head_size} blocks of {block}"
        yield _variant(name, kernel, types, constants, blocks.num_warps, blocks.num_stages, arch)


def _small_variants(arch: int) -> Iterator[Variant]:
    constants: dict[str, Any] = {"ROWS": MERGE_ROWS, "QUERIES": MERGE_QUERIES}
    yield _variant(f"merge_tiles sm_{arch}", merge_tiles, {}, constants, 4, 3, arch)
    for pool in ("avg", "max"):
        for reduce in ("mean", "max"):
            name = f"pool_and_reduce sm_{arch} {pool} {reduce}"
            constants = {"AVG": pool == "avg", "MEAN": reduce == "mean", "TOKENS": POOL_TOKENS}
            yield _variant(name, pool_and_reduce, {}, constants, 4, 3, arch)


def _variant(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    arch: int,
) -> Variant:
    known = {"tables": "*i32", "num_tokens": "*i32", "scale": "fp32", **types}
    known |= {"query_strides": ("i32",) * 3, "key_strides": ("i32",) * 3}
    known |= dict.fromkeys(FLOATS, "*fp32")
    signature = {
        argument: "constexpr" if argument in constants else known.get(argument, "i32")
        for argument in kernel.arg_names
    }
    return Variant(
        f"window_scores {name}", kernel, signature, constants, num_warps, num_stages, arch
    )
