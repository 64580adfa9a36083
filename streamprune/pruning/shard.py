"""Writes one stage into its part of a shard: selected linears are pruned, everything else is copied unchanged.

Rows are processed in chunks, so that only a chunk of a tensor is in memory; mapped pages are released once they have
been read. All weights are checked for NaN and Inf, which are reported with their position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamprune.calibration.grams import LayerGrams
from streamprune.disk.durable import Buffer, FilePart
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import Part, fill_in_order
from streamprune.model.copies import CopyStream
from streamprune.model.finite import finite_rows
from streamprune.model.loader import WeightLoader
from streamprune.model.stages import Stage
from streamprune.process.ranks import ALONE, Ranks
from streamprune.pruning.expert_codes import told_apart
from streamprune.pruning.kept_codes import codes_of
from streamprune.pruning.linears import CHUNK_BYTES, parts_of, pieces
from streamprune.pruning.pruned_linears import PrunedLinears, Stats
from streamprune.pruning.refitted_ahead import RefittedAhead
from streamprune.pruning.target import Target


class ShardWriter:
    """Writes the shards of one job, one stage at a time. `allow_zeros`: accept linears that are all zeros."""

    def __init__(
        self, target: Target, loader: WeightLoader, ranks: Ranks = ALONE, *, allow_zeros: bool = False
    ) -> None:
        self.target, self.loader, self.ranks, self.allow_zeros = target, loader, ranks, allow_zeros
        self._stream = CopyStream(loader.device)

    def fill(
        self, file: FilePart, part: Part, stage: Stage, stats: Stats, grams: LayerGrams | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Fills a stage's `part` of a shard; returns a report on each linear that was pruned (JSON values).

        The caller commits `file`. `stats(linear, in_features)` returns the statistics of a linear's input. `grams` are
        those of the layer, if the recipe has a refit. Raises CheckpointError for NaN, Inf and linears of zeros.
        """
        linears = self._pruned(stage, stats, grams)
        ahead = RefittedAhead(linears)
        with self._stream.on():
            if grams is not None and (grams.place is not None or self.ranks.size > 1):
                ahead.refit_all(grams)
            work = _StageShard(linears, ahead)
            fill_in_order(file, part.header, part.tensors, work.content, written=work.release)
        if grams is not None and grams.place is None:
            order = {name: i for i, name in enumerate(self.target.linears_of(stage))}
            linears.reports.sort(key=lambda report: order[report["name"]])
        return told_apart(linears.reports, self.target.apart)

    def refit_elsewhere(self, stage: Stage, stats: Stats, grams: LayerGrams | None) -> None:
        """This rank's share of refitting a stage that rank 0 fills."""
        if grams is not None:
            with self._stream.on():
                RefittedAhead(self._pruned(stage, stats, grams)).refit_all(grams)

    def _pruned(self, stage: Stage, stats: Stats, grams: LayerGrams | None) -> PrunedLinears:
        return PrunedLinears(
            self.target, self.loader, self._stream, self.ranks, stage, stats, grams, allow_zeros=self.allow_zeros
        )


class _StageShard:
    """The work on one stage: produces the bytes of each of its tensors."""

    def __init__(self, linears: PrunedLinears, ahead: RefittedAhead) -> None:
        self._linears, self._ahead, self._loader = linears, ahead, linears.loader
        stage, target = linears.stage, linears.target
        self._stored, self._kept, self._selected = linears.stored, linears.kept, target.selected
        self._known = target.skeleton.used
        self._linear_tensors = {ref.name for ref in stage.linears.values()}
        self._parts = parts_of(stage, target.selected)
        apart = {name: target.codes_of(name, stage.linears[name]) for name in stage.linears if name in target.apart}
        self._apart = {codes.name: name for name, made in apart.items() for codes, _ in made}
        """Codes of experts that are in one tensor -> the linear that they are rows of."""
        self._waiting: dict[str, memoryview] = {}

    def content(self, ref: TensorRef) -> Iterator[Buffer]:
        """The bytes of `ref`, one of the part's tensors, in pieces."""
        if ref.name in self._kept and ref.name not in self._parts:
            for _ in self._checked(self._stored[ref.name]) if ref.name in self._known else ():
                pass  # what the codes stand for
            yield from pieces(self._loader.maps.raw(self._kept[ref.name]))
        elif ref.name in self._linears.scales:
            yield _bytes(torch.cat(self._linears.scales[ref.name]))
        elif ref.name in self._apart:
            yield from pieces(self._rows_of(ref.name))
        elif ref.name in self._parts:
            part, whole = None, self._stored[ref.name]
            for name, part in self._parts[ref.name]:
                if name in self._ahead:
                    yield from pieces(self._ahead.stored(name))
                    continue
                if name in self._selected:
                    yield from self._linears.pruned(part, name)
                elif ref.name in self._kept:
                    yield from pieces(self._loader.maps.raw(codes_of(part)))
                else:
                    yield from self._checked(part)
            if part is not None and part.end < whole.end:  # of experts that give back their input
                rest = replace(whole, begin=part.end)
                yield from pieces(self._loader.maps.raw(codes_of(rest) if ref.name in self._kept else rest))
        elif ref.name in self._known:
            yield from self._checked(self._stored[ref.name])
        else:
            yield from pieces(self._loader.maps.raw(self._stored[ref.name]))

    def _rows_of(self, codes: str) -> memoryview:
        """Codes of an expert. What else its matrix consists of waits until its turn, which is next."""
        if codes not in self._waiting:
            name = self._apart[codes]
            ref = self._linears.stage.linears[name]
            made = self._ahead.stored(name) if name in self._ahead else b"".join(self._linears.pruned(ref, name))
            self._loader.maps.release([ref], drop_cache=True)
            begin = 0
            for part, _ in self._linears.target.codes_of(name, ref):
                self._waiting[part.name] = memoryview(made)[begin : begin + part.nbytes]
                begin += part.nbytes
        return self._waiting.pop(codes)

    def release(self, ref: TensorRef, begin: int, end: int) -> None:
        """Releases the mapped pages behind bytes `begin` to `end` of `ref`, a tensor of the output."""
        source = self._stored.get(ref.name)
        if source is not None and begin < end:
            times = source.nbytes // ref.nbytes
            done = replace(source, begin=source.begin + times * begin, end=source.begin + times * end)
            self._loader.maps.release([done], drop_cache=True)

    def _checked(self, ref: TensorRef) -> Iterator[Buffer]:
        """The bytes of a tensor that is not pruned, checked for NaN and Inf."""
        chunks = finite_rows(self._loader.maps, ref, CHUNK_BYTES, self._stored[ref.name])
        for _, rows in self._linears.not_empty(ref, chunks) if ref.name in self._linear_tensors else chunks:
            yield _bytes(rows)


def _bytes(tensor: Tensor) -> Buffer:
    """The bytes of a contiguous CPU tensor, without a copy."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
