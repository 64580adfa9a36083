"""The forward side of a job with asymmetric calibration: the dense model beside the one that is being pruned.

A cache has both models' states, a batch of the dense one and then the same windows of the pruned one. A layer goes:

    1  both halves through the dense weights: statistics of the pruned half's inputs; the dense half's outputs wait
    2  for each input that refitted linears share, in the order of use: both halves again as far as that input, the
       dense half with dense weights, the pruned half with what has been refitted so far; then they are refitted
    3  the pruned half through the layer's shard; with the outputs that waited it makes the next cache

So a linear is fitted to what the dense layer makes of dense inputs, from the inputs that it will really have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Set
from pathlib import Path

import torch
from torch import Tensor

from streamprune.errors import UnsupportedError
from streamprune.job_pass import Pass
from streamprune.model.activations import Aside
from streamprune.model.binding import in_their_place
from streamprune.model.grams import GramCollector, LayerGrams
from streamprune.model.passes import check_weights, retry_smaller
from streamprune.model.skeleton import Stage
from streamprune.model.statistics import Collector
from streamprune.model.walk import Enough


class PairedPass(Pass):
    """Runs `windows` (samples, seqlen) through both models; `batch` counts windows, so chunks of a cache have twice
    as many states. For models without experts."""

    dense: Aside
    """What the dense model makes of the layer at work."""

    placed: dict[str, Tensor]
    """New weights of the linears of the layer at work that have been refitted."""

    @property
    def cache_bytes(self) -> int:
        return 2 * super().cache_bytes

    def embed(self, persist: bool) -> None:
        stages = self.walk.skeleton.stages
        for stage in (stages[0], stages[-1]):
            check_weights(self.walk.feed, self.walk.skeleton, stage)

        def attempt() -> None:
            with self.activations.write(0, persist=persist) as put:
                for states in self.walk.embed(self._batches):
                    put(torch.cat((states, states)))

        retry_smaller(self.walk, attempt)

    def layer(self, stage: Stage, write: bool, persist: bool, grams: LayerGrams | None = None) -> Collector:
        """Step 1. Nothing is written."""
        check_weights(self.walk.feed, self.walk.skeleton, stage)

        def attempt() -> Collector:
            self.placed = {}
            self.dense = self._aside()
            collector, pruned_half = Collector(self._accumulate), False

            def watch(name: str, x: Tensor) -> None:
                if pruned_half:
                    collector.watch(name, x)

            with self.walk.layer(stage, watch=watch) as run:
                for states in self.activations.read(stage.index):
                    dense, states = states.chunk(2)
                    pruned_half = False
                    self.dense.put(run(dense))
                    pruned_half = True
                    collector.flow(states, run(states))
                    collector.end_batch()
            return collector

        collector = retry_smaller(self.walk, attempt)
        if grams is not None:
            grams.gathered(None, collector.groups, collector.tokens)
        self._tokens = {name: collector.tokens(name) for name in collector.groups}
        return collector

    def place(self, name: str, weight: Tensor) -> None:
        """From here on the pruned half computes with a linear's new weight, in its stored shape."""
        self.placed[name] = weight.to(self.walk.device)

    def gather(self, stage: Stage, make: Callable[[], GramCollector], inputs: Set[str]) -> GramCollector:
        """Step 2, for one input, named by the first linear that has it."""
        (name,) = inputs
        once = self._tokens[name] == self.windows.size  # a linear that is called again is not to be cut short

        def attempt() -> GramCollector:
            collector = make()
            dense_inputs: deque[Tensor] = deque()
            pruned_half = False

            def watch(linear: str, x: Tensor) -> None:
                if linear != name:
                    return
                if not pruned_half:
                    dense_inputs.append(x)
                elif not dense_inputs:
                    raise UnsupportedError(f"{name} is not called as often as in the dense model")
                else:
                    collector.watch_pair(name, dense_inputs.popleft(), x)
                if once:
                    raise Enough

            with self.walk.layer(stage, watch=watch) as run:
                for states in self.activations.read(stage.index):
                    dense, states = states.chunk(2)
                    pruned_half = False
                    run(dense)
                    pruned_half = True
                    with in_their_place(self.walk.skeleton, self.placed):
                        run(states)
            return collector

        return retry_smaller(self.walk, attempt)

    def pruned_layer(self, stage: Stage, shard: Path, persist: bool) -> None:
        """Step 3."""
        self.placed = {}

        def attempt() -> None:
            self.dense.rewind()
            with (
                self.written(shard, stage) as (feed, sources),
                self.walk.layer(stage, feed=feed, sources=sources) as run,
                self.activations.write(stage.index + 1, persist=persist) as put,
            ):
                for states in self.activations.read(stage.index):
                    after = run(states.chunk(2)[1])
                    put(torch.cat((self.dense.take(after).to(after.dtype), after)))

        retry_smaller(self.walk, attempt)
        del self.dense

    def again(self, stage: Stage, shard: Path, persist: bool) -> None:
        """Steps 1 and 3 of a layer that has been refitted already."""

        def attempt() -> None:
            self.dense = self._aside()
            with self.walk.layer(stage) as run:
                for states in self.activations.read(stage.index):
                    self.dense.put(run(states.chunk(2)[0]))

        retry_smaller(self.walk, attempt)
        self.pruned_layer(stage, shard, persist)

    def _aside(self) -> Aside:
        states, hidden = self.activations, self.walk.skeleton.hidden_size
        return Aside(states.folder, self.windows.size, hidden, self.walk.cache_dtype, resident=states.resident)
