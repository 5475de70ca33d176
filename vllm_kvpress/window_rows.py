"""A batch's rows for streaming heads: one row for each block of queries, in a few array operations.

    request   chunk [40, 130), block size 32     rows  [40, 64) [64, 96) [96, 128) [128, 130)

Each row reads the sinks' blocks, then the window's up to its own; its length is the number of
tokens in them, so that its queries are the last. `WindowPlan` says the same of one query.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_kvpress.window_plan import WindowPlan

__all__ = ["WindowRows", "window_rows"]

IntArray = npt.NDArray[np.int64]


class WindowRows(NamedTuple):
    """The rows of a step, in the order of its requests and of their tokens.

    Attributes:
        requests: The request of each row, int64 [num_rows].
        query_starts: Where each row's queries begin, and their number, int32 [num_rows + 1].
        lengths: Tokens that each row reads, its own included, int32 [num_rows].
        columns: Logical blocks that each row reads, int64 [num_rows, most]; behind a row's last
            block stands that block again.
        gaps: Blocks between sinks and window that each row does not see, int64 [num_rows].
    """

    requests: IntArray
    query_starts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    columns: IntArray
    gaps: IntArray


def window_rows(plan: WindowPlan, query_starts: IntArray, ends: IntArray) -> WindowRows:
    """Returns the rows of a step; a request without queries gets one row without any.

    Args:
        plan: The window.
        query_starts: Where each request's queries begin in the batch, and their number,
            int64 [num_reqs + 1].
        ends: Tokens of each request once the step is over, int64 [num_reqs].
    """
    size = plan.block_size
    starts = ends - np.diff(query_starts)
    first_blocks = starts // size
    last_blocks = np.maximum(first_blocks, (ends - 1) // size)
    counts = last_blocks - first_blocks + 1
    requests = np.repeat(np.arange(len(ends)), counts)
    behind = np.arange(len(requests)) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = first_blocks[requests] + behind
    row_ends = np.minimum(ends[requests], (blocks + 1) * size)
    row_starts = np.maximum(starts[requests], blocks * size)
    gaps = np.maximum(0, blocks - plan.window_blocks - plan.sink_blocks)
    columns = np.arange(int((blocks - gaps).max(initial=0)) + 1)
    logical = np.where(columns < plan.sink_blocks, columns, columns + gaps[:, None])
    bounds = np.concatenate([[0], np.cumsum(row_ends - row_starts)]) + query_starts[0]
    return WindowRows(
        requests,
        bounds.astype(np.int32),
        (row_ends - gaps * size).astype(np.int32),
        np.minimum(logical, blocks[:, None]),
        gaps,
    )
