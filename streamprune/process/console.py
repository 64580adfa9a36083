"""Makes stdout and stderr safe for a job that runs for hours: printing never ends it.

closed descriptors           are opened on /dev/null; otherwise the next file to be opened would become "stderr"
stderr fails (disk full, …)  output to it is dropped from then on, and the job goes on
encoding lacks a character   it is written in ASCII: "..." for "…", "\\xe9" for "é"
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
    """A text stream that drops all output after its first failure."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failed = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except (OSError, ValueError):  # disk full, reader gone, or stream closed
            self._failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_streams() -> None:
    """Makes stdout and stderr of this process safe to print to. For the command line only: it replaces sys.stderr."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=_ERRORS)
    error = sys.stderr if sys.stderr is not None else os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = cast(TextIO, _Droppable(error))


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Redirects stdout to stderr: libraries and a checkpoint's own code may print, and must not mix with the result."""
    if sys.stderr is None:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """A codecs error handler: ASCII in place of what the encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def print_stderr(text: str) -> None:
    """Prints one line to stderr; nothing where that is missing or fails."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def can_print(text: str) -> bool:
    """Whether stdout can encode `text` as it is."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
