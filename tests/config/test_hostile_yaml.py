import os
import time

import pytest

from vllm_kvpress.config import load_policy
from vllm_kvpress.errors import ConfigError

VALID = b"evict:\n  scorer: {name: knorm}\n  budget: {tokens: 100}\n"

# name -> (bytes of the file, words of its message)
HOSTILE = {
    "empty": (b"", ["is empty"]),
    "only a comment": (b"# nothing\n", ["is empty"]),
    "a list": (b"- 1\n- 2\n", ["not a mapping"]),
    "a scalar": (b"snapkv\n", ["not a mapping", "'snapkv'"]),
    "not YAML": (b"evict: [1, 2\n", ["not valid YAML"]),
    "a tab": (b"evict:\n\tx: 1\n", ["not valid YAML"]),
    "python tag": (b"evict: !!python/object/apply:os.system ['true']\n", ["a YAML tag", "line 1"]),
    "python name": (b"!!python/name:os.system\n", ["a YAML tag"]),
    "own tag": (b"evict: !secret x\n", ["a YAML tag", "!secret"]),
    "standard tag": (b"sink_tokens: !!int '4'\n", ["a YAML tag"]),
    "anchor": (b"a: &x 1\nb: 2\n", ["anchor or alias", "line 1"]),
    "merge key": (b"a: &x {b: 1}\nc:\n  <<: *x\n", ["anchor or alias"]),
    "alias bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n".encode()
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        ["anchor or alias"],
    ),
    "recursive alias": (b"a: &a [*a]\n", ["anchor or alias"]),
    "duplicate key": (VALID + b"evict: 3\n", ["'evict' stands twice", "line 4"]),
    "inner duplicate key": (b"evict: {losers: drop, losers: drop}\n", ["'losers'", "twice"]),
    "two documents": (VALID + b"---\n" + VALID, ["several YAML documents"]),
    "integer key": (b"1: 2\n", ["key that is not a string"]),
    "list key": (b"? [a, b]\n: 2\n", ["key that is not a string"]),
    "mapping key": (b"? {a: b}\n: 2\n", ["key that is not a string"]),
    "deep flow": (b"evict: " + b"[" * 30000, ["nested too deeply"]),
    "deep block": (
        b"".join(b" " * depth + b"a:\n" for depth in range(200)),
        ["nested too deeply"],
    ),
    "huge integer": (b"sink_tokens: " + b"9" * 60000 + b"\n", ["sink_tokens", "'999999"]),
    "huge float": (b"sink_tokens: 1e9999\n", ["sink_tokens", "inf"]),
    "octal": (b"sink_tokens: 0777\n", ["sink_tokens", "'0777'"]),
    "sexagesimal": (b"sink_tokens: 1:30\n", ["sink_tokens", "'1:30'"]),
    "underscores": (b"sink_tokens: 1_000\n", ["sink_tokens", "'1_000'"]),
    "date": (b"sink_tokens: 2024-01-01\n", ["sink_tokens", "'2024-01-01'"]),
    "yes": (b"base: knorm\nevict: {when: {prompt_end: yes}}\n", ["prompt_end", "'yes'"]),
    "infinity": (b"evict: {budget: {keep_ratio: .inf}}\n", ["evict"]),
    "not UTF-8": (b"name: \xff\xfe\n", ["not UTF-8"]),
    "UTF-16": ("evict: 1\n".encode("utf-16"), ["not UTF-8"]),
    "NUL": (b"name: \x00\n", ["not valid YAML"]),
    "binary": (bytes(range(128)) * 8, ["not valid YAML"]),
    "too large": (b"# " + b"x" * 65536, ["too large", "65536 bytes"]),
    "directive": (b"%TAG ! tag:example.com,2000:\n---\nevict: !x y\n", ["a YAML tag"]),
    "base outside": (b"base: ../../etc/passwd\n", ["is not known"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_gives_one_message_fast(tmp_path, name):
    content, words = HOSTILE[name]
    file = tmp_path / "hostile.yaml"
    file.write_bytes(content)

    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_policy(str(file))

    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    assert len(message) < 700
    assert time.perf_counter() - start < 5


def _error(path):
    with pytest.raises(ConfigError) as caught:
        load_policy(str(path))
    return str(caught.value)


def test_the_same_bytes_without_harm_are_a_policy(tmp_path):
    file = tmp_path / "good.yaml"
    file.write_bytes(VALID)

    assert load_policy(str(file)).name == "good"


def test_directory(tmp_path):
    (tmp_path / "folder.yaml").mkdir()

    assert "Is a directory" in _error(tmp_path / "folder.yaml")


def test_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")

    assert "not a regular file" in _error(tmp_path / "pipe.yaml")


def test_endless_device(tmp_path):
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")

    assert "not a regular file" in _error(tmp_path / "zero.yaml")


def test_symbolic_link_to_itself(tmp_path):
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")

    assert "cannot be read" in _error(tmp_path / "loop.yaml")


def test_file_name_of_no_policy_name(tmp_path):
    file = tmp_path / "my policy.yaml"
    file.write_bytes(VALID)

    assert "name is not valid; got 'my policy'" in _error(file)


def test_other_ending(tmp_path):
    file = tmp_path / "policy.txt"
    file.write_bytes(VALID)

    assert "has the wrong ending; got '.txt'; allowed: .yaml, .yml" in _error(file)
