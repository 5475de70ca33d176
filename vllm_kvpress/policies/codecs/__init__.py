"""Codecs of packed cells, by the names that a policy has for keys and for values.

    name    keys                              values
    int8    per token                         per token
    int4    per token                         per token
    kivi4   per channel over 32 tokens        per token over 32 channels
    kivi2   per channel over 32 tokens        per token over 32 channels
    none    the model's own dtype, exact      the same

int8 and int4 share a scale over the whole head (`group` 0) or over 32 channels. `fp8` is a name of
a policy too, but no codec: it is the engine's own cache dtype, without packed cells.
"""

from collections.abc import Callable
from typing import Literal

import torch

from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.layout import EXACT_BITS, PackedFormat, SideFormat
from vllm_kvpress.policies.codecs.codec import Codec, Encoded
from vllm_kvpress.policies.codecs.exact import ExactCodec
from vllm_kvpress.policies.codecs.kivi import GROUP, KiviKeyCodec
from vllm_kvpress.policies.codecs.rotation import hadamard, rotate
from vllm_kvpress.policies.codecs.uniform import UniformCodec
from vllm_kvpress.schema import Codecs
from vllm_kvpress.sources import nearest

__all__ = [
    "EXACT",
    "GROUPS",
    "Codec",
    "Encoded",
    "ExactCodec",
    "KiviKeyCodec",
    "Side",
    "UniformCodec",
    "hadamard",
    "known_codecs",
    "make_codec",
    "packed_format",
    "rotate",
    "store_format",
]

Side = Literal["keys", "values"]
EXACT = "none"
GROUPS = (0, GROUP)

# Name -> what makes the codec of keys, and of values, from `group`.
_PACKED: dict[str, dict[Side, Callable[[int], Codec]]] = {
    "int8": {
        "keys": lambda group: UniformCodec(8, group),
        "values": lambda group: UniformCodec(8, group),
    },
    "int4": {
        "keys": lambda group: UniformCodec(4, group),
        "values": lambda group: UniformCodec(4, group),
    },
    "kivi4": {
        "keys": lambda group: KiviKeyCodec(4),
        "values": lambda group: UniformCodec(4, GROUP),
    },
    "kivi2": {
        "keys": lambda group: KiviKeyCodec(2),
        "values": lambda group: UniformCodec(2, GROUP),
    },
}


def known_codecs() -> list[str]:
    """Returns the names that have packed cells, `none` included: one side may be exact."""
    return sorted([*_PACKED, EXACT])


def make_codec(name: str, side: Side, *, group: int = 0, dtype: torch.dtype) -> Codec:
    """Returns the codec of one side.

    Args:
        name: One of `known_codecs()`.
        side: "keys" or "values".
        group: Channels that share a scale in int8 and int4: 0 for the whole head, or 32.
        dtype: The model's dtype, which `none` keeps.

    Raises:
        ConfigError: the name or the group is not known.
    """
    _check(name, side, group)
    return ExactCodec(dtype) if name == EXACT else _PACKED[name][side](group)


def packed_format(
    keys: str, values: str, group: int, num_kv_heads: int, head_size: int, dtype_bits: int
) -> PackedFormat:
    """Returns the cells that hold what the two codecs make.

    Args:
        keys: Name of the keys' codec.
        values: Name of the values' codec.
        group: Channels that share a scale in int8 and int4: 0 for the whole head, or 32.
        num_kv_heads: KV heads on this rank.
        head_size: Channels of a head.
        dtype_bits: Bits of an element in the model's dtype, 16 or 32.

    Raises:
        ConfigError: a name, the group or `dtype_bits` is not known.
        UnsupportedModelError: codes of a head do not fill bytes.
    """
    if dtype_bits not in EXACT_BITS:
        raise ConfigError(
            "elements of the model's dtype cannot lie in cells",
            got=f"{shown(dtype_bits)} bits",
            allowed=" or ".join(map(str, EXACT_BITS)),
        )
    return PackedFormat(
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        keys=_side_format(keys, "keys", group, head_size, dtype_bits),
        values=_side_format(values, "values", group, head_size, dtype_bits),
    )


def store_format(
    codecs: Codecs | None, num_kv_heads: int, head_size: int, dtype_bits: int
) -> PackedFormat | None:
    """Returns the cells that a policy asks for, of one store; None if it packs nothing."""
    if codecs is None or codecs.is_fp8:
        return None
    group = 0 if codecs.group == "head" else codecs.group
    return packed_format(codecs.keys, codecs.values, group, num_kv_heads, head_size, dtype_bits)


def _side_format(name: str, side: Side, group: int, head_size: int, dtype_bits: int) -> SideFormat:
    _check(name, side, group)
    if name == EXACT:
        return SideFormat(bits=dtype_bits)
    return _PACKED[name][side](group).side_format(head_size, dtype_bits)


def _check(name: str, side: Side, group: int) -> None:
    if name != EXACT and name not in _PACKED:
        raise ConfigError(
            f"the codec {shown(name)} of {side} is not known",
            allowed=", ".join(known_codecs()),
            fix=nearest(name, known_codecs()),
        )
    if group not in GROUPS:
        raise ConfigError(
            "group is not a number of channels that can share a scale",
            got=shown(group),
            allowed=f"0 for the whole head, or {GROUP}",
        )
