"""The structured start: weights that already look up what followed the last time.

Retrieval that has to emerge from noise costs more steps than a CPU affords. So the first two layers
begin as the circuit that trained models arrive at, in clear blocks of the hidden state; all else is
noise, and training is free to change everything. The blocks, and who writes them:

    constant | is a key | code of the token | token 1 .. 4 places before | newest key
    ------------ embedding --------------- | ---------- layer 0 ----------------------

Layer 0 has four heads that look 1 to 4 tokens back, by rotary positions alone, and one that looks
at the newest name or variable. All heads of layer 1 compare these blocks with those of earlier
tokens: they look for what came after the same context, and copy it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from testbed_training.model import EMBEDDING, Shape, Weights
from testbed_training.vocabulary import token_ids
from vllm_kvpress.testbed.language import NAMES, VARIABLES

__all__ = ["structured_weights"]

_CODE, _CONTEXT = 54, 40
_OFFSETS = 4
CONSTANT_AT, KEY_AT, CODE_AT = 0, 1, 2
CONTEXT_AT = CODE_AT + _CODE
# Every embedding has the norm 1, so that the constant stays one after normalisation.
_CONSTANT = 0.5
_KEY = 0.5
_CONTEXT_NORM = 0.6

# Rotary pairs that turn within a text's length tell positions; the slow ones carry content.
_POSITIONAL_PAIRS, _FIRST_CONTENT_PAIR = 13, 14
# Amplitudes in nats of the heads that look at one place: the fast pairs tell neighbours apart.
_PLACE_NATS = (14, 12, 8, 8, 6, 6, 5, 5, 4, 4, 3, 3, 3)
_KEY_NATS = 24.0
_RECENCY_NATS, _RECENCY_TOKENS = 8.0, 6.0
# What each KV head of layer 1 compares: dimensions and nats for a match of a block. The current
# token meets the one before an earlier token, the one before meets the second before, and so on.
_MATCHES = (
    {0: (18, 12.0), _OFFSETS: (18, 12.0)},
    {0: (18, 16.0), 1: (18, 16.0)},
    {0: (13, 16.0), 1: (13, 12.0), _OFFSETS: (10, 12.0)},
    {0: (9, 12.0), 1: (9, 9.0), 2: (5, 5.0), 3: (5, 5.0), _OFFSETS: (8, 9.0)},
)
_COPY_GAIN = 6.0
_NOISE, _WRITING_NOISE = 0.01, 0.001


def structured_weights(shape: Shape, seed: int) -> Weights:
    """Return the weights to start from, float32, by their names in the checkpoint."""
    assert shape.hidden == CONTEXT_AT + (_OFFSETS + 1) * _CONTEXT
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (8, 4, 64)
    generator = torch.Generator().manual_seed(seed)
    weights = _noise(shape, generator)
    projection = _orthonormal(_CONTEXT, _CODE, generator) * math.sqrt(_CODE / _CONTEXT)
    weights[EMBEDDING] = _embedding(shape, generator)
    _write_context_heads(shape, weights, projection)
    _write_copying_heads(shape, weights, projection, generator)
    return weights


def _noise(shape: Shape, generator: torch.Generator) -> Weights:
    weights: Weights = {}
    for name, size in shape.matrices().items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        structured = ".self_attn." in name and name.startswith(("model.layers.0", "model.layers.1"))
        deviation = _WRITING_NOISE if writes else _NOISE if structured else size[1] ** -0.5
        weights[name] = torch.randn(size, generator=generator) * deviation
    for name in shape.norms():
        weights[name] = torch.ones(shape.hidden)
    return weights


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    square = torch.randn(columns, columns, generator=generator)
    return torch.linalg.qr(square).Q[:rows]


def _embedding(shape: Shape, generator: torch.Generator) -> Tensor:
    ids = token_ids()
    rows = torch.zeros(shape.vocab, shape.hidden)
    rows[:, CONSTANT_AT] = _CONSTANT
    rows[[ids[f"▁{word}"] for word in (*NAMES, *VARIABLES)], KEY_AT] = _KEY
    codes = torch.nn.functional.normalize(torch.randn(shape.vocab, _CODE, generator=generator))
    left = 1 - rows.square().sum(dim=1, keepdim=True)
    rows[:, CODE_AT:CONTEXT_AT] = codes * left.sqrt()
    return rows


def _context_at(block: int) -> slice:
    """Return where a context block stands: 0 to 3 for places before, 4 for the newest key."""
    return slice(CONTEXT_AT + block * _CONTEXT, CONTEXT_AT + (block + 1) * _CONTEXT)


def _rows(shape: Shape, head: int) -> slice:
    return slice(head * shape.head_dim, (head + 1) * shape.head_dim)


def _frequencies(shape: Shape) -> Tensor:
    pairs = torch.arange(shape.head_dim // 2, dtype=torch.float64)
    return shape.rope_theta ** (-2 * pairs / shape.head_dim)


def _write_context_heads(shape: Shape, weights: Weights, projection: Tensor) -> None:
    """Make layer 0 write the tokens before, and the newest key, beside each token."""
    scale = math.sqrt(shape.hidden)
    constant = _CONSTANT * scale
    query, key, value, output = _attention_of(weights, 0)
    half = shape.head_dim // 2
    for head, profile in enumerate(_profiles(shape)):
        # A query of amplitude a and phase p meets a constant key of strength 1: a cos(turn + p).
        rows, kv_rows = _rows(shape, head), _rows(shape, head // 2)
        query[rows][:_POSITIONAL_PAIRS, CONSTANT_AT] = profile.real.float() / constant
        query[rows][half : half + _POSITIONAL_PAIRS, CONSTANT_AT] = profile.imag.float() / constant
        strength = math.sqrt(shape.head_dim)
        key[kv_rows][:_POSITIONAL_PAIRS, CONSTANT_AT] = strength / constant
        value[kv_rows][:_CONTEXT, CODE_AT:CONTEXT_AT] = projection / scale
        gain = _CONTEXT_NORM / math.sqrt(1 - _CONSTANT**2)
        output[_context_at(head), rows][:, :_CONTEXT] = torch.eye(_CONTEXT) * gain
    # The last pair hardly turns: a key's flag counts the same at any distance.
    newest, last_pair = _OFFSETS, half - 1
    nats = math.sqrt(_KEY_NATS * math.sqrt(shape.head_dim))
    query[_rows(shape, newest)][last_pair, CONSTANT_AT] = nats / constant
    key[_rows(shape, newest // 2)][last_pair, KEY_AT] = nats / (_KEY * scale)


def _attention_of(weights: Weights, layer: int) -> Iterator[Tensor]:
    return (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")


def _profiles(shape: Shape) -> list[Tensor]:
    """Return for each context head the complex amplitudes, in nats, of its positional pairs."""
    frequencies = _frequencies(shape)[:_POSITIONAL_PAIRS]
    nats = torch.tensor(_PLACE_NATS, dtype=torch.float64)
    places = [torch.polar(nats, -frequencies * place) for place in range(1, _OFFSETS + 1)]
    return [*places, _recency(shape, frequencies)]


def _recency(shape: Shape, frequencies: Tensor) -> Tensor:
    """Return amplitudes whose sum falls like a logarithm of the distance, by least squares."""
    steps = torch.linspace(0, math.log(shape.max_positions), 400, dtype=torch.float64)
    distances = torch.cat((torch.arange(64, dtype=torch.float64), steps.exp()))
    wanted = -_RECENCY_NATS * torch.log1p(distances / _RECENCY_TOKENS)
    turns = distances[:, None] * frequencies
    waves = torch.cat((turns.cos(), turns.sin(), torch.ones(len(distances), 1)), dim=1)
    ridge = 1e-2 * torch.eye(waves.shape[1], dtype=torch.float64)
    found = torch.linalg.solve(waves.T @ waves + ridge, waves.T @ wanted)
    count = len(frequencies)
    return torch.complex(found[:count], -found[count : 2 * count])


def _write_copying_heads(
    shape: Shape, weights: Weights, projection: Tensor, generator: torch.Generator
) -> None:
    """Make layer 1 copy what came after the same context."""
    query, key, value, output = _attention_of(weights, 1)
    # After layer 0 the norm has grown by the context blocks.
    scale = math.sqrt(shape.hidden / (1 + (_OFFSETS + 1) * _CONTEXT_NORM**2))
    code, context = math.sqrt(1 - _CONSTANT**2) * scale, _CONTEXT_NORM * scale
    content = _content_dims(shape)
    group = shape.heads // shape.kv_heads
    for kv_head, matches in enumerate(_MATCHES):
        start = 0
        for block, (dims, nats) in matches.items():
            at = [kv_head * shape.head_dim + dim for dim in content[start : start + dims]]
            start += dims
            sketch = _orthonormal(dims, _CONTEXT, generator) * math.sqrt(_CONTEXT / dims)
            strength = math.sqrt(nats * math.sqrt(shape.head_dim))
            key[at, _context_at(block)] = sketch * strength / context
            for head in range(kv_head * group, (kv_head + 1) * group):
                rows = [row + (head - kv_head) * shape.head_dim for row in at]
                if block == 0:
                    query[rows, CODE_AT:CONTEXT_AT] = sketch @ projection * strength / code
                else:
                    earlier = block if block == _OFFSETS else block - 1
                    query[rows, _context_at(earlier)] = sketch * strength / context
        value[_rows(shape, kv_head)][:_CODE, CODE_AT:CONTEXT_AT] = torch.eye(_CODE) / code
    for head in range(shape.heads):
        gain = torch.eye(_CODE) * _COPY_GAIN / shape.heads
        output[CODE_AT:CONTEXT_AT, _rows(shape, head)][:, :_CODE] = gain


def _content_dims(shape: Shape) -> list[int]:
    """Return the dimensions of a head whose rotary pairs hardly turn."""
    half = shape.head_dim // 2
    return [dim for dim in range(shape.head_dim) if dim % half >= _FIRST_CONTENT_PAIR]
