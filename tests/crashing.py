"""Records what a crash could leave on the disk, for every moment of a job.

`CrashDisk` stands between what changes the disk and the operating system while a job runs once, and keeps
the state of a folder before and after every operation and in the middle of every write, in three ways:

  killed    the process died: everything that was handed to the system is there
  lost      the power failed, and nothing survived that was not fsynced: neither bytes nor names
  emptied   the power failed, and names survived, but no bytes that were not fsynced

A test puts such a state back with `restore` and runs the job again.
"""
# ruff: noqa: PTH102, PTH104, PTH105, PTH106, PTH108, PTH116

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamprune.disk import durable, lock

Tree = dict[str, bytes | None]
"""Relative POSIX path -> content, None for a folder."""

KINDS = ("killed", "lost", "emptied")

_CHANGES = {
    "write", "fsync", "replace", "rename", "mkdir", "rmdir", "ftruncate", "unlink",
}  # fmt: skip
_UNKNOWN = {
    "fdatasync", "link", "makedirs", "pwrite", "remove", "removedirs", "renames", "sendfile", "symlink",
    "truncate", "writev", "copy_file_range", "pwritev", "mknod", "mkfifo", "chmod", "fchmod", "utime",
}  # fmt: skip


def tree_of(root: Path) -> Tree:
    """The tree of everything in a folder."""
    tree: Tree = {}
    for path in sorted(root.rglob("*")):
        assert not path.is_symlink()
        tree[path.relative_to(root).as_posix()] = path.read_bytes() if path.is_file() else None
    return tree


def restore(root: Path, tree: Tree) -> None:
    """Makes a folder contain exactly this tree."""
    shutil.rmtree(root)
    root.mkdir()
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


class CrashDisk:
    """Replaces the module `os` where the disk is changed, and records. `states[kind]` maps labels to trees."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[str] = []
        self.states: dict[str, dict[str, Tree]] = {kind: {} for kind in KINDS}
        self._seen: dict[str, set[int]] = {kind: set() for kind in KINDS}
        self._same: dict[bytes, bytes] = {}
        self._paths: dict[int, Path] = {}
        self._held: list[int] = []
        self._one = threading.RLock()
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        for path in (root, *root.rglob("*")):
            if path.is_dir():
                self._sync_folder(path)
            else:
                self._files[path.stat().st_ino] = path.read_bytes()
        self._last = tree_of(root)

    # ---- what durable sees

    def __getattr__(self, name: str) -> Any:
        if name in _UNKNOWN:
            raise NotImplementedError(f"teach tests/crashing.py about os.{name}")
        if name in _CHANGES:
            return lambda *args, **kwargs: self._do(name, getattr(self, f"_{name}"), *args, **kwargs)
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            return int(self._do("open", self._create, path, flags, mode))
        fd = os.open(path, flags, mode)
        self._paths[fd] = Path(path)
        return fd

    def close(self, fd: int) -> None:
        self._paths.pop(fd, None)  # before closing: another thread may get the same number right after
        os.close(fd)

    def unlink_path(self, path: Path, missing_ok: bool = False) -> None:
        """Replaces Path.unlink."""
        try:
            self._do("unlink", self._unlink, path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    # ---- the operations

    def _create(self, path: Any, flags: int, mode: int) -> int:
        new = not Path(path).exists()
        fd = os.open(path, flags, mode)
        self._paths[fd] = Path(path)
        if new:
            self._files[os.fstat(fd).st_ino] = b""
        return fd

    def _write(self, fd: int, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = os.write(fd, view[: len(view) // 2])
        self._note("within")
        return half + os.write(fd, view[half:])

    def _fsync(self, fd: int) -> None:
        path = self._paths[fd]
        assert path.stat().st_ino == os.fstat(fd).st_ino
        if path.is_dir():
            self._sync_folder(path)
        else:
            self._files[path.stat().st_ino] = path.read_bytes()

    def _replace(self, source: Any, target: Any) -> None:
        self._hold(target)
        os.replace(source, target)

    def _rename(self, source: Any, target: Any) -> None:
        self._hold(target)
        os.rename(source, target)

    def _mkdir(self, path: Any, mode: int = 0o777) -> None:
        os.mkdir(path, mode)
        self._folders[os.stat(path).st_ino] = {}

    def _rmdir(self, path: Any) -> None:
        self._hold(path)
        os.rmdir(path)

    def _unlink(self, path: Any) -> None:
        self._hold(path)
        os.unlink(path)

    def _ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    # ---- recording

    def _do(self, name: str, operation: Any, *args: Any, **kwargs: Any) -> Any:
        with self._one:
            return self._do_alone(name, operation, *args, **kwargs)

    def _do_alone(self, name: str, operation: Any, *args: Any, **kwargs: Any) -> Any:
        about = self._paths.get(args[0]) if isinstance(args[0], int) else Path(args[0])
        self.operations.append(f"{len(self.operations)} {name} {about.name if about else args[0]}")
        assert tree_of(self.root) == self._last, f"the disk changed behind durable's back before {self.operations[-1]}"
        self._note("before")
        result = operation(*args, **kwargs)
        self._note("after")
        return result

    def _note(self, when: str) -> None:
        self._last = {name: self._keep(content) for name, content in tree_of(self.root).items()}
        lost: Tree = {}
        self._collect(self.root.stat().st_ino, "", lost)
        emptied: Tree = {}
        for name, content in self._last.items():
            path = self.root / name
            emptied[name] = None if content is None else self._files.get(path.stat().st_ino, b"")
        for kind, tree in (("killed", self._last), ("lost", lost), ("emptied", emptied)):
            key = hash(frozenset(tree.items()))
            if key not in self._seen[kind]:
                self._seen[kind].add(key)
                self.states[kind][f"{when} {self.operations[-1]}"] = tree

    def _keep(self, content: bytes | None) -> bytes | None:
        return None if content is None else self._same.setdefault(content, content)

    def _collect(self, folder: int, prefix: str, tree: Tree) -> None:
        for name, inode in self._folders[folder].items():
            if inode in self._folders:
                tree[prefix + name] = None
                self._collect(inode, f"{prefix}{name}/", tree)
            else:
                tree[prefix + name] = self._files[inode]

    def _sync_folder(self, path: Path) -> None:
        self._folders[path.stat().st_ino] = {p.name: p.stat().st_ino for p in path.iterdir()}

    def _hold(self, path: Any) -> None:
        """Keeps an open link to a file that is removed, so that its inode number is not reused."""
        if Path(path).exists():
            self._held.append(os.open(path, os.O_RDONLY))

    def release(self) -> None:
        for fd in self._held:
            os.close(fd)
        self._held.clear()


def replace_os(patch: pytest.MonkeyPatch, stand_in: object) -> None:
    """Replaces the module `os` by `stand_in` in all modules that change names on the disk."""
    for module in (durable, lock):
        patch.setattr(module, "os", stand_in)


@contextmanager
def recorded(root: Path) -> Iterator[CrashDisk]:
    """Records what durable does to a folder."""
    disk = CrashDisk(root)
    try:
        with pytest.MonkeyPatch.context() as patch:
            replace_os(patch, disk)
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: disk.unlink_path(path, missing_ok))
            yield disk
    finally:
        disk.release()


class NoSync:
    """`os` without fsync, its slowest function, for tests that are not about power failures."""

    def __getattr__(self, name: str) -> Any:
        return (lambda fd: None) if name == "fsync" else getattr(os, name)


OPERATIONS = frozenset({"open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "ftruncate"})


class FaultyOs:
    """`os` whose n-th operation (from 0) of those named fails; `counted` says how many there were."""

    def __init__(self, number: int, error: BaseException, names: Collection[str] = OPERATIONS) -> None:
        self.number, self.error, self.names, self.counted = number, error, names, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.names:
            return real

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counted += 1
            if self.counted - 1 == self.number:
                raise self.error
            return real(*args, **kwargs) if name != "fsync" else None

        return counted
