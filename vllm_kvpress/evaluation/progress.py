"""How far an evaluation is, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Work", "duration", "show_progress"]


@dataclass
class Work:
    """What is to do, what is done, and the time it took.

    The estimate counts two kinds of work apart, for they cost nothing like the same: starting an
    engine, and answering prompts, by their tokens.

    Attributes:
        engines: Engines to start.
        tokens: Tokens of all prompts.
        title: What happens now.
    """

    engines: int
    tokens: int
    title: str = ""
    changed: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    _engines_done: int = 0
    _tokens_done: int = 0
    _start_seconds: float = 0.0
    _answer_seconds: float = 0.0
    _since: float | None = field(default=None)

    def begin(self) -> None:
        """Start the clock."""
        self._since = self.clock()

    def started(self) -> None:
        """Note that an engine is ready."""
        self._engines_done += 1
        self._start_seconds += self._lap()
        self.changed()

    def answered(self, tokens: int) -> None:
        """Note that prompts of so many tokens were answered."""
        self._tokens_done += tokens
        self._answer_seconds += self._lap()
        self.changed()

    def finished(self, title: str, event: dict[str, Any]) -> None:
        """Say a cell's result in a line."""
        record = event["record"]
        left = self.remaining()
        self.say(
            f"{title}, {event['task']} at {event['length']}: {record['accuracy']:.3f} "
            f"± {record['standard_error']:.3f}" + ("" if left is None else f" ({left} left)")
        )

    @property
    def share(self) -> float:
        """The share of the prompts' tokens that is done."""
        return min(1.0, self._tokens_done / self.tokens) if self.tokens else 1.0

    def remaining(self) -> str | None:
        """Return an estimate of the time that is left, or None as long as nothing is known."""
        if not self._engines_done or not self._tokens_done:
            return None
        starting = self._start_seconds / self._engines_done * (self.engines - self._engines_done)
        left = max(0, self.tokens - self._tokens_done)
        return duration(starting + self._answer_seconds / self._tokens_done * left)

    def _lap(self) -> float:
        now = self.clock()
        seconds = 0.0 if self._since is None else now - self._since
        self._since = now
        return seconds


def duration(seconds: float) -> str:
    """Return a duration as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@contextmanager
def show_progress(console: Console, work: Work) -> Iterator[None]:
    """Show a bar with the time left; where there is no terminal, the lines of cells alone."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task: TaskID = bar.add_task("", total=1.0, left="")

        def changed() -> None:
            left = work.remaining()
            text = "" if left is None else f"about {left} left"
            bar.update(task, completed=work.share, description=work.title, left=text)

        work.changed = changed
        work.say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
        work.begin()
        changed()
        yield
