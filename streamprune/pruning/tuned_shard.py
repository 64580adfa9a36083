"""The tuning side of a job: from a layer's shard, through tuning.py, to its shard once more.

    1  what the layer is given and what is wanted of it, window by window: both from the pass (CalibrationPass.pairs)
    2  the layer's weights come from the shard that has just been written; they are tuned
    3  the shard is filled again, the tuned tensors new and all others byte for byte

Of several ranks, each passes its windows through the layer, and rank 0 does the rest: a step depends on the one before
it, and a window is not divided.

Nothing within this is kept when a job is interrupted: the layer begins again, and its first shard with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from streamprune.disk.durable import Buffer, FilePart
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import Part, fill_in_order
from streamprune.errors import ResourceError
from streamprune.model.copies import is_out_of_memory
from streamprune.model.loader import WeightLoader
from streamprune.model.pairs import Pairs
from streamprune.model.stages import Stage
from streamprune.pruning.forward import CalibrationPass
from streamprune.pruning.linears import CHUNK_BYTES
from streamprune.pruning.output import Output
from streamprune.pruning.records import StageRecord
from streamprune.pruning.target import Target
from streamprune.pruning.tuning import BlockTuner, New, Tuning, tuned_names


class LayerTuning:
    """Tunes the layers of one job, `most` windows at a time; fewer once memory has run out."""

    def __init__(self, target: Target, forward: CalibrationPass, tuning: Tuning, most: int) -> None:
        self._target, self._forward, self._tuning, self._most = target, forward, tuning, most
        self._whole = most
        self._ranks = forward.share.ranks

    @classmethod
    def of(
        cls, windows: int, target: Target | None, forward: CalibrationPass | None
    ) -> LayerTuning | None:  # fmt: skip
        """That of a job, None where it tunes nothing; `windows` are what memory allows at once."""
        if target is None or forward is None or (recipe := target.recipe).tune_epochs is None or recipe.tune_lr is None:
            return None
        return cls(target, forward, Tuning(recipe.tune_epochs, recipe.tune_lr), windows)

    def layer(self, stage: Stage, output: Output, record: StageRecord) -> FilePart | None:
        """Tunes a layer whose part of `output` is durable: the part anew, all but committed, and in `record`.

        None where the layer stays as it was, and on other ranks than 0. Nothing is recorded where nothing of it was
        pruned.
        """
        names = tuned_names(self._forward.streamed.skeleton, stage, self._target.selected)
        if not names:
            return None
        if self._ranks.rank:
            for _ in self._forward.all_pairs(stage):
                pass
            self._ranks.attend()
            return None
        pairs = self._pairs(stage)
        there = output.written(stage)
        with self._forward.written(there, stage) as (loader, sources):
            within = {n.removeprefix(stage.prefix + "."): ref for n, ref in sources.items()}

            def tensors() -> Iterator[tuple[str, Tensor]]:
                for name, ref in within.items():
                    yield name, loader.tensor(ref)
                    loader.release([ref])

            made, record.tune = self._tune(stage, tensors, names, pairs)
            self._ranks.at_work(done=True)
            if not made:
                return None
            new = {within[n].name: make for n, make in made.items()}
            file = self._fill(output.begin(stage), output.part(stage), new, loader)
        record.shard = output.entry(stage, file)
        return file

    def _tune(
        self, stage: Stage, tensors: Callable[[], Iterator[tuple[str, Tensor]]], names: Mapping[str, bool], pairs: Pairs
    ) -> tuple[dict[str, New], dict[str, Any]]:  # fmt: skip
        while True:
            try:
                tuner = BlockTuner(self._forward.streamed, self._tuning, self._most, self._ranks.at_work)
                made, report = tuner.tune(stage, tensors(), names, pairs)
            except (torch.OutOfMemoryError, RuntimeError) as e:
                if not is_out_of_memory(e):
                    raise
            else:
                return made, report | ({"out_of_memory_windows": self._most} if self._most < self._whole else {})
            if self._most == 1:
                raise ResourceError(
                    f"{self._forward.streamed.device} ran out of memory while {stage.name} was tuned one window "
                    "at a time; free some, or take a smaller --seqlen"
                )
            self._most = -(-self._most // 2)  # out here, where nothing holds the failed attempt's tensors
            if self._forward.streamed.device.type == "cuda":
                torch.cuda.empty_cache()

    def _pairs(self, stage: Stage) -> Pairs:
        streamed, states = self._forward.streamed, self._forward.activations
        samples, seqlen = self._forward.windows.shape
        between = streamed.skeleton.between
        pairs = Pairs(
            states.folder, (samples, seqlen), between.width(stage.index, seqlen), between.hidden, streamed.cache_dtype,
            streamed.device, resident=states.resident,
        )  # fmt: skip
        for given, wanted in self._forward.all_pairs(stage):
            pairs.put(given, wanted)
        return pairs

    def _fill(self, file: FilePart, part: Part, new: Mapping[str, New], loader: WeightLoader) -> FilePart:
        """Writes the part over the bytes that it reads; each piece is copied before it is overwritten."""

        def content(ref: TensorRef) -> Iterator[Buffer]:
            if ref.name in new:
                made = new[ref.name](loader.tensor(ref)).cpu()
                data: memoryview = made.reshape(-1).view(torch.uint8).numpy().data
            else:
                data = loader.maps.raw(ref)
            for begin in range(0, len(data), CHUNK_BYTES):
                yield bytes(data[begin : begin + CHUNK_BYTES])
            loader.release([ref])

        return fill_in_order(file, part.header, part.tensors, content)
