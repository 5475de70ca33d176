"""How the cache of skipped layers shares the policy's blocks: pure integers.

vLLM's cache groups own blocks of one pool, and a block has room for one page of each layer of the
widest group. Skipped layers are a group of their own; few layers would leave most of a block empty.
So a page of theirs holds the tokens of several blocks, side by side with those of the others:

    policy     | layer 2 | layer 3 | layer 4 | layer 5 | ... |     block_size tokens each
    skipped    | layer 0               | layer 1             |     multiple * block_size each

The price is paid by prefix hits: they end where a block of every group ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from vllm_kvpress.errors import ConfigError, UnsupportedModelError, shown

# Longest block of skipped layers, in tokens: how much of a shared prefix may be computed again.
MOST_TOKENS = 256
# Share of the memory of a request that may be padding, where any choice keeps to it.
PADDING = 0.05
# The share of its tokens of which a policy's layers hold blocks, for the sake of the choice.
_KEPT = 0.25


class SkippedGroups(NamedTuple):
    """The cache groups of skipped layers.

    Attributes:
        num_layers: Skipped layers.
        groups: How many groups.
        width: Layers of one, at most.
        multiple: Blocks of the policy that a block of theirs has the tokens of.
        block_size: Tokens in a block of theirs.
        padding: Share of a request's blocks that is empty, if the policy keeps a quarter.
        block_bytes: Bytes of a block of the pool, over all layers of the widest group.
        stock_block_bytes: The same without a policy: a policy's block of tokens in every layer.
    """

    num_layers: int
    groups: int
    width: int
    multiple: int
    block_size: int
    padding: float
    block_bytes: int
    stock_block_bytes: int

    def blocks(self, num_tokens: int) -> int:
        """Returns the blocks that hold so many tokens of a request."""
        return self.groups * -(-num_tokens // self.block_size)


def skipped_groups(
    num_skipped: int, num_others: int, block_size: int, page_bytes: int, other_page_bytes: int
) -> SkippedGroups:
    """Returns the smallest blocks, then the fewest groups, that waste little memory.

    Args:
        num_skipped: Skipped layers, at least one.
        num_others: Layers under the policy, at least one.
        block_size: Tokens in a block of the policy.
        page_bytes: Bytes of so many tokens in a skipped layer.
        other_page_bytes: Bytes of a block in a layer under the policy.
    """
    choices = []
    stock = (num_skipped + num_others) * page_bytes
    most = max(1, MOST_TOKENS // block_size)
    for multiple, groups in product(range(1, most + 1), range(1, num_skipped + 1)):
        width = -(-num_skipped // groups)
        if -(-num_skipped // width) < groups:
            continue
        size = max(num_others * other_page_bytes, width * multiple * page_bytes)
        used = _KEPT * num_others * other_page_bytes + num_skipped * page_bytes
        padding = 1 - used / (size * (_KEPT + groups / multiple))
        tokens = multiple * block_size
        choice = (num_skipped, groups, width, multiple, tokens, padding, size, stock)
        choices.append(SkippedGroups(*choice))
    good = (choice for choice in choices if choice.padding <= PADDING)
    return next(good, min(choices, key=lambda choice: round(choice.padding, 9)))


def skipped_groups_of(
    skip: Sequence[int], num_layers: int, block_size: int, page_bytes: int
) -> SkippedGroups | None:
    """Returns the groups of a policy's skipped layers, or None if it skips none.

    Args:
        skip: Indices of the skipped layers.
        num_layers: Layers of the model.
        block_size: Tokens in a block.
        page_bytes: Bytes of a block in any layer.
    """
    if not skip:
        return None
    return skipped_groups(len(skip), num_layers - len(skip), block_size, page_bytes, page_bytes)


def check_skipped(skip: Sequence[int], num_layers: int, num_sliding: int) -> None:
    """Checks the indices of skipped layers against a model.

    Args:
        skip: Indices of the skipped layers.
        num_layers: Layers of the model.
        num_sliding: Those of them with a sliding window.

    Raises:
        ConfigError: an index that the model does not have, or every layer.
        UnsupportedModelError: the model has sliding-window layers.
    """
    if not skip:
        return
    beyond = [layer for layer in skip if layer >= num_layers]
    if beyond:
        raise ConfigError(
            "layers.skip names a layer that the model does not have",
            got=shown(beyond),
            allowed=f"0 to {num_layers - 1}",
            fix="Count layers from 0",
        )
    if len(skip) == num_layers:
        raise ConfigError(
            "layers.skip names every layer of the model: the policy does nothing",
            got=f"{num_layers} of {num_layers} layers",
            allowed=f"at most {num_layers - 1}",
            fix="Skip fewer layers, or start without the policy",
        )
    if num_sliding:
        raise UnsupportedModelError(
            "layers.skip is not run in a model with sliding-window layers",
            got=f"{num_sliding} of {num_layers} layers",
            allowed="layers.skip: [] there; vLLM keeps the sliding-window layers as they are",
            fix="Set layers.skip to []",
        )
