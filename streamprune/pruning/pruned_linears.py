"""Prunes the linears of one stage, in chunks of rows: selects, refits, quantises, from stored bytes to stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamprune.calibration.grams import LayerGrams
from streamprune.disk.durable import Buffer
from streamprune.disk.header import TensorRef
from streamprune.kernels import Selection
from streamprune.methods.refits import Sample
from streamprune.methods.stats import InputStats
from streamprune.model.copies import CopyStream
from streamprune.model.finite import refuse_nonfinite, rows_of
from streamprune.model.loader import WeightLoader
from streamprune.model.naming import TORCH_DTYPES
from streamprune.model.stages import Stage
from streamprune.model.zeros import refuse_zeros
from streamprune.process.memory import is_out_of_memory
from streamprune.process.ranks import Ranks
from streamprune.pruning.kept_codes import zeroed
from streamprune.pruning.linears import CHUNK_BYTES, linear_report
from streamprune.pruning.quantise import LinearCodes
from streamprune.pruning.refit import LayerRefit, Outcome, Refit, chunk_rows, sampled
from streamprune.pruning.target import Features, Target

Stats = Callable[[str, int], InputStats]
"""(linear, in_features) -> the statistics of its input."""


class _Rows(NamedTuple):
    """Some finished rows of a linear."""

    stored: NDArray[np.uint8]
    """Their bytes."""
    sums: list[tuple[float, float]]
    """Score that was removed, and in all."""
    outcome: Outcome | None
    codes: LinearCodes | None


class PrunedLinears:
    """Those linears of a stage that are pruned, each when it is asked for.

    `stats(linear, in_features)` returns the statistics of a linear's input. `grams` are those of the layer, if the
    recipe has a refit. `allow_zeros`: accept linears that are all zeros.
    """

    def __init__(
        self, target: Target, loader: WeightLoader, stream: CopyStream, ranks: Ranks, stage: Stage, stats: Stats,
        grams: LayerGrams | None, *, allow_zeros: bool,
    ) -> None:  # fmt: skip
        self.target, self.loader, self.ranks, self.stage = target, loader, ranks, stage
        self.reports: list[dict[str, Any]] = []
        """On each linear that has been pruned (JSON values)."""
        self.scales: dict[str, list[Tensor]] = {}
        """FP8 scales by tensor name, known once their weight has been pruned."""
        self.stored = {ref.name: ref for ref in stage.tensors}
        self.kept = {part.name: part for ref in stage.tensors for part in target.kept.get(ref.name, ())}
        """With --quantize keep: the tensors that quantised weights are stored as, by name."""
        self._stream, self._allow_zeros = stream, allow_zeros
        self._features = Features(target, stats, loader.device)
        self._refit = self._layer_refit(grams) if grams is not None else None
        experts = [stage.linears[name] for name in target.linears_of(stage) if name in stage.expert_of]
        self._following = dict(pairwise(experts))
        """Expert weight -> the next one to prefetch: all of a layer's experts at once would be too many."""

    def not_empty(self, ref: TensorRef, chunks: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """The `chunks` of a linear `ref` as they are. Raises CheckpointError if all of it is zeros and may not be."""
        return chunks if self._allow_zeros else refuse_zeros(ref, chunks)

    def pruned(self, ref: TensorRef, name: str) -> Iterator[Buffer]:
        """Prunes the linear `name`, stored as `ref`; yields what it is stored as afterwards, in pieces.

        Adds to `reports`, and with FP8 to `scales`. Raises CheckpointError for NaN, Inf and a linear of zeros.
        """
        if ref in self._following:
            self.loader.expect([self._following[ref]])
        transposed = name in self.target.skeleton.transposed
        in_features = ref.shape[0] if transposed else ref.shape[1]
        feature, power = self._features.of(name, in_features)
        refit = self._refit if self._refit is not None and name in self._refit else None
        outcome = refit.begin(name, self._sample) if refit else None
        codes = self._codes(ref, name, in_features)
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
                refuse_nonfinite(ref, begin, rows, self.stored[ref.name])
            weight = found[0].weight if len(found) == 1 else torch.cat([result.weight for result in found])
            own, own_codes = outcome and outcome.fresh(), codes and codes.fresh()
            if refit is not None and own is not None:
                weight = refit.rows(name, begin, exact, weight, own)
            if own_codes is not None:
                gram = refit.gram(name) if refit else None
                wanted = refit.aim(name, begin, exact) if refit else exact
                weight = own_codes.rows(wanted, weight, gram, own.used if own else None)
            turned = transposed and own_codes is None  # of experts, codes are always stored (out, in)
            stored = self._stream.fetch(weight.t().contiguous() if turned else weight, None)
            if ref.name in self.kept:
                stored = zeroed(self.loader.maps, ref, begin, stored)
            return _Rows(
                stored.reshape(-1).view(torch.uint8).numpy(),
                [(result.removed, result.total) for result in found],
                own,
                own_codes,
            )

        chunks = self.not_empty(ref, rows_of(self.loader, ref, ref.nbytes if transposed else chunk))
        for rows in (
            self._dealt(chunks, done)
            if refit and name not in self.stage.expert_of
            else (done(*pair) for pair in chunks)
        ):
            for lost, every in rows.sums:
                removed, total = removed + lost, total + every
            if outcome is not None and rows.outcome is not None:
                outcome.add_(rows.outcome)
            if codes is not None and rows.codes is not None:
                codes.add_(rows.codes)
            yield rows.stored.data
        self.reports.append(linear_report(name, out_features, in_features, self.target.of(name), removed, total))
        if refit is not None and outcome is not None:
            self.reports[-1] |= outcome.report()
            refit.done(name)
        if codes is not None:
            self.reports[-1] |= codes.report(outcome is not None)
            scales = torch.cat([self._stream.fetch(part, None) for part in codes.scales])
            refs = [scale for _, scale in self.target.codes_of(name, ref)]
            for scale, own in zip(refs, torch.split(scales, [scale.shape[0] for scale in refs]), strict=True):
                self.scales[scale.name] = [own]
        if self.loader.copies and ref in self._following:
            self.loader.release([ref])

    def _layer_refit(self, grams: LayerGrams) -> LayerRefit:
        def keep(name: str, weight: Tensor, share: float) -> Tensor:
            return self.target.keep(name, weight, *self._features.of(name, weight.shape[1]), share)

        refit = Refit(str(self.target.recipe.refit), self.target.damping)
        return LayerRefit(refit, self.target.of, grams, keep, self.target.backend)

    def _sample(self, name: str) -> Sample:
        """The rows of a linear that its damping is chosen on."""
        ref = self.stage.linears[name]
        stored = self.loader.tensor(ref)
        if name in self.target.skeleton.transposed:
            stored = stored.t()
        which = sampled(len(stored)).to(stored.device)
        rows = stored[which].contiguous()
        feature, power = self._features.of(name, rows.shape[1])
        masked = torch.cat([r.weight for r in self._select(name, rows, feature, power)])
        return Sample(rows.float(), masked.float(), which)

    def _dealt(self, chunks: Iterable[tuple[int, Tensor]], done: Callable[[int, Tensor], _Rows]) -> Iterator[_Rows]:
        """What `done` makes of each of the chunks, which the ranks take in turn."""
        ranks = self.ranks
        if ranks.size == 1:  # one after the other
            yield from (done(*pair) for pair in chunks)
            return
        own = [(i, done(*pair)) for i, pair in enumerate(chunks) if i % ranks.size == ranks.rank]
        yield from (rows for _, rows in sorted(chain(*ranks.gather(own)), key=lambda pair: pair[0]))

    def _codes(self, ref: TensorRef, name: str, in_features: int) -> LinearCodes | None:
        how = self.target.quantisation
        if how is None:
            return None
        return LinearCodes(how, TORCH_DTYPES[ref.dtype], self._features.power(name, in_features))

    def _select(self, name: str, rows: Tensor, feature: Tensor, power: int) -> Iterator[Selection]:
        """Prunes rows (n, in); in halves, if the device lacks memory for the kernels' temporaries."""
        try:
            yield self.target.select(name, rows, feature, power)
            return
        except RuntimeError as e:
            if len(rows) == 1 or not is_out_of_memory(e):
                raise
        torch.cuda.empty_cache()
        for half in torch.split(rows, -(-len(rows) // 2)):
            yield from self._select(name, half, feature, power)
