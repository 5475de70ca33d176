"""Reads a policy's text (YAML or JSON, named, in a file or inline) into plain Python data.

Text comes from users and is not trusted. Accepted is what JSON can say: mappings with string
keys, lists, strings, finite numbers, booleans, null. YAML's tags, anchors, aliases, merge keys,
duplicate keys, several documents, sexagesimal numbers and yes/no booleans are refused or stay
plain strings. What the data means is `config.py`'s job.
"""

import difflib
import importlib.resources
import json
import os
import re
import stat
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from vllm_kvpress.errors import ConfigError, shown

__all__ = [
    "PolicyInfo",
    "known_policies",
    "nearest",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_file",
    "read_named",
]

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
YAML_SUFFIXES = (".yaml", ".yml")

_PLAIN = "plain mappings, lists, strings, numbers, true, false and null"
_TRUE_FALSE = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
# At most 20 digits: longer ones stay strings, so no arithmetic is done on hostile numbers.
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,19})$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9]{1,32}\.[0-9]{0,32}|\.[0-9]{1,32}|[0-9]{1,32}(?=[eE]))(?:[eE][-+]?[0-9]{1,4})?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars, which refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR_TAG:
                raise ConfigError(
                    f"a YAML mapping {_at(key_node)} has a key that is not a string",
                    got=shown(key),
                    allowed="string keys",
                )
            if key in seen:
                raise ConfigError(
                    f"the key {shown(key)} stands twice in one YAML mapping",
                    got=f"a second one {_at(key_node)}",
                    fix="Remove one of the two",
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_STR_TAG = "tag:yaml.org,2002:str"
_PlainLoader.yaml_implicit_resolvers = {}
for _tag, _regexp, _first in (
    ("tag:yaml.org,2002:bool", _TRUE_FALSE, list("tTfF")),
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789.")),
):
    _PlainLoader.add_implicit_resolver(_tag, _regexp, _first)


@dataclass(frozen=True)
class PolicyInfo:
    """One shipped policy as its file's header comment describes it."""

    name: str
    title: str
    paper: str


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns "Did you mean 'x'?" for the known name closest to `name`, or None."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else None


def known_policies() -> list[PolicyInfo]:
    """Returns the shipped policies, sorted by name."""
    return [
        PolicyInfo(name, _header(text, "title"), _header(text, "paper"))
        for name, text in ((path.name[:-5], _text(path)) for path in _shipped())
    ]


def read_named(name: str) -> dict[str, Any]:
    """Returns the data of the shipped policy `name`.

    Raises:
        ConfigError: no such policy; the message lists the known ones.
    """
    for path in _shipped():
        if path.name == f"{name}.yaml":
            return parse_yaml(_text(path), f"policy {name!r}")
    known = [path.name[:-5] for path in _shipped()]
    raise ConfigError(
        f"policy {shown(name)} is not known",
        allowed=f"{', '.join(known)}; a path that ends in .yaml; inline JSON",
        fix=nearest(name, known),
    )


def read_file(path: Path) -> dict[str, Any]:
    """Returns the data of the policy file `path`; reads at most 64 KiB of a regular file.

    Raises:
        ConfigError: the path or its content is not such a file.
    """
    what = f"policy file {shown(str(path))}"
    if path.suffix not in YAML_SUFFIXES:
        raise ConfigError(
            f"{what} has the wrong ending", got=shown(path.suffix), allowed=".yaml, .yml"
        )
    content = read_bytes(path, what, MAX_BYTES)
    try:
        return parse_yaml(content.decode("utf-8"), what)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8", got=f"a bad byte at {error.start}") from error


def read_bytes(path: Path, what: str, max_bytes: int) -> bytes:
    """Returns the content of a regular file of at most `max_bytes`; `what` names it in errors.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{what} is not a regular file", allowed="a regular file")
            content = file.read(max_bytes + 1)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{what} cannot be read", got=reason, fix="Check the path") from error
    if len(content) > max_bytes:
        raise ConfigError(f"{what} is too large", allowed=f"at most {max_bytes} bytes")
    return content


def parse_yaml(text: str, what: str) -> dict[str, Any]:
    """Returns the one mapping that the YAML `text` holds; `what` names it in errors.

    Raises:
        ConfigError: not YAML, not one mapping, or YAML beyond plain data.
    """
    try:
        _refuse_exotic(text, what)
        data = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader subclass
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{what} is not valid YAML", got=reason, allowed=_PLAIN) from error
    return _mapping(data, what)


def parse_json(text: str, what: str) -> dict[str, Any]:
    """Returns the one object that the JSON `text` holds; `what` names it in errors.

    Raises:
        ConfigError: not JSON, too long or too deep, a duplicate key, NaN or an infinity.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{what} is too large", allowed=f"at most {MAX_BYTES} characters")
    try:
        data = json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ConfigError(
            f"{what} is not valid JSON", got=reason, fix='Quote keys and strings with ""'
        ) from error
    return _mapping(data, what)


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK opening a FIFO waits for its writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _refuse_exotic(text: str, what: str) -> None:
    """Walks the YAML events, before any object exists, and refuses all but plain data."""
    depth = num_documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{what} uses a YAML anchor or alias {_at(event)}", allowed=_PLAIN)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ConfigError(
                f"{what} uses a YAML tag {_at(event)}", got=shown(tag), allowed=_PLAIN
            )
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents > 1:
                raise ConfigError(f"{what} holds several YAML documents", allowed="one document")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{what} is nested too deeply", allowed=f"{MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ConfigError(
                f"the key {shown(key)} stands twice in one JSON object",
                fix="Remove one of the two",
            )
        data[key] = value
    return data


def _refuse_constant(text: str) -> float:
    raise ConfigError("a JSON number is not finite", got=text, allowed="finite numbers")


def _mapping(data: object, what: str) -> dict[str, Any]:
    if data is None:
        raise ConfigError(f"{what} is empty", allowed="a mapping with at least 'evict' or 'base'")
    if not isinstance(data, dict):
        raise ConfigError(f"{what} is not a mapping", got=shown(data), allowed="a mapping")
    return data


def _at(marked: Any) -> str:
    mark = marked.start_mark
    return f"at line {mark.line + 1}, column {mark.column + 1}"


def _shipped() -> list[Traversable]:
    """The shipped policy files: of the installed package, else of the source tree."""
    try:
        folder: Traversable = importlib.resources.files("vllm_kvpress.configs")
    except ModuleNotFoundError:
        folder = Path(__file__).resolve().parent.parent / "configs"
    return sorted(
        (path for path in folder.iterdir() if path.name.endswith(".yaml")),
        key=lambda path: path.name[:-5],
    )


def _text(path: Traversable) -> str:
    return path.read_text(encoding="utf-8")


def _header(text: str, key: str) -> str:
    """The value of the header comment `# key: value`; empty if there is none."""
    found = re.search(rf"^# {key}: *(.*)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else ""
