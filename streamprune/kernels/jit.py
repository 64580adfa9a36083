"""numba.njit with our options, and without the on-disk cache where there is no place to write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import xxhash

_SOURCES = xxhash.xxh3_64_hexdigest(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))

_Loop = TypeVar("_Loop", bound=Callable[..., Any])


def jit(*, entry: bool = False, inline: bool = False) -> Callable[[_Loop], _Loop]:
    """Compile the decorated loop on its first call; nopython, no GIL. `entry` says that Python calls it.

    Loops that Python calls are cached on disk if possible, with all that they call. Numba looks for a cache folder
    when it decorates and raises RuntimeError if neither the package's `__pycache__` nor the user's cache folder can be
    written. The kernels then compile in each process anew.

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
