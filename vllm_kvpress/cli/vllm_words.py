"""Reads the command line of `vllm serve` just far enough to know which options were given."""

import json
from collections.abc import Mapping

from vllm_kvpress.cli.model_shape import ModelShape
from vllm_kvpress.errors import ConfigError, shown

__all__ = ["parse_vllm_words", "ranks_of", "read_options", "size_option", "steps_in_flight"]

_SHORT = {
    "dcp": "decode-context-parallel-size",
    "pcp": "prefill-context-parallel-size",
    "pp": "pipeline-parallel-size",
    "tp": "tensor-parallel-size",
}


def parse_vllm_words(words: list[str]) -> dict[str, str]:
    """Returns vLLM's options, without dashes, to their values as typed.

    A flag without a value is "true". `--option.key value` becomes `option` with a JSON object, as
    in vLLM. Words that are neither an option nor its value are skipped.
    """
    options: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit():
            name, equals, value = word.lstrip("-").partition("=")
            name = _SHORT.get(name, name)
            _store(options, name, value if equals else "true")
            name = "" if equals else name
        elif name:
            _store(options, name, word)
            name = ""
    return options


def _store(options: dict[str, str], name: str, value: str) -> None:
    outer, dot, inner = name.partition(".")
    outer = outer.replace("_", "-")
    if not dot:
        options[outer] = value
        return
    try:
        known = json.loads(options.get(outer, "{}"))
        parsed = json.loads(value)
    except ValueError:
        known, parsed = {}, value
    options[outer] = json.dumps({**(known if isinstance(known, dict) else {}), inner: parsed})


def read_options(
    policy_source: str, words: list[str], given: Mapping[str, int | None]
) -> dict[str, str]:
    """Returns the options that stand after `--`.

    Args:
        policy_source: The policy, which is named before `--`.
        words: What stands after it.
        given: Sizes that may stand on either side, and what stands before it.

    Raises:
        ConfigError: something stands on both sides.
    """
    options = parse_vllm_words(words)
    if "kv-policy" in options:
        raise ConfigError(
            "the policy is named twice",
            got=f"{shown(policy_source)}, and --kv-policy after --",
            fix="Drop --kv-policy",
        )
    for name, size in given.items():
        if size is not None and size_option(options, name) not in (None, size):
            raise ConfigError(
                f"--{name} is given twice",
                got=f"{size}, and {options[name]} after --",
                fix="Give it once",
            )
    return options


def size_option(options: Mapping[str, str], name: str) -> int | None:
    """Returns the number that an option gives, or None.

    vLLM takes 32k and the like, in thousands or 1024s.

    Raises:
        ConfigError: it gives none.
    """
    text = options.get(name)
    if text is None:
        return None
    factors = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}
    digits, factor = (text[:-1], factors[text[-1]]) if text[-1:] in factors else (text, 1)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 10 and int(digits) > 0):
        raise ConfigError(f"--{name} is not valid", got=shown(text), allowed="an integer above 0")
    return int(digits) * factor


def steps_in_flight(options: Mapping[str, str]) -> int:
    """Returns how many steps vLLM schedules before the first of them is processed."""
    off = options.get("async-scheduling", "true").lower() == "false"
    return 1 if off or "no-async-scheduling" in options else 2


def ranks_of(options: Mapping[str, str], shape: ModelShape) -> int:
    """Returns the ranks of tensor parallelism, each with some of the heads.

    Raises:
        ConfigError: the heads cannot be shared out, as vLLM would say.
    """
    num_ranks = size_option(options, "tensor-parallel-size") or 1
    fewer, more = sorted((num_ranks, shape.num_kv_heads))
    if shape.num_heads % num_ranks or more % fewer:
        raise ConfigError(
            "--tensor-parallel-size does not divide the model's heads",
            got=str(num_ranks),
            allowed=f"a divisor of {shape.num_heads} heads that divides {shape.num_kv_heads} KV "
            "heads, or is a multiple of them",
        )
    return num_ranks
