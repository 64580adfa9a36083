"""One stage into one shard: selected linears are pruned row by row, everything else is copied as it is.

Rows are handled in chunks, so no more than a chunk of a tensor is ever held; what has been read is released.
Every weight that passes is looked at: NaN and Inf are found here, with their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.calibration.grams import LayerGrams
from streamprune.disk.durable import AtomicFile, Buffer
from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import TensorRef
from streamprune.disk.scratch import ScratchMatrix
from streamprune.disk.shards import fill_shard
from streamprune.kernels import Selection
from streamprune.methods.fp8 import dequantise
from streamprune.methods.refits import Sample
from streamprune.methods.selection import Amount, prune_count
from streamprune.methods.stats import InputStats
from streamprune.model.copies import CopyStream, is_out_of_memory
from streamprune.model.finite import finite_rows, refuse_nonfinite, rows_of
from streamprune.model.loader import WeightLoader
from streamprune.model.naming import TORCH_DTYPES
from streamprune.model.skeleton import Skeleton, Stage, is_linear
from streamprune.model.zeros import refuse_zeros
from streamprune.pruning.quantise import LinearCodes, coded
from streamprune.pruning.refit import LayerRefit, Refit, chunk_rows, sampled
from streamprune.pruning.target import Features, Target

CHUNK_BYTES = 16 << 20


@dataclass
class StageWriter:
    """Writes the shards of one job. `linears` collects a report of each pruned linear of the current stage."""

    skeleton: Skeleton
    loader: WeightLoader
    target: Target
    selected: frozenset[str]
    """Module paths of the linears to prune."""
    linears: list[dict[str, Any]] = field(default_factory=list)
    allow_zeros: bool = False
    """Whether linears may hold nothing but zeros (model/zeros.py)."""

    def __post_init__(self) -> None:
        self._lane = CopyStream(self.loader.device)
        self._refit: LayerRefit | None = None
        self._scales: dict[str, list[Tensor]] = {}
        self._following: dict[TensorRef, TensorRef] = {}
        """Of experts' linears, which are too many to be brought together, the next one."""
        self._stored: dict[str, TensorRef] = {}
        self._holds_linears: set[str] = set()
        self._made: dict[str, ScratchMatrix] = {}
        """Tensors that were refitted ahead of their place in the shard."""

    def tensors_of(self, stage: Stage) -> list[TensorRef]:
        """What is written of a stage; tensors that are quantised have a place in no file yet."""
        if self.target.quantisation is None:
            return list(stage.tensors)
        chosen = {ref.name for name, ref in stage.linears.items() if name in self.selected}
        return [new for ref in stage.tensors for new in (coded(ref) if ref.name in chosen else (ref,))]

    @property
    def refitted(self) -> frozenset[str]:
        """Module paths of the linears that get new values, unless it turns out that too little is known of them."""
        return self.selected if self.target.recipe.needs_gram else frozenset()

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(ref.nbytes for stage in self.skeleton.stages for ref in self.tensors_of(stage))

    def stays(self) -> list[str]:
        """What is not quantised: linears by module path, and layers' other matrices (routers) as they are stored."""
        modules = self.skeleton.model.named_modules()
        names = [name for name, module in modules if is_linear(module) and name not in self.selected]
        for stage in self.skeleton.stages:
            refs = self.tensors_of(stage)
            if stage.kind != "layer":
                refs = [ref for ref in refs if ref.name in stage.unclaimed]
            plain = (ref for ref in refs if ref.dtype in TORCH_DTYPES and len(ref.shape) == 2)
            names += [n.removesuffix(".weight") for n in (ref.name for ref in plain) if n.endswith(".weight")]
        return list(dict.fromkeys(names))

    def fill(
        self, path: Path, stage: Stage, stats: Callable[[str, int], InputStats], grams: LayerGrams | None = None
    ) -> AtomicFile:
        """Fills one shard; the caller commits it. `stats(linear, in_features)` are those of a linear's input.

        With a recipe that refits, `grams` are those of the layer.
        """
        self.linears = []
        parts = self._parts(stage)
        self._features = Features(self.target, stats, self.loader.device)
        self._refit = self._layer_refit(grams) if grams is not None else None
        known = {ref.name for ref in self.skeleton.sources.values()}
        stored = self._stored = {ref.name: ref for ref in stage.tensors}
        self._holds_linears = {ref.name for ref in stage.linears.values()}
        self._scales = {}
        apart = [stage.linears[name] for name in self.in_order(stage) if name in stage.expert_of]
        self._following = dict(pairwise(apart))
        self._made = {}
        if grams is not None and grams.place is not None:
            with self._lane.on():
                for name in grams.by_use:
                    self._refit_ahead(name, stage.linears[name], grams.folder, grams.place)

        def content(ref: TensorRef) -> Iterator[Buffer]:
            if ref.name in self._made:
                yield from _pieces(self._made[ref.name].tensor[0].numpy().data)
            elif ref.name in self._scales:
                yield _bytes(torch.cat(self._scales[ref.name]))
            elif ref.name in parts:
                for name, part in parts[ref.name]:
                    yield from self._pruned(part, name) if name in self.selected else self._checked(part)
            elif ref.name in known:
                yield from self._checked(ref)
            else:
                yield from _pieces(self.loader.maps.raw(ref))

        def release(ref: TensorRef, begin: int, end: int) -> None:
            """Lets go of the pages of a tensor whose bytes have been used."""
            source = stored.get(ref.name)
            if source is not None and begin < end:
                times = source.nbytes // ref.nbytes
                done = replace(source, begin=source.begin + times * begin, end=source.begin + times * end)
                self.loader.maps.release([done], drop_cache=True)

        with self._lane.on():
            return fill_shard(path, self.tensors_of(stage), content, written=release)

    def _refit_ahead(self, name: str, ref: TensorRef, folder: Path, place: Callable[[str, Tensor], None]) -> None:
        """Refits a linear before its turn in the shard has come; `place` gets its new weight, as it will be stored."""
        size = ref.nbytes if self.target.quantisation is None else coded(ref)[0].nbytes
        made = self._made[ref.name] = ScratchMatrix(folder, 1, size, torch.uint8)
        begin = 0
        for piece in self._pruned(ref, name):
            data = torch.frombuffer(piece, dtype=torch.uint8)
            made.tensor[0, begin : begin + len(data)] = data
            begin += len(data)
        stored = made.tensor[0]
        if self.target.quantisation is None:
            place(name, stored.view(TORCH_DTYPES[ref.dtype]).view(ref.shape))
        else:
            codes = stored.view(torch.float8_e4m3fn).view(ref.shape)
            place(name, dequantise(codes, torch.cat(self._scales[ref.name + SCALE]), TORCH_DTYPES[ref.dtype]))

    def _checked(self, ref: TensorRef) -> Iterator[Buffer]:
        """The bytes of a tensor that is not pruned."""
        chunks = finite_rows(self.loader.maps, ref, CHUNK_BYTES, self._stored[ref.name])
        for _, rows in self._filled(ref, chunks) if ref.name in self._holds_linears else chunks:
            yield _bytes(rows)

    def _filled(self, ref: TensorRef, chunks: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        return chunks if self.allow_zeros else refuse_zeros(ref, chunks)

    def _parts(self, stage: Stage) -> dict[str, list[tuple[str, TensorRef]]]:
        """Tensors of which something is pruned -> the linears that they hold, in the order in which they lie there."""
        parts: dict[str, list[tuple[str, TensorRef]]] = {}
        for name, ref in sorted(stage.linears.items(), key=lambda item: item[1].begin):
            parts.setdefault(ref.name, []).append((name, ref))
        return {name: held for name, held in parts.items() if any(linear in self.selected for linear, _ in held)}

    def in_order(self, stage: Stage) -> dict[str, int]:
        """The linears of a stage that are pruned, in the order of their shard, and their in_features."""
        chosen = [(ref.name, ref.begin, name) for name, ref in stage.linears.items() if name in self.selected]
        return {name: _width(stage.linears[name], name in self.skeleton.transposed) for *_, name in sorted(chosen)}

    def _layer_refit(self, grams: LayerGrams) -> LayerRefit:
        def keep(name: str, weight: Tensor, share: float) -> Tensor:
            return self.target.keep(name, weight, *self._features.of(name, weight.shape[1]), share)

        refit = Refit(str(self.target.recipe.refit), self.target.damping)
        return LayerRefit(refit, self.target.of, grams, keep, self.target.backend)

    def _sample(self, name: str) -> Sample:
        """The rows of a linear that decide how it is refitted."""
        ref = self.skeleton.sources[f"{name}.weight"]
        stored = self.loader.tensor(ref)
        if name in self.skeleton.transposed:
            stored = stored.t()
        which = sampled(len(stored)).to(stored.device)
        rows = stored[which].contiguous()
        feature, power = self._features.of(name, rows.shape[1])
        masked = torch.cat([r.weight for r in self._select(name, rows, feature, power)])
        return Sample(rows.float(), masked.float(), which)

    def _pruned(self, ref: TensorRef, name: str) -> Iterator[Buffer]:
        if ref in self._following:
            self.loader.expect([self._following[ref]])
        transposed = name in self.skeleton.transposed
        in_features = _width(ref, transposed)
        feature, power = self._features.of(name, in_features)
        refit = self._refit if self._refit is not None and name in self._refit else None
        outcome = refit.begin(name, self._sample) if refit else None
        codes = self._codes(ref, name)
        chunk = CHUNK_BYTES if outcome is None else chunk_rows(in_features) * in_features * _itemsize(ref)
        removed = total = 0.0
        for begin, rows in self._filled(ref, rows_of(self.loader, ref, ref.nbytes if transposed else chunk)):
            parts: list[Tensor] = []
            exact = rows.t().contiguous() if transposed else rows
            for result in self._select(name, exact, feature, power):
                if not result.finite:
                    refuse_nonfinite(ref, begin, rows, self._stored[ref.name])
                removed, total = removed + result.removed, total + result.total
                parts.append(result.weight)
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            if refit is not None and outcome is not None:
                weight = refit.rows(name, begin, exact, weight, outcome)
            if codes is not None:
                gram = refit.gram(name) if refit else None
                wanted = refit.aim(name, begin, exact) if refit else exact
                weight = codes.rows(wanted, weight, gram, outcome.used if outcome else None)
            yield _bytes(self._lane.fetch(weight.t().contiguous() if transposed else weight, None))
        out_features = ref.shape[1] if transposed else ref.shape[0]
        per_row = prune_per_row(self.target.of(name), in_features)
        self.linears.append({
            "name": name, "rows": out_features, "in_features": in_features, "pruned": per_row * out_features,
            "sparsity": per_row / in_features, "removed_score": _share(removed, total),
        })  # fmt: skip
        if refit is not None and outcome is not None:
            self.linears[-1] |= outcome.report()
            refit.done(name)
        if codes is not None:
            self.linears[-1] |= codes.report(outcome is not None)
            self._scales[coded(ref)[1].name] = [self._lane.fetch(part, None) for part in codes.scales]
        if self.loader.copies and ref in self._following:
            self.loader.release([ref])

    def _codes(self, ref: TensorRef, name: str) -> LinearCodes | None:
        how = self.target.quantisation
        if how is None:
            return None
        return LinearCodes(how, TORCH_DTYPES[ref.dtype], self._features.power(name, ref.shape[1]))

    def _select(self, name: str, rows: Tensor, feature: Tensor, power: int) -> Iterator[Selection]:
        """Prunes rows (n, in); in halves, where a device has no room for the kernels' temporaries."""
        try:
            yield self.target.select(name, rows, feature, power)
            return
        except RuntimeError as e:
            if len(rows) == 1 or not is_out_of_memory(e):
                raise
        torch.cuda.empty_cache()
        for half in torch.split(rows, -(-len(rows) // 2)):
            yield from self._select(name, half, feature, power)


def _share(part: float, whole: float) -> float | None:
    """None where the sums are beyond float32, as with weights of 1e20."""
    if not math.isfinite(part) or not math.isfinite(whole):
        return None
    return part / whole if whole else 0.0


def prune_per_row(amount: Amount, in_features: int) -> int:
    """Weights pruned in each row. Raises UsageError when the pattern does not divide in_features."""
    if amount.pattern is not None:
        return in_features // amount.pattern.m * (amount.pattern.m - amount.pattern.n)
    assert amount.sparsity is not None
    return prune_count(amount.sparsity, in_features)


def _width(ref: TensorRef, transposed: bool) -> int:
    return ref.shape[0] if transposed else ref.shape[1]


def _itemsize(ref: TensorRef) -> int:
    return ref.nbytes // max(1, ref.shape[0] * ref.shape[1])


def _pieces(data: memoryview) -> Iterable[Buffer]:
    for begin in range(0, len(data), CHUNK_BYTES):
        yield data[begin : begin + CHUNK_BYTES]


def _bytes(tensor: Tensor) -> Buffer:
    """A contiguous CPU tensor's bytes, not copied."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
