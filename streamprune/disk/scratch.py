"""Data that may be larger than memory, in unnamed temporary files: gone when closed, or when the process dies.

Changes the disk without durable.py, as nothing here has to survive a crash. The disk blocks of a matrix are reserved
when it is created, because running out of space while writing to a mapping would end the process.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from streamprune.disk.os_errors import disk_errors

if TYPE_CHECKING:
    import torch

_PAGE = mmap.PAGESIZE


class ScratchMatrix:
    """A matrix (rows, columns) of zeros, by default float32; `tensor` is a view of its file, which is in `folder`.

    Pages that were accessed count as resident until `forget`. Raises ResourceError if the disk is full.
    """

    def __init__(self, folder: Path, rows: int, columns: int, dtype: torch.dtype | None = None) -> None:
        import torch

        dtype = dtype or torch.float32
        self._stride = columns * dtype.itemsize
        nbytes = max(rows * self._stride, 1)
        with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
            self._map = mmap.mmap(file.fileno(), nbytes)
        self.tensor = torch.frombuffer(self._map, dtype=dtype, count=rows * columns).view(rows, columns)

    def forget(self, begin: int, end: int) -> None:
        """Gives back the memory of rows begin to end; their content stays in the file."""
        start, stop = -(-begin * self._stride // _PAGE) * _PAGE, end * self._stride // _PAGE * _PAGE
        if end == self.tensor.shape[0]:
            stop = len(self._map)
        if start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


class ScratchFile:
    """Bytes, appended one after the other to an unnamed file in `folder`; `size` is their number."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.size = folder, 0
        with disk_errors(folder):
            self.file: BinaryIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (see close)

    def append(self, data: bytes) -> None:
        """Raises ResourceError when the disk is full."""
        rest = memoryview(data)
        with disk_errors(self._folder):
            while rest:
                rest = rest[self.file.write(rest) :]
        self.size += len(data)

    def close(self) -> None:
        """The file is gone with the last mapping of it."""
        self.file.close()


class ScratchTokens:
    """Token ids (uint32): appended block by block, then read in any order; len() is their number.

    A context manager.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed at the end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def append(self, ids: NDArray[np.uint32]) -> None:
        """Raises ResourceError when the disk is full."""
        with disk_errors(self._folder):
            rest = memoryview(ids.tobytes())
            while rest:
                rest = rest[self._file.write(rest) :]
        self._count += ids.size

    def read(self, begin: int, end: int) -> NDArray[np.uint32]:
        """The ids from `begin` to `end`, as a new array."""
        size = np.dtype(np.uint32).itemsize
        with disk_errors(self._folder):
            self._file.seek(begin * size)
            parts = []
            left = (end - begin) * size
            while left > 0:
                parts.append(self._file.read(left))
                left -= len(parts[-1])
                if not parts[-1]:
                    raise IndexError(f"ids {begin} to {end} of {self._count}")
        return np.frombuffer(b"".join(parts), np.uint32)
