"""Codecs and kernels' references cannot import each other: this holds their arithmetic together."""

import pytest
import torch
from vllm_kvpress.kernels.quantize_on_write import reference

from vllm_kvpress.policies.codecs import KiviKeyCodec, UniformCodec

CODECS = [
    UniformCodec(8),
    UniformCodec(4),
    UniformCodec(4, 32),
    UniformCodec(2, 32),
    KiviKeyCodec(2),
    KiviKeyCodec(4),
    KiviKeyCodec(8, 16),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernels_reference_makes_the_codecs_bytes(codec, head_size, dtype):
    noise = torch.randn(3, 64, head_size, generator=torch.Generator().manual_seed(0))
    x = (noise * torch.logspace(-8, 4, head_size)).to(dtype)
    x[0, :40, :40] = torch.tensor([0.0, -0.0]).repeat(20)
    x[1, 5, 3] = float("nan")
    x[2, 6, 4] = float("inf")

    encoded = codec.encode(x)
    other = reference.encode(x, codec.bits, codec.group or head_size, codec.per_channel)

    assert torch.equal(encoded.codes, reference.pack(other.codes, codec.bits))
    assert torch.equal(encoded.scales.view(torch.int16), other.scales.view(torch.int16))
    assert torch.equal(encoded.zeros.view(torch.int16), other.zeros.view(torch.int16))
    assert encoded.nonfinite == int(reference.count_nonfinite(x)) == 2
