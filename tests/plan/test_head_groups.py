"""Cutting the heads of a plan into runs: nothing lost, little padded, ranks alike."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_kvpress.head_figures import HeadFigures
from vllm_kvpress.head_groups import Runs, choose_runs, group_heads
from vllm_kvpress.window_plan import WindowPlan


@st.composite
def labels(draw, max_layers=8):
    """[num_layers][num_kv_heads], true for retrieval."""
    count = draw(st.sampled_from([1, 2, 4, 8]))
    row = st.lists(st.booleans(), min_size=count, max_size=count)
    return draw(st.lists(row, min_size=1, max_size=max_layers))


def heads_of(groups, streams):
    return [
        (layer, head)
        for layer, lanes in enumerate(groups.layers)
        for lane in lanes
        if lane.streams == streams
        for head in lane.heads
    ]


@settings(max_examples=300)
@given(labels())
@example([[True]])
@example([[False]])
@example([[True, True], [True, False]])
def test_every_head_is_in_one_lane_and_no_retrieval_head_streams(plan):
    groups = group_heads(plan)

    everyone = [(layer, head) for layer, row in enumerate(plan) for head in range(len(row))]
    retrieval, streaming = heads_of(groups, False), heads_of(groups, True)
    assert sorted(retrieval + streaming) == everyone
    wanted = {(layer, head) for layer, head in everyone if plan[layer][head]}
    assert set(retrieval) == wanted | set(groups.promoted)
    assert not wanted & set(groups.promoted)
    assert len(retrieval) == groups.num_retrieval
    assert all(lanes for lanes in groups.layers)


@settings(max_examples=300)
@given(labels())
def test_no_run_pads_a_block_by_more_than_five_percent(plan):
    groups = group_heads(plan)

    sizes, kinds = Counter(), {}
    for lanes in groups.layers:
        for lane in lanes:
            sizes[lane.run] += len(lane.heads)
            assert kinds.setdefault(lane.run, lane.streams) == lane.streams
    assert sorted(sizes) == list(range(groups.runs.retrieval + groups.runs.streaming))
    assert groups.width == max(sizes.values())
    assert min(sizes.values()) >= 0.95 * groups.width
    padding = 1 - groups.num_heads / (len(sizes) * groups.width)
    assert HeadFigures(groups, WindowPlan(16, 4, 64), 64).padding == pytest.approx(padding)


ROWS = st.sampled_from([(32, 33), (32, 34), (16, 18)])


@settings(max_examples=300)
@given(labels(), ROWS)
def test_runs_are_of_one_size_in_bytes_where_streaming_heads_hold_sums(plan, rows):
    groups = group_heads(plan, rows=rows)

    sizes = Counter()
    for lanes in groups.layers:
        for lane in lanes:
            sizes[lane.run] += len(lane.heads) * rows[lane.streams]
    assert groups.width == Fraction(max(sizes.values()), rows[0])
    padding = 1 - sum(sizes.values()) / (len(sizes) * max(sizes.values()))
    assert HeadFigures(groups, WindowPlan(16, 4, 64), 64).padding == pytest.approx(padding)
    # A single kind of heads never needs more; of two kinds, one head each may be all there is.
    assert padding <= 0.05 or (len(set(sizes.values())) > 1 and padding < 1 - rows[0] / rows[1])


@pytest.mark.parametrize("rows", [(32, 33), (32, 34), (16, 18)])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 0.5, 0.75])
def test_a_model_s_sums_leave_little_padding(rows, ratio):
    plan = [[(head + layer) % 8 < 8 * ratio for head in range(8)] for layer in range(32)]
    groups = group_heads(plan, rows=rows)

    assert HeadFigures(groups, WindowPlan(16, 4, 64), 64).padding <= 0.05
    assert groups.runs.retrieval + groups.runs.streaming <= 10


def test_sums_move_the_cut_between_runs():
    assert choose_runs(64, 192, (16, 18)) == Runs(0, 1, 3)  # 64 * 16 of 64 * 18 in one of four
    assert choose_runs(128, 128, (32, 34)) == Runs(0, 1, 1)  # 3 % on average
    assert choose_runs(128, 128, (16, 18)) == Runs(1, 1, 1)  # 4.9 %, and 5.6 % without
    assert choose_runs(1, 1, (16, 18)) == Runs(0, 1, 1)  # one head each: 6 % it is


@settings(max_examples=200)
@given(labels())
def test_few_heads_are_promoted_and_one_goes_on_streaming(plan):
    groups = group_heads(plan)

    num_streaming = sum(not label for row in plan for label in row)
    assert len(groups.promoted) == groups.runs.promoted
    assert groups.runs.promoted <= max(1, 0.03 * groups.num_heads)
    assert (groups.runs.streaming > 0) == (num_streaming > 0)


def test_the_fewest_runs_are_taken_then_the_fewest_promotions():
    assert choose_runs(64, 192) == Runs(0, 1, 3)
    assert choose_runs(128, 128) == Runs(0, 1, 1)
    assert choose_runs(77, 179) == Runs(6, 1, 2)  # 83 and 2 of 86 or 87
    assert choose_runs(3, 5) == Runs(1, 1, 1)
    assert choose_runs(0, 256) == Runs(0, 0, 1)
    assert choose_runs(256, 0) == Runs(0, 1, 0)
    assert choose_runs(7, 1) == Runs(0, 7, 1)  # the last streaming head is not promoted


@given(st.integers(0, 60), st.integers(0, 60))
def test_no_smaller_number_of_runs_would_do(retrieval, streaming):
    if not retrieval + streaming:
        return
    runs = choose_runs(retrieval, streaming)

    most = min(max(0, streaming - 1), max(1, int(0.03 * (retrieval + streaming))))
    total = runs.retrieval + runs.streaming
    for promoted in range(most + 1):
        heads = (retrieval + promoted, streaming - promoted)
        for first in range(total):
            pairs = list(zip(heads, (first, total - 1 - first), strict=True))
            if any((n == 0) != (count == 0) or n > count for count, n in pairs):
                continue
            used = [(count, n) for count, n in pairs if n]
            width = max(-(-count // n) for count, n in used)
            assert min(count // n for count, n in used) < 0.95 * width


@settings(max_examples=200)
@given(labels(), st.sampled_from([1, 2, 4]))
def test_ranks_have_lanes_of_the_same_size_and_cover_all_heads(plan, num_ranks):
    ranks = [group_heads(plan, num_ranks, rank) for rank in range(num_ranks)]

    shapes = {
        tuple(
            tuple((lane.run, lane.streams, len(lane.heads)) for lane in lanes)
            for lanes in groups.layers
        )
        for groups in ranks
    }
    assert len(shapes) == 1
    local = max(1, len(plan[0]) // num_ranks)
    for rank, groups in enumerate(ranks):
        first = rank * len(plan[0]) // num_ranks
        retrieval = heads_of(groups, False)
        for layer, row in enumerate(plan):
            for head in range(local):
                assert (layer, head) in retrieval or not row[first + head]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_a_request_s_bytes_follow_the_share_of_retrieval_heads(ratio):
    plan = [[head < 8 * ratio for head in range(8)] for _ in range(32)]
    figures = HeadFigures(group_heads(plan), WindowPlan(16, 64, 256), 2048)

    full, held = figures.full_blocks(32768), figures.steady_blocks(32768 - 256, 256)
    window = (64 + 256 + 16) / 32768
    assert held / full == pytest.approx(ratio + (1 - ratio) * window, abs=0.001)
    assert figures.requests_at_once(10 * full, 32768 - 256, 256) >= int(0.95 * 10 * full / held) - 1


@settings(max_examples=200)
@given(labels(), st.sampled_from([1, 2, 4]))
def test_retrieval_lanes_of_every_rank_have_the_sizes_told(plan, num_ranks):
    for rank in range(num_ranks):
        groups = group_heads(plan, num_ranks, rank)

        sizes = {len(lane.heads) for lanes in groups.layers for lane in lanes if not lane.streams}
        assert groups.retrieval_sizes == tuple(sorted(sizes))
        assert groups.retrieval_sizes == group_heads(plan, num_ranks, 0).retrieval_sizes
