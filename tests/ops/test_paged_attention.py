"""Paged attention: the kernel in the interpreter and the reference, against dense float64."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder
from vllm_kvpress.kernels.cells import Cells
from vllm_kvpress.kernels.cells_reference import unpack
from vllm_kvpress.kernels.paged_attention import (
    ExactPart,
    PackedPart,
    cpu,
    merge,
    paged_attention,
    reference,
    tuning,
)
from vllm_kvpress.kernels.paged_attention import triton as kernel
from vllm_kvpress.kernels.paged_attention.variants import FORMATS, WHOLE, cells_of

from vllm_kvpress.layout import PackedFormat, SideFormat

# A query that sees no token of a split has the logarithm of 0, as meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OTHERS = {
    "int4-16-tokens": ((4, 16, True), (4, 64, True)),
    "int8-48": ((8, 48, False), (2, 24, False)),
    "int2-whole": ((2, WHOLE, False), (2, WHOLE, False)),
    "int4-48-tokens": ((4, 48, True), (8, 16, True)),
}


def cast_with_rounding(source, target, cast=interpreter_builder.cast_impl):
    """The interpreter cuts float32 to bfloat16; the hardware rounds."""
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
    return cast(source, target)


def dot_of_numbers(left, right, *rest, dot=interpreter_builder.create_dot):
    """The interpreter multiplies the bits of bfloat16 as if they were integers."""
    if left.dtype.scalar == tl.bfloat16:
        left, right = (interpreter_builder.cast_impl(x, tl.float32) for x in (left, right))
    return dot(left, right, *rest)


@pytest.fixture(autouse=True)
def interpreter_with_bfloat16(monkeypatch):
    monkeypatch.setattr(interpreter_builder, "cast_impl", cast_with_rounding)
    monkeypatch.setattr(interpreter_builder, "create_dot", dot_of_numbers)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """New tensors are full of NaN, or of a huge number, so that a place nobody writes shows."""

    def empty(*size, dtype=F32, device=None):
        return torch.full(
            torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size),
            math.nan if dtype.is_floating_point else 2**30,
            dtype=dtype,
            device=device,
        )

    monkeypatch.setattr(torch, "empty", empty)


def format_of(name, heads, size, dtype):
    sides = []
    for bits, group, along_tokens in (FORMATS | OTHERS)[name]:
        bits = 8 * dtype.itemsize if bits == 16 else bits
        group = size if group == WHOLE else group
        sides.append(SideFormat(bits=bits, group=group, per_channel=along_tokens))
    return PackedFormat(num_kv_heads=heads, head_size=size, keys=sides[0], values=sides[1])


def quantize(x, bits, dim):
    """Codes, scale and zero of groups along one axis, by the formula."""
    low = x.amin(dim, keepdim=True).half().float()
    scale = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
    scale = torch.where(scale == 0, 1.0, scale)
    return ((x - low) / scale).round().clamp(0, 2**bits - 1), scale, low


def encode(x, side, dtype):
    """Bytes of codes, scales, zeros of one cell's tokens [n, d]; what they stand for."""
    if side.bits >= 16:
        x = x.to(dtype)
        return x.contiguous().view(torch.uint8).flatten(), [[], []], x.float()
    x = x.T if side.per_channel else x
    pieces = [quantize(piece, side.bits, 1) for piece in x.split(side.group, 1)]
    back = torch.cat([codes * scale + low for codes, scale, low in pieces], 1)
    codes = torch.cat([codes for codes, _, _ in pieces], 1)
    params = [torch.cat([piece[i] for piece in pieces], 1).half() for i in (1, 2)]
    if side.per_channel:
        codes, back, params = codes.T, back.T, [x.T for x in params]
    per_byte = 8 // side.bits
    planes = codes.to(torch.uint8).chunk(per_byte, 1)
    packed = sum(plane << (side.bits * i) for i, plane in enumerate(planes))
    return packed.flatten(), [x.contiguous().view(torch.uint8).flatten() for x in params], back


@dataclass
class Case:
    """Requests over shuffled pages and blocks; all that none of them owns is NaN."""

    name: str | None = "kivi4"  # the packed part's format; None: there is none
    queries: tuple[int, ...] = (1, 1, 1)
    prefix: tuple[int, ...] | None = (37, 0, 1)  # None: the causal part is packed
    causal: tuple[int, ...] = (5, 9, 1)
    heads: int = 2
    group: int = 2
    size: int = 64
    dtype: torch.dtype = F32
    rotated: tuple[bool, bool] = (False, False)
    soft_cap: float = 0.0
    sinks: bool = False
    bias: bool = False
    heads_first: bool = False
    padding: int = 2
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def __post_init__(self):
        counts = torch.tensor([0, *self.queries])
        self.query_start_loc = counts.cumsum(0).int()
        self.query = self.normal(sum(self.queries) + self.padding, self.heads * self.group)
        self.rotation = hadamard(self.size)
        before = self.prefix or (0,) * len(self.queries)
        # What the queries see, request by request: keys and values [heads, tokens, size], float32.
        self.seen = [[] for _ in self.queries]
        self.prefix_part = self.pack(before) if self.prefix else None
        if self.name and not self.prefix:
            self.causal_part = self.pack(self.causal)
        else:
            self.causal_part = self.exact()
        self.add_bias()
        heads = self.heads * self.group
        self.sink = torch.randn(heads, generator=self.random) if self.sinks else None

    def normal(self, *shape):
        return torch.randn(*shape, self.size, generator=self.random).to(self.dtype)

    def pack(self, lengths):
        form = format_of(self.name, self.heads, self.size, self.dtype)
        page_bytes = (7 * form.cell_bytes // 2 // 16 + 1) * 16
        numbers = form.numbers(page_bytes)
        cells = Cells.of(numbers)
        width = form.pages(max(max(lengths), 1), page_bytes) + 1
        pages = torch.full((len(lengths) * width + 1, page_bytes), 255, dtype=torch.uint8)
        table = torch.randperm(len(pages), generator=self.random)[:-1].view(-1, width).int()
        for row, length, seen in zip(table, lengths, self.seen, strict=True):
            sides = [self.normal(self.heads, length).float() + 0.5 for _ in range(2)]
            back = [torch.zeros(0)] * 2
            for i, side in enumerate((form.keys, form.values)):
                back[i] = self.fill(pages, row, sides[i], side, numbers, i)
            turned = [
                x @ self.rotation if t else x for x, t in zip(back, self.rotated, strict=True)
            ]
            seen.append((*turned, back))
        return PackedPart(pages, table, torch.tensor(lengths).int(), cells)

    def fill(self, pages, row, x, side, numbers, i):
        """Writes one side of a request's cells; returns the numbers that they stand for."""
        bits, _, _, codes_at, scales_at, zeros_at = numbers[("keys", "values")[i]]
        tokens, back = numbers["tokens"], torch.empty_like(x)
        for first in range(0, x.shape[1], tokens):
            for head in range(self.heads):
                some = x[head, first : first + tokens]
                codes, params, back[head, first : first + tokens] = encode(some, side, self.dtype)
                cell = first // tokens * self.heads + head
                page = pages[row[cell // numbers["per_page"]]]
                start = cell % numbers["per_page"] * numbers["size"]
                for at, data in zip((codes_at, scales_at, zeros_at), (codes, *params), strict=True):
                    page[start + at : start + at + len(data)] = torch.as_tensor(data)
        assert bits == side.bits
        return back

    def exact(self, block_size=4):
        width = -(-max(self.causal) // block_size) + 1
        number = len(self.causal) * width + 1
        caches = [torch.full((number, block_size, self.heads, self.size), math.nan) for _ in "kv"]
        caches = [cache.to(self.dtype) for cache in caches]
        table = torch.randperm(number, generator=self.random)[:-1].view(-1, width).int()
        for row, length, seen in zip(table, self.causal, self.seen, strict=True):
            sides = [self.normal(self.heads, length) for _ in range(2)]
            for cache, side in zip(caches, sides, strict=True):
                for token in range(length):
                    cache[row[token // block_size], token % block_size] = side[:, token]
            seen.append((sides[0].float(), sides[1].float(), None))
        if self.heads_first:
            caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
        return ExactPart(*caches, table, torch.tensor(self.causal).int())

    def add_bias(self):
        self.biases, self.bias_tensor = [0.0] * len(self.queries), None
        if not self.bias:
            return
        cells, table = self.prefix_part.cells, self.prefix_part.table
        shape = (len(self.prefix_part.pages), cells.per_page, cells.tokens)
        self.bias_tensor = torch.rand(shape, generator=self.random) * 3
        for request, length in enumerate(self.prefix):
            added = torch.zeros(self.heads, length + self.causal[request])
            for head in range(self.heads):
                for t in range(length):
                    cell = t // cells.tokens * self.heads + head
                    page = table[request, cell // cells.per_page]
                    place = (page, cell % cells.per_page, t % cells.tokens)
                    added[head, t] = self.bias_tensor[place]
            self.biases[request] = added

    def options(self):
        keys, values = self.rotated
        return {
            "causal": self.causal_part,
            "prefix": self.prefix_part,
            "scale": self.size**-0.5,
            "soft_cap": self.soft_cap,
            "sinks": self.sink,
            "key_rotation": self.rotation if keys else None,
            "value_rotation": self.rotation if values else None,
            "bias": self.bias_tensor,
            "out": None,
        }

    def kernel(self, **extra):
        options = self.options() | extra
        before = self.prefix or [0] * len(self.queries)
        longest = max(a + b for a, b in zip(before, self.causal, strict=True))
        limits = {"max_query_len": max(self.queries), "max_tokens": max(longest, 1)}
        return kernel.launch(self.query, self.query_start_loc, **limits, **options)

    def reference(self, **extra):
        return reference.paged_attention(self.query, self.query_start_loc, **self.options() | extra)

    def on_cpu(self):
        return cpu.paged_attention(self.query, self.query_start_loc, **self.options())

    def dense(self, compute=torch.float64, rounding=None):
        """Attention as textbooks write it; `rounding`: what products take, as hardware does."""
        outs, lses = [], []
        for request, n in enumerate(self.queries):
            start = self.query_start_loc[request]
            q = self.query[start : start + n].to(compute).view(n, self.heads, self.group, self.size)
            parts = [self.stored(part, q, compute, rounding) for part in self.seen[request]]
            logits = [torch.einsum("nhgd,htd->hgnt", turned, k) for turned, k, _, _ in parts]
            logits = torch.cat(logits, -1) * self.size**-0.5
            if self.soft_cap:
                logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
            if self.bias:
                logits = logits + self.biases[request].to(compute)[:, None, None]
            total = logits.shape[-1]
            last = torch.arange(total - n, total)[:, None]
            last = last.clamp(min=self.prefix[request] - 1) if self.prefix else last
            logits = logits.masked_fill(torch.arange(total) > last, -math.inf)
            lse = logits.logsumexp(-1)
            if self.sinks:
                sink = self.sink.to(compute).view(self.heads, self.group, 1)
                lse = torch.logaddexp(lse, sink)
            weights = torch.exp(logits - lse[..., None]).to(rounding or compute).to(compute)
            weights = weights.split([k.shape[1] for _, k, _, _ in parts], -1)
            out = 0
            for some, (_, _, v, back) in zip(weights, parts, strict=True):
                out = out + torch.einsum("hgnt,htd->nhgd", some, v) @ back
            outs.append(out.flatten(1, 2))
            lses.append(lse.permute(2, 0, 1).flatten(1))
        return torch.cat(outs), torch.cat(lses)

    def stored(self, part, q, compute, rounding):
        """Queries, keys and values of a part, and the basis of its output.

        With `rounding` all are in the basis that the cells have, rounded there.
        """
        keys, values, cells = part
        turn = one = torch.eye(self.size, dtype=compute)
        if rounding and cells is not None:
            keys, values = cells
            q, turn = (
                x @ self.rotation.to(compute) if rotated else x
                for x, rotated in zip((q, one), self.rotated, strict=True)
            )
        return *(x.to(rounding or compute).to(compute) for x in (q, keys, values)), turn


def hadamard(size):
    block = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(block)] * (size // block)).contiguous()


def assert_close(case, got):
    """No further from float64 than twice what float32 sums of rounded numbers are."""
    exact, rounded = case.dense(), case.dense(F32, case.dtype)
    rounded = (rounded[0].to(case.dtype), rounded[1])
    real = sum(case.queries)
    for actual, truth, model in zip(got, exact, rounded, strict=True):
        assert not actual[:real].isnan().any()
        budget = 2 * (model - truth).abs().max() + 2e-6
        assert (actual[:real] - truth).abs().max() <= budget
    assert (got[0][real:] == 0).all()
    assert (got[1][real:] == -math.inf).all()


@pytest.mark.parametrize("name", [*FORMATS, *OTHERS])
def test_every_format_of_cells(name):
    case = Case(name=name, size=96)

    assert_close(case, case.kernel(splits=3))
    assert_close(case, case.reference())


@pytest.mark.parametrize("name", ["kivi2", "int4-32", "int8"])
@pytest.mark.parametrize(
    ("size", "group", "dtype"), [(64, 8, F16), (80, 4, BF16), (128, 1, F16), (256, 2, BF16)]
)
def test_every_head_size_in_low_precision(name, size, group, dtype):
    heads = max(4 // group, 1)
    case = Case(name, size=size, group=group, dtype=dtype, heads=heads, rotated=(True, True))

    assert_close(case, case.kernel(splits=2))
    assert_close(case, case.reference())


@pytest.mark.parametrize("splits", [2, 3])
def test_a_request_without_exact_tokens_reads_its_prefix_alone(splits):
    case = Case(queries=(5, 1, 3), prefix=(37, 20, 9), causal=(0, 0, 4))

    assert_close(case, case.kernel(splits=splits))
    assert_close(case, case.reference())


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_exact_cells_hold_the_model_s_dtype(dtype):
    case = Case(name="exact-cells", dtype=dtype)

    assert_close(case, case.kernel(splits=2))
    assert_close(case, case.reference())


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("name", [None, "int4-32"])
def test_one_part_in_any_number_of_splits(name, splits, monkeypatch):
    monkeypatch.setattr(tuning, "SHORTEST", 32)
    case = Case(name=name, prefix=None, causal=(100, 1, 33), sinks=True, group=3)

    assert_close(case, case.kernel(splits=splits))
    assert_close(case, case.reference())


@pytest.mark.parametrize("splits", [2, 7])
def test_two_parts_in_any_number_of_splits(splits, monkeypatch):
    monkeypatch.setattr(tuning, "SHORTEST", 32)
    options = {"sinks": True, "rotated": (True, True), "bias": True}
    case = Case(prefix=(100, 0, 64), causal=(3, 70, 33), **options)

    assert_close(case, case.kernel(splits=splits))
    assert_close(case, case.reference())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("name", "prefix"), [("kivi4", (40, 0, 7, 33)), ("int8", None), (None, None)]
)
def test_chunks_of_prompts_beside_decodes(name, prefix, dtype):
    chunks = (1, 9, 0, 12)  # a block has 64 / group queries
    options = {"dtype": dtype, "sinks": True, "heads": 1}
    case = Case(name, chunks, prefix, (9, 9, 5, 33), group=8, **options)

    assert_close(case, case.kernel())
    assert_close(case, case.reference())


@pytest.mark.parametrize("options", [{"soft_cap": 2.0}, {"bias": True}, {"heads_first": True}])
@pytest.mark.parametrize("rotated", [(True, False), (False, True)])
def test_options(options, rotated):
    case = Case(queries=(1, 3, 2), causal=(5, 9, 2), rotated=rotated, **options)

    assert_close(case, case.kernel())
    assert_close(case, case.reference())


def test_options_change_the_result():
    plain, _ = Case().kernel()

    for options in ({"soft_cap": 2.0}, {"bias": True}, {"sinks": True}):
        assert (Case(**options).kernel()[0] - plain).abs().max() > 1e-2, options


def test_a_rotation_only_changes_the_basis():
    """Keys and values in the rotated basis with the rotation told: the same attention."""
    case = Case(name="int8", rotated=(True, True), prefix=(37, 5, 1))
    wrong = case.kernel(key_rotation=None)[0]

    assert (wrong - case.kernel()[0])[:3].abs().max() > 1e-2


@pytest.mark.parametrize("run", ["kernel", "reference"])
def test_a_request_without_tokens_has_no_output(run):
    case = Case(name="int8", prefix=None, queries=(1, 1, 1), causal=(5, 1, 40))
    case.causal_part.lengths[1] = 0

    out, lse = getattr(case, run)()

    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    assert lse[[0, 2]].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rotated", [(False, False), (True, True)])
def test_padded_rows_of_a_given_output_stay(rotated, splits):
    case = Case(name="int8", prefix=None, causal=(5, 1, 40), rotated=rotated)
    given = torch.full_like(case.query, 7.0)

    out, lse = case.kernel(out=given, splits=splits)

    assert out is given
    assert (out[3:] == 7.0).all()
    assert torch.equal(out[:3], case.kernel(splits=splits)[0][:3])
    assert (lse[3:] == -math.inf).all()


def test_queries_and_outputs_may_be_views():
    case = Case(rotated=(True, True))
    expected, _ = case.kernel()
    wide = torch.full((5, 9, 64), math.nan)
    wide[:, 2:6] = case.query
    case.query = wide[:, 2:6]
    room = torch.zeros(5, 8, 64)

    out, _ = case.kernel(out=room[:, 4:])

    assert torch.equal(out, expected)
    assert torch.equal(room[:, 4:], expected)
    assert (room[:, :4] == 0).all()
    torch.testing.assert_close(case.reference()[0], expected)


def test_merge_of_two_calls_is_one_call():
    case = Case(name="int8", prefix=(37, 20, 1), sinks=True)
    whole = case.kernel()
    none = torch.zeros(3, dtype=torch.int32)
    prefix, causal = case.prefix_part, case.causal_part

    parts = [
        case.kernel(causal=causal._replace(lengths=none)),
        case.kernel(prefix=prefix._replace(lengths=none), sinks=None),
    ]

    for merged, expected in zip(merge(*zip(*parts, strict=True)), whole, strict=True):
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_merge_ignores_what_has_no_tokens():
    out, lse = merge(
        [torch.full((2, 1, 4), math.nan), torch.ones(2, 1, 4)],
        [torch.full((2, 1), -math.inf), torch.tensor([[0.5], [-math.inf]])],
    )

    assert torch.equal(out[:, 0, 0], torch.tensor([1.0, 0.0]))
    assert torch.equal(lse, torch.tensor([[0.5], [-math.inf]]))


@pytest.mark.parametrize("name", [*FORMATS, *OTHERS])
def test_unpacked_cells_are_exactly_what_was_packed(name):
    case = Case(name=name, prefix=(37, 0, 1), size=96, dtype=BF16)
    part = case.prefix_part

    for request, length in enumerate(case.prefix):
        got = unpack(part.pages, part.table[request], length, part.cells, BF16)
        for actual, expected in zip(got, case.seen[request][0][2], strict=True):
            assert torch.equal(actual, expected)


# Decode, a prompt, a chunk of one, and a request that this step leaves out.
CPU_STEPS = {"queries": (1, 19, 5, 0), "causal": (33, 19, 40, 7), "prefix": None}


@pytest.mark.parametrize("name", [None, "int8", "int4-32", "int8-48", "exact-cells"])
@pytest.mark.parametrize("rotated", [(False, False), (True, True)])
@pytest.mark.parametrize(("group", "dtype"), [(1, F32), (4, BF16)])
def test_cpu_engines_attend_by_the_fused_kernel(name, rotated, group, dtype, monkeypatch):
    case = Case(name, **CPU_STEPS, rotated=rotated, group=group, dtype=dtype, size=96)
    monkeypatch.setattr(reference, "attend", None)

    assert_close(case, case.on_cpu())


@pytest.mark.parametrize(
    "options",
    [{"soft_cap": 2.0}, {"sinks": True}, {"prefix": (7, 0, 20, 3)}, {"causal": (0, 3, 40, 7)}],
)
def test_cpu_engines_leave_to_the_reference_what_the_fused_kernel_cannot_do(options):
    case = Case("int8", **CPU_STEPS | {"queries": (1, 4, 5, 0)} | options, rotated=(True, True))

    for actual, expected in zip(case.on_cpu(), case.reference(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_long_prompts_are_computed_in_slices(monkeypatch):
    case = Case(queries=(1, 19, 3), causal=(5, 19, 9), bias=True, sinks=True)
    monkeypatch.setattr(reference, "LOGITS_AT_A_TIME", 200)

    assert_close(case, case.reference())


def test_the_public_operation_on_cpu_is_the_reference():
    case = Case(rotated=(True, True), sinks=True)
    options = {k: v for k, v in case.options().items() if "rotation" not in k}
    more = {"rotation": case.rotation, "rotate_keys": True, "rotate_values": True}

    got = paged_attention(
        case.query, case.query_start_loc, max_query_len=1, max_tokens=42, **options, **more
    )

    for actual, expected in zip(got, case.reference(), strict=True):
        assert torch.equal(actual, expected)


def change(part, **fields):
    return lambda case: {part: getattr(case, f"{part}_part")._replace(**fields)}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda _: {"query": torch.zeros(5, 4, 64).int()}, TypeError, "query: got torch.int32"),
        (lambda _: {"query": torch.zeros(5, 4, 80)}, ValueError, "of 64 channels"),
        (lambda _: {"query": torch.zeros(5, 3, 64)}, ValueError, "a divisor of the 3 query heads"),
        (lambda _: {"sinks": torch.zeros(3)}, ValueError, r"sinks: got shape \(3,\)"),
        (lambda _: {"sinks": torch.zeros(4).half()}, TypeError, "sinks: got torch.float16"),
        (lambda _: {"rotate_keys": True}, ValueError, "rotation: got None"),
        (lambda _: {"soft_cap": -1.0}, ValueError, "soft_cap"),
        (lambda _: {"max_tokens": 0}, ValueError, "max_tokens"),
        (lambda c: {"causal": c.prefix_part}, ValueError, "one packed part"),
        (lambda c: {"prefix": c.causal_part}, TypeError, "prefix: got ExactPart"),
        (lambda _: {"causal": None}, TypeError, "causal: got NoneType"),
        (lambda _: {"prefix": None, "bias": torch.zeros(1)}, ValueError, "without a prefix"),
        (change("prefix", lengths=torch.zeros(3)), TypeError, "prefix.lengths: got torch.float32"),
        (change("prefix", pages=torch.zeros(9, 16).byte()), ValueError, "at most 16 bytes"),
        (change("causal", table=torch.zeros(2, 2).int()), ValueError, "causal.table: got shape"),
        (change("causal", values=torch.zeros(3, 4, 2, 8)), ValueError, "causal.values: got shape"),
    ],
)
def test_wrong_input_is_refused(wrong, error, message):
    case = Case()
    given = {
        "query": case.query,
        "query_start_loc": case.query_start_loc,
        "causal": case.causal_part,
        "prefix": case.prefix_part,
        "scale": 0.1,
        "max_query_len": 1,
        "max_tokens": 42,
    }

    with pytest.raises(error, match=message):
        paged_attention(**given | wrong(case))


def test_the_kernel_refuses_caches_that_wide_loads_cannot_read():
    case = Case()
    pages = torch.nn.functional.pad(case.prefix_part.pages, (0, 8))

    with pytest.raises(ValueError, match="multiples of 16"):
        case.kernel(prefix=case.prefix_part._replace(pages=pages))


def test_splits_fill_the_device_and_shrink_without_a_cliff():
    splits = [tuning.num_splits(8 * batch, 4096 * batch, 32768, 132, 1) for batch in range(1, 300)]

    assert all(a >= b for a, b in pairwise(splits))
    assert all(a <= 2 * b + 1 for a, b in pairwise(splits))
    assert all(8 * batch * count >= 132 for batch, count in enumerate(splits, 1))
    assert splits[-1] == 32768 // tuning.LONGEST
    assert tuning.num_splits(8, 4096, 100, 132, 1) == 1
    assert tuning.num_splits(8, 4096, 100, 132, 2) == 2
    # Partial results of a long chunk would take more memory than they are worth.
    assert tuning.num_splits(8 * 512, 8192 * 4096, 131072, 132, 1) == 1


def test_variants_have_the_layout_s_cells():
    for name in FORMATS:
        for size in (64, 80, 96, 128, 256):
            form = format_of(name, 2, size, F16)
            assert cells_of(size, name) == Cells.of(form.numbers(3 * form.cell_bytes))


def test_variants_are_few_and_complete():
    variants = list(kernel.variants())

    assert len({variant.name for variant in variants}) == len(variants) < 60 * 4
    for variant in variants:
        assert set(variant.kernel.arg_names) == variant.signature.keys() | variant.constants.keys()
        assert not variant.signature.keys() & variant.constants.keys()
