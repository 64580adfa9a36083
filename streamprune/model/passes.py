"""Passes of all batches through one stage, from cache to cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk.cache import CacheReader, CacheWriter
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError
from streamprune.kernels import cpu
from streamprune.model.calibration import Tokens
from streamprune.model.skeleton import Skeleton, Stage
from streamprune.model.statistics import Collector
from streamprune.model.walk import Walk

_CHECK_BYTES = 16 << 20


def split_batches(windows: Tokens, batch: int) -> list[Tensor]:
    """Windows (samples, seqlen) as batches (≤ batch, seqlen) int64."""
    ids = torch.from_numpy(windows)
    return [ids[begin : begin + batch] for begin in range(0, len(ids), batch)]


def embed_pass(walk: Walk, batches: list[Tensor], folder: Path) -> None:
    """Token ids to cache 0."""
    with CacheWriter(folder, 0, walk.cache_dtype) as writer:
        for states in walk.embed(batches):
            writer.append(states)


def layer_pass(
    walk: Walk,
    stage: Stage,
    folder: Path,
    *,
    write: bool,
    collector: Collector | None = None,
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
    with CacheWriter(folder, stage.index + 1, walk.cache_dtype) as writer:
        for states in outputs:
            writer.append(states)


def _outputs(reader: CacheReader, run: Callable[[Tensor], Tensor], collector: Collector | None) -> Iterator[Tensor]:
    for chunk in range(len(reader)):
        yield run(reader[chunk])
        if collector:
            collector.end_batch()


def check_weights(maps: ShardMaps, skeleton: Skeleton, stage: Stage) -> None:
    """Looks at every weight of a stage before it is used. Raises CheckpointError for NaN and Inf, as finite_rows."""
    known = {ref.name for ref in skeleton.sources.values()}
    for ref in stage.tensors:
        if ref.name in known:
            # of the embeddings and the head, a pass touches a few rows only
            for _ in finite_rows(maps, ref, _CHECK_BYTES, release=stage.kind != "layer"):
                pass


def finite_rows(maps: ShardMaps, ref: TensorRef, chunk_bytes: int, *, release: bool = False) -> Iterator[Tensor]:
    """A stored tensor in chunks of whole rows; a scalar in one piece. `release` lets go of a chunk after its use.

    Raises CheckpointError naming file, tensor and index of the first NaN or Inf.
    """
    count = ref.shape[0] if ref.shape else 1
    step = max(1, chunk_bytes * count // max(ref.nbytes, 1))
    for begin in range(0, count, step):
        rows = maps.rows(ref, begin, min(begin + step, count)) if ref.shape else maps.tensor(ref)
        flat = cpu.first_nonfinite(rows)
        if flat is not None:
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat), rows.shape)]
            place = [begin + index[0], *index[1:]] if index else []
            raise CheckpointError(
                f"{ref.shard}: tensor {ref.name} is {float(rows.reshape(-1)[flat])} at {place}; "
                "the checkpoint is damaged, download it again"
            )
        yield rows
        if release:
            at = ref.begin + begin * (ref.nbytes // count)
            maps.release([replace(ref, begin=at, end=at + rows.nbytes)], drop_cache=True)
