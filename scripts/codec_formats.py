"""The formats that bench_codecs.py compares: our codecs, and vLLM's own from their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from vllm_kvpress.layout import PARAM_BYTES, SideFormat
from vllm_kvpress.policies.codecs import Codec, KiviKeyCodec, UniformCodec, rotate

GROUP_TOKENS = 32
SIGNS_SEED = 7
ROTATED = " + H"
OURS, VLLMS = "ours", "vLLM"
Restored = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Side:
    """Keys, or values, of one format.

    Attributes:
        restore: from x [heads, tokens, head_size] to x^, and the squared error that equal steps
            lose in theory, anything whose sum counts; None if steps are not equal.
        num_bytes: bytes of one token in one head, from head_size.
    """

    restore: Callable[[torch.Tensor], Restored]
    num_bytes: Callable[[int], float]


@dataclass(frozen=True)
class Format:
    """A format of keys and values under one name."""

    name: str
    keys: Side
    values: Side
    family: str = OURS


# Ours


def restore_with(codec: Codec, rotated: bool, x: torch.Tensor) -> Restored:
    """Encode and decode with a codec of ours, between two rotations if `rotated`."""
    encoded = codec.encode(rotate(x) if rotated else x)
    decoded = codec.decode(encoded, x.shape[-1])
    numbers_per_scale = x.numel() / encoded.scales.numel()
    noise = encoded.scales.double().square() / 12 * numbers_per_scale
    return rotate(decoded) if rotated else decoded, noise


def bytes_with(codec: Codec, head_size: int) -> float:
    """Return bytes of one token in one head, scales and zeros included, as the layout counts."""
    side: SideFormat = codec.side_format(head_size, 32)
    params = 2 * PARAM_BYTES * side.num_params(head_size, GROUP_TOKENS) / GROUP_TOKENS
    return side.code_bytes(head_size) + params


def our_format(name: str, keys: Codec, values: Codec, rotated: bool) -> Format:
    """Return a format of two codecs."""
    sides = [
        Side(partial(restore_with, codec, rotated), partial(bytes_with, codec))
        for codec in (keys, values)
    ]
    return Format(name + ROTATED * rotated, *sides)


def our_formats() -> Iterator[Format]:
    """Yield every codec of ours, and 2 bits per token as a contrast, plain and rotated."""
    group = GROUP_TOKENS
    codecs: dict[str, tuple[Codec, Codec]] = {
        "int8": (UniformCodec(8), UniformCodec(8)),
        "int8, group 32": (UniformCodec(8, group), UniformCodec(8, group)),
        "int4": (UniformCodec(4), UniformCodec(4)),
        "int4, group 32": (UniformCodec(4, group), UniformCodec(4, group)),
        "kivi4": (KiviKeyCodec(4), UniformCodec(4, group)),
        "kivi2": (KiviKeyCodec(2), UniformCodec(2, group)),
        "int2, group 32": (UniformCodec(2, group), UniformCodec(2, group)),
    }
    for name, (keys, values) in codecs.items():
        for rotated in (False, True):
            yield our_format(name, keys, values, rotated)


# vLLM's


def away_from_zero(x: torch.Tensor) -> torch.Tensor:
    """Round halves away from zero."""
    return x.sign() * (x.abs() + 0.5).floor()


def fp8(x: torch.Tensor) -> Restored:
    """`fp8`: e4m3, held within +-448, with the default scale of 1."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float(), None


def int8_per_token_head(x: torch.Tensor) -> Restored:
    """`int8_per_token_head`: s = max|x| / 127 of a token and head, float32; no zero."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6)
    codes = away_from_zero(x / scale).clamp(-128, 127)
    return codes * scale, scale.double().square() / 12 * x.shape[-1]


def int4_per_token_head(x: torch.Tensor) -> Restored:
    """`int4_per_token_head`: y = H(signs * x), s = (max y - min y) / 15, whole zero z in 0..15.

    q = round(y / s + z), y^ = (q - z) * s. The float32 scale hides z in its last four bits, a
    relative 2**-20 that is left out here; the signs are drawn here, not vLLM's.
    """
    generator = torch.Generator().manual_seed(SIGNS_SEED)
    signs = 2.0 * torch.randint(0, 2, (x.shape[-1],), generator=generator) - 1
    y = rotate(x * signs)
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6)
    zero = away_from_zero(-low / scale).clamp(0, 15)
    codes = away_from_zero(y / scale + zero).clamp(0, 15)
    noise = scale.double().square() / 12 * x.shape[-1]
    return rotate((codes - zero) * scale) * signs, noise


@lru_cache
def gaussian_codebook(bits: int) -> tuple[torch.Tensor, float]:
    """Return Lloyd and Max's levels for N(0, 1), float64, and the squared error that they leave.

    A level is the mean of its cell, (phi(a) - phi(b)) / (Phi(b) - Phi(a)); cells meet half-way
    between levels. Iterated until nothing moves.
    """
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    for _ in range(10_000):
        edges = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
        density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        moved = -density.diff() / mass
        if torch.equal(moved, levels) or (moved - levels).abs().max() < 1e-13:
            break
        levels = moved
    return levels, 1 - float((mass * levels.square()).sum())


def turboquant_keys(bits: int, x: torch.Tensor) -> Restored:
    """TurboQuant's keys: ||x|| in float16, and Lloyd-Max codes of H x / ||x||, taken as N(0, 1/d).

    "nc": what the codes stand for is brought back to length 1 before it is multiplied by ||x||.
    The theory is what the codebook leaves of a Gaussian.
    """
    levels, left = gaussian_codebook(bits)
    levels = (levels / math.sqrt(x.shape[-1])).float()
    norm = x.norm(dim=-1, keepdim=True)
    codes = torch.bucketize(rotate(x / (norm + 1e-8)), (levels[1:] + levels[:-1]) / 2)
    unit = levels[codes] / levels[codes].norm(dim=-1, keepdim=True)
    return rotate(unit) * norm.half().float(), norm.double().square() * left


def turboquant_values(bits: int, x: torch.Tensor) -> Restored:
    """TurboQuant's values: not rotated; equal steps from min to max of a token and head.

    Codes are found with float32 scale and zero, and decoded with those rounded to float16.
    """
    top = 2**bits - 1
    low = x.amin(-1, keepdim=True)
    scale = ((x.amax(-1, keepdim=True) - low) / top).clamp_min(1e-8)
    codes = ((x - low) / scale + 0.5).floor().clamp(0, top)
    noise = scale.double().square() / 12 * x.shape[-1]
    return codes * scale.half().float() + low.half().float(), noise


def vllm_formats() -> Iterator[Format]:
    """Yield vLLM's own formats, with the bytes that vLLM counts for them."""
    for name, restore, num_bytes in (
        ("fp8", fp8, lambda head_size: head_size),
        ("int8_per_token_head", int8_per_token_head, lambda head_size: head_size + 4),
        ("int4_per_token_head", int4_per_token_head, lambda head_size: head_size / 2 + 4),
    ):
        side = Side(restore, num_bytes)
        yield Format(name, side, side, VLLMS)
    for name, key_bits, value_bits in (
        ("turboquant_4bit_nc", 4, 4),
        ("turboquant_k3v4_nc", 3, 4),
        ("turboquant_3bit_nc", 3, 3),
    ):
        keys = Side(partial(turboquant_keys, key_bits), partial(_turboquant_bytes, key_bits, 2))
        values = Side(
            partial(turboquant_values, value_bits), partial(_turboquant_bytes, value_bits, 4)
        )
        yield Format(name, keys, values, VLLMS)


def _turboquant_bytes(bits: int, params: int, head_size: int) -> float:
    return math.ceil(head_size * bits / 8) + params
