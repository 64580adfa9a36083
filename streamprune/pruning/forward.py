"""The forward side of a job: activations from stage to stage, and the statistics of every linear's input."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from streamprune.calibration.gram_sums import GramCollector, HoldOut
from streamprune.calibration.grams import LayerGrams
from streamprune.calibration.statistics import Accumulate, Collector
from streamprune.calibration.windows import Tokens
from streamprune.disk.cache import remove_cache
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.model.activations import Activations
from streamprune.model.loader import WeightLoader
from streamprune.model.passes import (
    Batches,
    Watcher,
    check_weights,
    embed_pass,
    layer_pass,
    retry_smaller,
    routed_to,
)
from streamprune.model.routed import Routed, RoutedInputs
from streamprune.model.skeleton import Stage
from streamprune.model.streamed import StreamedModel
from streamprune.pruning.target import Target

PERSIST_SECONDS = 60
"""Activations that stay on the device are written to disk this often: what a crash costs at most, beside one layer."""


class CalibrationPass:
    """Runs `windows` (samples, seqlen) through the model in batches of `batch`; cache n is what goes into layer n.

    Where memory runs out, a stage is done again in smaller parts; `streamed.max_samples` says how small.
    """

    def __init__(
        self, streamed: StreamedModel, windows: Tokens, batch: int, activations: Activations, accumulate: Accumulate
    ) -> None:
        self.streamed, self.windows, self.activations = streamed, windows, activations
        self._batches = Batches(windows, batch)
        self._accumulate = accumulate
        self._routed: Routed | None = None
        """What went to the experts of the last layer, where they are refitted."""
        self._durable_at = time.perf_counter()
        """When a cache became durable last."""

    @property
    def cache_bytes(self) -> int:
        """What one stage's cache takes on disk."""
        return self.windows.size * self.streamed.skeleton.hidden_size * self.streamed.cache_dtype.itemsize

    def persists(self) -> bool:
        """Whether the next cache is to be durable: always, or once a minute where activations stay on the device."""
        return not self.activations.resident or time.perf_counter() - self._durable_at >= PERSIST_SECONDS

    def made_durable(self) -> None:
        """A cache has become durable."""
        self._durable_at = time.perf_counter()

    @property
    def placing(self) -> Callable[[str, Tensor], None] | None:
        """What puts a refitted linear's new weight where the next Grams' pass computes with it, if such a pass does."""
        return None

    def grams_of(self, target: Target, stage: Stage, room: int) -> LayerGrams | None:
        """The Grams of a layer whose linears are refitted, in `room` bytes or in files; None where none is."""
        linears = target.linears_of(stage)
        if not target.recipe.needs_gram or stage.kind != "layer" or not linears:
            return None
        hold = HoldOut.of(self.windows.size, self.windows.shape[1])
        products = torch.bfloat16 if self.streamed.dtype == torch.bfloat16 else torch.float32
        rerun = functools.partial(self.gather, stage)
        folder = self.activations.folder
        return LayerGrams(linears, room, hold, folder, rerun, products, stage.expert_of, self.placing)

    def catch_up(self, newest: int, done: int, shards: Callable[[Stage], Checkpoint] | None) -> None:
        """Brings the activations to those before layer `done` - 1, from cache `newest`, or if that is -1 the tokens.

        With `shards`, what the layers before are propagated with; else their dense weights.
        """
        persist = not self.activations.resident
        if newest < 0:
            self.embed(persist)
        else:
            self.streamed.learn_calls(self._batches)
        for stage in self.streamed.skeleton.stages[max(newest, 0) + 1 : done]:
            if shards is None:
                self._layer(stage, persist)
            else:
                self.again(stage, shards(stage), persist)
            if stage.index > newest:
                remove_cache(self.activations.folder, stage.index)

    def embed(self, persist: bool) -> None:
        """Tokens to the states before layer 0. The head's weights are looked at as well: a bad one is found early."""
        self.check_outside()
        retry_smaller(
            self.streamed, lambda: embed_pass(self.streamed, self._batches, self.activations, persist=persist)
        )

    def check_outside(self) -> None:
        """Looks at the weights outside the layers. Raises CheckpointError for NaN and Inf."""
        stages = self.streamed.skeleton.stages
        for stage in (stages[0], stages[-1]):
            check_weights(self.streamed.loader, self.streamed.skeleton, stage)

    def layer(self, stage: Stage, write: bool, persist: bool, grams: LayerGrams | None = None) -> Collector:
        """One layer: its outputs, if `write`, and the statistics of its linears' inputs; Grams if there is room.

        With `grams` of experts, what they are given is kept until the next pass.
        """
        keeps = grams is not None and grams.of_experts

        def attempt() -> tuple[Collector, GramCollector | None]:
            self._routed = None  # before another takes as much disk
            if keeps:
                self._routed = routed_to(self.streamed, stage, RoutedInputs(self.activations.folder, self.windows.size))
            check_weights(self.streamed.loader, self.streamed.skeleton, stage)
            collector = Collector(self._accumulate)
            beside = grams.first_pass() if grams else None
            watchers: list[Watcher] = [collector, beside] if beside else [collector]
            layer_pass(
                self.streamed, stage, self.activations, write=write, persist=persist, watchers=watchers,
                flow=collector.flow, routed=self._routed,
            )  # fmt: skip
            return collector, beside

        collector, beside = retry_smaller(self.streamed, attempt)
        if grams is not None:
            grams.gathered(beside, collector.groups, collector.tokens)
        return collector

    def gather(self, stage: Stage, make: Callable[[], GramCollector], inputs: Set[str]) -> GramCollector:
        """What a collector that is made anew for each attempt sees of a layer: of one of its experts, or of all else.

        `inputs` are named by a linear each.
        """
        paths = [experts.path for experts in stage.experts if not inputs.isdisjoint(experts.linears)]

        def attempt() -> GramCollector:
            collector = make()
            if not paths:
                layer_pass(self.streamed, stage, self.activations, write=False, watchers=[collector])
            for path in paths:
                assert self._routed is not None
                with self.streamed.experts(path, self._routed):
                    rows = (self.streamed.max_samples or len(self._batches[0])) * self.windows.shape[1]
                    self._routed.again(inputs, collector.watch, rows)
                collector.end_batch()
            return collector

        return retry_smaller(self.streamed, attempt)

    def _layer(self, stage: Stage, persist: bool) -> None:
        retry_smaller(
            self.streamed,
            functools.partial(layer_pass, self.streamed, stage, self.activations, write=True, persist=persist),
        )
        self.streamed.loader.release(stage.tensors)

    def pairs(self, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
        """What a layer that has passed is given, and what is wanted of it; by chunks."""
        with self.streamed.layer(stage) as run:
            for states in self.activations.read(stage.index):
                yield states, run(states)

    def again(self, stage: Stage, shard: Checkpoint, persist: bool) -> None:
        """What a layer that is pruned already makes of the activations."""
        self.pruned_layer(stage, shard, persist)
        self.streamed.loader.release(stage.tensors)

    def pruned_layer(self, stage: Stage, shard: Checkpoint, persist: bool) -> None:
        """The second pass of `--propagate pruned`, with the weights that have just been written to `shard`."""
        self._routed = None
        with self.written(shard, stage) as (loader, sources):
            again = functools.partial(
                layer_pass,
                self.streamed,
                stage,
                self.activations,
                write=True,
                persist=persist,
                loader=loader,
                sources=sources,
            )
            retry_smaller(self.streamed, again)

    @contextmanager
    def written(self, written: Checkpoint, stage: Stage) -> Iterator[tuple[WeightLoader, dict[str, TensorRef]]]:
        """The weights of a layer that has been written: what brings them, and which parameter is which tensor."""
        sources: dict[str, TensorRef] = {}
        before = {ref.name: ref for ref in stage.tensors}
        for name, ref in self.streamed.skeleton.sources.items():
            if name.startswith(stage.prefix + "."):
                now = written.tensors[ref.name]
                if ref.shape != now.shape:  # one expert's part of a tensor
                    begin = now.begin + ref.begin - before[ref.name].begin
                    now = replace(now, shape=ref.shape, begin=begin, end=begin + ref.nbytes)
                sources[name] = now
                if ref.name + SCALE in written.tensors:
                    sources[name + SCALE] = written.tensors[ref.name + SCALE]
        with ShardMaps(written) as maps, WeightLoader(maps, self.streamed.device) as loader:
            yield loader, sources
