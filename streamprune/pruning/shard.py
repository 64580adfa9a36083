"""Writes one stage into its part of a shard: selected linears are pruned, everything else is copied unchanged.

Rows are processed in chunks, so that only a chunk of a tensor is in memory; mapped pages are released once they have
been read. All weights are checked for NaN and Inf, which are reported with their position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamprune.calibration.grams import LayerGrams
from streamprune.disk.durable import Buffer, FilePart
from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import TensorRef
from streamprune.disk.scratch import ScratchMatrix
from streamprune.disk.shards import Part, fill_in_order
from streamprune.kernels import Selection
from streamprune.methods.fp8 import dequantise
from streamprune.methods.refits import Sample
from streamprune.methods.stats import InputStats
from streamprune.model.copies import CopyStream, is_out_of_memory
from streamprune.model.finite import finite_rows, refuse_nonfinite, rows_of
from streamprune.model.loader import WeightLoader
from streamprune.model.naming import TORCH_DTYPES
from streamprune.model.stages import Stage
from streamprune.model.zeros import refuse_zeros
from streamprune.process.ranks import ALONE, Ranks
from streamprune.pruning.codes import coded
from streamprune.pruning.kept_codes import codes_of, zeroed
from streamprune.pruning.linears import CHUNK_BYTES, linear_report, parts_of, pieces
from streamprune.pruning.quantise import LinearCodes
from streamprune.pruning.refit import LayerRefit, Outcome, Refit, chunk_rows, sampled
from streamprune.pruning.target import Features, Target

Stats = Callable[[str, int], InputStats]
"""(linear, in_features) -> the statistics of its input."""


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
        work = _StageShard(self, self._stream, stage, stats, grams)
        with self._stream.on():
            if grams is not None and (grams.place is not None or self.ranks.size > 1):
                work.refit_all(grams)
            fill_in_order(file, part.header, part.tensors, work.content, written=work.release)
        if grams is not None and grams.place is None:
            order = {name: i for i, name in enumerate(self.target.linears_of(stage))}
            work.linears.sort(key=lambda report: order[report["name"]])
        return work.linears

    def refit_elsewhere(self, stage: Stage, stats: Stats, grams: LayerGrams | None) -> None:
        """This rank's share of refitting a stage that rank 0 fills."""
        if grams is not None:
            with self._stream.on():
                _StageShard(self, self._stream, stage, stats, grams).refit_all(grams)


class _Rows(NamedTuple):
    """Some finished rows of a linear."""

    stored: NDArray[np.uint8]
    """Their bytes."""
    sums: list[tuple[float, float]]
    """Score that was removed, and in all."""
    outcome: Outcome | None
    codes: LinearCodes | None


class _StageShard:
    """The work on one stage: produces the bytes of each of its tensors."""

    def __init__(
        self, writer: ShardWriter, stream: CopyStream, stage: Stage, stats: Stats, grams: LayerGrams | None,
    ) -> None:  # fmt: skip
        self.linears: list[dict[str, Any]] = []
        target = self._target = writer.target
        self._skeleton, self._loader, self._allow_zeros = target.skeleton, writer.loader, writer.allow_zeros
        self._stream, self._stage, self._ranks = stream, stage, writer.ranks
        self._features = Features(target, stats, self._loader.device)
        self._refit = self._layer_refit(grams) if grams is not None else None
        self._stored = {ref.name: ref for ref in stage.tensors}
        self._known = self._skeleton.used
        self._kept = {part.name: part for ref in stage.tensors for part in target.kept.get(ref.name, ())}
        """With --quantize keep: the tensors that quantised weights are stored as, by name."""
        self._linear_tensors = {ref.name for ref in stage.linears.values()}
        self._parts = parts_of(stage, target.selected)
        experts = [stage.linears[name] for name in target.linears_of(stage) if name in stage.expert_of]
        self._following = dict(pairwise(experts))
        """Expert weight -> the next one to prefetch: all of a layer's experts at once would be too many."""
        self._scales: dict[str, list[Tensor]] = {}
        """FP8 scales by tensor name, known once their weight has been written."""
        self._refitted_ahead: dict[str, ScratchMatrix] = {}
        """Bytes of linears that were refitted before their turn in the shard."""

    def content(self, ref: TensorRef) -> Iterator[Buffer]:
        """The bytes of `ref`, one of the part's tensors, in pieces."""
        if ref.name in self._kept and ref.name not in self._parts:
            for _ in self._checked(self._stored[ref.name]) if ref.name in self._known else ():
                pass  # what the codes stand for
            yield from pieces(self._loader.maps.raw(self._kept[ref.name]))
        elif ref.name in self._scales:
            yield _bytes(torch.cat(self._scales[ref.name]))
        elif ref.name in self._parts:
            part, whole = None, self._stored[ref.name]
            for name, part in self._parts[ref.name]:
                if name in self._refitted_ahead:
                    yield from pieces(self._refitted_ahead[name].tensor[0].numpy().data)
                    continue
                if name in self._target.selected:
                    yield from self._pruned(part, name)
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

    def release(self, ref: TensorRef, begin: int, end: int) -> None:
        """Releases the mapped pages behind bytes `begin` to `end` of `ref`, a tensor of the output."""
        source = self._stored.get(ref.name)
        if source is not None and begin < end:
            times = source.nbytes // ref.nbytes
            done = replace(source, begin=source.begin + times * begin, end=source.begin + times * end)
            self._loader.maps.release([done], drop_cache=True)

    def refit_all(self, grams: LayerGrams) -> None:
        """Refits all linears before their turn in the shard, in the order of use if later ones depend on it."""
        names: Iterable[str] = grams.by_use if grams.place is not None else self._target.linears_of(self._stage)
        experts: dict[str, list[str]] = {}
        for name in [name for name in names if name in grams]:
            if name in self._stage.expert_of:
                experts.setdefault(self._stage.expert_of[name], []).append(name)
            else:
                self._refit_ahead(name, grams.folder, grams.place)
        self._refit_experts(list(experts.values()), grams)

    def _refit_experts(self, experts: Sequence[Sequence[str]], grams: LayerGrams) -> None:
        """Refits experts, given by their linears, which ranks take in turn; rank 0 is sent all of them."""
        ranks = self._ranks
        for first in range(0, len(experts), ranks.size):
            own = experts[first + ranks.rank] if first + ranks.rank < len(experts) else []
            made = [(name, b"".join(self._pruned(self._stage.linears[name], name))) for name in own]
            reports = [report for report in self.linears if report["name"] in own]
            names = [self._stage.linears[name].name + SCALE for name in own]
            scales = {name: self._scales.pop(name) for name in names if name in self._scales}
            self.linears = [report for report in self.linears if report["name"] not in own]
            grams.leave_out([name for names in experts[first : first + ranks.size] for name in names])
            for refitted, told, parts in ranks.collect((made, reports, scales)):
                for name, data in refitted:
                    self._keep(name, grams.folder, [data])
                self.linears += told
                self._scales |= parts

    def _keep(self, name: str, folder: Path, pieces: Iterable[Buffer]) -> Tensor:
        """Keeps the bytes of a refitted linear until its turn in the shard; returns them as a tensor (bytes,)."""
        ref = self._stage.linears[name]
        size = ref.nbytes if self._target.quantisation is None else coded(ref)[0].nbytes
        made = self._refitted_ahead[name] = ScratchMatrix(folder, 1, size, torch.uint8)
        begin = 0
        for piece in pieces:
            view = memoryview(piece).cast("B")
            made.tensor.numpy()[0, begin : begin + len(view)] = np.frombuffer(view, dtype=np.uint8)
            begin += len(view)
        return made.tensor[0]

    def _refit_ahead(self, name: str, folder: Path, place: Callable[[str, Tensor], None] | None) -> None:
        """Refits a linear before its turn in the shard; `place` gets its new weight as it will be stored."""
        ref = self._stage.linears[name]
        stored = self._keep(name, folder, self._pruned(ref, name))
        if place is None:
            return
        if self._target.quantisation is None:
            place(name, stored.view(TORCH_DTYPES[ref.dtype]).view(ref.shape))
        else:
            codes = stored.view(torch.float8_e4m3fn).view(ref.shape)
            place(name, dequantise(codes, torch.cat(self._scales[ref.name + SCALE]), TORCH_DTYPES[ref.dtype]))

    def _checked(self, ref: TensorRef) -> Iterator[Buffer]:
        """The bytes of a tensor that is not pruned, checked for NaN and Inf."""
        chunks = finite_rows(self._loader.maps, ref, CHUNK_BYTES, self._stored[ref.name])
        for _, rows in self._not_empty(ref, chunks) if ref.name in self._linear_tensors else chunks:
            yield _bytes(rows)

    def _not_empty(self, ref: TensorRef, chunks: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        return chunks if self._allow_zeros else refuse_zeros(ref, chunks)

    def _layer_refit(self, grams: LayerGrams) -> LayerRefit:
        def keep(name: str, weight: Tensor, share: float) -> Tensor:
            return self._target.keep(name, weight, *self._features.of(name, weight.shape[1]), share)

        refit = Refit(str(self._target.recipe.refit), self._target.damping)
        return LayerRefit(refit, self._target.of, grams, keep, self._target.backend)

    def _sample(self, name: str) -> Sample:
        """The rows of a linear that its damping is chosen on."""
        ref = self._stage.linears[name]
        stored = self._loader.tensor(ref)
        if name in self._skeleton.transposed:
            stored = stored.t()
        which = sampled(len(stored)).to(stored.device)
        rows = stored[which].contiguous()
        feature, power = self._features.of(name, rows.shape[1])
        masked = torch.cat([r.weight for r in self._select(name, rows, feature, power)])
        return Sample(rows.float(), masked.float(), which)

    def _pruned(self, ref: TensorRef, name: str) -> Iterator[Buffer]:
        if ref in self._following:
            self._loader.expect([self._following[ref]])
        transposed = name in self._skeleton.transposed
        in_features = ref.shape[0] if transposed else ref.shape[1]
        feature, power = self._features.of(name, in_features)
        refit = self._refit if self._refit is not None and name in self._refit else None
        outcome = refit.begin(name, self._sample) if refit else None
        codes = self._codes(ref, name)
        out_features = ref.shape[1] if transposed else ref.shape[0]
        chunk = (
            CHUNK_BYTES
            if outcome is None
            else chunk_rows(in_features, out_features) * in_features * TORCH_DTYPES[ref.dtype].itemsize
        )
        removed = total = 0.0

        def done(begin: int, rows: Tensor) -> _Rows:
            exact = rows.t().contiguous() if transposed else rows
            found = list(self._select(name, exact, feature, power))
            if not all(result.finite for result in found):
                refuse_nonfinite(ref, begin, rows, self._stored[ref.name])
            weight = found[0].weight if len(found) == 1 else torch.cat([result.weight for result in found])
            own, own_codes = outcome and outcome.fresh(), codes and codes.fresh()
            if refit is not None and own is not None:
                weight = refit.rows(name, begin, exact, weight, own)
            if own_codes is not None:
                gram = refit.gram(name) if refit else None
                wanted = refit.aim(name, begin, exact) if refit else exact
                weight = own_codes.rows(wanted, weight, gram, own.used if own else None)
            stored = self._stream.fetch(weight.t().contiguous() if transposed else weight, None)
            if ref.name in self._kept:
                stored = zeroed(self._loader.maps, ref, begin, stored)
            return _Rows(
                stored.reshape(-1).view(torch.uint8).numpy(),
                [(result.removed, result.total) for result in found],
                own,
                own_codes,
            )

        chunks = self._not_empty(ref, rows_of(self._loader, ref, ref.nbytes if transposed else chunk))
        for rows in (
            self._dealt(chunks, done)
            if refit and name not in self._stage.expert_of
            else (done(*pair) for pair in chunks)
        ):
            for lost, every in rows.sums:
                removed, total = removed + lost, total + every
            if outcome is not None and rows.outcome is not None:
                outcome.add_(rows.outcome)
            if codes is not None and rows.codes is not None:
                codes.add_(rows.codes)
            yield rows.stored.data
        self.linears.append(linear_report(name, out_features, in_features, self._target.of(name), removed, total))
        if refit is not None and outcome is not None:
            self.linears[-1] |= outcome.report()
            refit.done(name)
        if codes is not None:
            self.linears[-1] |= codes.report(outcome is not None)
            self._scales[coded(ref)[1].name] = [self._stream.fetch(part, None) for part in codes.scales]
        if self._loader.copies and ref in self._following:
            self._loader.release([ref])

    def _dealt(self, chunks: Iterable[tuple[int, Tensor]], done: Callable[[int, Tensor], _Rows]) -> Iterator[_Rows]:
        """What `done` makes of each of the chunks, which the ranks take in turn."""
        ranks = self._ranks
        if ranks.size == 1:  # one after the other
            yield from (done(*pair) for pair in chunks)
            return
        own = [(i, done(*pair)) for i, pair in enumerate(chunks) if i % ranks.size == ranks.rank]
        yield from (rows for _, rows in sorted(chain(*ranks.gather(own)), key=lambda pair: pair[0]))

    def _codes(self, ref: TensorRef, name: str) -> LinearCodes | None:
        how = self._target.quantisation
        if how is None:
            return None
        return LinearCodes(how, TORCH_DTYPES[ref.dtype], self._features.power(name, ref.shape[1]))

    def _select(self, name: str, rows: Tensor, feature: Tensor, power: int) -> Iterator[Selection]:
        """Prunes rows (n, in); in halves, if the device lacks memory for the kernels' temporaries."""
        try:
            yield self._target.select(name, rows, feature, power)
            return
        except RuntimeError as e:
            if len(rows) == 1 or not is_out_of_memory(e):
                raise
        torch.cuda.empty_cache()
        for half in torch.split(rows, -(-len(rows) // 2)):
            yield from self._select(name, half, feature, power)


def _bytes(tensor: Tensor) -> Buffer:
    """The bytes of a contiguous CPU tensor, without a copy."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
