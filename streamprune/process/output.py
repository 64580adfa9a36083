"""Results on stdout: flushed while an error can still be told, and dropped where nobody reads them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator

from streamprune.errors import ResourceError
from streamprune.process.console import can_print
from streamprune.process.torchrun import is_follower


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Wraps everything that prints to stdout, and flushes it: errors of a flush at exit would be lost.

    Raises ResourceError if stdout cannot be written, BrokenPipeError if its reader has exited.
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
    """Prints a result, on rank 0 only. Raises as `output`."""
    if is_follower():
        return
    with output():
        print(text)


def sum_up(text: str) -> None:
    """Prints the summary of a finished job; a broken pipe does not change the exit code."""
    try:
        say(text)
    except BrokenPipeError:
        forget_output()


def forget_output() -> None:
    """Drops unwritten output, which the interpreter would try to write again at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: object) -> None:
    """Prints a result as JSON, in ASCII where stdout has no other characters. Raises as `output`."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    say(text if can_print(text) else json.dumps(value, indent=2))
