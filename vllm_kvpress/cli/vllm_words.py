"""Reads the command line of `vllm serve` just far enough to know which options were given."""

import json

__all__ = ["parse_vllm_words"]

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
