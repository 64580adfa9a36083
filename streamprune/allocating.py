"""Shares a sparsity out among the linears of a model, from its weights and the statistics of their inputs.

All weights are read once, a chunk at a time; nothing but a few numbers a linear is kept. See pruning/allocation.py for
the mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from streamprune.disk.header import TensorRef
from streamprune.model.passes import rows_of
from streamprune.model.skeleton import Stage
from streamprune.model.statistics import StatisticsFile
from streamprune.pruning.allocation import OUTLIER, Curve, by_error, levels_around, owl
from streamprune.pruning.selection import select
from streamprune.stage_writer import CHUNK_BYTES, StageWriter


def allocate(kind: str, writer: StageWriter, given: StatisticsFile, sparsity: float) -> dict[str, float]:
    """The sparsity of each linear that `writer` prunes; `kind` is "owl" or "error".

    Their mean, by weights, is `sparsity`. Raises what reading weights and statistics raises.
    """
    if kind == "owl":
        return _owl(writer, given, sparsity)
    levels = levels_around(sparsity)
    curves: dict[str, Curve] = {}
    for stage in writer.skeleton.layer_stages:
        for name, width in writer.in_order(stage).items():
            ref = writer.skeleton.sources[f"{name}.weight"]
            curves[name] = Curve(_size(ref), levels, _errors(writer, ref, name, _power(given, name, width), levels))
    return by_error(curves, sparsity)


def _errors(writer: StageWriter, ref: TensorRef, name: str, power: Tensor, levels: list[float]) -> list[float]:
    """What pruning the lowest w²a of each row takes away of the linear's sum of w²a, at each level."""
    feature = (power / power.max().clamp_min(torch.finfo(power.dtype).tiny)).float().to(writer.feed.device)
    removed, total = [0.0] * len(levels), 0.0
    for rows in _rows(writer, ref, name):
        for i, level in enumerate(levels):
            found = select(rows, feature, 2, selector="exact", sparsity=level, backend=writer.target.backend)
            removed[i] += found.removed
        total += found.total
    return [part / total if total > 0 else 0.0 for part in removed]


def _owl(writer: StageWriter, given: StatisticsFile, sparsity: float) -> dict[str, float]:
    layers: list[list[str]] = []
    outliers: list[float] = []
    sizes: list[int] = []
    for stage in writer.skeleton.layer_stages:
        linears = writer.in_order(stage)
        if not linears:
            continue
        total = sum(float(score.sum(dtype=torch.float64)) for score in _scores(writer, given, stage))
        size = sum(_size(writer.skeleton.sources[f"{name}.weight"]) for name in linears)
        above = sum(int((score > OUTLIER * total / size).sum()) for score in _scores(writer, given, stage))
        layers.append(list(linears))
        outliers.append(above / size)
        sizes.append(size)
    return {
        name: share for names, share in zip(layers, owl(outliers, sizes, sparsity), strict=True) for name in names
    }  # fmt: skip


def _scores(writer: StageWriter, given: StatisticsFile, stage: Stage) -> Iterator[Tensor]:
    """|w| √a of all weights of a layer's linears, a chunk at a time, float32."""
    for name, width in writer.in_order(stage).items():
        feature = _power(given, name, width).sqrt().float().to(writer.feed.device)
        for rows in _rows(writer, writer.skeleton.sources[f"{name}.weight"], name):
            yield rows.abs().float().mul_(feature)


def _rows(writer: StageWriter, ref: TensorRef, name: str) -> Iterator[Tensor]:
    transposed = name in writer.skeleton.transposed
    for _, rows in rows_of(writer.feed, ref, ref.nbytes if transposed else CHUNK_BYTES):
        yield rows.t().contiguous() if transposed else rows
    writer.feed.maps.release([ref])


def _power(given: StatisticsFile, name: str, width: int) -> Tensor:
    """a_j, (in,) float64."""
    return given.load(name, width).mean_square


def _size(ref: TensorRef) -> int:
    return ref.shape[0] * ref.shape[1]
