"""numba.njit with our options; without its on-disk cache if there is no place to write it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import xxhash

from streamprune.disk.places import cache_folder
from streamprune.errors import ResourceError

_SOURCES = xxhash.xxh3_64_hexdigest(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))

_Loop = TypeVar("_Loop", bound=Callable[..., Any])


@functools.cache
def _choose_cache() -> None:
    """Chooses Numba's cache folder: its own choice may belong to another user, or be a folder named `~`."""
    package = Path(__file__).parent
    beside = package / "__pycache__" if (package / "__pycache__").exists() else package
    if not numba.config.CACHE_DIR and not os.access(beside, os.W_OK | os.X_OK):
        with contextlib.suppress(ResourceError):
            numba.config.CACHE_DIR = str(cache_folder("kernels"))


def jit(*, entry: bool = False, inline: bool = False) -> Callable[[_Loop], _Loop]:
    """Compiles the decorated loop on its first call, in nopython mode, without the GIL. `entry`: Python calls it.

    Entry loops are cached on disk if possible, including the loops that they call. Numba looks for a cache folder when
    it decorates: the package's `__pycache__`, or the user's cache (disk/places.py). If neither is writable it raises
    RuntimeError, and the kernels are compiled in every process.

    Numba's cache notices changes to the file of a loop, but not to files of loops that it calls. The name under which a
    loop is cached therefore contains a digest of the sources of all kernels. `inline` forces inlining.
    """

    def wrap(target: _Loop) -> _Loop:
        options: dict[str, Any] = {
            "nogil": True,
            "error_model": "numpy",  # no ZeroDivisionError branches, which would prevent vector code
            "forceinline": inline,
        }
        compiled: _Loop
        if entry:
            _choose_cache()
            target.__qualname__ = f"{target.__qualname__}_{_SOURCES}"
            try:
                compiled = numba.njit(target, cache=True, **options)
                return compiled
            except RuntimeError as error:
                if "cache" not in str(error):
                    raise
        compiled = numba.njit(target, **options)
        return compiled

    return wrap
