"""Passes of all batches through one stage, from cache to cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk.cache import CacheReader, CacheWriter
from streamprune.model.calibration import Tokens
from streamprune.model.skeleton import Stage
from streamprune.model.statistics import Collector
from streamprune.model.walk import Walk


def split_batches(windows: Tokens, batch: int) -> list[Tensor]:
    """Windows (samples, seqlen) as batches (≤ batch, seqlen) int64."""
    return list(torch.from_numpy(windows).split(batch))


def embed_pass(walk: Walk, batches: list[Tensor], folder: Path) -> None:
    """Token ids to cache 0."""
    with CacheWriter(folder, 0, walk.skeleton.dtype) as writer:
        for states in walk.embed(batches):
            writer.append(states)


def layer_pass(
    walk: Walk, stage: Stage, folder: Path, *, write: bool, collector: Collector | None = None,
    run: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Cache i through layer i to cache i + 1 (if `write`), its linears' inputs into the collector (if given).

    `run` takes the place of the layer with the checkpoint's weights.
    """
    if run is None:
        with walk.layer(stage, watch=collector.watch if collector else None) as dense:
            layer_pass(walk, stage, folder, write=write, collector=collector, run=dense)
        return
    outputs = _outputs(CacheReader(folder, stage.index), run, collector)
    if not write:
        for _ in outputs:
            pass
        return
    with CacheWriter(folder, stage.index + 1, walk.skeleton.dtype) as writer:
        for states in outputs:
            writer.append(states)


def _outputs(reader: CacheReader, run: Callable[[Tensor], Tensor], collector: Collector | None) -> Iterator[Tensor]:
    for chunk in range(len(reader)):
        yield run(reader[chunk])
        if collector:
            collector.end_batch()
