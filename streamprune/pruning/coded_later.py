"""FP8 for layers that are tuned: what is learnt would be lost in codes, so a layer becomes codes in the end.

    1  the layer is written as it would be without FP8, into a scratch file beside the activations
    2  it is tuned there (tuned_shard.py)
    3  from there it goes to its part of the output: its linears in FP8, each weight rounded to the nearest code, and
       everything else byte for byte

Nothing of the scratch file is kept when a job is interrupted: the layer begins again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamprune.disk import durable
from streamprune.disk.durable import FilePart
from streamprune.disk.mapping import ShardMaps
from streamprune.methods.selection import Amount
from streamprune.model.loader import WeightLoader
from streamprune.model.stages import Stage
from streamprune.pruning.expert_codes import told_apart
from streamprune.pruning.forward import CalibrationPass
from streamprune.pruning.output import Output
from streamprune.pruning.pruned_linears import Stats
from streamprune.pruning.shard import ShardWriter
from streamprune.pruning.target import Target

_FOLDER = "not-coded"


class CodedLater:
    """The layers of a job that tunes them and stores them in FP8, while they are not codes yet."""

    def __init__(self, target: Target, cache: Path) -> None:
        self._target, self._folder = target, cache / _FOLDER
        self.target = replace(target, quantisation=None, apart={})
        """How a layer is pruned before it is tuned."""
        self.output = Output(self._folder, self.target, None)
        """Where it is until then."""

    @classmethod
    def of(cls, target: Target | None, cache: Path) -> CodedLater | None:
        """That of a job; None where nothing is tuned, or nothing is quantised."""
        if target is None or target.quantisation is None or target.recipe.tune is None:
            return None
        return cls(target, cache)

    def has(self, stage: Stage) -> bool:
        """Whether a stage becomes codes later."""
        return stage.kind == "layer" and bool(self.target.linears_of(stage))

    def begin(self) -> None:
        """Makes the folder of the scratch files."""
        durable.make_folder(self._folder)

    def code(
        self, stage: Stage, forward: CalibrationPass, output: Output, stats: Stats, pruned: Sequence[dict[str, Any]]
    ) -> tuple[FilePart, list[dict[str, Any]]]:
        """Stores a layer that has been tuned, if need be, in its part of `output`, and removes its scratch file.

        The caller commits what comes back; with it the reports on linears: those of what was `pruned`, and the errors
        of rounding. `stats` are those that the masks were chosen with.
        """
        there = self.output.written(stage)
        before = {ref.name: ref for ref in stage.tensors}
        linears = {n: ref.within(before[ref.name], there.tensors[ref.name]) for n, ref in stage.linears.items()}
        again = replace(stage, tensors=tuple(there.tensors.values()), linears=linears)
        rounding = replace(self._target, amount=Amount(0.0), shares={}, least=None)
        file = output.begin(stage)
        with ShardMaps(there) as maps, WeightLoader(maps, forward.streamed.device) as loader:
            writer = ShardWriter(rounding, loader, allow_zeros=True)
            coded = writer.fill(file, output.part(stage), again, stats)
        errors = {report["name"]: {"rounding_error": report["rounding_error"]} for report in coded}
        durable.remove(self._folder / self.output.part(stage).name)
        return file, [report | errors[report["name"]] for report in told_apart(pruned, self._target.apart)]
