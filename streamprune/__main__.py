"""`python -m streamprune`, and the `streamprune` console script."""

import ctypes
import sys

from streamprune.cli import main

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def run() -> None:
    """Runs the command line and ends the process with its exit code."""
    _steady_heap()
    sys.exit(main())


def _steady_heap() -> None:
    """Makes glibc hand large blocks back as soon as they are freed, so that resident memory stays flat.

    It holds for the whole process, so the program does it and not the library; without glibc it does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 32 << 20)


if __name__ == "__main__":
    run()
