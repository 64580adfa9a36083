"""The forward pass of a job with asymmetric calibration: the dense model runs beside the one that is being pruned.

A cache holds the states of both models: a batch of the dense model, then the same windows of the pruned model. A layer
is processed in three steps:

    1  the dense half runs, and its outputs are kept; the pruned half runs with the dense weights as well, for
       statistics of its inputs. Where a refit chooses masks by itself, those of the dense half do
    2  for each input that refitted linears share, in the order of use: both halves run again up to that input, the
       dense half with dense weights, the pruned half with the linears refitted so far; then these linears are refitted
    3  the pruned half runs with the layer's final weights; its outputs and those kept in step 1 are the next cache

Attention, which is most of a small model's time, would run nine times. On a CPU the inputs of the linear that ends it
are kept in scratch files instead, the dense half's in step 1, the pruned half's in step 2; from then on that linear
alone runs in its place (model/ends.py). No bit depends on it.

A linear is thus fitted to its dense outputs for dense inputs, given the inputs that it has in the pruned model. Linears
that write to the residual stream also compensate for the error that it has accumulated before them. Where none is
recognised (model/residual.py), this error is not compensated for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Set

import torch
from torch import Tensor

from streamprune.calibration.collector import Collector
from streamprune.calibration.gram_sums import GramCollector
from streamprune.calibration.grams import LayerGrams
from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import UnsupportedError
from streamprune.methods.refits import METHODS
from streamprune.methods.tuning import PULL
from streamprune.model.activations import StateBuffer
from streamprune.model.binding import replaced_weights
from streamprune.model.ends import End, confirmed, ends_of, replayed
from streamprune.model.passes import check_weights
from streamprune.model.residual import outputs_of, writers_among
from streamprune.model.routed import Enough, InputHook
from streamprune.model.stages import Stage
from streamprune.pruning.forward import CalibrationPass
from streamprune.pruning.target import Target


class PairedPass(CalibrationPass):
    """Runs `windows` (samples, seqlen) through both models. For models without experts.

    `batch` counts windows, so that a chunk of a cache has the states of twice as many.
    """

    dense: StateBuffer
    """The dense model's outputs of the current layer."""

    placed: dict[str, Tensor]
    """New weights of those linears of the current layer that have been refitted, by module path."""

    _writers: list[str]
    """Linears of the current layer that write to the residual stream, in the order of use."""

    _own_mask = False
    """Whether a refit chooses masks by itself."""

    _coded = False
    """Whether linears are stored in FP8, which rounds their inputs as well: not so before step 3."""

    _ends: list[End]
    """Parts of the current layer that need not run again."""

    _kept: tuple[dict[End, StateBuffer], dict[End, StateBuffer]] = ({}, {})
    """The inputs of the linears that end them: in the dense model, and in the pruned one."""

    @property
    def cache_bytes(self) -> int:
        return 2 * super().cache_bytes

    def embed(self, persist: bool) -> None:
        """As CalibrationPass.embed; the states of both models are still equal."""
        self.check_outside()

        def attempt() -> None:
            with self.activations.write(0, persist=persist) as put:
                for states in self.streamed.embed(self._batches):
                    put(torch.cat((states, states)))

        self.retried(attempt)

    def layer(
        self, stage: Stage, write: bool, persist: bool, grams: LayerGrams | None = None, *, routed: bool = False
    ) -> Collector:
        """Step 1. Nothing is written."""
        check_weights(self.streamed.loader, self.streamed.skeleton, stage)

        def attempt() -> Collector:
            self.placed, self.dense, self._kept = {}, self._aside(stage), ({}, {})
            collector = Collector(self._accumulate, self.share)
            kept, watching = dict[str, StateBuffer](), list[InputHook]()

            def watch(name: str, x: Tensor) -> None:
                for see in watching:
                    see(name, x)

            def keep(name: str, x: Tensor) -> None:
                if name in kept:
                    kept[name].put(x)

            def passed(states: Tensor, *seeing: InputHook) -> Tensor:
                watching[:] = seeing
                after = run(states)
                watching.clear()
                if collector.watch in seeing:
                    collector.flow(between.states(states), between.states(after))
                return after

            with self.streamed.layer(stage, watch=watch) as run:
                for chunk, states in enumerate(self.activations.read(stage.index)):
                    dense, states = states.chunk(2)
                    if not chunk:
                        self._writers = writers_among(skeleton, candidates, run, dense[:1])
                        self._ends = confirmed(skeleton, self._ends_of(stage, grams), run, dense[:1])
                        kept = {end.linear: self._keep(0, end) for end in self._ends}
                    self.dense.put(passed(dense, keep, collector.watch) if self._own_mask else passed(dense, keep))
                    if not self._own_mask:
                        passed(states, collector.watch)
                    collector.end_batch()
            return collector

        skeleton, between = self.streamed.skeleton, self.streamed.skeleton.between
        hidden = skeleton.hidden_size
        candidates = [name for name, ref in stage.linears.items() if hidden in ref.shape]
        collector = self.retried(attempt)
        self._writers = self.share.ranks.broadcast(self._writers)
        if grams is not None:
            grams.gathered(None, collector.groups, collector.tokens)
        self._calls = {name: collector.tokens(name) for name in collector.groups}
        self._writers = [name for name in collector.groups if name in self._writers]  # in the order of use
        return collector

    def _ends_of(self, stage: Stage, grams: LayerGrams | None) -> list[End]:
        """The parts of a layer that might be kept from running again, which on a device is faster than a disk."""
        cpu = self.streamed.device.type == "cpu"
        return ends_of(self.streamed.skeleton, stage) if cpu and grams is not None else []

    def _keep(self, half: int, end: End) -> StateBuffer:
        """Where the inputs of a linear that ends a part are kept from now on."""
        folder, dtype = self.activations.folder, self.streamed.dtype
        found = self._kept[half][end] = StateBuffer(folder, self.own_tokens, end.width, dtype, resident=False)
        return found

    def grams_of(self, target: Target, stage: Stage, room: int) -> LayerGrams | None:
        """As CalibrationPass.grams_of."""
        self._own_mask = target.recipe.refit is not None and METHODS[target.recipe.refit].own_mask
        self._coded = target.quantisation is not None
        return super().grams_of(target, stage, room)

    @property
    def placing(self) -> Callable[[str, Tensor], None] | None:
        return self.place

    def place(self, name: str, weight: Tensor) -> None:
        """Makes the pruned half compute with a linear's new `weight`, in its stored shape, from now on."""
        self.placed[name] = weight.to(self.streamed.device)

    def gather(self, stage: Stage, make: Callable[[], GramCollector], inputs: Set[str]) -> GramCollector:
        """Step 2, for one input; `inputs` is the first linear that uses it."""
        (name,) = inputs
        streamed = self.streamed
        once = self._calls[name] == self.windows.size  # otherwise the pass must not stop at the first call
        before = self._writers[: self._writers.index(name)] if name in self._writers else []
        ending = next((end for end in self._ends if end.linear == name), None)

        def attempt() -> GramCollector:
            collector, seen = make(), list[Tensor]()
            keep = None if ending is None else self._keep(1, ending)
            self._rewind()

            def watch(linear: str, x: Tensor) -> None:
                if linear == name:
                    seen.append(x)
                    if once:
                        raise Enough

            def half(run: Callable[[Tensor], Tensor], states: Tensor, which: int) -> tuple[list[Tensor], Tensor]:
                """Inputs of the linear, and the residual stream just before its outputs are added."""
                seen.clear()
                again = {
                    end: kept.take(states) for end, kept in self._kept[which].items() if end != ending or not which
                }
                begun = streamed.skeleton.between.states(states).to(streamed.device).float()
                if ending in again and not before:
                    return [again[ending]], begun
                with (
                    replayed(streamed.skeleton, {end: x for end, x in again.items() if not end.holds(name)}),
                    outputs_of(streamed.skeleton, before) as made,
                ):
                    run(states)
                return list(seen), sum((made[writer] for writer in before), begun)

            with streamed.layer(stage, watch=watch) as run:
                for chunk in self.activations.read(stage.index):
                    halves = (torch.split(states, streamed.max_samples or len(states)) for states in chunk.chunk(2))
                    for dense, states in zip(*halves, strict=True):
                        wanted, stream = half(run, dense, 0)
                        with replaced_weights(streamed.skeleton, self.placed):
                            given, own = half(run, states, 1)
                        if len(given) != len(wanted):
                            raise UnsupportedError(f"{name} is not called as often as in the dense model")
                        missing = stream - own if name in self._writers and once else None
                        for a, b in zip(wanted, given, strict=True):
                            collector.watch_pair(name, a, b, missing)
                        if keep is not None:
                            keep.put(given[0])
                    collector.end_batch()
            return collector

        return self.retried(attempt)

    def _rewind(self) -> None:
        for kept in (*self._kept[0].values(), *self._kept[1].values()):
            kept.rewind()

    def pairs(self, stage: Stage) -> Generator[tuple[Tensor, Tensor], None, None]:
        """As CalibrationPass.pairs: the pruned model's inputs, and PULL of the way from what the dense layer makes of
        these to the dense model's outputs."""
        self._kept = ({}, {})  # the layer will be tuned
        self.dense.rewind()
        states = self.streamed.skeleton.between.states
        with self.streamed.layer(stage) as run:
            for chunk in self.activations.read(stage.index):
                given = chunk.chunk(2)[1]
                wanted = states(self.dense.take(given))
                yield given, torch.lerp(states(run(given)).to(wanted), wanted, PULL)

    def pruned_layer(self, stage: Stage, shard: Checkpoint, persist: bool) -> None:
        """Step 3."""
        self.placed, kept = {}, {} if self._coded else self._kept[1]

        def attempt() -> None:
            self.dense.rewind()
            self._rewind()
            with (
                self.written(shard, stage) as (loader, sources),
                self.streamed.layer(stage, loader=loader, sources=sources) as run,
                self.activations.write(stage.index + 1, persist=persist) as put,
            ):
                for states in self.activations.read(stage.index):
                    pruned = states.chunk(2)[1]
                    parts = torch.split(pruned, self.streamed.max_samples or len(pruned))
                    made = []
                    for part in parts:
                        with replayed(self.streamed.skeleton, {end: x.take(part) for end, x in kept.items()}):
                            made.append(run(part))
                    after = torch.cat(made)
                    put(torch.cat((self.dense.take(after).to(after.dtype), after)))

        self.retried(attempt)
        self._kept = ({}, {})
        del self.dense

    def again(self, stage: Stage, shard: Checkpoint, persist: bool) -> None:
        """Steps 1 and 3 for a layer that is already pruned."""

        def attempt() -> None:
            self.dense, self._kept = self._aside(stage), ({}, {})
            with self.streamed.layer(stage) as run:
                for states in self.activations.read(stage.index):
                    self.dense.put(run(states.chunk(2)[0]))

        self.retried(attempt)
        self.pruned_layer(stage, shard, persist)

    def _aside(self, stage: Stage) -> StateBuffer:
        states, length = self.activations, self.windows.shape[1]
        width = self.streamed.skeleton.between.width(stage.index + 1, length)
        return StateBuffer(states.folder, self.own_tokens, width, self.streamed.cache_dtype, resident=states.resident)
