"""The forward pass of a job: activations from stage to stage, and statistics of every linear's input."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Iterator, Set
from contextlib import closing, contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from streamprune.calibration.collector import Accumulate, Collector
from streamprune.calibration.gram_sums import GramCollector, HoldOut
from streamprune.calibration.grams import LayerGrams
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
    Dealt,
    Watcher,
    check_weights,
    embed_pass,
    layer_pass,
    retry_smaller,
    routed_to,
)
from streamprune.model.routed import Routed
from streamprune.model.routed_inputs import RoutedInputs
from streamprune.model.stages import Stage
from streamprune.model.streamed import StreamedModel
from streamprune.process.share import Share
from streamprune.pruning.target import Target

Made = TypeVar("Made")

PERSIST_SECONDS = 60
"""How often activations that stay on the device are written to disk. A crash costs at most this much work and one
layer."""


class CalibrationPass:
    """Runs this rank's `share` of `windows` (samples, seqlen) through the model. Cache n holds the inputs of layer n.

    When memory runs out, a stage is repeated in smaller parts, of `streamed.max_samples` windows; not by one of several
    ranks.
    """

    def __init__(
        self, streamed: StreamedModel, windows: Tokens, share: Share, activations: Activations, accumulate: Accumulate
    ) -> None:
        self.streamed, self.windows, self.activations, self.share = streamed, windows, activations, share
        self._batches = Dealt(Batches(windows, share.batch), share)
        self._accumulate = accumulate
        self._routed: Routed | None = None
        """Inputs routed to the experts of the last layer, if they are refitted."""
        self._durable_at = time.perf_counter()
        """When a cache last became durable (perf_counter)."""

    @property
    def cache_bytes(self) -> int:
        """Size on disk of one stage's cache."""
        width = self.streamed.skeleton.between.most(self.windows.shape[1])
        return self.own_tokens * width * self.streamed.cache_dtype.itemsize

    @property
    def own_tokens(self) -> int:
        """Tokens that this rank passes through the model."""
        return self.share.own_windows * int(self.windows.shape[1])

    def retried(self, work: Callable[[], Made]) -> Made:
        """As retry_smaller; but none of several ranks repeats a pass by itself, as they exchange data within it."""
        return retry_smaller(self.streamed, work) if self.share.ranks.size == 1 else work()

    def persists(self) -> bool:
        """Whether to make the next cache durable: always, or once a minute if activations stay on the device."""
        if not self.activations.resident:
            return True
        return self.share.ranks.broadcast(time.perf_counter() - self._durable_at >= PERSIST_SECONDS)

    def made_durable(self) -> None:
        """Notes that a cache has just become durable."""
        self._durable_at = time.perf_counter()

    @property
    def placing(self) -> Callable[[str, Tensor], None] | None:
        """Receives each refitted linear's new weight, if later Grams of the layer are computed with it."""
        return None

    def grams_of(self, target: Target, stage: Stage, room: int) -> LayerGrams | None:
        """The Grams of a layer whose linears are refitted, in `room` bytes or in files; None if none is refitted."""
        linears = target.linears_of(stage)
        if not target.recipe.needs_gram or stage.kind != "layer" or not linears:
            return None
        hold = HoldOut.of(self.windows.size, self.windows.shape[1])
        products = torch.bfloat16 if self.streamed.dtype == torch.bfloat16 else torch.float32
        rerun = functools.partial(self.gather, stage)
        folder = self.activations.folder
        return LayerGrams(linears, room, hold, folder, rerun, products, stage.expert_of, self.placing, self.share)

    def catch_up(self, newest: int, done: int, shards: Callable[[Stage], Checkpoint] | None) -> None:
        """Recomputes the inputs of layer `done` - 1 from cache `newest`, or from the tokens if that is -1.

        `shards` returns the pruned weights of a finished layer; without it, layers run with their dense weights.
        """
        persist = not self.activations.resident
        if newest < 0:
            self.embed(persist)
        else:
            self.streamed.learn_calls(self._batches)
        stages = self.streamed.skeleton.stages
        for position in range(max(newest, 0) + 1, done):
            stage = stages[position]
            self.streamed.loader.maps.upcoming([s.tensors for s in stages[position:]])
            if shards is None:
                self._layer(stage, persist)
            else:
                self.again(stage, shards(stage), persist)
            if stage.index > newest:
                remove_cache(self.activations.folder, stage.index)

    def embed(self, persist: bool) -> None:
        """Computes the inputs of layer 0. Checks all weights outside the layers first, so that bad ones fail early."""
        self.check_outside()
        self.retried(lambda: embed_pass(self.streamed, self._batches, self.activations, persist=persist))

    def check_outside(self) -> None:
        """Raises CheckpointError for NaN and Inf in the weights outside the layers."""
        stages = self.streamed.skeleton.stages
        ends = stages[:1] if self.streamed.loader.maps.fetches else (stages[0], stages[-1])  # the head comes later
        for stage in ends:
            check_weights(self.streamed.loader, self.streamed.skeleton, stage)

    def layer(
        self, stage: Stage, write: bool, persist: bool, grams: LayerGrams | None = None, *, routed: bool = False
    ) -> Collector:
        """Runs one layer: caches its outputs, if `write`, and gathers statistics of its linears' inputs.

        Also gathers those of the `grams` that fit into memory together. If experts are refitted, or with `routed`, the
        inputs routed to them are kept in a file until the next pass.
        """
        keeps = routed or (grams is not None and grams.of_experts)

        def attempt() -> tuple[Collector, GramCollector | None]:
            self._routed = None  # frees its disk space before the next one needs as much
            if keeps:
                self._routed = routed_to(self.streamed, stage, RoutedInputs(self.activations.folder, self.own_tokens))
            check_weights(self.streamed.loader, self.streamed.skeleton, stage)
            collector = Collector(self._accumulate, self.share)
            beside = grams.first_pass() if grams else None
            watchers: list[Watcher] = [collector, beside] if beside else [collector]
            layer_pass(
                self.streamed, stage, self.activations, write=write, persist=persist, watchers=watchers,
                flow=collector.flow, routed=self._routed,
            )  # fmt: skip
            return collector, beside

        collector, beside = self.retried(attempt)
        if self._routed is not None:
            self._routed.gathered(self.share.ranks, self.windows.size)
        if grams is not None:
            grams.gathered(beside, collector.groups, collector.tokens)
        return collector

    def gather(self, stage: Stage, make: Callable[[], GramCollector], inputs: Set[str]) -> GramCollector:
        """One more pass through a layer, or through one of its experts, for a collector of Grams.

        `make` creates a new collector for each attempt, as a pass that runs out of memory is repeated. `inputs` names
        one linear for each input to collect.
        """
        paths = [experts.path for experts in stage.experts if not inputs.isdisjoint(experts.linears)]

        def attempt() -> GramCollector:
            collector = make()
            if not paths:
                layer_pass(self.streamed, stage, self.activations, write=False, watchers=[collector])
            for path in paths:
                assert self._routed is not None
                with self.streamed.experts(path, self._routed):
                    rows = (self.streamed.max_samples or self.share.size(0)) * self.windows.shape[1]
                    self._routed.again(inputs, collector.watch, rows)
                collector.end_batch()
            return collector

        return self.retried(attempt)

    @property
    def routed(self) -> Routed:
        """What was kept of the inputs routed to the last layer's experts."""
        assert self._routed is not None
        return self._routed

    def _layer(self, stage: Stage, persist: bool) -> None:
        self.retried(functools.partial(layer_pass, self.streamed, stage, self.activations, write=True, persist=persist))
        self.streamed.loader.release(stage.tensors)

    def pairs(self, stage: Stage) -> Generator[tuple[Tensor, Tensor], None, None]:
        """What a finished layer is given and the hidden states wanted of it, in chunks of (n, seqlen, width)."""
        with self.streamed.layer(stage) as run:
            for states in self.activations.read(stage.index):
                yield states, self.streamed.skeleton.between.states(run(states))

    def all_pairs(self, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
        """As `pairs`, in the order of all windows: on rank 0 those of all ranks, on the others none."""
        share, ranks = self.share, self.share.ranks
        if ranks.size == 1:
            yield from self.pairs(stage)
            return
        with closing(self.pairs(stage)) as own:
            for number in range(share.batches):
                if (source := share.owner(number)) == ranks.rank:
                    given, wanted = next(own)
                elif not ranks.rank:
                    given, wanted = (t.new_empty(share.size(number), *t.shape[1:]) for t in (given, wanted))
                else:
                    continue
                for tensor in (given, wanted):
                    ranks.hand_over_(tensor, source)
                if not ranks.rank:
                    yield given, wanted

    def again(self, stage: Stage, shard: Checkpoint, persist: bool) -> None:
        """Recomputes the outputs of a layer that is already pruned, from its `shard`."""
        self.pruned_layer(stage, shard, persist)
        self.streamed.loader.release(stage.tensors)

    def pruned_layer(self, stage: Stage, shard: Checkpoint, persist: bool) -> None:
        """The second pass of `--propagate pruned`, with the pruned weights just written to `shard`."""
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
            self.retried(again)

    @contextmanager
    def written(self, written: Checkpoint, stage: Stage) -> Iterator[tuple[WeightLoader, dict[str, TensorRef]]]:
        """A loader for the weights of a layer in the output, and the tensor of each of its parameters."""
        sources: dict[str, TensorRef] = {}
        before = {ref.name: ref for ref in stage.tensors}
        for name, ref in self.streamed.skeleton.sources.items():
            if name.startswith(stage.prefix + "."):
                if ref.name not in written.tensors:  # an expert's, which was all experts' before
                    sources |= {name + end: written.tensors[name + end] for end in ("", SCALE)}
                    continue
                sources[name] = ref.within(before[ref.name], written.tensors[ref.name])
                if ref.name + SCALE in written.tensors:
                    sources[name + SCALE] = written.tensors[ref.name + SCALE]
        with ShardMaps(written) as maps, WeightLoader(maps, self.streamed.device) as loader:
            yield loader, sources
