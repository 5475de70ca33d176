"""Which tokens stay: the forced ones, then the highest scores, exactly and deterministically."""

import torch

from vllm_kvpress.errors import ScoreError, shown

__all__ = ["select_tokens"]


def select_tokens(
    scores: torch.Tensor,
    num_keep: int,
    sink_tokens: int,
    recent_tokens: int,
    *,
    num_candidates: int | None = None,
    context: str = "the scorer",
) -> torch.Tensor:
    """Returns the indices of the kept tokens, int64 [num_kv_heads, num_keep], each row ascending.

    The first `sink_tokens` and the last `recent_tokens` are kept whatever their scores; the rest
    by score, ties going to the lower index (-0.0 equals 0.0). Linear in the number of tokens: one
    selection of the threshold, no sort, and no dependence on how a device breaks ties.

    Args:
        scores: float32 [num_kv_heads, num_tokens], not modified.
        num_keep: tokens to keep in each row, from sink_tokens + recent_tokens to num_tokens.
        sink_tokens: forced tokens at the front.
        recent_tokens: forced tokens at the back, of the candidates.
        num_candidates: choose among the first so many tokens, all by default; the scores of the
            others are checked, not ranked.
        context: who scored what, for the error message ("scorer 'knorm', layer 3").

    Raises:
        ScoreError: `scores` is not float32 [num_kv_heads, num_tokens], or has a NaN anywhere.
    """
    check_scores(scores, context)
    scores = scores[:, :num_candidates]
    num_heads, num_tokens = scores.shape
    assert 0 <= num_keep <= num_tokens, (num_keep, num_tokens)
    if num_keep == num_tokens:
        return torch.arange(num_tokens, device=scores.device).repeat(num_heads, 1)
    assert sink_tokens + recent_tokens <= num_keep, (sink_tokens, recent_tokens, num_keep)

    keep = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    middle = slice(sink_tokens, num_tokens - recent_tokens)
    keep[:, middle] = _highest(scores[:, middle], num_keep - sink_tokens - recent_tokens)
    # Each kept token goes to its rank; the others go to one extra column, which is cut off.
    rank = torch.where(keep, keep.cumsum(dim=1) - 1, num_keep)
    indices = torch.arange(num_tokens, device=scores.device).expand_as(rank)
    kept = rank.new_empty(num_heads, num_keep + 1).scatter_(1, rank, indices)
    return kept[:, :num_keep].contiguous()


def check_scores(scores: torch.Tensor, context: str) -> None:
    """Checks that `scores` can be ranked.

    Raises:
        ScoreError: not a float32 tensor with two dimensions, or a NaN anywhere.
    """
    if not isinstance(scores, torch.Tensor):
        raise ScoreError(
            f"{context} returned no tensor", got=shown(scores), allowed="a float32 tensor"
        )
    if scores.dtype != torch.float32 or scores.dim() != 2:
        raise ScoreError(
            f"{context} returned scores of the wrong kind",
            got=f"{scores.dtype} {list(scores.shape)}",
            allowed="torch.float32 [num_kv_heads, num_tokens]",
        )
    is_nan = scores.isnan()
    if is_nan.any():
        head, token = (int(index) for index in is_nan.nonzero()[0])
        raise ScoreError(
            f"{context} returned NaN",
            got=f"{int(is_nan.sum())} of {scores.numel()}, the first at KV head {head}, "
            f"token {token}",
            allowed="numbers, +inf, -inf",
            fix="Look for NaN in the model's keys and queries (float16 overflows), then the scorer",
        )


def _highest(scores: torch.Tensor, num_keep: int) -> torch.Tensor:
    """A mask of the `num_keep` highest scores in each row, ties going to the lower index."""
    if num_keep == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    num_tokens = scores.shape[1]
    # The num_keep-th highest *value* is the same whichever of its equals a device picks.
    threshold = scores.kthvalue(num_tokens - num_keep + 1, dim=1, keepdim=True).values
    above = scores > threshold
    ties = scores == threshold
    room = num_keep - above.sum(dim=1, keepdim=True)
    return above | (ties & (ties.cumsum(dim=1) <= room))
