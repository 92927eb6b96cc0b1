"""A bar for long work, where someone can see it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[int, int, str], object]  # steps done, steps in all (0: unknown), a few words


def silent(done: int, steps: int, words: str) -> None:
    """A progress that nobody sees."""


@contextlib.contextmanager
def shown(what: str, progress: Progress | None = None) -> Iterator[Progress]:
    """The caller's own `progress`; without one a bar on stderr, if that is a terminal.

    what: a few words that stand before the bar, `training tiny-gpt`.
    """
    if progress is not None or not sys.stderr.isatty():
        yield progress or silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(what),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, steps, words: bar.update(
            task, completed=done, total=steps or None, description=words
        )
