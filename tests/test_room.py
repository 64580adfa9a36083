"""Is there room on the disk: what goes to one file system is added up, and the message says what mends it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from streamprune.disk.room import check_room
from streamprune.errors import ResourceError

FREE = 100 << 20


@pytest.fixture(autouse=True)
def free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=FREE))


def test_as_much_as_is_free_fits(tmp_path: Path) -> None:
    check_room([(tmp_path, FREE)], "")
    with pytest.raises(ResourceError):
        check_room([(tmp_path, FREE + 1)], "")


def test_one_file_system_is_counted_once(tmp_path: Path) -> None:
    check_room([(tmp_path / "a", FREE // 2), (tmp_path / "b", FREE // 2)], "")
    with pytest.raises(ResourceError):
        check_room([(tmp_path / "a", FREE // 2), (tmp_path / "b", FREE // 2 + 1)], "")


def test_what_the_message_says(tmp_path: Path) -> None:
    """It names the nearest folder that exists, and leaves nothing behind."""
    with pytest.raises(ResourceError) as found:
        check_room([(tmp_path / "no" / "such", 2 * FREE)], "buy a disk", detail=" for weights")
    assert str(found.value) == f"{tmp_path} has 100 MiB free, this job needs 200 MiB for weights; buy a disk"
    assert not list(tmp_path.iterdir())
