"""Shares a sparsity out among the linears of a model, from its weights and the statistics of their inputs.

All weights are read once, a chunk at a time; nothing but a few numbers a linear is kept. See methods/allocation.py for
the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamprune.calibration.statistics import StatisticsFile
from streamprune.disk.header import TensorRef
from streamprune.errors import UsageError
from streamprune.methods.allocation import OUTLIER, Curve, by_error, levels_around, owl
from streamprune.methods.selection import select
from streamprune.model.finite import rows_of
from streamprune.model.skeleton import Stage
from streamprune.pruning.shard import CHUNK_BYTES, StageWriter
from streamprune.pruning.spec import JobSpec


def share_out(
    spec: JobSpec, writer: StageWriter | None, known: StatisticsFile | None, resolved: Mapping[str, Any]
) -> dict[str, float]:
    """Gives `writer` the sparsity of each linear where it is not the same for all, and returns it.

    As recorded when the job began (`resolved`), or by the statistics that are `known`.
    """
    if writer is None or spec.allocate is None or spec.sparsity is None:
        return {}
    shares: dict[str, float] = resolved.get("allocation", {})
    if not shares and known is not None:
        shares = allocate(spec.allocate, writer, known, spec.sparsity)
    writer.target = replace(writer.target, shares=shares)
    return shares


def allocate(kind: str, writer: StageWriter, given: StatisticsFile, sparsity: float) -> dict[str, float]:
    """The sparsity of each linear that `writer` prunes; `kind` is "owl" or "error".

    Their mean, by weights, is `sparsity`. Raises what reading weights and statistics raises.
    """
    if kind == "owl":
        return _owl(writer, given, sparsity)
    levels = levels_around(sparsity)
    curves: dict[str, Curve] = {}
    for stage, linears in _layers(writer):
        tokens, update = given.updates.get(stage.prefix, (0.0, 0.0))
        if not tokens > 0:
            raise UsageError(f"{given.path} does not say what {stage.prefix} adds; make it again with `calibrate`")
        errors = [0.0] * len(levels)
        for name, width in linears.items():
            ref = writer.skeleton.sources[f"{name}.weight"]
            found = _errors(writer, ref, name, _power(given, name, width), levels)
            errors = [a + b * update / tokens for a, b in zip(errors, found, strict=True)]
        curves[stage.prefix] = Curve(_weights(writer, linears), levels, errors)
    return _by_linear(writer, by_error(curves, sparsity))


def _layers(writer: StageWriter) -> Iterator[tuple[Stage, dict[str, int]]]:
    """The layers that are pruned, and their linears with in_features."""
    for stage in writer.skeleton.layer_stages:
        linears = writer.in_order(stage)
        if linears:
            yield stage, linears


def _by_linear(writer: StageWriter, shares: Mapping[str, float]) -> dict[str, float]:
    """From the sparsity of each layer that of each linear, to the nearest whole number of weights in a row.

    Half a weight more keeps floor() at that number; without it all of them would be rounded down.
    """
    return {
        name: min((round(shares[stage.prefix] * width) + 0.5) / width, 1 - 0.5 / width)
        for stage, linears in _layers(writer)
        for name, width in linears.items()
    }


def _weights(writer: StageWriter, linears: Iterable[str]) -> int:
    return sum(math.prod(writer.skeleton.sources[f"{name}.weight"].shape) for name in linears)


def _errors(writer: StageWriter, ref: TensorRef, name: str, power: Tensor, levels: list[float]) -> list[float]:
    """What pruning the lowest w²a of each row takes away of the linear's sum of w²a, at each level."""
    feature = (power / power.max().clamp_min(torch.finfo(power.dtype).tiny)).float().to(writer.loader.device)
    removed, total = [0.0] * len(levels), 0.0
    for rows in _rows(writer, ref, name):
        for i, level in enumerate(levels):
            found = select(rows, feature, 2, selector="exact", sparsity=level, backend=writer.target.backend)
            removed[i] += found.removed
        total += found.total
    return [part / total if total > 0 else 0.0 for part in removed]


def _owl(writer: StageWriter, given: StatisticsFile, sparsity: float) -> dict[str, float]:
    outliers: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for stage, linears in _layers(writer):
        size = _weights(writer, linears)
        total = sum(float(score.sum(dtype=torch.float64)) for score in _scores(writer, given, stage))
        above = sum(int((score > OUTLIER * total / size).sum()) for score in _scores(writer, given, stage))
        outliers[stage.prefix], sizes[stage.prefix] = above / size, size
    found = owl(list(outliers.values()), list(sizes.values()), sparsity)
    return _by_linear(writer, dict(zip(outliers, found, strict=True)))


def _scores(writer: StageWriter, given: StatisticsFile, stage: Stage) -> Iterator[Tensor]:
    """|w| √a of all weights of a layer's linears, a chunk at a time, float32."""
    for name, width in writer.in_order(stage).items():
        feature = _power(given, name, width).sqrt().float().to(writer.loader.device)
        for rows in _rows(writer, writer.skeleton.sources[f"{name}.weight"], name):
            yield rows.abs().float().mul_(feature)


def _rows(writer: StageWriter, ref: TensorRef, name: str) -> Iterator[Tensor]:
    transposed = name in writer.skeleton.transposed
    for _, rows in rows_of(writer.loader, ref, ref.nbytes if transposed else CHUNK_BYTES):
        yield rows.t().contiguous() if transposed else rows
    writer.loader.maps.release([ref])


def _power(given: StatisticsFile, name: str, width: int) -> Tensor:
    """a_j, (in,) float64."""
    return given.load(name, width).mean_square
