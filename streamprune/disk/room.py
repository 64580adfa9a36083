"""Whether there is room on the disk for what a command is about to write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from streamprune.errors import ResourceError
from streamprune.process.memory import format_bytes

SLACK_BYTES = 64 << 20
"""Disk space for everything besides weights and activations: side files, journal, reports."""


def check_room(needs: Iterable[tuple[Path, int]], advice: str, *, detail: str = "") -> None:
    """Raises ResourceError unless each (path, bytes to be written there) fits on its file system.

    Paths need not exist yet; what goes to the same file system is added up. `detail` says in the message what the
    bytes are for, `advice` what mends it.
    """
    totals: dict[int, tuple[Path, int]] = {}
    for path, size in needs:
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        device = there.stat().st_dev
        totals[device] = (there, totals.get(device, (there, 0))[1] + size)
    for there, size in totals.values():
        free = shutil.disk_usage(there).free
        if free < size:
            raise ResourceError(
                f"{there} has {format_bytes(free)} free, this job needs {format_bytes(size)}{detail}; {advice}"
            )
