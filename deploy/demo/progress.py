"""What the demo says while it runs, always on stderr: bars on a terminal, a line every few seconds in a pipe."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_PLAIN_EVERY_S = 3.0
_RICH_EVERY_S = 0.1


class Display(Protocol):
    """Where progress goes."""

    def say(self, line: str) -> None:
        """Tell one thing that is done."""
        ...

    @contextmanager
    def task(self, title: str) -> "Iterator[Advance]":
        """Show how far one task is, until the block ends."""
        ...


class Advance(Protocol):
    """Tell how far a task is; cheap enough to be called for every slate."""

    def __call__(self, done: int, total: int, detail: str = "") -> None:
        """Show `done` of `total`."""
        ...


def display() -> Display:
    """Return bars when stderr is a terminal, lines otherwise."""
    return RichDisplay() if sys.stderr.isatty() else PlainDisplay()


class _Rarely:
    """Say yes at most once in some seconds."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_s = time.monotonic()

    def __call__(self) -> bool:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._every_s
        return True


class PlainDisplay:
    """Lines."""

    def say(self, line: str) -> None:
        """Write the line."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    @contextmanager
    def task(self, title: str) -> Iterator[Advance]:
        """Write a line every few seconds."""
        rarely = _Rarely(_PLAIN_EVERY_S)
        rarely()

        def advance(done: int, total: int, detail: str = "") -> None:
            if rarely():
                self.say(f"{title}: {done:,} of {total:,}{'  ' + detail if detail else ''}")

        yield advance


class RichDisplay:
    """Bars."""

    def __init__(self) -> None:
        """Write to stderr, so that stdout holds results alone."""
        self._console = Console(stderr=True, highlight=False)

    def say(self, line: str) -> None:
        """Write the line."""
        self._console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str) -> Iterator[Advance]:
        """Show a bar that goes away when the block ends."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        rarely = _Rarely(_RICH_EVERY_S)
        with Progress(*columns, console=self._console, transient=True) as progress:
            bar: TaskID = progress.add_task(title, total=None, detail="")

            def advance(done: int, total: int, detail: str = "") -> None:
                if rarely() or done == total:
                    progress.update(bar, completed=done, total=total, detail=detail)

            yield advance
