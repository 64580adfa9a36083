"""Ctrl-C and SIGTERM: never lost, never a deadlock.

During start-up, where only a lock file has to be cleaned up, a signal ends the process at once: an exception raised at
an arbitrary point of an import can deadlock Python's import locks or end in C++'s std::terminate.

Within `work`, a signal raises KeyboardInterrupt in the main thread, wherever that is. If that is in a library's
`__del__`, in a callback from C or under an `except` that catches everything, the exception is swallowed and the job
would go on. So signals are recorded, and `check`, called between the steps of a job, raises KeyboardInterrupt again.
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

from streamprune.errors import INTERRUPTED


@dataclass
class _State:
    """One per process, as signal handlers are."""

    received: list[int] = field(default_factory=list)
    """Signals since `listening` began."""
    at_once: bool = False
    """Whether a signal ends the process at once, rather than raising KeyboardInterrupt."""
    is_ending: bool = False
    """Whether the next signal is ignored, see `ending`."""
    cleanups: list[Callable[[], object]] = field(default_factory=list)
    """Called before that, the latest first."""


_state = _State()


def check() -> None:
    """Raises KeyboardInterrupt if a signal has been received, even if an earlier KeyboardInterrupt was swallowed."""
    if _state.received:
        raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether a signal has been received."""
    return bool(_state.received)


def ending() -> None:
    """Ignores one signal from now on: this process is about to end by itself, and has yet to say why."""
    _state.is_ending = True


def before_leaving(cleanup: Callable[[], object]) -> None:
    """Registers `cleanup` to be called before a signal ends the process at once, until `forget`.

    If it returns True, nothing is printed: another process has said why all of them end.
    """
    _state.cleanups.append(cleanup)


def forget(cleanup: Callable[[], object]) -> None:
    """Undoes before_leaving."""
    if cleanup in _state.cleanups:
        _state.cleanups.remove(cleanup)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler that cleans up, prints one line and ends the process with exit code 130."""
    told = False
    try:
        for cleanup in reversed(_state.cleanups):
            with contextlib.suppress(OSError):
                told = cleanup() is True or told
        with contextlib.suppress(OSError):
            if not told:
                os.write(2, b"streamprune: error: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.is_ending:
        _state.is_ending = False
        return
    if _state.at_once:
        leave(number, frame)
    _state.received.append(number)
    raise KeyboardInterrupt


def listen(handler: Callable[[int, FrameType | None], Any]) -> dict[signal.Signals, Any]:
    """Installs `handler` for SIGTERM and SIGINT, unless they are ignored (as under nohup); returns the previous ones.

    For the main thread only.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


@contextmanager
def listening(program: bool) -> Iterator[None]:
    """Handles signals within it. Outside of `work` they end the process if it is our own `program`, not a caller's."""
    _state.at_once, _state.is_ending = program, False
    before = listen(_on_signal)
    unraisable_before, uncaught_before = sys.unraisablehook, sys.excepthook

    def unraisable(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            unraisable_before(what)

    def uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            uncaught_before(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught  # no traceback: the signal is recorded
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = unraisable_before, uncaught_before
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.received.clear()
        _state.at_once = _state.is_ending = False


@contextmanager
def work() -> Iterator[None]:
    """Within it, a signal raises KeyboardInterrupt, so that the job can clean up."""
    before, _state.at_once = _state.at_once, False
    try:
        yield
    finally:
        _state.at_once = before
