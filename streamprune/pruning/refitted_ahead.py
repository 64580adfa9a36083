"""Refits linears before their turn in the shard: where others depend on them, or where several ranks share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamprune.calibration.grams import LayerGrams
from streamprune.disk.durable import Buffer
from streamprune.disk.float_quantized import SCALE
from streamprune.disk.scratch import ScratchMatrix
from streamprune.methods.fp8 import dequantise
from streamprune.model.naming import TORCH_DTYPES
from streamprune.pruning.codes import coded
from streamprune.pruning.pruned_linears import PrunedLinears


class RefittedAhead:
    """Refits `linears` of a stage, and keeps their bytes until their turn in the shard."""

    def __init__(self, linears: PrunedLinears) -> None:
        self._linears = linears
        self._made: dict[str, ScratchMatrix] = {}

    def __contains__(self, name: str) -> bool:
        """Whether a linear has been refitted."""
        return name in self._made

    def stored(self, name: str) -> memoryview:
        """The bytes that a refitted linear is stored as."""
        return self._made[name].tensor[0].numpy().data

    def refit_all(self, grams: LayerGrams) -> None:
        """Refits all linears that have `grams`, in the order of use if later ones depend on it."""
        stage = self._linears.stage
        names: Iterable[str] = grams.by_use if grams.place is not None else self._linears.target.linears_of(stage)
        experts: dict[str, list[str]] = {}
        for name in [name for name in names if name in grams]:
            if name in stage.expert_of:
                experts.setdefault(stage.expert_of[name], []).append(name)
            else:
                self._refit_ahead(name, grams.folder, grams.place)
        self._refit_experts(list(experts.values()), grams)

    def _refit_experts(self, experts: Sequence[Sequence[str]], grams: LayerGrams) -> None:
        """Refits experts, given by their linears, which ranks take in turn; rank 0 is sent all of them."""
        linears, ranks = self._linears, self._linears.ranks
        for first in range(0, len(experts), ranks.size):
            own = experts[first + ranks.rank] if first + ranks.rank < len(experts) else []
            made = [(name, b"".join(linears.pruned(linears.stage.linears[name], name))) for name in own]
            reports = [report for report in linears.reports if report["name"] in own]
            refs = linears.stage.linears
            names = [scale.name for name in own for _, scale in linears.target.codes_of(name, refs[name])]
            scales = {name: linears.scales.pop(name) for name in names if name in linears.scales}
            linears.reports = [report for report in linears.reports if report["name"] not in own]
            grams.leave_out([name for names in experts[first : first + ranks.size] for name in names])
            for refitted, told, parts in ranks.collect((made, reports, scales)):
                for name, data in refitted:
                    self._keep(name, grams.folder, [data])
                linears.reports += told
                linears.scales |= parts

    def _keep(self, name: str, folder: Path, pieces: Iterable[Buffer]) -> Tensor:
        """Keeps the bytes of a refitted linear; returns them as a tensor (bytes,)."""
        ref = self._linears.stage.linears[name]
        size = ref.nbytes if self._linears.target.quantisation is None else coded(ref)[0].nbytes
        made = self._made[name] = ScratchMatrix(folder, 1, size, torch.uint8)
        begin = 0
        for piece in pieces:
            view = memoryview(piece).cast("B")
            made.tensor.numpy()[0, begin : begin + len(view)] = np.frombuffer(view, dtype=np.uint8)
            begin += len(view)
        return made.tensor[0]

    def _refit_ahead(self, name: str, folder: Path, place: Callable[[str, Tensor], None] | None) -> None:
        """Refits a linear; `place` gets its new weight as it will be stored."""
        linears = self._linears
        ref = linears.stage.linears[name]
        stored = self._keep(name, folder, linears.pruned(ref, name))
        if place is None:
            return
        if linears.target.quantisation is None:
            place(name, stored.view(TORCH_DTYPES[ref.dtype]).view(ref.shape))
        else:
            codes = stored.view(torch.float8_e4m3fn).view(ref.shape)
            place(name, dequantise(codes, torch.cat(linears.scales[ref.name + SCALE]), TORCH_DTYPES[ref.dtype]))
