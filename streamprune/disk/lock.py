"""At most one process at a time works on an output.

Changes the disk without durable.py, as nothing in the lock file has to survive a crash.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from streamprune.disk.os_errors import disk_errors
from streamprune.errors import LockedError
from streamprune.process import interrupts


class Lock:
    """An exclusive advisory lock on a file beside OUT; the kernel frees it when the process ends.

    The file is removed on release. A process that opened it before the removal notices that the name now
    belongs to another file, and tries again. Raises LockedError, with the holder's process id, if it is held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def __enter__(self) -> Lock:
        with disk_errors(self.path):
            while True:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held = _held(fd, self.path)
                    os.close(fd)
                    raise held from None
                except BaseException:
                    os.close(fd)
                    raise
                if _same_file(fd, self.path):
                    break
                os.close(fd)
            self._fd = fd
            interrupts.before_leaving(self.path.unlink)
            try:
                os.ftruncate(fd, 0)
                os.write(fd, f"{os.getpid()}\n".encode())
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        interrupts.forget(self.path.unlink)
        os.close(self._fd)
        self._fd = -1


def check_free(path: Path) -> None:
    """Raises LockedError if another process holds the lock; creates no file."""
    with disk_errors(path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(fd, path) from None
        finally:
            os.close(fd)


def _held(fd: int, path: Path) -> LockedError:
    holder = os.read(fd, 32).decode("ascii", "replace").strip()
    return LockedError(f"another run (process {holder or 'unknown'}) holds {path}; wait for it or stop it")


def _same_file(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
