"""Where files other than output go: compiled kernels, work folders, code that comes with a checkpoint.

In order of preference: XDG_CACHE_HOME, `.cache` in the home folder, a folder in the system's temporary folder. Never
the working directory, to which `~` would expand without a home. Compiled code is run from these folders, so the
temporary one must belong to the user, with no access for others; any other is not used.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from streamprune.disk import durable
from streamprune.errors import ResourceError, StateError


def cache_folder(name: str = "") -> Path:
    """The folder `name` among the user's caches; it exists and is writable.

    Raises ResourceError if there is no such place, not even a temporary folder.
    """
    for home in _cache_homes():
        if _can_write(home / "streamprune" / name):
            return home / "streamprune" / name
    why = "no home folder, and no temporary one"
    with contextlib.suppress(FileNotFoundError):  # of gettempdir, where nothing can be written
        private = Path(tempfile.gettempdir()) / f"streamprune-{os.getuid()}"
        if _is_private(private) and _can_write(private / name):
            return private / name
        why = f"no home folder, and {private} is not this user's own"
    raise ResourceError(
        f"there is no place for temporary files: {why}; set XDG_CACHE_HOME to a folder that can be written"
    )


def settle_hub_caches(environment: MutableMapping[str, str]) -> None:
    """Sets HF_HOME or HF_MODULES_CACHE if the hub's libraries would otherwise use a folder that cannot be written.

    Call it before these libraries are imported. Variables that are set stay as they are.
    """
    homes = [Path(environment["HF_HOME"])] if environment.get("HF_HOME") else []
    hub = next(iter([*homes, *(home / "huggingface" for home in _cache_homes())]), None)
    if hub is None or not (_is_folder(hub) or _could_make(hub)):
        environment.setdefault("HF_HOME", str(cache_folder("huggingface")))
    elif not os.access(hub, os.W_OK) and not _could_make(hub):
        environment.setdefault("HF_MODULES_CACHE", str(cache_folder("modules")))


def _could_make(folder: Path) -> bool:
    there = next((p for p in folder.parents if _exists(p)), folder)
    return not _exists(folder) and os.access(there, os.W_OK | os.X_OK)


def _exists(path: Path) -> bool:
    """False as well where this user may not look, as in another user's home; Path.exists raises PermissionError."""
    return os.path.exists(path)  # noqa: PTH110


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def _cache_homes() -> Iterator[Path]:
    given = Path(os.environ.get("XDG_CACHE_HOME") or "-")
    if given.is_absolute():
        yield given
    try:
        home = Path.home()
    except RuntimeError:  # a user whom the system does not know
        return
    if home.is_absolute() and _is_folder(home):
        yield home / ".cache"


def _can_write(folder: Path) -> bool:
    try:
        durable.make_folder(folder)
    except (ResourceError, StateError):
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _is_private(folder: Path) -> bool:
    """Makes a folder that only this user can access; False if the folder is another user's."""
    try:
        durable.make_folder(folder, 0o700)
        found = folder.lstat()
    except (OSError, ResourceError, StateError):
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
