"""Every change of the disk goes through durable.py, in an order that survives a crash."""

from __future__ import annotations

import ast
import errno
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crashing import FaultyOs

import streamprune
from streamprune.disk import durable
from streamprune.disk.durable import AtomicFile
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import write_shard
from streamprune.errors import ResourceError, StateError


class Faults:
    """`os` that keeps the order of operations, and in which some fail."""

    def __init__(self, **fail: int) -> None:
        self.fail = fail
        self.order: list[str] = []
        self.opened: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in {"open", "close", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "ftruncate"}:
            return real

        def run(*args: Any, **kwargs: Any) -> Any:
            about = self.opened.get(args[0], "?") if isinstance(args[0], int) else Path(args[0]).name
            if name != "close":
                self.order.append(f"{name} {about}")
            if name in self.fail:
                raise OSError(self.fail[name], os.strerror(self.fail[name]), None)
            result = real(*args, **kwargs)
            if name == "open":
                self.opened[result] = about
            return result

        return run


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Faults]:
    def start(**fail: int) -> Faults:
        faults = Faults(**fail)
        monkeypatch.setattr(durable, "os", faults)
        return faults

    return start


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# ---- files


def test_order_of_an_atomic_file(tmp_path: Path, faulty: Callable[..., Faults]) -> None:
    faults = faulty()
    durable.replace_file(tmp_path / "f", b"new")
    folder = tmp_path.name
    assert faults.order == [
        "open .f.tmp", "write .f.tmp", "fsync .f.tmp", "replace .f.tmp", f"open {folder}", f"fsync {folder}",
    ]  # fmt: skip
    assert (tmp_path / "f").read_bytes() == b"new"


def test_order_of_a_line(tmp_path: Path, faulty: Callable[..., Faults]) -> None:
    faults, folder = faulty(), tmp_path.name
    durable.append_line(tmp_path / "j", b"one")
    assert faults.order == ["open j", "write j", "fsync j", f"open {folder}", f"fsync {folder}"]
    faults.order.clear()
    durable.append_line(tmp_path / "j", b"two")
    assert faults.order == ["open j", "write j", "fsync j"]
    assert (tmp_path / "j").read_bytes() == b"one\ntwo\n"


def test_order_of_other_changes(tmp_path: Path, faulty: Callable[..., Faults]) -> None:
    faults, folder = faulty(), tmp_path.name
    durable.make_folder(tmp_path / "a" / "b")
    assert faults.order == ["mkdir a", f"open {folder}", f"fsync {folder}", "mkdir b", "open a", "fsync a"]
    faults.order.clear()
    (tmp_path / "f").write_bytes(b"123456")
    durable.truncate(tmp_path / "f", 3)
    assert faults.order == ["open f", "ftruncate f", "fsync f"]
    assert (tmp_path / "f").read_bytes() == b"123"
    faults.order.clear()
    durable.publish(tmp_path / "a", tmp_path / "c")
    assert faults.order[-3:] == ["rename a", f"open {folder}", f"fsync {folder}"]
    assert names(tmp_path) == ["c", "f"]


def test_removal_of_a_folder_is_durable(tmp_path: Path, faulty: Callable[..., Faults]) -> None:
    """Else what was removed may come back after a power failure, within the published output for one."""
    faults = faulty()
    (tmp_path / "a" / "b").mkdir(parents=True)
    durable.clear(tmp_path / "a")
    assert faults.order[-3:] == ["rmdir a", f"open {tmp_path.name}", f"fsync {tmp_path.name}"]


def test_readers_see_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with AtomicFile(path) as f:
        f.write(b"n" * 10)
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == [".f.tmp", "f"]
    assert path.read_bytes() == b"n" * 10
    assert names(tmp_path) == ["f"]


def test_an_exception_abandons_the_file(tmp_path: Path) -> None:
    path, before = tmp_path / "f", open_files()
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), AtomicFile(path) as f:
        f.write(b"new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["f"]
    assert path.read_bytes() == b"old"
    assert open_files() == before
    f.abandon()


@pytest.mark.parametrize("operation", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, faulty: Callable[..., Faults], operation: str, code: int
) -> None:
    path, before = tmp_path / "f", open_files()
    path.write_bytes(b"old")
    faulty(**{operation: code})
    with pytest.raises(ResourceError, match="it resumes"):
        durable.replace_file(path, b"new")
    assert names(tmp_path) == ["f"], "no temporary file is left"
    assert path.read_bytes() == b"old"
    assert open_files() == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG])
def test_a_place_that_cannot_be_written(tmp_path: Path, faulty: Callable[..., Faults], code: int) -> None:
    faulty(open=code)
    with pytest.raises(StateError, match="choose a folder that can be written"):
        durable.replace_file(tmp_path / "f", b"new")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __getattr__(self, name: str) -> Any:
            return (lambda fd, data: os.write(fd, data[:3])) if name == "write" else getattr(os, name)

    monkeypatch.setattr(durable, "os", Slow())
    digest = durable.replace_file(tmp_path / "f", bytes(range(100)))
    durable.append_line(tmp_path / "j", b"a long line")
    assert (tmp_path / "f").read_bytes() == bytes(range(100))
    assert (tmp_path / "j").read_bytes() == b"a long line\n"
    with AtomicFile(tmp_path / "g") as g:
        g.write(bytes(range(50)))
        g.write(memoryview(bytes(range(50, 100))))
    assert (g.size, g.digest) == (100, digest)


@pytest.mark.parametrize("existing", [b"", b"one\n"])
@pytest.mark.parametrize("written", [0, 1, 4])
def test_a_line_that_does_not_fit_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bytes, written: int
) -> None:
    calls = iter([written, None])

    class Full:
        def __getattr__(self, name: str) -> Any:
            return self.put if name == "write" else getattr(os, name)

        def put(self, fd: int, data: memoryview) -> int:
            count = next(calls)
            if not count:
                raise OSError(errno.ENOSPC, "No space left on device")
            return os.write(fd, data[:count])

    path = tmp_path / "j"
    path.write_bytes(existing)
    monkeypatch.setattr(durable, "os", Full())
    with pytest.raises(ResourceError):
        durable.append_line(path, b"two two")
    assert path.read_bytes() == existing


def test_a_line_that_was_not_synced_is_taken_back(tmp_path: Path, faulty: Callable[..., Faults]) -> None:
    """Else the next start takes for committed what the disk refused to keep."""
    path = tmp_path / "j"
    path.write_bytes(b"one\n")
    faulty(fsync=errno.EIO)
    with pytest.raises(ResourceError):
        durable.append_line(path, b"two")
    assert path.read_bytes() == b"one\n"


def test_copies_follow_links(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to("real")
    size, digest = durable.copy_file(tmp_path / "link", tmp_path / "deep" / "er" / "copy")
    copy = tmp_path / "deep" / "er" / "copy"
    assert not copy.is_symlink() and copy.read_bytes() == b"x" * 1000
    assert (size, digest) == (1000, durable.replace_file(tmp_path / "again", b"x" * 1000))


def test_temporary_files_do_not_follow_links(tmp_path: Path) -> None:
    """A link that somebody laid in a shared folder must not lead our bytes into another file."""
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".f.tmp").symlink_to("victim")
    with pytest.raises((StateError, ResourceError)):
        durable.replace_file(tmp_path / "f", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_an_interrupt_while_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that writes has stopped when the interrupt goes on: nothing is written to files that are closed."""

    class Interrupting:
        writes = 0

        def __getattr__(self, name: str) -> Any:
            return self.put if name == "write" else getattr(os, name)

        def put(self, fd: int, data: memoryview) -> int:
            self.writes += 1
            if self.writes == 2:  # the first is the header
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                time.sleep(0.3)
            return os.write(fd, data)

    monkeypatch.setattr(durable, "os", Interrupting())
    refs = [TensorRef(name, "s", "U8", (100,), 0, 100) for name in "ab"]
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "s", refs, lambda ref: [bytes(100)])
    assert threading.active_count() == before
    assert not names(tmp_path)


@pytest.mark.parametrize("failing", [1, 2, 9])
def test_a_full_disk_while_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    full = FaultyOs(failing - 1, OSError(errno.ENOSPC, "No space left on device"), {"write"})
    monkeypatch.setattr(durable, "os", full)
    refs = [TensorRef(name, "s", "U8", (100,), 0, 100) for name in "abcdefgh"]
    before = threading.active_count()
    with pytest.raises(ResourceError, match=r"no space left.*/s"):
        write_shard(tmp_path / "s", refs, lambda ref: [bytes(100)])
    assert full.counted == failing, "nothing is written after what failed"
    assert threading.active_count() == before
    assert not names(tmp_path)


# ---- folders


def test_clear_never_follows_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"1")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_bytes(b"2")
    (folder / "sub" / "to-folder").symlink_to(outside)
    (folder / "to-file").symlink_to(outside / "precious")
    (folder / "dangling").symlink_to("nowhere")
    durable.clear(folder)
    assert names(tmp_path) == ["outside"]
    assert (outside / "precious").read_bytes() == b"1"
    link = tmp_path / "link"
    link.symlink_to(outside)
    durable.clear(link)
    assert names(tmp_path) == ["outside"]
    assert (outside / "precious").read_bytes() == b"1"


def test_removing_what_is_not_there(tmp_path: Path) -> None:
    durable.clear(tmp_path / "nothing")
    durable.remove(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    durable.clear(tmp_path / "file")
    assert not names(tmp_path)


def test_publish_replaces_only_an_empty_folder(tmp_path: Path) -> None:
    for name in ("new", "empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "a").write_bytes(b"1")
    (tmp_path / "full" / "b").write_bytes(b"2")
    with pytest.raises((StateError, ResourceError)):
        durable.publish(tmp_path / "new", tmp_path / "full")
    assert names(tmp_path / "full") == ["b"]
    durable.publish(tmp_path / "new", tmp_path / "empty")
    assert names(tmp_path / "empty") == ["a"]


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("f", "f/deeper", "dangling"):
        with pytest.raises(StateError):
            durable.make_folder(tmp_path / name)
    assert (tmp_path / "f").read_bytes() == b"1"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        durable.make_folder(tmp_path / "a" / "b")
        durable.replace_file(tmp_path / "a" / "file", b"1")
        durable.append_line(tmp_path / "a" / "journal", b"1")
        durable.copy_file(tmp_path / "a" / "file", tmp_path / "a" / "copy")
    finally:
        os.umask(before)
    for path in (tmp_path / "a", *(tmp_path / "a").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


# ---- nobody else

OWN = {"disk/durable.py", "disk/lock.py", "disk/scratch.py"}
ALLOWED = {
    ("process/output.py", "os.open"): "the null device, when stdout is closed",
    ("process/console.py", "os.open"): "the null device, for a stream that is closed",
    ("process/interrupts.py", "os.write"): "a line on stderr",
    ("disk/places.py", "tempfile.gettempdir"): "only asks where it is",
    ("pruning/prepare.py", "np.save"): "into memory",
    ("demo.py", "tempfile.TemporaryDirectory"): "the demo's own folder",
}

_OF_OS = {
    "chmod", "chown", "copy_file_range", "ftruncate", "link", "makedirs", "mkdir", "mkfifo", "mknod", "open", "pwrite",
    "pwritev", "remove", "removedirs", "rename", "renames", "replace", "rmdir", "sendfile", "symlink", "truncate",
    "unlink", "utime", "write", "writev", "fsync", "fdatasync",
}  # fmt: skip
_OF_PATHS = {
    "chmod", "hardlink_to", "mkdir", "rename", "rmdir", "symlink_to", "touch", "unlink", "write_bytes",
    "write_text", "rmtree", "copytree", "copyfile", "mkstemp", "mkdtemp", "tofile", "save_file", "save_pretrained",
}  # fmt: skip
_MODULES = {"shutil": {"disk_usage"}, "tempfile": set[str]()}


def _writes(path: Path) -> list[tuple[int, str]]:
    """Calls that change a disk, by line: as far as names tell."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in {"os", "shutil", "tempfile"}:
            found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names if a.name not in {"disk_usage"}]
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        mode = next((k.value for k in node.keywords if k.arg == "mode"), None)
        if isinstance(function, ast.Name):
            if function.id == "open" and _opens_for_writing(mode or (node.args[1] if len(node.args) > 1 else None)):
                found.append((node.lineno, "open"))
        elif isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if owner == "os":
                if function.attr in _OF_OS:
                    found.append((node.lineno, f"os.{function.attr}"))
            elif owner in _MODULES:
                if function.attr not in _MODULES[owner]:
                    found.append((node.lineno, f"{owner}.{function.attr}"))
            elif owner == "durable":
                continue
            elif function.attr in _OF_PATHS:
                found.append((node.lineno, f".{function.attr}"))
            elif function.attr == "open" and _opens_for_writing(mode or next(iter(node.args[owner == "gzip" :]), None)):
                found.append((node.lineno, ".open for writing"))
            elif owner in {"np", "numpy", "torch"} and function.attr in {"save", "savez", "memmap", "open_memmap"}:
                target = node.args[0] if node.args else None
                if not (isinstance(target, ast.Name) and target.id == "buffer"):
                    found.append((node.lineno, f"{owner}.{function.attr}"))
    return found


def _opens_for_writing(mode: ast.expr | None) -> bool:
    if mode is None:
        return False
    return not isinstance(mode, ast.Constant) or not isinstance(mode.value, str) or bool(set(mode.value) & set("wax+"))


def test_only_durable_changes_the_disk() -> None:
    package = Path(streamprune.__file__).parent
    found = {
        (name, call): line
        for path in sorted(package.rglob("*.py"))
        if (name := path.relative_to(package).as_posix()) not in OWN
        for line, call in _writes(path)
    }
    assert found.keys() == ALLOWED.keys(), found


def test_the_search_finds_what_it_should(tmp_path: Path) -> None:
    lines = [
        "os.replace(a, b)", "open(p, 'w')", "open(p, mode='rb+')", "p.open('ab')", "p.unlink()", "shutil.rmtree(p)",
        "tempfile.mkstemp()", "p.write_text('')", "from os import remove", "np.save(path, x)", "torch.save(x, path)",
        "tempfile.TemporaryDirectory()", "p.open(mode=m)",
        "open(p, m)", "p.mkdir()", "gzip.open(p, 'wb')",
    ]  # fmt: skip
    harmless = ["open(p)", "open(p, 'rb')", "p.open('rb')", "os.stat(p)", "shutil.disk_usage(p)", "s.replace('a', 'b')",
                "gzip.open(p, 'rb')"]  # fmt: skip
    path = tmp_path / "code.py"
    path.write_text("\n".join([*lines, *harmless]))
    assert sorted({line for line, _ in _writes(path)}) == list(range(1, len(lines) + 1))
