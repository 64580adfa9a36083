"""Every change that streamprune makes to a disk: write, fsync, rename, remove.

No other module creates, changes or removes a file, except scratch.py, whose files have no name, and lock.py; a test
enforces it. What the functions guarantee, on a file system with POSIX semantics:

  FilePart        bytes before the part are left as they are; after the commit, the part survives a power loss
  replace_file    readers see the old file, the new file or none, never a part; once it returns, the new
                  file survives a power loss (temporary file, fsync, rename, fsync of the folder)
  append_line     a line is either whole or recognisably torn; once it returns, the line survives a power loss
  publish         a folder appears under its final name in one step
  remove, clear   idempotent; after a crash in the middle, some files are left and none is changed

Modes follow the umask (0666 for files, 0777 for folders), so that others can read what was written.

The order of writes of a job, and what a crash after each step leaves behind, is drawn in CONTRIBUTING.md;
a new kind of write changes that table and tests/test_crash.py with it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType

import xxhash

from streamprune.disk.direct import ALIGNMENT, DirectWriter
from streamprune.disk.os_errors import disk_errors
from streamprune.errors import CheckpointError

Buffer = bytes | bytearray | memoryview

_WRITE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
"""Never follow symlinks: one planted beside OUT could redirect the write."""

_LARGE_PIECE = 1 << 20
"""From the first piece of this size on, a file is written with O_DIRECT."""

_FLUSH_BYTES = 32 << 20
"""Writeback is started after every so many bytes, so that the final fsync is short."""


class _Stream:
    """Writes bytes to an open file, one after the other, from byte `begin` on.

    `size` bytes have been written; `digest` (xxh3_128, hexadecimal) is of these, and of what `hash` had seen before.
    `reread=True` leaves the data in the page cache, for files that are read again soon; other files bypass it from the
    first large piece on, if the file system supports that (direct.py).
    """

    def __init__(self, path: Path, fd: int, begin: int, before: xxhash.xxh3_128 | None, reread: bool) -> None:
        self.path, self.begin, self.size = path, begin, 0
        self.hash = before.copy() if before is not None else xxhash.xxh3_128()
        self._fd, self._reread = fd, reread
        self._flushed = 0
        self._direct: DirectWriter | None = None
        self._bypass = not reread

    @property
    def digest(self) -> str:
        return self.hash.hexdigest()

    def write(self, data: Buffer) -> None:
        """Appends bytes; raises ResourceError when the disk is full."""
        view = memoryview(data).cast("B")
        self.hash.update(view)
        with disk_errors(self.path):
            if self._direct is None and self._bypass and len(view) >= _LARGE_PIECE:
                head = view[: -(self.begin + self.size) % ALIGNMENT]
                self._append(head)
                view = view[len(head) :]
                writer = DirectWriter(self._fd, os.write)
                self._direct = writer if writer.works else None
                self._bypass = writer.works
            if self._direct is None:
                self._append(view)
            else:
                self._direct.append(view)
                self.size += len(view)

    def _append(self, view: memoryview) -> None:
        written = 0
        while written < len(view):
            written += os.write(self._fd, view[written : written + _FLUSH_BYTES])
        self.size += written
        if not self._reread and self.size - self._flushed >= _FLUSH_BYTES:
            _start_writeback(self._fd, self.begin + self._flushed, self.size - self._flushed)
            self._flushed = self.size

    def _settle(self) -> None:
        """Makes the bytes durable, forgets their cached pages, and closes the file."""
        if self._direct is not None:
            self._direct.finish()
            self._direct = None  # with its block of memory, as the file's hash may be needed for longer
        os.fsync(self._fd)
        if not self._reread:
            _drop_cached(self._fd)
        os.close(self._fd)
        self._fd = -1

    def _close(self) -> None:
        self._direct = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class AtomicFile(_Stream):
    """A file that is streamed under a temporary name and appears under its own when it is complete.

    Use as a context manager: leaving it normally commits, leaving it with an exception removes the temporary file.
    """

    def __init__(self, path: Path, *, reread: bool = False) -> None:
        self.temporary = path.with_name(f".{path.name}.tmp")
        with disk_errors(path):
            fd = os.open(self.temporary, _WRITE | os.O_CREAT | os.O_TRUNC, 0o666)
        super().__init__(path, fd, 0, None, reread)
        self._pending = True

    def commit(self) -> None:
        """Makes the file durable under its own name; unless `reread`, drops it from the page cache."""
        with disk_errors(self.path):
            self._settle()
            os.replace(self.temporary, self.path)
            self._pending = False
            sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Removes the temporary file; harmless after a commit."""
        self._close()
        if self._pending:
            self._pending = False
            self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abandon()


class FilePart(_Stream):
    """Writes one part of a file in place, from byte `begin` on; the bytes before are left as they are.

    A second attempt overwrites the first. Which parts are complete must be recorded elsewhere (the journal does).
    `before` is the hash state after the first `begin` bytes, None for the first part.
    """

    def __init__(self, path: Path, begin: int, before: xxhash.xxh3_128 | None) -> None:
        with disk_errors(path):
            fd = os.open(path, _WRITE | os.O_CREAT, 0o666)
        super().__init__(path, fd, begin, before, False)
        with disk_errors(path):
            os.lseek(fd, begin, os.SEEK_SET)

    def commit(self) -> None:
        """Makes the part durable, and the file's name with its first part."""
        with disk_errors(self.path):
            self._settle()
            if not self.begin:
                sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Closes the file; harmless after a commit."""
        self._close()


def _start_writeback(fd: int, offset: int, length: int) -> None:
    """Asks the kernel to start writing a complete range to disk; only a hint, where the system has it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def _drop_cached(fd: int) -> None:
    """Drops the file from the page cache, as it is not read again soon."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Makes created, renamed and removed names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: Buffer) -> str:
    """Writes a whole small file atomically and durably; returns its xxh3_128."""
    with AtomicFile(path) as f:
        f.write(data)
    return f.digest


def copy_file(source: Path, target: Path) -> tuple[int, str]:
    """Copies one file (links are followed) atomically and durably; returns its bytes and xxh3_128."""
    make_folder(target.parent)
    try:
        with source.open("rb") as r, AtomicFile(target) as w:
            while block := r.read(4 << 20):
                w.write(block)
    except OSError as e:  # of the source: AtomicFile raises errors of ours
        raise CheckpointError(f"{source}: cannot be read ({e.strerror}); the same command resumes when it can") from e
    return w.size, w.digest


def append_line(path: Path, line: bytes) -> None:
    """Appends one line and fsyncs it; `line` must not contain a newline."""
    with disk_errors(path):
        fresh = not path.exists()
        fd = os.open(path, _WRITE | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(fd).st_size
            view = memoryview(line + b"\n")
            try:
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)
        if fresh:
            sync_folder(path.parent)


def truncate(path: Path, size: int) -> None:
    """Cuts a torn tail off a file, durably."""
    with disk_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Creates a folder and its parents, durably. `mode` (of the folder itself) is subject to the umask."""
    with disk_errors(path):
        if path.is_dir():
            return
        make_folder(path.parent)
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path)) from None
        sync_folder(path.parent)


def check_folder(path: Path) -> None:
    """Raises what make_folder would raise for want of a permission, or for a file in the way; changes nothing."""
    with disk_errors(path):
        there = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            code = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(code, os.strerror(code), str(there))


def publish(source: Path, target: Path) -> None:
    """Renames a folder to its final name, durably. `target` must not exist, or be an empty folder."""
    with disk_errors(target):
        os.rename(source, target)
        sync_folder(target.parent)


def remove(path: Path) -> None:
    """Removes one file if it exists."""
    with disk_errors(path):
        path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Removes a folder and all in it, if it exists, durably. Links are removed, never followed."""
    if folder.is_symlink() or folder.exists():
        _clear(folder)
        with disk_errors(folder):
            sync_folder(folder.parent)


def _clear(folder: Path) -> None:
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        remove(folder)
        return
    with disk_errors(folder):
        for entry in sorted(folder.iterdir()):
            _clear(entry)
        os.rmdir(folder)
