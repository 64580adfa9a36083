"""Distributes a sparsity among the linears of a model, from its weights and the statistics of their inputs.

All weights are read in chunks (twice for "owl"), and only a few numbers per linear are kept. See methods/allocation.py
for the mathematics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from streamprune.calibration.statistics import StatisticsFile
from streamprune.errors import UsageError
from streamprune.methods.allocation import OUTLIER, Curve, by_error, levels_around, owl
from streamprune.methods.selection import select
from streamprune.model.finite import rows_of
from streamprune.model.loader import WeightLoader
from streamprune.model.stages import Stage
from streamprune.process import interrupts
from streamprune.progress import Progress, ProgressCallback, no_progress
from streamprune.pruning.linears import CHUNK_BYTES
from streamprune.pruning.target import Target


def allocate(
    kind: str, target: Target, loader: WeightLoader, given: StatisticsFile, sparsity: float,
    progress: ProgressCallback = no_progress,
) -> dict[str, float]:  # fmt: skip
    """The sparsity of each linear that `target` prunes; `kind` is "owl" or "error".

    Their mean, weighted by the linears' sizes, is `sparsity`. `progress` is called once per layer. Raises UsageError
    for statistics without the sums that "error" needs, and whatever reading weights and statistics raises.
    """
    work = _Allocation(target, loader, given)
    return work.by_owl(sparsity, progress) if kind == "owl" else work.by_error(sparsity, progress)


class _Allocation:
    """The weights and input statistics of the linears to prune, and both ways to allocate a sparsity among them."""

    def __init__(self, target: Target, loader: WeightLoader, given: StatisticsFile) -> None:
        self._target, self._loader, self._given = target, loader, given
        stages = target.skeleton.layer_stages
        self._layers = [(stage, linears) for stage in stages if (linears := target.linears_of(stage))]
        """The layers that are pruned, and their linears with in_features."""
        self._refs = {name: ref for stage in stages for name, ref in stage.linears.items()}

    def by_error(self, sparsity: float, progress: ProgressCallback) -> dict[str, float]:
        """See methods/allocation.by_error."""
        levels = levels_around(sparsity)
        curves: dict[str, Curve] = {}
        for stage, linears in self._counted(progress):
            tokens, update = self._given.updates.get(stage.prefix, (0.0, 0.0))
            if not tokens > 0:
                raise UsageError(
                    f"{self._given.path} lacks the size of what {stage.prefix} adds to the residual stream, which "
                    "--allocate error needs; make it again with `calibrate`"
                )
            errors = [0.0] * len(levels)
            for name, width in linears.items():
                found = self._errors(name, width, levels)
                errors = [a + b * update / tokens for a, b in zip(errors, found, strict=True)]
            curves[stage.prefix] = Curve(self._weights(linears), levels, errors)
        return self._by_linear(by_error(curves, sparsity))

    def by_owl(self, sparsity: float, progress: ProgressCallback) -> dict[str, float]:
        """See methods/allocation.owl."""
        outliers: dict[str, float] = {}
        sizes: dict[str, int] = {}
        for stage, linears in self._counted(progress):
            size = self._weights(linears)
            total = sum(float(score.sum(dtype=torch.float64)) for score in self._scores(linears))
            above = sum(int((score > OUTLIER * total / size).sum()) for score in self._scores(linears))
            outliers[stage.prefix], sizes[stage.prefix] = above / size, size
        found = owl(list(outliers.values()), list(sizes.values()), sparsity)
        return self._by_linear(dict(zip(outliers, found, strict=True)))

    def _counted(self, progress: ProgressCallback) -> Iterator[tuple[Stage, dict[str, int]]]:
        for done, (stage, linears) in enumerate(self._layers, 1):
            interrupts.check()
            since = time.perf_counter()
            yield stage, linears
            progress(Progress(f"allocate {stage.name}", done, len(self._layers), time.perf_counter() - since))

    def _by_linear(self, shares: Mapping[str, float]) -> dict[str, float]:
        """The sparsity of each linear, from that of its layer, rounded to a whole number of weights per row.

        Half a weight is added, as the number to prune is found with floor(sparsity * width): an exact quotient could
        come out one weight too low.
        """
        return {
            name: min((round(shares[stage.prefix] * width) + 0.5) / width, 1 - 0.5 / width)
            for stage, linears in self._layers
            for name, width in linears.items()
        }

    def _weights(self, linears: Iterable[str]) -> int:
        return sum(math.prod(self._refs[name].shape) for name in linears)

    def _errors(self, name: str, width: int, levels: list[float]) -> list[float]:
        """At each level of sparsity, the share of the linear's sum of w²a that pruning it row by row removes."""
        power = self._power(name, width)
        feature = (power / power.max().clamp_min(torch.finfo(power.dtype).tiny)).float().to(self._loader.device)
        removed, total = [0.0] * len(levels), 0.0
        for rows in self._rows(name):
            for i, level in enumerate(levels):
                found = select(rows, feature, 2, selector="exact", sparsity=level, backend=self._target.backend)
                removed[i] += found.removed
            total += found.total
        return [part / total if total > 0 else 0.0 for part in removed]

    def _scores(self, linears: Mapping[str, int]) -> Iterator[Tensor]:
        """|w| √a of all weights of a layer's linears, in chunks of (n, in) float32."""
        for name, width in linears.items():
            feature = self._power(name, width).sqrt().float().to(self._loader.device)
            for rows in self._rows(name):
                yield rows.abs().float().mul_(feature)

    def _rows(self, name: str) -> Iterator[Tensor]:
        ref = self._refs[name]
        transposed = name in self._target.skeleton.transposed
        for _, rows in rows_of(self._loader, ref, ref.nbytes if transposed else CHUNK_BYTES):
            yield rows.t().contiguous() if transposed else rows
        self._loader.maps.release([ref])

    def _power(self, name: str, width: int) -> Tensor:
        """a_j = E[x_j²], (in,) float64."""
        return torch.from_numpy(self._given.load(name, width).mean_square)
