"""The forward side of a job with asymmetric calibration: the dense model beside the one that is being pruned.

A cache has both models' states, a batch of the dense one and then the same windows of the pruned one. A layer goes:

    1  both halves through the dense weights: statistics of the pruned half's inputs; the dense half's outputs wait
    2  for each input that refitted linears share, in the order of use: both halves again as far as that input, the
       dense half with dense weights, the pruned half with what has been refitted so far; then they are refitted
    3  the pruned half through the layer's shard; with the outputs that waited it makes the next cache

So a linear is fitted to what the dense layer makes of dense inputs, from the inputs that it will really have. Linears
that write into the residual stream also make up for what it has lost before them: they are found by their outputs,
which add up to what the layer adds. Where none do (norms behind the sublayers, scaled residuals), nothing is made up
for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from streamprune.calibration.gram_sums import GramCollector
from streamprune.calibration.grams import LayerGrams
from streamprune.calibration.statistics import Collector
from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import UnsupportedError
from streamprune.model.activations import StateBuffer
from streamprune.model.binding import replaced_weights
from streamprune.model.passes import check_weights, retry_smaller
from streamprune.model.routed import Enough
from streamprune.model.skeleton import Skeleton, Stage
from streamprune.pruning.forward import CalibrationPass

_MOST_WRITERS = 8
"""Linears that are tried as writers of the residual stream: their sets are, all of them."""

_UNEXPLAINED = 0.1
"""Of what a layer adds to a token, this part may be something else than what writers' outputs add up to: rounding."""


class PairedPass(CalibrationPass):
    """Runs `windows` (samples, seqlen) through both models; `batch` counts windows, so chunks of a cache have twice
    as many states. For models without experts."""

    dense: StateBuffer
    """What the dense model makes of the layer at work."""

    placed: dict[str, Tensor]
    """New weights of the linears of the layer at work that have been refitted."""

    _writers: list[str]
    """Its linears that write into the residual stream, in the order of use."""

    @property
    def cache_bytes(self) -> int:
        return 2 * super().cache_bytes

    def embed(self, persist: bool) -> None:
        """As CalibrationPass.embed; both models' states are the same here."""
        self.check_outside()

        def attempt() -> None:
            with self.activations.write(0, persist=persist) as put:
                for states in self.streamed.embed(self._batches):
                    put(torch.cat((states, states)))

        retry_smaller(self.streamed, attempt)

    def layer(self, stage: Stage, write: bool, persist: bool, grams: LayerGrams | None = None) -> Collector:
        """Step 1. Nothing is written."""
        check_weights(self.streamed.loader, self.streamed.skeleton, stage)

        def attempt() -> Collector:
            self.placed, self.dense = {}, self._aside()
            collector, pruned_half = Collector(self._accumulate), False

            def watch(name: str, x: Tensor) -> None:
                if pruned_half:
                    collector.watch(name, x)

            with self.streamed.layer(stage, watch=watch) as run:
                for chunk, states in enumerate(self.activations.read(stage.index)):
                    dense, states = states.chunk(2)
                    pruned_half = False
                    self.dense.put(run(dense))
                    if not chunk:
                        self._writers = self._writers_among(candidates, run, dense[:1])
                    pruned_half = True
                    collector.flow(states, run(states))
                    collector.end_batch()
            return collector

        hidden = self.streamed.skeleton.hidden_size
        candidates = [name for name, ref in stage.linears.items() if hidden in ref.shape]
        collector = retry_smaller(self.streamed, attempt)
        if grams is not None:
            grams.gathered(None, collector.groups, collector.tokens)
        self._calls = {name: collector.tokens(name) for name in collector.groups}
        self._writers = [name for name in collector.groups if name in self._writers]  # in the order of use
        return collector

    def _writers_among(
        self, names: Collection[str], run: Callable[[Tensor], Tensor], states: Tensor
    ) -> list[str]:  # fmt: skip
        """Of linears of the dense layer, those that write into the residual stream; seen on a few states."""
        with outputs_of(self.streamed.skeleton, names) as made:
            after = run(states)
        added = after.float() - states.to(after.device).float()
        return writers_of(added, {name: y for name, y in made.items() if y.shape == added.shape})

    @property
    def placing(self) -> Callable[[str, Tensor], None] | None:
        return self.place

    def place(self, name: str, weight: Tensor) -> None:
        """From here on the pruned half computes with a linear's new weight, in its stored shape."""
        self.placed[name] = weight.to(self.streamed.device)

    def gather(self, stage: Stage, make: Callable[[], GramCollector], inputs: Set[str]) -> GramCollector:
        """Step 2, for one input, named by the first linear that has it."""
        (name,) = inputs
        streamed = self.streamed
        once = self._calls[name] == self.windows.size  # what is called again is not to be cut short
        before = self._writers[: self._writers.index(name)] if name in self._writers else []

        def attempt() -> GramCollector:
            collector, seen = make(), list[Tensor]()

            def watch(linear: str, x: Tensor) -> None:
                if linear == name:
                    seen.append(x)
                    if once:
                        raise Enough

            def half(run: Callable[[Tensor], Tensor], states: Tensor) -> tuple[list[Tensor], Tensor]:
                """What the linear is fed, and the residual stream where its outputs are added to it."""
                seen.clear()
                with outputs_of(streamed.skeleton, before) as made:
                    run(states)
                return list(seen), sum((made[writer] for writer in before), states.to(streamed.device).float())

            with streamed.layer(stage, watch=watch) as run:
                for chunk in self.activations.read(stage.index):
                    halves = (torch.split(states, streamed.max_samples or len(states)) for states in chunk.chunk(2))
                    for dense, states in zip(*halves, strict=True):
                        wanted, stream = half(run, dense)
                        with replaced_weights(streamed.skeleton, self.placed):
                            given, own = half(run, states)
                        if len(given) != len(wanted):
                            raise UnsupportedError(f"{name} is not called as often as in the dense model")
                        missing = stream - own if name in self._writers and once else None
                        for a, b in zip(wanted, given, strict=True):
                            collector.watch_pair(name, a, b, missing)
            return collector

        return retry_smaller(streamed, attempt)

    def pairs(self, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
        """As CalibrationPass.pairs: the pruned half, and what the dense model makes of its own."""
        self.dense.rewind()
        for chunk in self.activations.read(stage.index):
            given = chunk.chunk(2)[1]
            yield given, self.dense.take(given)

    def pruned_layer(self, stage: Stage, shard: Checkpoint, persist: bool) -> None:
        """Step 3."""
        self.placed = {}

        def attempt() -> None:
            self.dense.rewind()
            with (
                self.written(shard, stage) as (loader, sources),
                self.streamed.layer(stage, loader=loader, sources=sources) as run,
                self.activations.write(stage.index + 1, persist=persist) as put,
            ):
                for states in self.activations.read(stage.index):
                    after = run(states.chunk(2)[1])
                    put(torch.cat((self.dense.take(after).to(after.dtype), after)))

        retry_smaller(self.streamed, attempt)
        del self.dense

    def again(self, stage: Stage, shard: Checkpoint, persist: bool) -> None:
        """Steps 1 and 3 of a layer that has been refitted already."""

        def attempt() -> None:
            self.dense = self._aside()
            with self.streamed.layer(stage) as run:
                for states in self.activations.read(stage.index):
                    self.dense.put(run(states.chunk(2)[0]))

        retry_smaller(self.streamed, attempt)
        self.pruned_layer(stage, shard, persist)

    def _aside(self) -> StateBuffer:
        states, hidden = self.activations, self.streamed.skeleton.hidden_size
        return StateBuffer(
            states.folder, self.windows.size, hidden, self.streamed.cache_dtype, resident=states.resident
        )


@contextmanager
def outputs_of(skeleton: Skeleton, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the last outputs of linears, (…, out) float32, while it is open."""
    found: dict[str, Tensor] = {}

    def seeing(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], made: Tensor) -> None:
            found[name] = made.float()

        return hook

    hooks = [skeleton.model.get_submodule(name).register_forward_hook(seeing(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def writers_of(added: Tensor, outputs: Mapping[str, Tensor]) -> list[str]:
    """The linears whose `outputs` (batch, seqlen, hidden) add up to what a layer `added` to its states, if some do.

    The set that comes nearest is taken, if half of the tokens are explained by it but for rounding.
    """
    names, size = list(outputs)[:_MOST_WRITERS], torch.linalg.vector_norm(added, dim=-1).clamp_min(1e-30)
    best, least = list[str](), _UNEXPLAINED
    for number in range(1, len(names) + 1):
        for some in combinations(names, number):
            rest = added - sum(outputs[name] for name in some)
            part = float((torch.linalg.vector_norm(rest, dim=-1) / size).median())
            if part < least:
                best, least = list(some), part
    return best
