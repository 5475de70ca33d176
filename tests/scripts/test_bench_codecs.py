import math

import bench_codecs
import codec_formats
import pytest
import records
import torch
import transformers
from codec_formats import GROUP_TOKENS, Format, Side

from vllm_kvpress.policies.codecs import packed_format
from vllm_kvpress.testbed import model_path
from vllm_kvpress.testbed.documents import make_document

FORMATS = {
    form.name: form for form in (*codec_formats.our_formats(), *codec_formats.vllm_formats())
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(side, x):
    return float((side.restore(x)[0] - x).norm() / x.norm())


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The record and the plot of the toy run, made as a user makes them."""
    path = tmp_path_factory.mktemp("codecs") / "toy.json"
    assert bench_codecs.main(["--toy", "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def short():
    """The caches of the toy's document, and its tokens."""
    arguments = bench_codecs.parse_arguments(["--toy", "--queries", "40"])
    (layers,) = bench_codecs.read_caches(arguments)
    document = make_document("needle", num_tokens=256, seed=arguments.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    tokens = tokenizer.encode(document.prompt(document.questions[0]))
    return layers, torch.tensor([tokens])


# The caches that are measured


def test_keys_and_values_are_those_of_the_plain_model(short):
    layers, tokens = short
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)

    with torch.inference_mode():
        cache = model.eval()(tokens, use_cache=True).past_key_values

    assert len(layers) == len(cache.layers) == 4
    for layer, plain in zip(layers, cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, plain.keys[0])
        torch.testing.assert_close(layer.values, plain.values[0])


def test_queries_have_rope_and_the_attention_is_that_of_the_model(short):
    layers, tokens = short
    outputs = []
    attend = transformers.AttentionInterface()["sdpa"]

    def keep_outputs(*arguments, **options):
        outputs.append(attend(*arguments, **options)[0])
        return outputs[-1], None

    transformers.AttentionInterface.register("kept_outputs", keep_outputs)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32, attn_implementation="kept_outputs"
    )
    with torch.inference_mode():
        model.eval()(tokens)

    for layer, output in zip(layers, outputs, strict=True):
        own = bench_codecs.attend_last(*layer)
        torch.testing.assert_close(own, output[0, -40:].transpose(0, 1), atol=1e-5, rtol=1e-4)


# Sums


def test_a_format_that_keeps_everything_has_no_error(short):
    exact = Side(lambda x: (x, None), lambda head_size: 4 * head_size)

    sums = bench_codecs.layer_sums(short[0][0], Format("exact", exact, exact))

    assert sums["keys"][0] == sums["values"][0] == sums["output"][0] == 0
    assert min(size for _, size in sums.values()) > 0
    assert math.isnan(sums["keys_theory"][0])


def test_tokens_behind_the_last_whole_group_stay_exact():
    zero = Side(lambda x: (torch.zeros_like(x), None), lambda head_size: 0)
    x = normal(2, 2 * GROUP_TOKENS + 5, 64)

    restored, _ = bench_codecs.restore(zero, x)

    assert (restored[:, : 2 * GROUP_TOKENS] == 0).all()
    assert torch.equal(restored[:, 2 * GROUP_TOKENS :], x[:, 2 * GROUP_TOKENS :])


def test_errors_are_pooled_over_everything_and_over_each_layer():
    side = Side(lambda x: (x, None), lambda head_size: head_size / 2)
    sums = torch.tensor([[[1.0, 4.0]], [[8.0, 32.0]]])  # a layer: one (error, size)

    result = bench_codecs.summary(Format("f", side, side), 64, sums, ["keys"])

    assert result["errors"]["keys"] == {"all": 0.5, "per_layer": [0.5, 0.5]}
    assert result["bytes"] == {"keys": 32, "values": 32}


def test_the_largest_channel_is_found():
    x = torch.ones(2, 50, 64)
    layer = bench_codecs.Layer(x, x * (1 + 9 * (torch.arange(64) == 3)), x)

    assert bench_codecs.outliers([layer]) == {"keys": [10.0], "values": [1.0]}


# Formats


@pytest.mark.parametrize(
    ("name", "group"),
    [("int8", 0), ("int8", 32), ("int4", 0), ("int4", 32), ("kivi4", 0), ("kivi2", 0)],
)
@pytest.mark.parametrize("head_size", [64, 80])
def test_bytes_of_our_formats_are_those_of_the_cells(name, group, head_size):
    form = FORMATS[name + f", group {group}" * bool(group)]
    cells = packed_format(name, name, group, 1, head_size, 32)

    total = form.keys.num_bytes(head_size) + form.values.num_bytes(head_size)

    assert total == cells.bytes_per_token


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [
        ("fp8", 64, 64),
        ("int8_per_token_head", 68, 68),
        ("int4_per_token_head", 36, 36),
        ("turboquant_4bit_nc", 34, 36),
        ("turboquant_k3v4_nc", 26, 36),
        ("turboquant_3bit_nc", 26, 28),
    ],
)
def test_bytes_of_vllm_s_formats_are_those_that_vllm_counts(name, keys, values):
    form = FORMATS[name]

    assert (form.keys.num_bytes(64), form.values.num_bytes(64)) == (keys, values)


@pytest.mark.parametrize(
    ("bits", "levels", "left"),
    [
        (1, [0.7979], 0.3634),
        (2, [0.4528, 1.510], 0.1175),
        (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    ],
)
def test_the_gaussian_codebook_is_that_of_max_s_table(bits, levels, left):
    """Max, "Quantizing for minimum distortion", 1960, table I: three to four digits."""
    found, error = codec_formats.gaussian_codebook(bits)

    half = 2 ** (bits - 1)
    torch.testing.assert_close(found[half:].tolist(), levels, atol=1e-3, rtol=0)
    torch.testing.assert_close(found, -found.flip(0), atol=1e-9, rtol=0)
    assert error == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8"])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_gaussian_numbers_lose_what_the_theory_says(name, side):
    """Steps that are not small against the numbers, at 2 bits, are where the theory bends."""
    x = normal(2, 512, 64)

    restored, theory = getattr(FORMATS[name], side).restore(x)

    measured = float((restored - x).square().sum())
    assert measured == pytest.approx(float(theory.sum()), rel=0.15)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_in_order_of_their_bits_on_gaussian_numbers(name):
    """What a format loses lies between what theory allows at its rate, 2**-bits, and 4 times it."""
    side = FORMATS[name].values
    bits = 8 * side.num_bytes(64) / 64

    error = relative_error(side, normal(2, 512, 64))

    assert 2**-bits < error < (16 if name == "fp8" else 4) * 2**-bits


@pytest.mark.parametrize("name", ["int4_per_token_head", "turboquant_4bit_nc"])
def test_the_rotated_formats_of_vllm_bear_one_large_channel(name):
    x = normal(1, 64, 64)
    x[..., 5] += 10

    assert relative_error(FORMATS[name].keys, x) < 0.7 * relative_error(FORMATS["int4"].keys, x)


def test_int4_per_token_head_has_a_whole_zero():
    """Numbers above 0 start at code 0, not at their least one: 15 steps do not reach them all."""
    x = codec_formats.rotate(torch.full((1, 1, 64), 100.0) + torch.arange(64) / 63)
    generator = torch.Generator().manual_seed(codec_formats.SIGNS_SEED)
    signs = 2.0 * torch.randint(0, 2, (64,), generator=generator) - 1

    restored, _ = codec_formats.int4_per_token_head(x * signs)

    torch.testing.assert_close(
        codec_formats.rotate(restored * signs), torch.ones(1, 1, 64), atol=1e-3, rtol=0
    )


def test_turboquant_keys_keep_their_length():
    x = normal(2, 33, 64) * 7

    restored, _ = codec_formats.turboquant_keys(3, x)

    torch.testing.assert_close(restored.norm(dim=-1), x.norm(dim=-1), rtol=2**-11, atol=0)


def test_halves_are_rounded_away_from_zero():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.0, 0.49, 0.5, 1.5])

    assert codec_formats.away_from_zero(x).tolist() == [-3, -2, -1, 0, 0, 1, 2]


# The whole script


def test_the_toy_run_writes_a_record_of_every_format(toy):
    record = records.read_record(toy)

    assert [result["format"] for result in record["results"]] == list(FORMATS)
    assert record["settings"]["tasks"] == ["needle"]
    assert record["settings"]["head_size"] == 64
    assert 200 < record["settings"]["lengths"][0] <= 256
    for result in record["results"]:
        for name in (*bench_codecs.SIDES, *bench_codecs.OUTPUTS):
            errors = result["errors"][name]
            assert len(errors["per_layer"]) == 4
            assert 0 < min(errors["per_layer"]) <= errors["all"] <= max(errors["per_layer"]) < 1


def test_real_keys_have_channels_that_stick_out_and_kivi_s_groups_bear_them(toy):
    record = records.read_record(toy)
    found = {r["format"]: r["errors"]["keys"]["per_layer"][0] for r in record["results"]}

    # The first layer's, at the same bytes.
    assert record["settings"]["largest_channel"]["keys"][0] > 5
    assert found["int2, group 32"] > 2 * found["kivi2"]
    assert found["int4, group 32"] > 2 * found["kivi4"]


def test_the_toy_run_draws_its_plot_and_draws_the_same_again(toy):
    plot = toy.with_suffix(".png")
    first = plot.read_bytes()

    bench_codecs.main(["--plot-only", "--output", str(toy)])

    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert plot.read_bytes() == first


def test_the_table_has_a_row_a_format(toy):
    table = bench_codecs.results_table(records.read_record(toy)["results"])

    assert table.row_count == len(FORMATS)
    assert list(table.columns[3].cells)[list(table.columns[0].cells).index("fp8")] == "-"


def test_the_kept_record_is_that_of_the_default_run():
    arguments = vars(bench_codecs.parse_arguments([]))
    record = records.read_record(records.RESULTS / "cpu_codecs.json")

    for name in ("tasks", "num_tokens", "queries"):
        assert record["settings"][name] == arguments[name]
    assert record["seeds"]["documents"] == arguments["seed"]
    assert [result["format"] for result in record["results"]] == list(FORMATS)
