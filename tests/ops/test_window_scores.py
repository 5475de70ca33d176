"""Window scores: the kernels in the interpreter and the reference, against float64 and SnapKV."""

import math
from dataclasses import dataclass

import pytest
import torch
from vllm_kvpress.kernels.window_scores import reference, window_scores
from vllm_kvpress.kernels.window_scores import triton as kernel

from vllm_kvpress.policies import LayerObservation
from vllm_kvpress.policies.scorers.snapkv import SnapKVScorer

POOLS = {"pool": "avg", "pool_size": 5, "reduce": "mean"}
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """New tensors are full of NaN, so that a place which no program writes shows."""
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: torch.full(size, math.nan, **kind))


@dataclass
class Case:
    """Requests whose keys lie in shuffled pages; all that none of them owns is NaN."""

    lengths: tuple[int, ...] = (70, 33)
    window: int = 8
    num_kv_heads: int = 2
    group: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    key_dtype: torch.dtype | None = None
    heads_first: bool = False
    spare_columns: int = 1

    def __post_init__(self):
        generator = torch.Generator().manual_seed(7)
        normal = {"generator": generator, "dtype": torch.float32}
        columns = -(-max(self.lengths) // self.block_size) + self.spare_columns
        num_reqs, heads = len(self.lengths), self.num_kv_heads * self.group
        self.query = torch.randn(num_reqs, self.window, heads, self.head_size, **normal)
        self.query = self.query.to(self.dtype)
        # Pages of one request lie anywhere, the spare ones and those past its end in page 0.
        order = torch.randperm(num_reqs * columns, generator=generator).int() + 1
        self.tables = order.view(num_reqs, columns)
        keys = torch.full(
            (num_reqs * columns + 1, self.block_size, self.num_kv_heads, self.head_size), math.nan
        )
        for request, length in enumerate(self.lengths):
            self.tables[request, -(-length // self.block_size) :] = 0
            blocks = self.tables[request, : -(-length // self.block_size)].long()
            own = torch.full((len(blocks) * self.block_size, *keys.shape[2:]), math.nan)
            own[:length] = torch.randn(length, *keys.shape[2:], **normal)
            keys[blocks] = own.view(len(blocks), *keys.shape[1:])
        self.keys = keys.to(self.key_dtype or self.dtype)
        if self.heads_first:
            self.keys = self.keys.transpose(1, 2).contiguous().transpose(1, 2)
        self.num_tokens = torch.tensor(self.lengths, dtype=torch.int32)
        self.scale = self.head_size**-0.5

    @property
    def arguments(self):
        return self.query, self.keys, self.tables, self.num_tokens, self.scale

    @property
    def held(self):
        return self.tables.shape[1] * self.block_size

    def by_kernel(self, **options):
        return kernel.launch(*self.arguments, **{"max_tokens": self.held, **POOLS, **options})

    def by_reference(self, **options):
        options = {"max_tokens": self.held, **POOLS, **options}
        return reference.window_scores(*self.arguments, **options)

    def largest_product(self):
        """The largest sum of |q * k| * scale over the channels."""
        keys = torch.cat([self.tokens(request).flatten(0, 1) for request in range(len(self.query))])
        products = self.query.double().abs().flatten(0, 2) @ keys.double().abs().T
        return products.max() * self.scale

    def tokens(self, request):
        """Keys of one request, [num_kv_heads, length, head_size]."""
        blocks = self.tables[request, : -(-self.lengths[request] // self.block_size)].long()
        return self.keys[blocks].flatten(0, 1)[: self.lengths[request]].transpose(0, 1)


def assert_scores(case, **options):
    """The kernel is as exact as float32 allows, and the places without a number are the same."""
    exact = case.by_reference(dtype=torch.float64, **options)
    plain = case.by_reference(**options)
    got = case.by_kernel(**options)
    finite = exact.isfinite()
    assert got.dtype == torch.float32
    assert torch.equal(got[~finite].double(), exact[~finite])
    error = (got - exact)[finite].abs().max()
    budget = 2 * (plain - exact)[finite].abs().max()
    # A product sums in an order of its own: its logits, then its denominators, are off by epsilon
    # times the sum of |q * k|.
    order = 2 * EPSILON * case.largest_product() * exact[finite].abs().max()
    assert error <= budget + order


SHAPES = [
    Case(),
    Case(lengths=(0, 1, 7, 8, 9, 100)),
    Case(lengths=(63,), num_kv_heads=1, group=8, window=3),
    Case(lengths=(50,), num_kv_heads=3, group=1, head_size=80, block_size=32),
    Case(lengths=(65,), num_kv_heads=1, group=4, head_size=96, dtype=torch.float16),
    Case(lengths=(300, 140), num_kv_heads=1, head_size=128, dtype=torch.bfloat16, window=40),
    Case(lengths=(131,), num_kv_heads=1, head_size=256, dtype=torch.bfloat16, heads_first=True),
    Case(lengths=(40,), num_kv_heads=2, group=3, head_size=256, window=20),
    Case(lengths=(129,), num_kv_heads=1, group=7, head_size=64, dtype=torch.float16, window=1),
    Case(lengths=(45, 21), head_size=40, block_size=1, window=33),
    Case(lengths=(90,), block_size=24, dtype=torch.float16, spare_columns=0),
]  # fmt: skip


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: f"{case.lengths}-{case.head_size}")
def test_kernel_is_as_exact_as_the_reference(case):
    assert_scores(case)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("pool_size", [1, 3, 101])
def test_pooling_and_reduction(pool, pool_size, reduce):
    case = Case(lengths=(61, 20), num_kv_heads=1, group=3)

    assert_scores(case, pool=pool, pool_size=pool_size, reduce=reduce)


def test_more_tiles_than_a_merging_program_reads_at_once():
    case = Case(lengths=(1100,), num_kv_heads=1, group=1, head_size=256, window=5)
    tiles = -(-1100 // kernel.blocks_for(0, 4, 256).tokens)

    assert tiles > kernel.MERGE_ROWS
    assert_scores(case)


@pytest.mark.parametrize("key_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_keys_are_the_numbers_that_their_bytes_stand_for(key_dtype):
    case = Case(lengths=(70,), num_kv_heads=1, dtype=torch.bfloat16, key_dtype=key_dtype)

    assert_scores(case)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_nan_stays_nan_where_the_reference_has_it(pool, reduce):
    """The mean and the maxima must not swallow what the policy refuses."""
    case = Case(lengths=(70, 33))
    case.query[0, 3, 1] = math.nan
    options = {"pool": pool, "reduce": reduce}

    got, expected = case.by_kernel(**options), case.by_reference(**options)

    assert torch.equal(got.isnan(), expected.isnan())
    assert got[0, 0, :62].isnan().all()
    assert not got[0, 1].isnan().any()
    assert not got[1].isnan().any()


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered in matmul")
def test_logits_that_overflow_are_nan_and_large_ones_are_not():
    case = Case(lengths=(70,))
    case.query[:, :, :2] *= 1e4
    case.query[:, :, 2:] *= math.inf

    got, expected = case.by_kernel(), case.by_reference(dtype=torch.float64)

    assert got[0, 1, :62].isnan().all()
    torch.testing.assert_close(got[0, 0].double(), expected[0, 0], rtol=1e-3, atol=1e-6)


def test_places_of_the_window_and_past_the_end():
    case = Case(lengths=(0, 5, 20), window=8)

    got = case.by_kernel()

    assert got[0].eq(-math.inf).all()
    assert got[1, :, :5].eq(math.inf).all()
    assert got[1, :, 5:].eq(-math.inf).all()
    assert got[2, :, :12].isfinite().all()
    assert got[2, :, 12:20].eq(math.inf).all()
    assert got[2, :, 20:].eq(-math.inf).all()


def test_width_of_the_scores():
    case = Case(lengths=(33, 30))

    assert torch.equal(case.by_kernel(max_tokens=33), case.by_kernel()[:, :, :33])
    assert torch.equal(
        window_scores(*case.arguments, max_tokens=33), case.by_reference(max_tokens=33)
    )
    assert torch.equal(window_scores(*case.arguments), case.by_reference())
    assert case.by_kernel(max_tokens=0).shape == (2, 2, 0)


@pytest.mark.parametrize("run", ["by_kernel", "by_reference"])
def test_a_request_scores_the_same_in_every_batch(run):
    case = Case(lengths=(70, 0, 33, 40))
    together = getattr(case, run)()

    for request in range(4):
        case.query, case.tables, case.num_tokens = (
            part[request : request + 1]
            for part in (Case(case.lengths).query, Case(case.lengths).tables, case.num_tokens)
        )
        alone = getattr(case, run)()
        case = Case(case.lengths)
        assert torch.equal(alone[0], together[request])


def test_one_more_query_is_noticed():
    case = Case(lengths=(70,))
    full = case.by_kernel()
    case.query = case.query[:, 1:]

    assert (full - case.by_kernel())[0, :, :62].abs().max() > 1e-4


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("pool_size", [1, 5, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_is_the_scorer_bit_for_bit(pool, pool_size, dtype):
    case = Case(lengths=(70, 6, 33), head_size=80, group=4, dtype=dtype)
    scores = case.by_reference(pool=pool, pool_size=pool_size)
    scorer = SnapKVScorer(window=case.window, pool=pool_size, pooling=pool)

    for request, length in enumerate(case.lengths):
        keys = case.tokens(request)
        observation = LayerObservation(
            keys=keys,
            values=keys,
            queries=case.query[request].transpose(0, 1)[:, -length:],
            positions=None,
            layer_idx=0,
            kv_heads=tuple(range(case.num_kv_heads)),
            scale=case.scale,
        )
        assert torch.equal(scores[request, :, :length], scorer.score(observation))


def wrong(case, **changed):
    names = ("query", "keys", "block_tables", "num_tokens", "scale")
    options = {**dict(zip(names, case.arguments, strict=True)), **changed}
    return window_scores(**options)


def test_wrong_input_is_refused():
    case = Case()
    query, keys, tables, num_tokens, _ = case.arguments
    for error, message, changed in (
        (TypeError, r"query: got torch.float64; allowed: torch.float16", {"query": query.double()}),
        (TypeError, "keys: got torch.float16; allowed: torch.float32", {"keys": keys.half()}),
        (TypeError, "block_tables: got torch.int64", {"block_tables": tables.long()}),
        (TypeError, "num_tokens: got torch.int64", {"num_tokens": num_tokens.long()}),
        (ValueError, r"query: got shape \[8, 4, 64\]; allowed: 4 axes", {"query": query[0]}),
        (ValueError, "a window of 1 or more", {"query": query[:, :0]}),
        (ValueError, "head size", {"query": torch.zeros(2, 8, 4, 257)}),
        (ValueError, "KV heads that divides 3", {"query": query[:, :, :3]}),
        (ValueError, "allowed: 1 along the last axis", {"keys": keys.mT.contiguous().mT}),
        (ValueError, r"keys: .*; allowed: \[13, 16, 2, 64\]", {"keys": keys[..., :32]}),
        (ValueError, "block_tables: got shape", {"block_tables": tables[:1]}),
        (
            ValueError,
            r"num_tokens: got shape \[1\]; allowed: \[2\]",
            {"num_tokens": num_tokens[:1]},
        ),
        (
            ValueError,
            "num_tokens: got strides",
            {"num_tokens": torch.stack([num_tokens] * 2, 1)[:, 0]},
        ),
        (ValueError, "num_tokens: got device meta", {"num_tokens": num_tokens.to("meta")}),
        (ValueError, "num_tokens: got 70; allowed: at most 64", {"max_tokens": 64}),
        (ValueError, "max_tokens: got 97; allowed: 0 to 96", {"max_tokens": 97}),
        (ValueError, "pool: got 'sum'; allowed: avg, max", {"pool": "sum"}),
        (ValueError, "reduce: got 'sum'; allowed: mean, max", {"reduce": "sum"}),
        (ValueError, "pool_size: got 4; allowed: odd", {"pool_size": 4}),
        (ValueError, "pool_size: got -1; allowed: odd", {"pool_size": -1}),
    ):
        with pytest.raises(error, match=message):
            wrong(case, **changed)


def test_every_head_size_and_dtype_has_variants():
    found = {
        (one.architecture, one.constants["HEAD_SIZE"], one.signature["keys"], one.kernel.__name__)
        for one in kernel.variants()
        if "HEAD_SIZE" in one.constants
    }
    for architecture in (80, 89, 90, 100):
        for head_size in (64, 80, 96, 128, 256):
            for keys in ("*bf16", "*fp32"):
                for name in ("sum_tiles", "mean_attention"):
                    assert (architecture, head_size, keys, name) in found
