"""Statistics of weights that several layers share: the sums over all their uses (model/shared.py)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from pathlib import Path

from streamprune.calibration.statistics import StatisticsFile
from streamprune.errors import UnsupportedError
from streamprune.methods.stats import InputStats
from streamprune.model.stages import Outline, Stage
from streamprune.process.ranks import ALONE, Ranks
from streamprune.pruning.spec import JobSpec


def sum_uses(
    model: Outline, stage: Stage, found: dict[str, InputStats], groups: dict[str, str], saved: Callable[[int], Path],
    ranks: Ranks = ALONE,
) -> list[str]:  # fmt: skip
    """Gives a layer's shared linears the statistics of all their uses; returns these linears.

    Changes `found` (group -> statistics) and `groups` (linear -> group), on all ranks. `saved(layer)` is the file with
    the statistics of an earlier layer, which rank 0 has.
    """
    names = [name for name in stage.linears if name in model.shared]
    if not names:
        return names
    if not ranks.rank:
        _sum(names, model, found, groups, saved)
    all_found, all_groups = ranks.broadcast((dict(found), dict(groups)))
    found.clear()
    found.update(all_found)
    groups.clear()
    groups.update(all_groups)
    return names


def _sum(
    names: list[str], model: Outline, found: dict[str, InputStats], groups: dict[str, str], saved: Callable[[int], Path]
) -> None:
    for name in names:
        uses = [found[groups[name]]] if name in groups else []
        for layer, other in model.shared[name]:
            before = StatisticsFile(saved(layer))
            if other in before.groups:  # layers may not call all that they have
                uses.append(before.load(other, before.refs[f"{before.groups[other]}.sum"].shape[0]))
        if uses:
            groups[name] = f"{name}.every_use"
            found[groups[name]] = functools.reduce(operator.add, uses)
    for leader in found.keys() - set(groups.values()):
        del found[leader]


def check_shared(spec: JobSpec, model: Outline) -> None:
    """Raises UnsupportedError for what cannot be done to weights that several layers share."""
    if not model.shared or spec.recipe is None:
        return
    name, uses = next(iter(model.shared.items()))
    what = f"{name} is used in layer {uses[0][0]}, too"
    if spec.recipe.quantize is not None:
        raise UnsupportedError(f"{what}, and FP8 checkpoints name each linear once; pass --quantize none")
    if spec.recipe.tune:
        raise UnsupportedError(f"{what}, so that layers cannot be tuned one after the other; leave out --tune")
    if spec.propagate in ("pruned", "asymmetric"):
        raise UnsupportedError(f"{what}, and is pruned only when all its uses have been seen; pass --propagate dense")
