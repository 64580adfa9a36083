"""Memory that a job needs in addition to its forward pass: for refitting linears and for tuning layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

CONTEXT = 512 << 20
"""Device memory of the driver's context and the matrix library's workspace."""


class RefitNeeds(NamedTuple):
    """Bytes that a refit needs."""

    most: int
    """For Gram matrices, to hold all those of a layer at once."""
    least: int
    """For Gram matrices, to hold one at a time, or a panel of its rows."""
    held: int
    """For inputs that are held out of the Grams."""
    working: int
    """For its own arrays, once the forward pass is over."""


class TuneNeeds(NamedTuple):
    """Bytes that tuning needs."""

    fixed: int
    """For the largest layer: weights, gradients and optimizer moments."""
    per_window: int
    """For what autograd keeps, per window of a microbatch."""
    most: int
    """Windows in an optimizer step (a count, not bytes): a microbatch is never larger."""
    pairs: int
    """For inputs and targets of all windows, on a device where hidden states are resident."""

    def working(self, windows: int) -> int:
        """Bytes with microbatches of `windows` windows."""
        return self.fixed + windows * self.per_window


def extra_choices(refit: RefitNeeds | None, tune: TuneNeeds | None) -> Iterator[tuple[int, int, int]]:
    """Ways to share out a device, the fastest first: (bytes for Grams, windows in a microbatch, extra bytes in all)."""
    least = refit.least if refit else 0
    rooms = (refit.most, (refit.most + refit.least) // 2, refit.least) if refit else (0,)
    windows = tune.most if tune else 0
    for room in rooms:
        yield room, windows, _extra_bytes(refit, tune, room, windows)
    while windows > 1:
        windows = -(-windows // 2)
        yield least, windows, _extra_bytes(refit, tune, least, windows)


def _extra_bytes(refit: RefitNeeds | None, tune: TuneNeeds | None, room: int, windows: int) -> int:
    held, working = (refit.held, refit.working) if refit else (0, 0)
    return room + held + max(working, tune.working(windows) if tune else 0)


def least_extra(refit: RefitNeeds | None, tune: TuneNeeds | None) -> int:
    """The fewest bytes of a device that a refit and tuning can do with, in addition to a pass."""
    return _extra_bytes(refit, tune, refit.least if refit else 0, 1)
