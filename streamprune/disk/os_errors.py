"""Errors of the operating system while something is written, as errors of ours that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamprune.errors import ResourceError, StateError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns OSError into errors of ours; `path` is what is written, where the error names nothing.

    Raises ResourceError for a full disk or quota, StateError for a folder that cannot be written.
    """
    try:
        yield
    except OSError as e:
        where = e.filename or path
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"no space left while writing {where}: free some and run the same command again, it resumes"
            ) from e
        if e.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.ENOENT,
            errno.ENAMETOOLONG,
            errno.ELOOP,
            errno.EISDIR,
            errno.ENOTEMPTY,
            errno.EEXIST,
            errno.EBUSY,
            errno.EXDEV,
        ):
            raise StateError(f"cannot write {where}: {e.strerror}; choose a folder that can be written") from e
        raise ResourceError(f"writing {where} failed: {e.strerror}; run the same command again, it resumes") from e
