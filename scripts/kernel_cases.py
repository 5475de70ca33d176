"""What `bench_kernels.py` runs: each kernel on inputs as an engine has them, bytes counted.

A case calls a kernel's launcher, and its reference with the same arguments, on the same tensors.
Pages and blocks of a request lie in random places, as in a pool that has been in use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm_kvpress.kernels.cells import Cells
from vllm_kvpress.kernels.compact import reference as compact_reference
from vllm_kvpress.kernels.paged_attention import ExactPart, PackedPart
from vllm_kvpress.kernels.paged_attention import reference as attention_reference
from vllm_kvpress.kernels.physical_tables import reference as tables_reference
from vllm_kvpress.kernels.quantize_on_write import reference as write_reference
from vllm_kvpress.kernels.window_scores import reference as scores_reference

from vllm_kvpress.config import load_policy
from vllm_kvpress.layout import CacheShape, PackedFormat
from vllm_kvpress.policies.codecs import hadamard, store_format

BLOCK = 16
# Exact tokens behind the packed ones: the block that is still open.
TAIL = 16
WINDOW, POOL = 32, 5
KEEP_RATIO = 0.25
# Copies that a case makes to compare results, and room for what kernels allocate.
SPARE = 256 * 2**20


class Shape(NamedTuple):
    """Attention of one layer."""

    num_q_heads: int
    num_kv_heads: int
    head_size: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def cache(self) -> CacheShape:
        """The exact cache of the layer."""
        return CacheShape(
            block_size=BLOCK,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
        )


class Case(NamedTuple):
    """A kernel on its inputs.

    Attributes:
        run: Starts it.
        num_bytes: Bytes of its inputs and outputs, each once.
        error: Returns the largest difference of the last run from the reference; of bytes, how
            many differ.
    """

    run: Callable[[], Any]
    num_bytes: int
    error: Callable[[], float]


class Plan(NamedTuple):
    """A case before its tensors exist.

    Attributes:
        memory: Bytes that it takes at most.
        make: Makes it on a device.
    """

    memory: int
    make: Callable[[torch.device], Case]


class Format(NamedTuple):
    """The packed cells of a policy."""

    layout: PackedFormat
    cells: Cells
    rotate_keys: bool
    rotate_values: bool

    @classmethod
    def of(cls, policy: str, shape: Shape) -> Format:
        """Returns the cells of a shipped policy in pages of the exact cache's size."""
        quantize = load_policy(policy).quantize
        bits = 8 * shape.torch_dtype.itemsize
        layout = store_format(quantize, shape.num_kv_heads, shape.head_size, bits)
        assert quantize is not None
        assert layout is not None
        rotated = quantize.rotate
        cells = Cells.of(layout.numbers(shape.cache.page_bytes))
        return cls(layout, cells, rotated != "none", rotated == "both")

    def pages(self, num_pages: int, shape: Shape, device: torch.device) -> torch.Tensor:
        """Returns pages full of encoded tokens, uint8 [num_pages, page_bytes]."""
        cells = self.cells
        some = min(cells.num_kv_heads, num_pages)
        template = torch.zeros(some, shape.cache.page_bytes, dtype=torch.uint8, device=device)
        tokens = some * cells.per_page // cells.num_kv_heads * cells.tokens
        keys, values = numbers(2, cells.num_kv_heads, tokens, shape.head_size, shape, device)
        table = torch.arange(some, dtype=torch.int32, device=device)
        compact_reference.write_cells(keys, values, template, table, 0, cells)
        return template.repeat(-(-num_pages // some), 1)[:num_pages]

    def rotations(self, size: int, device: torch.device) -> dict[str, Any]:
        """Returns the options of the kernels that write cells."""
        return {
            "rotation": hadamard(size, device) if self.rotate_keys or self.rotate_values else None,
            "rotate_keys": self.rotate_keys,
            "rotate_values": self.rotate_values,
            "nonfinite": None,
        }


def numbers(*parts: Any) -> torch.Tensor:
    """Returns random numbers [...] of a shape's dtype; the last two parts are shape and device."""
    *size, shape, device = parts
    return torch.randn(*size, device=device).to(shape.torch_dtype)


def shuffled(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Returns tables int32 [rows, columns] that name every page below rows * columns once."""
    order = torch.randperm(rows * columns, device=device)
    return order.view(rows, columns).int()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference; places where both are infinite and equal count as equal."""
    if found.dtype == torch.uint8:
        return float((found != expected).sum())
    apart = (found.float() - expected.float()).abs()
    return float(torch.where(found == expected, 0.0, apart).max())


def attention(policy: str, shape: Shape, tokens: int, batch: int) -> Plan:
    """Decode attention: `tokens` packed tokens of each request, then the open block's exact ones.

    With the policy "exact" all tokens are exact, in the same kernel.
    """
    form = None if policy == "exact" else Format.of(policy, shape)
    exact_tokens = TAIL if form else tokens
    exact_bytes = batch * exact_tokens * shape.cache.bytes_per_token
    packed_bytes = int(batch * tokens * form.layout.bytes_per_token) if form else 0
    pages = form.layout.pages(tokens, shape.cache.page_bytes) if form else 0
    query_bytes = batch * shape.num_q_heads * shape.head_size * shape.torch_dtype.itemsize

    def make(device: torch.device) -> Case:
        from vllm_kvpress.kernels.paged_attention.triton import launch

        blocks = -(-exact_tokens // BLOCK)
        size = (batch * blocks, BLOCK, shape.num_kv_heads, shape.head_size)
        lengths = torch.full((batch,), exact_tokens, dtype=torch.int32, device=device)
        causal = ExactPart(
            numbers(*size, shape, device),
            numbers(*size, shape, device),
            shuffled(batch, blocks, device),
            lengths,
        )
        prefix = form and PackedPart(
            form.pages(batch * pages, shape, device),
            shuffled(batch, pages, device),
            torch.full_like(lengths, tokens),
            form.cells,
        )
        query = numbers(batch, shape.num_q_heads, shape.head_size, shape, device)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        rotation = hadamard(shape.head_size, device)
        options = {
            "causal": causal,
            "prefix": prefix,
            "scale": shape.head_size**-0.5,
            "soft_cap": 0.0,
            "sinks": None,
            "key_rotation": rotation if form and form.rotate_keys else None,
            "value_rotation": rotation if form and form.rotate_values else None,
            "bias": None,
        }
        out = torch.empty_like(query)
        longest = exact_tokens + (tokens if form else 0)
        limits = {"max_query_len": 1, "max_tokens": longest}

        def error() -> float:
            expected, _ = attention_reference.paged_attention(query, starts, out=None, **options)
            return difference(out, expected)

        run = partial(launch, query, starts, out=out, **limits, **options)
        return Case(run, exact_bytes + packed_bytes + 2 * query_bytes, error)

    memory = exact_bytes + batch * pages * shape.cache.page_bytes + SPARE
    return Plan(memory, make)


def write(policy: str, shape: Shape, tokens: int, batch: int) -> Plan | None:
    """New tokens written into packed cells: one of each request, and a prompt's at batch size 1."""
    form = Format.of(policy, shape)
    count = tokens if batch == 1 else batch
    per_page = form.cells.per_page // shape.num_kv_heads * form.cells.tokens
    pages = -(-count // per_page)
    num_bytes = count * (shape.cache.bytes_per_token + int(form.layout.bytes_per_token) + 8)

    def make(device: torch.device) -> Case:
        from vllm_kvpress.kernels.quantize_on_write.triton import launch

        size = (2, count, shape.num_kv_heads, shape.head_size)
        key, value = numbers(*size, shape, device)
        slots = torch.randperm(pages * per_page, device=device)[:count]
        empty = torch.zeros(pages, shape.cache.page_bytes, dtype=torch.uint8, device=device)
        filled = empty.clone()
        options = form.rotations(shape.head_size, device)

        def error() -> float:
            expected = empty.clone()
            write_reference.quantize_on_write(key, value, expected, slots, form.cells, **options)
            return difference(filled, expected)

        run = partial(launch, key, value, filled, slots, form.cells, **options)
        return Case(run, num_bytes, error)

    return Plan(2 * pages * shape.cache.page_bytes + 3 * num_bytes + SPARE, make)


def move(policy: str, keep_ratio: float, shape: Shape, tokens: int, batch: int) -> Plan | None:
    """The survivors of one request, moved from exact blocks into its store."""
    if batch != 1:  # an event moves one request at a time
        return None
    form = Format.of(policy, shape)
    cells = form.cells
    count = int(tokens * keep_ratio) // cells.tokens * cells.tokens
    pages = form.layout.pages(count, shape.cache.page_bytes)
    blocks = -(-tokens // BLOCK)
    read = count * shape.cache.bytes_per_token + 8 * count * shape.num_kv_heads
    num_bytes = read + int(count * form.layout.bytes_per_token)

    def make(device: torch.device) -> Case:
        from vllm_kvpress.kernels.compact.triton import launch

        size = (2, blocks, BLOCK, shape.num_kv_heads, shape.head_size)
        keys, values = numbers(*size, shape, device)
        choice = [
            torch.randperm(tokens, device=device)[:count].sort().values
            for _ in range(shape.num_kv_heads)
        ]
        table = shuffled(1, pages, device)[0]
        empty = torch.zeros(pages, shape.cache.page_bytes, dtype=torch.uint8, device=device)
        filled = empty.clone()
        options = form.rotations(shape.head_size, device)
        options["blocks"] = shuffled(1, blocks, device)[0]
        inputs = (keys, values, torch.stack(choice), table)

        def error() -> float:
            expected = empty.clone()
            compact_reference.compact(*inputs, expected, 0, cells, **options)
            return difference(filled, expected)

        return Case(partial(launch, *inputs, filled, 0, cells, **options), num_bytes, error)

    memory = 2 * tokens * shape.cache.bytes_per_token + 2 * pages * shape.cache.page_bytes
    return Plan(memory + SPARE, make)


def scores(shape: Shape, tokens: int, batch: int) -> Plan:
    """SnapKV's scores of every request's prompt."""
    key_bytes = batch * tokens * shape.cache.bytes_per_token // 2
    score_bytes = 4 * batch * shape.num_kv_heads * tokens
    query_row = shape.num_q_heads * shape.head_size * shape.torch_dtype.itemsize
    num_bytes = key_bytes + score_bytes + batch * WINDOW * query_row
    scratch = 4 * batch * shape.num_q_heads * (tokens + 2 * WINDOW * (tokens // 16 + 1))

    def make(device: torch.device) -> Case:
        from vllm_kvpress.kernels.window_scores.triton import launch

        blocks = -(-tokens // BLOCK)
        size = (batch * blocks, BLOCK, shape.num_kv_heads, shape.head_size)
        inputs = (
            numbers(batch, WINDOW, shape.num_q_heads, shape.head_size, shape, device),
            numbers(*size, shape, device),
            shuffled(batch, blocks, device),
            torch.full((batch,), tokens, dtype=torch.int32, device=device),
            shape.head_size**-0.5,
        )
        options = {"pool": "avg", "pool_size": POOL, "reduce": "mean", "max_tokens": tokens}
        last: list[torch.Tensor] = []

        def run() -> None:
            last[:] = [launch(*inputs, **options)]

        def error() -> float:
            return difference(last[0], scores_reference.window_scores(*inputs, **options))

        return Case(run, num_bytes, error)

    return Plan(key_bytes + scratch + 2 * score_bytes + SPARE, make)


def tables(shape: Shape, tokens: int, batch: int) -> Plan:
    """Physical block tables of a batch whose requests keep a quarter of their blocks."""
    columns = -(-tokens // BLOCK)
    head = int(columns * KEEP_RATIO)

    def make(device: torch.device) -> Case:
        from vllm_kvpress.kernels.physical_tables.triton import launch

        logical = shuffled(batch, columns, device)
        store = shuffled(batch, max(head, 1), device)
        heads = torch.full((batch,), head, device=device)
        gaps = torch.full((batch,), columns - 1 - head, device=device)
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        inputs = (logical, store, heads, gaps, lengths, BLOCK)
        out = torch.zeros_like(logical), torch.zeros_like(lengths)

        def error() -> float:
            expected = tuple(torch.zeros_like(one) for one in out)
            tables_reference.physical_tables(*inputs, *expected)
            return max(difference(*pair) for pair in zip(out, expected, strict=True))

        return Case(partial(launch, *inputs, *out), 2 * 4 * batch * columns, error)

    return Plan(16 * batch * columns + SPARE, make)


# Kernel and variant -> what plans a case for a shape, tokens of a request, and a batch size.
CASES: dict[str, Callable[[Shape, int, int], Plan | None]] = {
    "paged_attention exact": partial(attention, "exact"),
    "paged_attention int8": partial(attention, "int8"),
    "paged_attention int4": partial(attention, "int4"),
    "paged_attention kivi2": partial(attention, "kivi2"),
    "quantize_on_write int8": partial(write, "int8"),
    "quantize_on_write int4": partial(write, "int4"),
    "compact snapkv-int4": partial(move, "snapkv-int4", KEEP_RATIO),
    "compact kivi2": partial(move, "kivi2", 1.0),
    "window_scores snapkv": scores,
    "physical_tables -": tables,
}
