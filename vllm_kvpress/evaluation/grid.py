"""What an evaluation measures: engines (policy, keep ratio) and cells (task, length)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_kvpress.config import Policy, known_policies, load_policy
from vllm_kvpress.errors import ConfigError, shown
from vllm_kvpress.evaluation.items import ALL_TASKS
from vllm_kvpress.policies import resolve
from vllm_kvpress.policies.heads import check_heads
from vllm_kvpress.sources import nearest
from vllm_kvpress.testbed.documents import MIN_TOKENS

__all__ = [
    "FLOOR",
    "FULL",
    "Cell",
    "Settings",
    "Variant",
    "make_variants",
    "parse_lengths",
    "parse_policies",
    "parse_ratios",
    "parse_tasks",
    "ratio_text",
]

FULL = "full"
FLOOR = "random"
MAX_LENGTH = 2**24


@dataclass(frozen=True)
class Variant:
    """One engine: a policy at a keep ratio, or the full cache.

    Attributes:
        policy: The policy as the user wrote it; `full` for stock vLLM.
        keep_ratio: Share of the prompt that is kept; under a head plan without eviction, of the KV
            heads that keep every token; 1 for what drops nothing; None for a policy that has no
            ratio, which is measured as it stands.
        source: What `LLM(kv_policy=...)` takes; None for the full cache.
    """

    policy: str
    keep_ratio: float | None
    source: dict[str, Any] | None

    @property
    def title(self) -> str:
        """The variant in words."""
        if self.source is None or self.keep_ratio is None:
            return self.policy
        return f"{self.policy} at {self.keep_ratio:g}"


@dataclass(frozen=True)
class Cell:
    """One task at one prompt length."""

    task: str
    length: int


@dataclass(frozen=True)
class Settings:
    """What all cells of one evaluation share.

    Attributes:
        model: The model as the user named it.
        limit: Documents in a cell.
        seed: Draws the documents; the same for every policy.
        vllm_options: Further options of vLLM, as typed.
        versions: Releases of what a result depends on.
        divergence: Whether next-token distributions are compared with the full cache's.
    """

    model: str
    limit: int
    seed: int
    vllm_options: tuple[str, ...]
    versions: dict[str, str]
    divergence: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain data, equal to what JSON gives back."""
        data = {**asdict(self), "vllm_options": list(self.vllm_options)}
        if not self.divergence:  # as records had it before there was a choice
            del data["divergence"]
        return data

    @property
    def key(self) -> str:
        """A short name for these settings."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def parse_policies(text: str) -> list[str]:
    """Return the policies of a comma-separated list, `full` first and the floor second.

    A policy's own overrides have commas too: `snapkv:pool=13,window=64,knorm` names two.

    Raises:
        ConfigError: The list is empty, or a policy is not known or not valid.
    """
    names: list[str] = []
    for piece in _pieces(text, "--policies"):
        is_override = "=" in piece and ":" not in piece.partition("=")[0]
        if is_override and names and ":" in names[-1]:
            names[-1] += f",{piece}"
        else:
            names.append(piece)
    for name in names:
        if name != FULL:
            _load(name)
    return list(dict.fromkeys([FULL, FLOOR, *names]))


def make_variants(policies: Sequence[str], keep_ratios: Sequence[float]) -> list[Variant]:
    """Return the engines to start: every policy at every ratio; once what has none.

    Raises:
        ConfigError: A ratio is 0, and no policy is a head plan.
    """
    variants: list[Variant] = []
    for policy in policies:
        if policy == FULL:
            variants.append(Variant(FULL, 1.0, None))
            continue
        loaded = _load(policy)
        if loaded.evict is None and loaded.heads.plan == "all":
            variants.append(Variant(policy, 1.0, loaded.to_json()))
            continue
        if _has_no_ratio(loaded):
            variants.append(Variant(policy, None, _source(policy)))
            continue
        # Without any retrieval head a window is left; without any token nothing is.
        ratios = [ratio for ratio in keep_ratios if ratio > 0 or loaded.evict is None]
        variants += [Variant(policy, ratio, _at_ratio(policy, ratio)) for ratio in ratios]
    if 0 in keep_ratios and not any(variant.keep_ratio == 0 for variant in variants):
        raise ConfigError(
            "--keep-ratio is not valid",
            got="0",
            allowed="shares of the prompt above 0 and below 1; 0 for head plans alone",
        )
    return variants


def parse_ratios(text: str) -> list[float]:
    """Return keep ratios, largest first.

    Raises:
        ConfigError: One is not a number from 0 to below 1.
    """
    ratios: list[float] = []
    for piece in _pieces(text, "--keep-ratio"):
        if piece != "0" and (not re.fullmatch(r"0?\.\d{1,6}", piece) or float(piece) == 0):
            raise ConfigError(
                "--keep-ratio is not valid",
                got=shown(piece),
                allowed="shares of the prompt above 0 and below 1, such as 0.5,0.25,0.1",
            )
        ratios.append(float(piece))
    return sorted(set(ratios), reverse=True)


def parse_tasks(text: str) -> list[str]:
    """Return tasks, in the order of `ALL_TASKS`.

    Raises:
        ConfigError: One is not known.
    """
    pieces = _pieces(text, "--tasks")
    for piece in pieces:
        if piece not in ALL_TASKS:
            raise ConfigError(
                f"task {shown(piece)} is not known",
                allowed=", ".join(ALL_TASKS),
                fix=nearest(piece, ALL_TASKS),
            )
    return [task for task in ALL_TASKS if task in pieces]


def parse_lengths(text: str) -> list[int]:
    """Return prompt lengths in tokens, ascending.

    Raises:
        ConfigError: One is not an integer in range.
    """
    lengths = set()
    for piece in _pieces(text, "--lengths"):
        is_number = piece.isascii() and piece.isdigit() and len(piece) <= 9
        if not is_number or not MIN_TOKENS <= int(piece) <= MAX_LENGTH:
            raise ConfigError(
                "--lengths is not valid",
                got=shown(piece),
                allowed=f"numbers of tokens from {MIN_TOKENS} to {MAX_LENGTH}, such as 1024,4096",
            )
        lengths.add(int(piece))
    return sorted(lengths)


def default_policies() -> str:
    """Return every shipped policy that needs no file, as `--policies` takes them."""
    names = [info.name for info in known_policies()]
    return ",".join([FULL, *(name for name in names if not load_policy(name).heads.reads_file)])


def _pieces(text: str, option: str) -> list[str]:
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(pieces):
        raise ConfigError(
            f"{option} has an empty item", got=shown(text), fix="Separate items by single commas"
        )
    return pieces


def _load(source: str) -> Policy:
    policy = load_policy(source)
    resolve(policy)
    check_heads(policy.heads)
    return policy


def _has_no_ratio(policy: Policy) -> bool:
    """Whether a share of the prompt, or of the heads, says nothing of a policy.

    A window that holds in the prompt, too, is one of tokens; labels name the heads themselves.
    """
    if policy.evict is None:
        return policy.heads.plan == "inline"
    return resolve(policy).selects == "streaming"


def ratio_text(keep_ratio: float | None) -> str:
    """Return a keep ratio as tables show it; a dash for a policy that has none."""
    return "-" if keep_ratio is None else f"{keep_ratio:g}"


def _source(policy: str) -> dict[str, Any]:
    """Return a policy in full, named by its file if it comes from one."""
    data = _load(policy).to_json()
    if Path(policy).suffix in (".yaml", ".yml"):
        data["name"] = Path(policy).stem
    return data


def _at_ratio(source: str, keep_ratio: float) -> dict[str, Any]:
    """Return a policy with another budget, or number of retrieval heads, checked."""
    data = _source(source)
    if "evict" in data:
        data["evict"]["budget"] = {"name": "uniform", "keep_ratio": keep_ratio}
    else:
        data["heads"].pop("threshold", None)
        data["heads"]["retrieval_ratio"] = keep_ratio
    resolve(load_policy(data))
    return data
