import io

import pytest
from rich.console import Console

from vllm_kvpress.evaluation.progress import Work, duration, show_progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_the_estimate_counts_starts_and_tokens_apart(clock):
    work = Work(engines=3, tokens=30_000, clock=clock)
    work.begin()
    clock.now = 60.0
    work.started()
    assert work.remaining() is None

    clock.now = 70.0
    work.answered(10_000)

    # Two starts of a minute, and two more times ten seconds.
    assert work.remaining() == "2 min 20 s"
    assert work.share == pytest.approx(1 / 3)


def test_nothing_to_do_is_done(clock):
    assert Work(engines=0, tokens=0, clock=clock).share == 1.0


def test_prompts_a_little_longer_than_announced_are_not_more_than_all(clock):
    work = Work(engines=1, tokens=100, clock=clock)
    work.begin()
    work.started()
    work.answered(130)

    assert work.share == 1.0
    assert work.remaining() == "0 s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (61, "1 min 01 s"), (7290, "2 h 01 min")]
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text


def test_without_a_terminal_every_cell_is_a_line(clock):
    out = io.StringIO()
    work = Work(engines=1, tokens=100, clock=clock)
    event = {"task": "needle", "length": 512, "record": {"accuracy": 0.5, "standard_error": 0.1}}

    with show_progress(Console(file=out, width=40), work):
        work.started()
        clock.now = 5.0
        work.answered(50)
        work.finished("knorm at 0.5", event)

    assert out.getvalue() == "knorm at 0.5, needle at 512: 0.500 ± 0.100 (5 s left)\n"
