"""Memory that a layer takes besides its forward pass: to refit its linears, and to tune it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class RefitNeeds(NamedTuple):
    """What a refit takes, in bytes. `most` holds all Grams of a layer at once, `least` part of one after the other."""

    most: int
    least: int
    held: int
    """Inputs that are kept out of the Grams."""
    working: int


class TuneNeeds(NamedTuple):
    """What tuning takes, in bytes: of the largest layer, and for each window that is computed at once."""

    fixed: int
    per_window: int
    most: int
    """Windows a step, beyond which nothing is computed at once."""
    pairs: int
    """Inputs and targets of all windows, on a device where hidden states stay there."""

    def working(self, windows: int) -> int:
        """With so many windows at once."""
        return self.fixed + windows * self.per_window


def beside_pass(refit: RefitNeeds | None, tune: TuneNeeds | None) -> Iterator[tuple[int, int, int]]:
    """What may lie on a device beside a pass, the best first: room for Grams, windows to tune on, bytes of all."""
    least = refit.least if refit else 0
    rooms = (refit.most, (refit.most + refit.least) // 2, refit.least) if refit else (0,)
    windows = tune.most if tune else 0
    for room in rooms:
        yield room, windows, _bytes_beside(refit, tune, room, windows)
    while windows > 1:
        windows = -(-windows // 2)
        yield least, windows, _bytes_beside(refit, tune, least, windows)


def _bytes_beside(refit: RefitNeeds | None, tune: TuneNeeds | None, room: int, windows: int) -> int:
    held, working = (refit.held, refit.working) if refit else (0, 0)
    return room + held + max(working, tune.working(windows) if tune else 0)


def least_beside(refit: RefitNeeds | None, tune: TuneNeeds | None) -> int:
    """Bytes of a device that a refit and tuning take beside a pass, at the least."""
    return _bytes_beside(refit, tune, refit.least if refit else 0, 1)
