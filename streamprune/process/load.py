"""How much of the machine's processors other programs take."""

from __future__ import annotations

import os
from pathlib import Path

_STAT = Path("/proc/stat")


class Others:
    """Watches other programs from its creation on."""

    def __init__(self) -> None:
        self._begun = _times()

    def share(self) -> float | None:
        """The share of all processors' time that was neither idle nor ours, 0 to 1; None where the system does not
        tell."""
        now = _times()
        if now is None or self._begun is None:
            return None
        total, used, own = (b - a for a, b in zip(self._begun, now, strict=True))
        return min(1.0, max(0.0, used - own) / total) if total > 0 else None


def _times() -> tuple[float, float, float] | None:
    """Seconds so far: of all processors, of those that were not idle, and of this process and its children."""
    try:
        fields = _STAT.read_text().split("\n", 1)[0].split()[1:9]  # user to steal; what follows is part of user
        ticks = [int(field) for field in fields]
    except (OSError, ValueError):
        return None
    if len(ticks) < 5:
        return None
    second = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / second, (sum(ticks) - ticks[3] - ticks[4]) / second, sum(os.times()[:4])
