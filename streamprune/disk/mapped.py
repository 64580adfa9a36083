"""The shards of a checkpoint, mapped: bytes that are read on access and not copied. mapping.py has tensors of them.

Each shard is mapped as a whole, once, which takes only address space. The mapping is private: writing to a
tensor changes this process's copy of the page, never the file. No memory is reserved for such copies, so that a
shard may be larger than RAM (an ordinary copy-on-write mapping of it would be refused).

Pages that were accessed count as resident until `release`. A view keeps the mapping alive, even after `close`.
If another program truncates a mapped file, access to the lost part ends the process with SIGBUS; the size is
therefore checked again before each view is made. Imports no torch.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import DTYPE_BITS, TensorRef, open_file
from streamprune.disk.spool import Spool, shards_of
from streamprune.errors import CheckpointError, ResourceError

_PAGE = mmap.PAGESIZE


class _Mapped(NamedTuple):
    file: BinaryIO
    data: mmap.mmap
    size: int


class MappedFiles:
    """The shards of a checkpoint, mapped as needed. A context manager; methods may run in threads.

    With a `spool`, they are fetched from the hub and dropped again.
    """

    def __init__(self, checkpoint: Checkpoint, spool: Spool | None = None) -> None:
        self._checkpoint, self._spool = checkpoint, spool
        self._open: dict[str, _Mapped] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        if self._spool is not None:
            self._spool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def raw(self, ref: TensorRef) -> memoryview:
        """The bytes of `ref`, read-only, whatever its dtype.

        Raises:
            CheckpointError, ResourceError: as `tensor`.
        """
        return memoryview(self._map(ref.shard).data)[ref.begin : ref.end].toreadonly()

    def prefetch(self, refs: Iterable[TensorRef]) -> None:
        """Ask the system to start reading `refs`; returns at once. Raises as `raw`."""
        for shard, begin, end in _spans(refs):
            if self._spool is not None and not self._spool.has(shard):
                continue
            mapped = self._map(shard)
            start = begin - begin % _PAGE
            if hasattr(mmap, "MADV_WILLNEED"):
                mapped.data.madvise(mmap.MADV_WILLNEED, start, end - start)

    def release(self, refs: Iterable[TensorRef], *, drop_cache: bool = False) -> None:
        """Gives back the memory of all pages that lie wholly within `refs`; adjacent ones count as one range.

        Views stay usable: a page that is accessed again is read again, from the page cache or the file, and what
        was written to it is lost. `drop_cache` asks the system to drop the pages from its cache as well.
        """
        for shard, begin, end in _spans(refs):
            mapped = self._open.get(shard)
            if mapped is None:
                continue
            start, stop = -(-begin // _PAGE) * _PAGE, end - end % _PAGE
            if end == mapped.size:
                stop = -(-end // _PAGE) * _PAGE  # the rest of the last page is unused
            if start < stop and hasattr(mmap, "MADV_DONTNEED"):
                mapped.data.madvise(mmap.MADV_DONTNEED, start, min(stop, mapped.size) - start)
            if drop_cache and start < stop and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(mapped.file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)

    @property
    def fetches(self) -> bool:
        """Whether shards are fetched from the hub."""
        return self._spool is not None

    def upcoming(self, stages: Sequence[Iterable[TensorRef]], at_work: int = 1) -> None:
        """Says which tensors will be needed from now on, stage by stage: a spool fetches and drops shards by it.

        Those of the first `at_work` stages are needed at once.
        """
        if self._spool is not None:
            for shard in self._spool.upcoming([shards_of(refs) for refs in stages], at_work):
                with self._lock:
                    self._open.pop(shard, None)

    def cancel(self) -> None:
        """Ends downloads; whoever waits for one gets an error."""
        if self._spool is not None:
            self._spool.cancel()

    def close(self) -> None:
        """Closes the files. Views stay valid; each mapping ends with its last view."""
        if self._spool is not None:
            self._spool.close()
        with self._lock:
            self._closed = True
            for mapped in self._open.values():
                mapped.file.close()
            self._open.clear()

    def bits(self, ref: TensorRef, start: int = 0, stop: int | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Rows start to stop (by default all) of a tensor of two or four bytes, as unsigned integers.

        A view of the file that may be written to, or a copy if its offset is not a multiple of the item size. A scalar
        has shape (). Raises as `raw`.
        """
        width = DTYPE_BITS[ref.dtype] // 8
        shape = ref.shape if stop is None else (stop - start, *ref.shape[1:])
        begin = ref.begin + start * math.prod(ref.shape[1:]) * width
        data: Any = self._map(ref.shard).data
        if begin % width:
            data, begin = bytearray(data[begin : begin + math.prod(shape) * width]), 0
        kind = np.uint16 if width == 2 else np.uint32
        return np.frombuffer(data, kind, math.prod(shape), begin).reshape(shape)

    def _map(self, shard: str) -> _Mapped:
        path = self._checkpoint.path / shard
        if self._spool is not None:
            self._spool.file(shard)  # waits without the lock
        with self._lock:
            if self._closed:
                raise ValueError("the maps are closed")
            mapped = self._open.get(shard)
            if mapped is None:
                mapped = self._open[shard] = self._map_file(shard)
        size = os.fstat(mapped.file.fileno()).st_size
        if size != mapped.size:
            raise CheckpointError(
                f"{path}: changed from {mapped.size} to {size} bytes while it was read; "
                "start again when nothing else writes to it"
            )
        return mapped

    def _map_file(self, shard: str) -> _Mapped:
        path = self._checkpoint.path / shard
        file = open_file(path) if self._spool is None else self._spool.file(shard)
        info = os.fstat(file.fileno())
        if self._spool is None and (info.st_size, info.st_mtime_ns) != self._checkpoint.shard_stats[shard]:
            file.close()
            raise CheckpointError(
                f"{path}: has changed since its header was read; start again when nothing else writes to it"
            )
        try:
            return _Mapped(file, _private_map(file.fileno(), info.st_size), info.st_size)
        except OSError as error:
            file.close()
            raise ResourceError(
                f"{path}: cannot be mapped ({info.st_size} bytes): {error.strerror}; raise the limit of "
                "the address space (ulimit -v) or set vm.overcommit_memory to 0"
            ) from None


def _private_map(descriptor: int, size: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in mmap from Python 3.13
    return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _spans(refs: Iterable[TensorRef]) -> Iterator[tuple[str, int, int]]:
    """The ranges (shard, begin, end) of `refs`, without empty ones, adjacent ones merged."""
    joined: tuple[str, int, int] | None = None
    for ref in sorted(refs, key=lambda ref: (ref.shard, ref.begin)):
        if ref.begin == ref.end:
            continue
        if joined and joined[0] == ref.shard and joined[2] >= ref.begin:
            joined = (ref.shard, joined[1], max(joined[2], ref.end))
            continue
        if joined:
            yield joined
        joined = (ref.shard, ref.begin, ref.end)
    if joined:
        yield joined
