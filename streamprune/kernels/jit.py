"""numba.njit with our options, and without the on-disk cache where there is no place to write it."""

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
    """Numba's own choice of a user's folder may be none of the user's, or a folder called `~`."""
    package = Path(__file__).parent
    beside = package / "__pycache__" if (package / "__pycache__").exists() else package
    if not numba.config.CACHE_DIR and not os.access(beside, os.W_OK | os.X_OK):
        with contextlib.suppress(ResourceError):
            numba.config.CACHE_DIR = str(cache_folder("kernels"))


def jit(*, entry: bool = False, inline: bool = False) -> Callable[[_Loop], _Loop]:
    """Compile the decorated loop on its first call; nopython, no GIL. `entry` says that Python calls it.

    Loops that Python calls are cached on disk if possible, with all that they call. Numba looks for a cache folder
    when it decorates: the package's `__pycache__`, or a cache of the user's (disk/places.py). It raises RuntimeError if
    neither can be written. The kernels then compile in each process anew.

    Numba's cache notices changes of the file that a loop stands in, not of the files whose loops it calls. So
    the name under which a loop is cached carries a digest of all our kernels' sources.
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
