"""The tuning side of a job: from a layer's shard, through tuning.py, to its shard once more.

    1  what the layer is given and what is wanted of it, window by window: both from the pass (CalibrationPass.pairs)
    2  the layer's weights come from the shard that has just been written; they are tuned: experts first, one after the
       other, on what the pass has recorded for them, then the rest of the layer
    3  the shard is filled again, the tuned tensors new and all others byte for byte

Of several ranks, each passes its windows through the layer, and rank 0 does the rest: a step depends on the one before
it, and a window is not divided.

Nothing within this is kept when a job is interrupted: the layer begins again, and its first shard with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamprune.disk.durable import Buffer, FilePart
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import Part, fill_in_order
from streamprune.errors import ResourceError
from streamprune.model.differentiable import BoundExperts
from streamprune.model.frozen_experts import FrozenExperts, SpareWeight
from streamprune.model.loader import WeightLoader
from streamprune.model.naming import pieces_of
from streamprune.model.pairs import Pairs
from streamprune.model.stages import Stage
from streamprune.process.memory import is_out_of_memory
from streamprune.pruning.expert_tuning import ExpertTuner, put_back
from streamprune.pruning.forward import CalibrationPass
from streamprune.pruning.linears import CHUNK_BYTES
from streamprune.pruning.output import Output
from streamprune.pruning.records import StageRecord
from streamprune.pruning.target import Target
from streamprune.pruning.tuning import BlockTuner, New, Tuning, tuned_names


class LayerTuning:
    """Tunes the layers of one job, `whole` windows at a time; fewer once memory has run out, `most` from the beginning.

    Experts that see fewer than `least` tokens stay as they are.
    """

    def __init__(
        self, target: Target, forward: CalibrationPass, tuning: Tuning, whole: int, most: int, least: int
    ) -> None:  # fmt: skip
        self._target, self._forward, self._tuning, self._most = target, forward, tuning, most
        self._whole, self._least = whole, least
        self._ranks = forward.share.ranks

    @classmethod
    def of(
        cls, windows: int, target: Target | None, forward: CalibrationPass | None, least: int,
        done: Sequence[StageRecord] = (),
    ) -> LayerTuning | None:  # fmt: skip
        """That of a job, None where it tunes nothing; `windows` are what memory allows at once.

        After the stages that are `done` it goes on with as many windows as they had in the end, as if it had never
        stopped: sums of gradients depend on how many are taken at once.
        """
        if target is None or forward is None or (recipe := target.recipe).tune_epochs is None or recipe.tune_lr is None:
            return None
        most = min([windows, *((stage.tune or {}).get("out_of_memory_windows", windows) for stage in done)])
        return cls(target, forward, Tuning(recipe.tune_epochs, recipe.tune_lr), windows, most, least)

    def wants_routed(self, stage: Stage) -> bool:
        """Whether the pass has to record what a layer's experts are given."""
        return not self._target.selected.isdisjoint(stage.expert_of)

    def layer(self, stage: Stage, output: Output, record: StageRecord) -> FilePart | None:
        """Tunes a layer whose part of `output` is durable: the part anew, all but committed, and in `record`.

        None where the layer stays as it was, and on other ranks than 0. Nothing is recorded where nothing of it was
        pruned.
        """
        names = tuned_names(self._forward.streamed.skeleton, stage, self._target.selected)
        wants_routed = self.wants_routed(stage)
        if not names and not wants_routed:
            return None
        if self._ranks.rank:
            for _ in self._forward.all_pairs(stage):
                pass
            self._ranks.attend()
            return None
        pairs = self._pairs(stage)
        there = output.written(stage)
        with self._forward.written(there, stage) as (loader, sources):
            renewed, told = dict[str, SpareWeight](), dict[str, Any]()
            if wants_routed:
                tuner = ExpertTuner(
                    self._forward.streamed, self._tuning, self._least, self._forward.activations.folder,
                    self._ranks.at_work,
                )  # fmt: skip
                renewed, told = tuner.tune(stage, self._target.selected, self._forward.routed, pairs, loader, sources)
            bound = BoundExperts(FrozenExperts(renewed), loader, sources) if stage.experts else None
            made, record.tune = self._tune(stage, lambda: _tensors(stage, loader, sources), names, pairs, bound)
            self._ranks.at_work(done=True)
            kept = bound.frozen.new if bound is not None else {}
            if wants_routed:
                record.tune["experts"] = told if kept or not renewed else put_back(told)
            if not made and not kept:
                return None
            new = {sources[f"{stage.prefix}.{n}"].name: make for n, make in made.items()}
            parts = {sources[f"{name}.weight"]: weight for name, weight in kept.items()}
            file = _fill(output.begin(stage), output.part(stage), new, parts, loader)
        record.shard = output.entry(stage, file)
        return file

    def _tune(
        self, stage: Stage, tensors: Callable[[], Iterator[tuple[str, Tensor]]], names: Mapping[str, bool],
        pairs: Pairs, experts: BoundExperts | None,
    ) -> tuple[dict[str, New], dict[str, Any]]:  # fmt: skip
        while True:
            try:
                tuner = BlockTuner(self._forward.streamed, self._tuning, self._most, self._ranks.at_work)
                made, report = tuner.tune(stage, tensors(), names, pairs, experts)
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


def _tensors(
    stage: Stage, loader: WeightLoader, sources: Mapping[str, TensorRef]
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """The tensors of a layer but its experts', by their names within it; those stored in pieces put together."""
    experts = {f"{name}.weight" for name in stage.expert_of}
    for full, ref in sources.items():
        whole, piece, _ = full.partition("[")
        if full in experts or (piece and not full.endswith("[0]")):
            continue
        refs = pieces_of(sources, whole) if piece else [ref]
        stored = [loader.tensor(each) for each in refs]
        yield whole.removeprefix(f"{stage.prefix}."), stored[0] if len(stored) == 1 else torch.cat(stored)
        loader.release(refs)


def _fill(
    file: FilePart, part: Part, new: Mapping[str, New], parts: Mapping[TensorRef, SpareWeight], loader: WeightLoader
) -> FilePart:  # fmt: skip
    """Writes the part over the bytes that it reads; each piece is copied before it is overwritten.

    `new` makes whole tensors, by name; `parts` replaces experts' matrices, which may be parts of tensors.
    """
    within: dict[str, list[tuple[TensorRef, SpareWeight]]] = {}
    for own, weight in sorted(parts.items(), key=lambda item: item[0].begin):
        within.setdefault(own.name, []).append((own, weight))

    def content(ref: TensorRef) -> Iterator[Buffer]:
        if ref.name in new:
            yield from _copied(_bytes(new[ref.name](loader.tensor(ref)).cpu()))
            loader.release([ref])
            return
        begin = ref.begin
        for own, weight in within.get(ref.name, ()):
            yield from _copied(loader.maps.raw(replace(ref, begin=begin, end=own.begin)))
            yield from _copied(_bytes(weight.tensor))
            weight.forget()
            begin = own.end
        yield from _copied(loader.maps.raw(replace(ref, begin=begin)))
        loader.release([ref])

    return fill_in_order(file, part.header, part.tensors, content)


def _bytes(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def _copied(data: memoryview) -> Iterator[bytes]:
    for begin in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[begin : begin + CHUNK_BYTES])
