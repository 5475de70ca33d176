from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from vllm_kvpress.errors import ConfigError, UnsupportedModelError
from vllm_kvpress.policies.codecs import (
    ExactCodec,
    KiviKeyCodec,
    UniformCodec,
    hadamard,
    known_codecs,
    make_codec,
    packed_format,
    rotate,
)
from vllm_kvpress.policies.codecs.packing import pack, unpack

HEAD_SIZES = (64, 80, 96, 128, 256)
PACKED = ("int8", "int4", "kivi4", "kivi2")
# Per token with a short last group, a whole head, and per channel; every width of a code.
CODECS = [
    UniformCodec(8),
    UniformCodec(4),
    UniformCodec(4, 32),
    UniformCodec(2, 32),
    KiviKeyCodec(2),
    KiviKeyCodec(4),
    KiviKeyCodec(8, 16),
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_group_values(x, bits):
    """The codec's formula over one group, number for number, in numpy's float16 and float32."""
    top = np.float32(65504)
    x = np.array([0 if np.isnan(v) else max(min(v, top), -top) for v in x], np.float32)
    levels = np.float32(2**bits - 1)
    zero = np.float16(x.min())
    scale = np.float16((x.max() - np.float32(zero)) / levels)
    scale = np.float16(1) if scale == 0 else scale
    codes = np.clip(np.rint((x - np.float32(zero)) / np.float32(scale)), 0, levels)
    return scale, zero, codes, codes.astype(np.float32) * np.float32(scale) + np.float32(zero)


def groups_of(codec, head, width):
    """(place of the scale, place of the numbers) of every group of one head."""
    num_tokens, head_size = head.shape
    if codec.per_channel:
        for first in range(0, num_tokens, codec.group):
            for channel in range(head_size):
                yield (first // codec.group, channel), (slice(first, first + width), channel)
    else:
        for token in range(num_tokens):
            for first in range(0, head_size, width):
                yield (token, first // width), (token, slice(first, first + width))


def spread(codec, params, shape):
    """Gives every number the parameter of its group, by the docstring of layout.py."""
    out = torch.empty(shape, dtype=torch.float64)
    width = codec.group or shape[2]
    for token in range(shape[1]):
        for channel in range(shape[2]):
            place = (token // width, channel) if codec.per_channel else (token, channel // width)
            out[:, token, channel] = params[:, *place]
    return out


def reduced(codec, x, largest):
    """Least or largest number of every group, in the shape of the scales."""
    reduce = torch.amax if largest else torch.amin
    if codec.per_channel:
        return reduce(torch.unflatten(x, 1, (-1, codec.group)), dim=2)
    parts = torch.split(x, codec.group or x.shape[2], dim=2)
    return torch.stack([reduce(part, dim=2) for part in parts], dim=2)


def allowed_error(codec, x, encoded, restored):
    """The bound of `UniformCodec`'s docstring for finite `x` within float16's range, in float64.

    Half a step inside of the grid; outside, how far the rounded zero and scale end short of the
    group's least and largest number. Float32 adds a relative 2**-24 for each of: the difference and
    the quotient while encoding, the sum while decoding (its product of 8 by 11 bits is exact).
    """
    scale, zero = (spread(codec, p.double(), x.shape) for p in (encoded.scales, encoded.zeros))
    low, high = (spread(codec, reduced(codec, x.double(), top), x.shape) for top in (False, True))
    bound = torch.stack(
        [scale.abs() / 2, (zero - low).abs(), high - zero - (2**codec.bits - 1) * scale]
    ).amax(dim=0)
    float32 = (2 * (x.double() - zero).abs() + restored.double().abs()) * 2.0**-24
    return bound + float32 * (1 + 2**-20)


# Bytes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_byte_j_holds_every_wth_channel_from_j_on_the_first_in_the_lowest_bits(bits, head_size):
    codes = torch.randint(0, 2**bits, (3, 5, head_size), dtype=torch.uint8)
    width = head_size * bits // 8
    drawn = torch.zeros(3, 5, width, dtype=torch.int64)
    for channel in range(head_size):
        drawn[:, :, channel % width] += codes[:, :, channel].long() << bits * (channel // width)

    packed = pack(codes, bits)

    assert packed.dtype == torch.uint8
    assert torch.equal(packed.long(), drawn)
    assert torch.equal(unpack(packed, bits), codes)


@every_codec
@pytest.mark.parametrize("head_size", [64, 80])
def test_every_byte_is_that_of_the_formula(codec, head_size):
    x = normal(2, 32, head_size) * torch.logspace(-7, 3, head_size)
    x[0, 0, :40] = float("nan")
    x[1, 3, 5] = float("-inf")

    encoded = codec.encode(x)
    codes = unpack(encoded.codes, codec.bits)
    restored = codec.decode(encoded, head_size)

    for head in range(2):
        for at, numbers in groups_of(codec, x[head], codec.group or head_size):
            scale, zero, q, values = one_group_values(x[head][numbers].numpy(), codec.bits)
            assert encoded.scales[head][at].item() == scale
            assert encoded.zeros[head][at].item() == zero
            assert codes[head][numbers].tolist() == q.tolist()
            assert restored[head][numbers].tolist() == values.tolist()


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keys", known_codecs())
@pytest.mark.parametrize("values", known_codecs())
def test_encoded_cells_are_as_large_as_the_layout_says(keys, values, dtype, head_size, group):
    cells = packed_format(keys, values, group, 3, head_size, dtype.itemsize * 8)
    x = normal(3, cells.cell_tokens, head_size).to(dtype)

    encoded = [
        make_codec(name, side, group=group, dtype=dtype).encode(x)
        for name, side in ((keys, "keys"), (values, "values"))
    ]

    codes = [side.codes for side in encoded]
    params = [part for side in encoded for part in (side.scales, side.zeros)]
    sizes = [part[0].numel() * part.itemsize for part in codes + params]
    assert sizes == [end - start for start, end in pairwise(cells.offsets)]
    assert sum(sizes) * 3 / cells.cell_tokens == cells.bytes_per_token


@every_codec
def test_a_codec_s_own_format_says_how_many_bytes_it_makes(codec):
    encoded = codec.encode(normal(1, 64, 80))

    side = codec.side_format(80, 16)

    assert (side.bits, side.per_channel) == (codec.bits, codec.per_channel)
    assert encoded.codes.shape == (1, 64, side.code_bytes(80))
    assert encoded.scales.numel() == encoded.zeros.numel() == side.num_params(80, 64)
    assert encoded.scales.dtype == encoded.zeros.dtype == torch.float16


# Errors


@every_codec
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_no_number_is_off_by_more_than_half_a_step(codec, head_size):
    x = normal(2, 32, head_size) * 3 + 1

    encoded = codec.encode(x)
    restored = codec.decode(encoded, head_size)

    # Wide groups: neither the rounded zero nor the rounded scale costs more than half a step.
    scale = spread(codec, encoded.scales.double(), x.shape)
    float32 = (2 * (x - restored).abs() + 64).double() * 2.0**-24
    assert ((restored.double() - x.double()).abs() <= scale / 2 + float32).all()
    assert ((restored.double() - x.double()).abs() > scale / 4).any()


FINITE = st.floats(-65504, 65504, width=32)
SMALL_CODECS = [UniformCodec(8), UniformCodec(4, 4), UniformCodec(2, 5), KiviKeyCodec(2, 4)]
small_codecs = st.sampled_from(SMALL_CODECS)


@st.composite
def tensors(draw, elements=FINITE):
    """A small [1, 8, 8], of numbers of one magnitude or of all."""
    values = draw(arrays_of.arrays(np.float32, (1, 8, 8), elements=elements))
    shift = np.float32(draw(st.sampled_from([0, 0, 1, -1000.3])))
    scale = np.float32(draw(st.sampled_from([1, 1e-3, 1e-9])))
    return torch.from_numpy((values * scale + shift).clip(-65504, 65504))


@given(small_codecs, tensors())
def test_decoding_stays_within_the_derived_bound(codec, x):
    encoded = codec.encode(x)
    restored = codec.decode(encoded, 8)

    error = (restored.double() - x.double()).abs()
    assert (error <= allowed_error(codec, x, encoded, restored)).all()


@given(small_codecs, tensors())
def test_encoding_what_was_decoded_gives_the_same_bytes(codec, x):
    first = codec.encode(x)
    restored = codec.decode(first, 8)

    second = codec.encode(restored)

    # True where both ends of the grid are taken, and the grid is not narrow beside its place: the
    # rounded zero misses the least number by less than half a step, and the scale is a normal one.
    scales, zeros = first.scales.double(), first.zeros.double()
    missed = (zeros - reduced(codec, x.double(), largest=False)).abs()
    levels = 2**codec.bits - 1
    fixed = (missed < scales * 0.499) & (scales >= 2**-14) & (zeros.abs() < 1024 * levels * scales)
    assert torch.equal(first.scales[fixed], second.scales[fixed])
    assert torch.equal(first.zeros[fixed], second.zeros[fixed])
    again = codec.decode(second, 8)
    same = spread(codec, fixed.double(), x.shape).bool()
    assert torch.equal(restored[same], again[same])
    # Elsewhere the bound holds for what was decoded, as for any other numbers.
    inside = restored.clamp(-65504, 65504)
    error = (again.double() - inside.double()).abs()
    assert (error <= allowed_error(codec, inside, second, again)).all()


def test_encoding_twice_changes_no_byte_of_ordinary_numbers():
    for codec in CODECS:
        encoded = codec.encode(normal(2, 32, 80))

        again = codec.encode(codec.decode(encoded, 80))

        assert torch.equal(again.codes, encoded.codes)
        assert torch.equal(again.scales, encoded.scales)
        assert torch.equal(again.zeros, encoded.zeros)


@every_codec
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 65504.0, -65504.0, 2.0**-24])
def test_equal_numbers_that_float16_has_come_back_exactly(codec, value):
    x = torch.full((1, 32, 80), value)

    restored = codec.decode(codec.encode(x), 80)

    assert torch.equal(restored, x)


@every_codec
@pytest.mark.parametrize("value", [1000.3, -1000.3, 1e-9, 1e-30, 3.14159])
def test_equal_numbers_come_back_as_near_as_float16_has_them(codec, value):
    x = torch.full((1, 32, 80), value)

    restored = codec.decode(codec.encode(x), 80)

    assert ((restored - x).abs() <= (x.half().float() - x).abs()).all()


def test_the_order_of_zeros_of_both_signs_does_not_matter():
    for codec in CODECS:
        encoded = [codec.encode(torch.tensor(z).repeat(1, 32, 40)) for z in ([0.0, -0.0], [-0.0])]

        assert all(side.zeros.view(torch.int16).count_nonzero() == 0 for side in encoded)


# Numbers that are none


@every_codec
def test_what_is_not_finite_is_counted_and_held_within_float16(codec):
    x = normal(2, 64, 64)
    x[0, 3, 5] = float("nan")
    x[0, 4, 6] = float("inf")
    x[1, 40, 6] = float("-inf")
    x[1, 41, 7] = 1e30  # finite, but float16 has it not: held, not counted
    held = x.nan_to_num(nan=0.0, posinf=65504.0, neginf=-65504.0).clamp(-65504, 65504)

    encoded = codec.encode(x)
    restored = codec.decode(encoded, 64)

    assert encoded.nonfinite == 3
    assert restored.isfinite().all()
    assert torch.equal(encoded.codes, codec.encode(held).codes)
    assert ((restored - held).abs() <= allowed_error(codec, held, encoded, restored)).all()


@every_codec
def test_a_nan_harms_no_group_but_its_own(codec):
    x = normal(1, 64, 64)
    broken = x.clone()
    broken[0, 33, 40] = float("nan")

    plain, encoded = codec.encode(x), codec.encode(broken)

    assert (plain.nonfinite, encoded.nonfinite) == (0, 1)
    assert ((plain.scales != encoded.scales) | (plain.zeros != encoded.zeros)).sum() <= 1
    changed = (codec.decode(plain, 64) != codec.decode(encoded, 64)).nonzero()
    along = 2 if codec.per_channel else 1
    assert set(changed[:, along].tolist()) <= {40 if codec.per_channel else 33}


# Inputs


@every_codec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_is_encoded_as_its_float32(codec, dtype):
    x = normal(2, 32, 96).to(dtype)

    encoded, same = codec.encode(x), codec.encode(x.float())

    assert torch.equal(encoded.codes, same.codes)
    assert torch.equal(encoded.scales, same.scales)
    assert codec.decode(encoded, 96).dtype == torch.float32


@every_codec
def test_a_view_is_encoded_as_its_copy_and_left_alone(codec):
    cache = normal(32, 3, 128)
    before = cache.clone()
    view = cache[:, 1:, ::2].transpose(0, 1)

    encoded = codec.encode(view)

    assert torch.equal(encoded.codes, codec.encode(view.contiguous()).codes)
    assert torch.equal(cache, before)


@every_codec
def test_no_tokens_give_no_bytes(codec):
    encoded = codec.encode(torch.empty(2, 0, 64))

    assert encoded.codes.numel() == encoded.scales.numel() == 0
    assert codec.decode(encoded, 64).shape == (2, 0, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_none_keeps_every_number_as_it_is(dtype):
    codec = make_codec("none", "keys", dtype=dtype)
    x = normal(2, 7, 80).to(dtype)
    x[0, 0, :2] = torch.tensor([float("nan"), float("inf")])

    encoded = codec.encode(x)

    assert torch.equal(codec.decode(encoded, 80).nan_to_num(7), x.float().nan_to_num(7))
    assert encoded.nonfinite == 2
    assert torch.equal(encoded.codes, x.view(torch.uint8))


# Who sees whom


@given(st.sampled_from(SMALL_CODECS[:3]), tensors(), st.permutations(range(8)))
def test_permuted_tokens_are_permuted_bytes_per_token(codec, x, order):
    encoded, permuted = codec.encode(x), codec.encode(x[:, order])

    assert torch.equal(permuted.codes, encoded.codes[:, order])
    assert torch.equal(permuted.scales, encoded.scales[:, order])
    assert torch.equal(permuted.zeros, encoded.zeros[:, order])


@given(tensors(), tensors())
def test_a_group_of_tokens_does_not_see_the_others_per_channel(x, other):
    codec = KiviKeyCodec(2, 4)
    mixed = torch.cat([x[:, :4], other[:, 4:]], dim=1)

    encoded, beside_others = codec.encode(x), codec.encode(mixed)

    assert torch.equal(encoded.codes[:, :4], beside_others.codes[:, :4])
    assert torch.equal(encoded.scales[:, 0], beside_others.scales[:, 0])
    assert torch.equal(encoded.zeros[:, 0], beside_others.zeros[:, 0])


@every_codec
def test_heads_do_not_see_each_other(codec):
    x = normal(3, 32, 64)

    encoded = codec.encode(x)

    for head in range(3):
        alone = codec.encode(x[head : head + 1])
        assert torch.equal(alone.codes[0], encoded.codes[head])
        assert torch.equal(alone.scales[0], encoded.scales[head])


def relative_error(codec, x):
    return float((codec.decode(codec.encode(x), x.shape[2]) - x).norm() / x.norm())


def test_outlier_channels_cost_2_bits_per_token_three_times_what_they_cost_per_channel():
    """KIVI's reason for keys per channel: the same bytes, less than a third of the error."""
    keys = normal(2, 128, 128)
    keys[..., ::32] += 20
    per_token, per_channel = UniformCodec(2, 32), KiviKeyCodec(2, 32)

    ratio = relative_error(per_token, keys) / relative_error(per_channel, keys)

    sides = [codec.side_format(128, 16) for codec in (per_token, per_channel)]
    assert len({(s.code_bytes(128), s.num_params(128, 32)) for s in sides}) == 1
    assert ratio > 3


# Rotation


@pytest.mark.parametrize(
    ("head_size", "block"), [(64, 64), (80, 16), (96, 32), (128, 128), (256, 256)]
)
def test_the_rotation_is_orthonormal_symmetric_and_flat_within_its_blocks(head_size, block):
    matrix = hadamard(head_size)

    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(head_size), atol=1e-6, rtol=0)
    blocks = torch.arange(head_size) // block
    inside = blocks[:, None] == blocks[None, :]
    assert (matrix[~inside] == 0).all()
    torch.testing.assert_close(
        matrix[inside].abs(), torch.full((head_size * block,), block**-0.5), atol=1e-7, rtol=0
    )
    assert matrix[0, :block].gt(0).all()
    assert matrix[1, 1] < 0


def test_rotating_twice_is_the_identity_and_keeps_products():
    queries, keys = normal(5, 80, seed=1).double(), normal(7, 80, seed=2)

    torch.testing.assert_close(rotate(rotate(keys)), keys, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        rotate(queries) @ rotate(keys).T, queries.float() @ keys.T, atol=2e-5, rtol=0
    )


def test_rotation_spreads_an_outlier_so_that_4_bits_over_the_head_lose_less():
    x = normal(1, 64, 128)
    x[..., 17] += 30

    plain = UniformCodec(4)
    rotated_error = float((rotate(plain.decode(plain.encode(rotate(x)), 128)) - x).norm())

    assert rotated_error / float(x.norm()) < relative_error(plain, x) / 2


# Names


def test_the_names_of_the_table_have_the_codecs_of_the_table():
    made = {
        (name, side): make_codec(name, side, group=32, dtype=torch.bfloat16)
        for name in known_codecs()
        for side in ("keys", "values")
    }

    assert known_codecs() == sorted([*PACKED, "none"])
    assert made["int8", "keys"] == made["int8", "values"] == UniformCodec(8, 32)
    assert made["int4", "keys"] == made["int4", "values"] == UniformCodec(4, 32)
    assert made["kivi4", "keys"] == KiviKeyCodec(4, 32)
    assert made["kivi4", "values"] == UniformCodec(4, 32)
    assert made["kivi2", "keys"] == KiviKeyCodec(2, 32)
    assert made["kivi2", "values"] == UniformCodec(2, 32)
    assert made["none", "values"] == ExactCodec(torch.bfloat16)


def test_group_is_that_of_int8_and_int4_alone():
    default = packed_format("int4", "kivi4", 0, 2, 80, 16)
    grouped = packed_format("int4", "kivi4", 32, 2, 80, 16)

    assert (default.keys.group, grouped.keys.group) == (80, 32)
    assert default.values == grouped.values


@pytest.mark.parametrize(
    ("names", "group", "bits", "message"),
    [
        (("int3", "int4"), 0, 16, r"the codec 'int3' of keys is not known; allowed: int4, .*Did"),
        (("int4", "kivi"), 0, 16, r"the codec 'kivi' of values is not known"),
        (("fp8", "int4"), 0, 16, r"the codec 'fp8' of keys is not known; allowed: int4, int8"),
        (("int4", "int4"), 64, 16, r"got 64; allowed: 0 for the whole head, or 32"),
        (("none", "int4"), 0, 8, r"got 8 bits; allowed: 16 or 32"),
    ],
)
def test_wrong_names_and_numbers_are_refused(names, group, bits, message):
    with pytest.raises(ConfigError, match=message):
        packed_format(*names, group, 2, 64, bits)


def test_heads_that_do_not_fill_bytes_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"got head_size 66; allowed: multiples of 4"):
        packed_format("kivi2", "int8", 0, 2, 66, 16)
    assert packed_format("int4", "int8", 0, 2, 66, 16).head_size == 66


@pytest.mark.parametrize(
    ("codec", "x", "message"),
    [
        (UniformCodec(4), torch.zeros(2, 64), r"got torch.float32 \[2, 64\]; allowed: floats \["),
        (UniformCodec(4), torch.zeros(1, 2, 64, dtype=torch.int32), r"got torch.int32 \[1, 2, 64"),
        (UniformCodec(4), torch.zeros(1, 2, 65), r"got head_size 65; allowed: multiples of 2"),
        (KiviKeyCodec(2), torch.zeros(1, 33, 64), r"got 33; allowed: multiples of 32"),
        (ExactCodec(torch.float16), torch.zeros(1, 2, 64), r"float16; got torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(codec, x, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformCodec(3), "bits must be 2, 4 or 8"),
        (lambda: UniformCodec(4, -1), "group at least 0"),
        (lambda: KiviKeyCodec(16), "bits must be 2, 4 or 8"),
        (lambda: KiviKeyCodec(2, 0), "group at least 1"),
        (lambda: ExactCodec(torch.float64), "16 or 32 bits; got torch.float64"),
        (lambda: ExactCodec(torch.float16).side_format(64, 32), "32 bits, not 16"),
    ],
)
def test_codecs_that_no_cell_can_hold_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
