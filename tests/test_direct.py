"""Files written past the page cache: the same bytes, whatever the pieces, and whatever the file system refuses."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from crashing import FaultyOs

from streamprune.disk import direct, durable
from streamprune.disk.direct import ALIGNMENT
from streamprune.errors import ResourceError

BLOCK = 8 * ALIGNMENT
LARGE = 2 * ALIGNMENT


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(durable, "_LARGE_PIECE", LARGE)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Offset, length and whether O_DIRECT was on, of each write."""
    seen: list[tuple[int, int, bool]] = []

    class Watching:
        def __getattr__(self, name: str) -> Any:
            return self.put if name == "write" else getattr(os, name)

        def put(self, fd: int, data: memoryview) -> int:
            at = os.lseek(fd, 0, os.SEEK_CUR)
            seen.append((at, len(data), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))))
            return os.write(fd, data)

    monkeypatch.setattr(durable, "os", Watching())
    return seen


def supported(folder: Path) -> bool:
    """Whether files in the folder can be written with O_DIRECT."""
    fd = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        return direct._switch(fd, True)
    finally:
        os.close(fd)
        (folder / "probe").unlink()


def open_files() -> int:
    """Descriptors of this process; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def written(path: Path, pieces: list[bytes]) -> bytes:
    with durable.AtomicFile(path) as f:
        for piece in pieces:
            f.write(piece)
    data = b"".join(pieces)
    assert f.size == len(data)
    assert f.digest == xxhash.xxh3_128_hexdigest(data)
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return data


@pytest.mark.parametrize("seed", range(30))
def test_any_pieces(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 17, 4095, 4096, 4097, LARGE, LARGE + 5, BLOCK, 3 * BLOCK + 1]) for _ in range(9)]
    written(tmp_path / "f", [chance.randbytes(size) for size in sizes])


def test_large_files_pass_the_page_cache_by(tmp_path: Path, writes: list[tuple[int, int, bool]]) -> None:
    if not supported(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    written(tmp_path / "f", [os.urandom(100), os.urandom(3 * BLOCK), os.urandom(10)])
    past = [(at, length) for at, length, on in writes if on]
    assert sum(length for _, length in past) >= 3 * BLOCK - 2 * ALIGNMENT
    assert all(at % ALIGNMENT == 0 and length % ALIGNMENT == 0 for at, length in past)
    assert sum(length for _, length, on in writes if not on) < 2 * ALIGNMENT


def test_small_files_go_the_usual_way(tmp_path: Path, writes: list[tuple[int, int, bool]]) -> None:
    written(tmp_path / "f", [os.urandom(LARGE - 1)] * 5)
    assert [length for _, length, on in writes if not on] == [LARGE - 1] * 5


def test_files_that_are_read_again_stay_in_the_cache(tmp_path: Path, writes: list[tuple[int, int, bool]]) -> None:
    with durable.AtomicFile(tmp_path / "f", reread=True) as f:
        f.write(os.urandom(4 * BLOCK))
    assert not any(on for *_, on in writes)


@pytest.mark.parametrize("refusal", ["switch", "write"])
def test_a_file_system_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    """Refused when it is asked for (tmpfs of old), or at the first write."""
    refused: list[int] = []

    class Refusing:
        F_GETFL, F_SETFL = fcntl.F_GETFL, fcntl.F_SETFL

        def fcntl(self, fd: int, command: int, *flags: int) -> int:
            if command == fcntl.F_SETFL and flags[0] & getattr(os, "O_DIRECT", 0):
                refused.append(fd)
                if refusal == "switch":
                    raise OSError(errno.EINVAL, "Invalid argument")
                return 0
            return fcntl.fcntl(fd, command, *flags)

    class System:
        def __getattr__(self, name: str) -> Any:
            return self.put if name == "write" and refusal == "write" else getattr(os, name)

        def put(self, fd: int, data: memoryview) -> int:
            if refused and len(data) == BLOCK and len(refused) < 2:
                refused.append(fd)
                raise OSError(errno.EINVAL, "Invalid argument")
            return os.write(fd, data)

    monkeypatch.setattr(direct, "fcntl", Refusing())
    monkeypatch.setattr(durable, "os", System())
    written(tmp_path / "f", [os.urandom(3), os.urandom(5 * BLOCK), os.urandom(77)])
    assert len(refused) == (1 if refusal == "switch" else 2)


def test_the_disk_takes_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stingy:
        def __getattr__(self, name: str) -> Any:
            return self.put if name == "write" else getattr(os, name)

        def put(self, fd: int, data: memoryview) -> int:
            if len(data) > ALIGNMENT:
                flags = fcntl.fcntl(fd, fcntl.F_GETFL)
                fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
                try:
                    return os.write(fd, data[: len(data) // 2 + 1])
                finally:
                    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            return os.write(fd, data)

    monkeypatch.setattr(durable, "os", Stingy())
    written(tmp_path / "f", [os.urandom(5), os.urandom(2 * BLOCK + 9), os.urandom(3)])


@pytest.mark.parametrize("failing", [2, 3, 4, 5])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    def put() -> None:
        with durable.AtomicFile(tmp_path / "f") as f:
            f.write(os.urandom(10))
            f.write(os.urandom(2 * BLOCK + ALIGNMENT + 1))

    full = FaultyOs(failing - 1, OSError(errno.ENOSPC, "No space left on device"), {"write"})
    monkeypatch.setattr(durable, "os", full)
    before = open_files()
    with pytest.raises(ResourceError, match="no space left"):
        put()
    assert full.counted == failing
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


def test_a_whole_shard(tmp_path: Path, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned model is the same, written past the cache or through it."""
    from calls import prune

    monkeypatch.setattr(durable, "_LARGE_PIECE", 1 << 10)
    prune(models(), tmp_path / "past", sparsity=0.5, method="magnitude")
    monkeypatch.setattr(durable, "_LARGE_PIECE", 1 << 40)
    prune(models(), tmp_path / "through", sparsity=0.5, method="magnitude")
    for shard in (tmp_path / "through").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "past" / shard.name).read_bytes()
