"""Ctrl-C and SIGTERM: heard once, acted upon for certain.

At start-up, where nothing has to be tidied up but a lock's file, a signal ends the program on the spot: while libraries
are imported, an exception out of nowhere can end in a deadlock of Python's import locks or in C++'s std::terminate.

While a job is at `work`, a signal becomes a KeyboardInterrupt in the main thread, wherever that happens to be. Within a
library's `__del__`, a callback from C or an `except` that catches all, it would be lost and the job would go on: so
what was heard is remembered, and `check`, between the steps of a job, raises it again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

EXIT_CODE = 130


@dataclass
class _State:
    """Of this process, which has one set of signal handlers."""

    heard: list[int] = field(default_factory=list)
    """The signals since `listening` began."""
    at_once: bool = False
    """Whether a signal ends the process where it stands."""
    tidy: list[Callable[[], object]] = field(default_factory=list)
    """What is done before that, the latest first."""


_state = _State()


def check() -> None:
    """Raises KeyboardInterrupt where a signal has been heard, though nobody else may have noticed."""
    if _state.heard:
        raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether a signal has been heard."""
    return bool(_state.heard)


def before_leaving(tidy: Callable[[], object]) -> None:
    """Has `tidy` called before a signal ends the process on the spot; until `forget`."""
    _state.tidy.append(tidy)


def forget(tidy: Callable[[], object]) -> None:
    """The opposite of before_leaving."""
    if tidy in _state.tidy:
        _state.tidy.remove(tidy)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """A signal's handler that ends the process with one line and EXIT_CODE."""
    try:
        for tidy in reversed(_state.tidy):
            with contextlib.suppress(OSError):
                tidy()
        with contextlib.suppress(OSError):
            os.write(2, b"streamprune: error: interrupted\n")
    finally:
        os._exit(EXIT_CODE)


def _hear(number: int, frame: FrameType | None) -> None:
    if _state.at_once:
        leave(number, frame)
    _state.heard.append(number)
    raise KeyboardInterrupt


def listen(handler: Callable[[int, FrameType | None], Any]) -> dict[signal.Signals, Any]:
    """Lets SIGINT (unless it is ignored, as behind nohup) and SIGTERM call `handler`; returns what they called before.

    For the main thread only.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


@contextmanager
def listening(program: bool) -> Iterator[None]:
    """Within it, signals are heard; outside of `work` they end the process, if it is ours (a `program`)."""
    _state.at_once = program
    before = listen(_hear)
    told, shown = sys.unraisablehook, sys.excepthook

    def unraisable(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            told(what)

    def uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            shown(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught  # no traceback: it is remembered instead
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = told, shown
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.heard.clear()
        _state.at_once = False


@contextmanager
def work() -> Iterator[None]:
    """Within it, a signal raises KeyboardInterrupt, for there is something to tidy up."""
    before, _state.at_once = _state.at_once, False
    try:
        yield
    finally:
        _state.at_once = before
