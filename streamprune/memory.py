"""How much memory this process holds, and how much the machine has left."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path


def resident_bytes() -> int:
    """Resident memory of this process now, mapped file pages counted."""
    return _kilobytes("/proc/self/status", "VmRSS") or _highest()


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far, mapped file pages counted."""
    return _kilobytes("/proc/self/status", "VmHWM") or _highest()


def available_bytes() -> int | None:
    """What the machine could still give to processes without swapping; None where it does not say."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(file: str, field: str) -> int | None:
    path = Path(file)
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found.group(1)) << 10 if found else None


def _highest() -> int:
    """Where there is no /proc: in bytes on macOS, in KiB elsewhere."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def give_back_free_memory() -> None:
    """Returns what the heap holds free to the system; otherwise it grows a little with every layer. glibc only."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
