"""`python -m streamprune`, and the `streamprune` console script."""

import contextlib
import ctypes
import os
import signal
import sys
from typing import NoReturn

from streamprune.errors import INTERRUPTED
from streamprune.process import interrupts
from streamprune.process.imports import own_process

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def run() -> NoReturn:
    """Runs the command line and ends the process with its exit code.

    At once: taking torch, numba and transformers apart would take another one to two seconds, in which OUT is there and
    the process as well.
    """
    interrupts.listen(interrupts.leave)  # before more is imported
    from streamprune.process.torchrun import prepare_environment

    prepare_environment()
    from streamprune.cli import main
    from streamprune.process.console import steady_streams

    _steady_heap()
    own_process()
    steady_streams()
    try:
        code = main(program=True)
    except KeyboardInterrupt:  # while another was dealt with
        code = INTERRUPTED
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # all is done
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone away
            if stream is not None:
                stream.flush()
    os._exit(code)


def _steady_heap() -> None:
    """Makes large activations cheap to allocate and gives their memory back when they are freed.

    A fresh block of memory costs a page fault for every 4 KiB when it is first touched: 8 to 12 % of a forward pass.
    Torch asks for 2 MiB pages when THP_MEM_ALLOC_ENABLE is set before it is imported, and glibc keeps blocks below
    its threshold (32 MiB is the most it takes) for the next layer. Both hold for the whole process, so the program
    does it and not the library; where there is no such allocator nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


if __name__ == "__main__":
    run()
