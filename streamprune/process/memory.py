"""Memory that this process holds and that the machine has left; parsing and formatting amounts of it."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

from streamprune.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def resident_bytes() -> int:
    """Resident memory of this process now, including mapped file pages."""
    return _kilobytes("/proc/self/status", "VmRSS") or _peak_rusage()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far, including mapped file pages."""
    return _kilobytes("/proc/self/status", "VmHWM") or _peak_rusage()


def available_bytes() -> int | None:
    """Bytes that processes could still allocate without swapping; None where the system does not tell."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(file: str, field: str) -> int | None:
    path = Path(file)
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found.group(1)) << 10 if found else None


def _peak_rusage() -> int:
    """Peak resident bytes where there is no /proc. `ru_maxrss` is in bytes on macOS, in KiB elsewhere."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: of Python, torch's allocators (of any device), or a CUDA library."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError, *([torch.OutOfMemoryError] if torch is not None else []))
    messages = ("DefaultCPUAllocator", "CUDA error: out of memory", "HIP error: out of memory", "_STATUS_ALLOC_FAILED",
                "Cuda failure 2 'out of memory'")  # fmt: skip
    return isinstance(error, kinds) or any(m in str(error) for m in messages)


def give_back_free_memory() -> None:
    """Returns free heap memory to the system (glibc only); without it, the process grows a little with every layer."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def parse_bytes(text: str) -> int:
    """Bytes from "8GiB", "500 MB", "1.5e9". Raises UsageError for anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else "?"
    unit = {"K": "KIB", "M": "MIB", "G": "GIB", "T": "TIB"}.get(unit, unit)
    if not found or unit not in _UNITS or not 1 <= float(found.group(1)) * _UNITS[unit] < 2**63:
        raise UsageError(f"{text!r} is not an amount of memory; write for example 8GiB or 500MB")
    return int(float(found.group(1)) * _UNITS[unit])


def format_bytes(count: float) -> str:
    """Bytes for reading: "712 MiB", "1.43 GiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            number = count / size
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{count:.0f} B"
