"""stdout and stderr as a job of hours needs them: what nobody can be shown is dropped, and no character fails.

a descriptor that is closed    leads nowhere from now on; else the next file to be opened would be "stderr"
stderr that cannot be written  is given up, and the job goes on
letters that stdout lacks      are written in ASCII: "..." for "…", "\\xe9" for "é"
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

_ASCII = {
    "…": "...", "−": "-", "–": "-", "—": "-", "×": "x", "≤": "<=", "≥": ">=", "²": "^2", "·": ".", "‖": "||",
    "→": "->", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
_ERRORS = "streamprune.ascii"


class _Droppable:
    """A text stream that is given up at the first failure: what cannot be written is dropped from then on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            action()
        except (OSError, ValueError):  # full, or its reader has gone away; closed
            self._lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_streams() -> None:
    """Makes stdout and stderr of this process safe to print to. For programs, not for libraries."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, this one
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=_ERRORS)
    error = sys.stderr if sys.stderr is not None else os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = cast(TextIO, _Droppable(error))


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Within it, what anybody prints goes to stderr: code that comes with a checkpoint, and libraries."""
    if sys.stderr is None:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """The handler of characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def aside(text: str) -> None:
    """One line on stderr, if there is somebody to read it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def speaks_unicode(text: str) -> bool:
    """Whether stdout can carry `text` as it is."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
