"""Progress on stderr: a bar on a terminal and in a notebook, otherwise one plain line per stage; nothing when quiet."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from streamprune.process.console import print_stderr, stdout_kept_clean

_WORTH_SAYING = 2.0
"""Seconds: an end that is nearer is not announced."""


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


class TimeLeft:
    """Estimates from finished stages how long the others take, as if all were alike: the median so far.

    The first stage does not count: it has the embedding, and reads the text.
    """

    def __init__(self) -> None:
        self._steps: list[Progress] = []

    def after(self, step: Progress) -> float | None:
        """Seconds that the stages after `step` are expected to take; None before three stages are done."""
        if self._steps and (step.done <= self._steps[-1].done or step.total != self._steps[-1].total):
            self._steps.clear()  # another series of stages
        self._steps.append(step)
        known = [found.seconds for found in self._steps[1:]]
        return median_low(known) * (step.total - step.done) if len(known) > 1 else None


class Display:
    """Shows finished stages when it is called, and lines between them. This one shows nothing."""

    def __call__(self, step: Progress) -> None:
        """Shows a finished stage."""

    def say(self, line: str) -> None:
        """Prints a line on stderr."""


class _Lines(Display):
    def __init__(self, title: str) -> None:
        self._title, self._left = title, TimeLeft()

    def __call__(self, step: Progress) -> None:
        left = self._left.after(step)
        more = f", about {format_duration(left)} left" if left is not None and left >= _WORTH_SAYING else ""
        self.say(f"{step.done}/{step.total} {step.name} {step.seconds:.1f} s{more}")

    def say(self, line: str) -> None:
        print_stderr(f"{self._title}: {line}")


class _Bar(Display):
    def __init__(self, title: str, bar: Any) -> None:
        self._title, self._bar = title, bar

    def __call__(self, step: Progress) -> None:
        self._bar.total = step.total
        self._bar.set_postfix_str(step.name, refresh=False)
        self._bar.update(step.done - self._bar.n)

    def say(self, line: str) -> None:
        self._bar.clear()
        print_stderr(f"{self._title}: {line}")
        self._bar.refresh()


@contextmanager
def show_progress(title: str, quiet: bool = False) -> Iterator[Display]:
    """Yields a callback that shows stages as they finish. Meanwhile, only the result can reach stdout.

    In a notebook: `with show_progress("prune") as progress: prune(…, progress=progress)`.
    """
    with stdout_kept_clean(), _shown(title, quiet) as progress:
        yield progress


@contextmanager
def _shown(title: str, quiet: bool) -> Iterator[Display]:
    notebook = _in_a_notebook()
    if quiet:
        yield Display()
    elif notebook or (sys.stderr is not None and sys.stderr.isatty()):
        with _tqdm(notebook)(desc=title, unit="stage", dynamic_ncols=True, leave=notebook) as bar:
            yield _Bar(title, bar)
    else:
        yield _Lines(title)


def _in_a_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose stderr is no terminal."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def _tqdm(notebook: bool) -> Any:
    """The class of bar; in a notebook without ipywidgets it is made of text, and no warning says so."""
    if not notebook:
        from tqdm import tqdm

        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm as of_notebooks
    return of_notebooks


def format_duration(seconds: float) -> str:
    """A time for people: 3.2 s, 45 s, 12 min, 3 h 5 min."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
