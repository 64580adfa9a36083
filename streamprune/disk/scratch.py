"""A matrix that may be larger than memory, in a file without a name: gone when it is closed, or when its process dies.

The only change to a disk outside of durable.py; nothing of it is ever seen, so nothing has to be made durable. The
file's blocks are reserved when it is made: a disk that fills up later cannot end the process while it writes.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch

from streamprune.disk.durable import disk_errors

_PAGE = mmap.PAGESIZE


class ScratchMatrix:
    """A matrix (rows, columns) of zeros, float32 unless told; `tensor` is a view on its file in `folder`.

    Pages that were touched count as resident until `forget`. Raises ResourceError when the disk has no room.
    """

    def __init__(self, folder: Path, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> None:
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
        """Gives back the memory of rows begin to end; what was written to them stays in the file."""
        start, stop = -(-begin * self._stride // _PAGE) * _PAGE, end * self._stride // _PAGE * _PAGE
        if end == self.tensor.shape[0]:
            stop = len(self._map)
        if start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
