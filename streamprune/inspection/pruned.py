"""Which linears were pruned, as the report says that `prune` left beside the weights.

The report has the names of today's modules, a checkpoint may have older ones (`backbone.layers.…`, `block_sparse_moe`,
`language_model.model.…`). Names are therefore compared as a whole, then from the list of layers on, and what is left by
layer and shape, so that a linear that was pruned is never taken for one that was not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streamprune.disk.report import REPORT, report_of_pruning
from streamprune.errors import CorruptStateError

_IN_LAYER = re.compile(r"(?:^|\.)((?:layers|h|blocks|block|layer)\.([0-9]{1,18})\..+)$")

Linear = tuple[str, int, int]
"""Module name, and the two sizes of its weight."""


def find_pruned(folder: Path, linears: Mapping[str, tuple[int, int]]) -> frozenset[str] | None:
    """Those of `linears`, name -> shape, that were pruned; None if no report says which.

    Raises CorruptStateError if the report is damaged.
    """
    try:
        report = report_of_pruning(folder)
        if report is None:
            return None
        left = _reported(folder / REPORT, report)
    except CorruptStateError as e:
        raise CorruptStateError(f"{e}; without it, every linear is judged: move it away, or prune again") from e
    among = {(name, *shape) for name, shape in linears.items()}
    pruned: set[str] = set()
    keys: tuple[Callable[[Linear], object], ...] = (lambda linear: linear[0], _within_model, _by_shape)
    for key in keys:
        wanted = {key(linear) for linear in left}
        found = {linear for linear in among if key(linear) in wanted}
        known = {key(linear) for linear in found}
        left, among = {linear for linear in left if key(linear) not in known}, among - found
        pruned |= {name for name, *_ in found}
    return frozenset(pruned)


def _within_model(linear: Linear) -> object:
    found = _IN_LAYER.search(linear[0])
    return found[1] if found else linear[0]


def _by_shape(linear: Linear) -> object:
    found = _IN_LAYER.search(linear[0])
    return int(found[2]) if found else None, *sorted(linear[1:])


def _reported(path: Path, report: Mapping[str, Any]) -> set[Linear]:
    """The linears of a report, shared ones under all their names."""
    found: set[Linear] = set()
    try:
        shared = dict(report.get("shared", {}))
        for linear in report["linears"]:
            for name in (linear["name"], *shared.get(linear["name"], ())):
                found.add((str(name), int(linear["rows"]), int(linear["in_features"])))
    except (KeyError, OverflowError, TypeError, ValueError):
        raise CorruptStateError(f"{path} is damaged (linears)") from None
    return found
