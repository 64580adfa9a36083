"""Results on stdout: flushed while an error can still be told, and dropped where nobody reads them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator

from streamprune.errors import ResourceError
from streamprune.process.console import can_print


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Around all that prints to stdout, and flushes it: at exit nobody would be told what goes wrong.

    Raises ResourceError where it cannot be written, and BrokenPipeError for a reader that has gone away.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        forget_output()
        raise ResourceError(f"the output cannot be written: {e.strerror}; send it elsewhere") from e


def say(text: str) -> None:
    """Prints a result. Raises as `output`."""
    with output():
        print(text)


def sum_up(text: str) -> None:
    """What has become of a job that is done: whether somebody reads it is no matter of its exit code."""
    try:
        say(text)
    except BrokenPipeError:
        forget_output()


def forget_output() -> None:
    """What is still to be written is dropped, or the interpreter would try again at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: object) -> None:
    """Prints a result as JSON, in ASCII where stdout has no other characters. Raises as `output`."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    say(text if can_print(text) else json.dumps(value, indent=2))
