"""Progress on stderr: a bar on a terminal, otherwise one plain line per stage; nothing when quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from streamprune.process.console import print_stderr, stdout_kept_clean


@dataclass(frozen=True)
class Progress:
    """One finished stage, `name`: number `done` of `total`, took `seconds`. Jobs report it from a background thread."""

    name: str
    done: int
    total: int
    seconds: float


ProgressCallback = Callable[[Progress], None]


def no_progress(step: Progress) -> None:
    """The callback that ignores progress."""


@contextmanager
def show_progress(title: str, quiet: bool) -> Iterator[ProgressCallback]:
    """Yields a callback that shows stages as they finish. Meanwhile, only the result can reach stdout."""
    with stdout_kept_clean(), _shown(title, quiet) as progress:
        yield progress


@contextmanager
def _shown(title: str, quiet: bool) -> Iterator[ProgressCallback]:
    if quiet:
        yield no_progress
    elif sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=title, unit="stage", dynamic_ncols=True, leave=False) as bar:

            def advance(step: Progress) -> None:
                bar.total = step.total
                bar.set_postfix_str(step.name, refresh=False)
                bar.update(step.done - bar.n)

            yield advance
    else:

        def print_line(step: Progress) -> None:
            print_stderr(f"{title}: {step.done}/{step.total} {step.name} {step.seconds:.1f} s")

        yield print_line
