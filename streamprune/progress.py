"""Progress on stderr: a bar on a terminal, one plain line a stage elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from streamprune.process.console import aside, stdout_kept_clean


@dataclass(frozen=True)
class Progress:
    """One finished step: stage `done` of `total`, called `name`, after `seconds`. Jobs tell it from a second thread."""

    name: str
    done: int
    total: int
    seconds: float


ProgressCallback = Callable[[Progress], None]


def no_progress(step: Progress) -> None:
    """Tells nobody."""


@contextmanager
def show_progress(title: str, quiet: bool) -> Iterator[ProgressCallback]:
    """A callback that shows steps as they finish. Meanwhile, stdout is kept for the result."""
    with stdout_kept_clean(), _shown(title, quiet) as progress:
        yield progress


@contextmanager
def _shown(title: str, quiet: bool) -> Iterator[ProgressCallback]:
    if quiet:
        yield no_progress
    elif sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=title, unit="stage", dynamic_ncols=True, leave=False) as bar:

            def move(step: Progress) -> None:
                bar.total = step.total
                bar.set_postfix_str(step.name, refresh=False)
                bar.update(step.done - bar.n)

            yield move
    else:

        def line(step: Progress) -> None:
            aside(f"{title}: {step.done}/{step.total} {step.name} {step.seconds:.1f} s")

        yield line
