"""One run of a job: everything between taking the lock and the result. See job.py for the outline.

The order of writes of a stage; the journal line is the only commit point:

    1  cache i + 1            cache/i+1.bin, then .json                            durable
    2  layer i's statistics   OUT.partial/.streamprune/statistics-i.safetensors   durable
    3  its part of a shard    OUT.partial/model-….safetensors                      durable
       with --tune, written once more when the layer has been tuned                durable
    4  journal line                                                                durable: COMMIT
    5  cache i is removed

With `--propagate pruned`, the cache is computed with the pruned weights and is therefore written after step 3. After a
crash before step 4 the stage is repeated from cache i, which still exists; after step 4, only files to remove are left.
The fsync of step 3, and steps 4 and 5, run in a background thread: without a forward pass the next part is filled
meanwhile, and on a GPU all of step 3 overlaps with the next layer's forward pass.

Activations that stay on a GPU are written only once a minute, and a stage's record says whether its cache is durable. A
resumed run starts from the last durable cache, and first repeats the forward pass of the layers since then.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, count
from types import TracebackType
from typing import TYPE_CHECKING, Any

from streamprune.calibration.statistics import write_statistics
from streamprune.disk import durable, journal
from streamprune.errors import UsageError
from streamprune.methods.stats import InputStats
from streamprune.model.experts import is_pooled, pool
from streamprune.model.stages import Stage
from streamprune.process import interrupts
from streamprune.process.background import BackgroundWorker
from streamprune.process.memory import give_back_free_memory, peak_resident_bytes
from streamprune.progress import Progress, ProgressCallback
from streamprune.pruning.finish import finish
from streamprune.pruning.means import Means
from streamprune.pruning.output import Output
from streamprune.pruning.prepare import Prepared, begin, remove_leftovers
from streamprune.pruning.records import StageRecord
from streamprune.pruning.shared import sum_uses
from streamprune.pruning.sharing import Sharing, check_disk

if TYPE_CHECKING:
    from streamprune.calibration.grams import LayerGrams
    from streamprune.pruning.forward import CalibrationPass
    from streamprune.pruning.tuned_shard import LayerTuning

Commit = Callable[[], None]


class Run:
    """One run of a prepared job. A context manager: the checkpoint is mapped while it is open."""

    def __init__(self, prepared: Prepared, progress: ProgressCallback) -> None:
        self._job, self._progress = prepared, progress
        setup = self._setup = prepared.setup
        self._spec, self._model = setup.spec, setup.model
        self._state, self._layout = prepared.state, prepared.layout
        self._begun, self._resolved, self._target = prepared.begun, prepared.resolved, setup.target
        self._records = list(prepared.records)
        self._given = prepared.given if prepared.windows is None else None
        self._ranks = prepared.ranks
        self._deals = self._ranks.size > 1 and prepared.windows is None and not setup.checkpoint.streamed
        """Whether ranks write OUT together, as stages do not depend on each other."""
        self._uncommitted: list[durable.FilePart] = []
        self._since = 0.0
        """When the current stage began (perf_counter)."""
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        self._means = Means.of(self._job, self._records, self._stack)
        self._loader, self._forward = self._means.loader, self._means.forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._means.maps.cancel()
        self._stack.__exit__(kind, error, trace)

    def discard(self) -> None:
        """Removes the unfinished work, as its input is invalid."""
        if self._begun:
            self._state.discard()

    def work(self, startup: float) -> dict[str, Any]:
        """Does the remaining work; returns the report. `startup` is how many seconds this run has taken so far."""
        with self._means.exactly():
            return self._work(startup)

    def _work(self, startup: float) -> dict[str, Any]:
        begun = time.perf_counter()
        output = self.check()
        if not self._begun:
            self._begin()
        self._agree()
        self._output = output
        self._writer = self._means.writer(self._target) if self._target is not None else None
        self._tuner = self._tuning()
        remove_leftovers(self._job, self._newest_cache())
        stages = self._model.stages
        if self._target is None:
            stages = stages[:-1]  # `calibrate` needs no head
        done = len(self._records)
        self._since = begun - self._job.reading  # the first stage includes drawing the windows
        if self._forward is not None and 0 < done <= len(self._model.layer_stages):
            pruned = None if self._setup.propagate == "dense" else self._output
            shards = None if pruned is None else functools.partial(self._sharing.written, pruned)
            with self._means.out_of_memory_named():
                self._forward.catch_up(self._newest_cache(), done, shards)
        try:
            with (
                self._means.out_of_memory_named(),
                BackgroundWorker[Commit](lambda commit: commit(), 1) as commits,
            ):
                if self._deals and output is not None:
                    self._deal(output.by_shard(stages[done:]), commits)
                for position in () if self._deals else range(done, len(stages)):
                    interrupts.check()
                    self._stage(position, stages, commits)
        finally:
            for file in self._uncommitted:
                file.abandon()
        return self._finish(startup, time.perf_counter() if done < len(stages) else begun)

    def _deal(self, shards: Sequence[list[Stage]], commits: BackgroundWorker[Commit]) -> None:
        """Without a forward pass: writes this rank's share of the stages of `shards`; rank 0 commits all of them."""
        turns, named = self._sharing.turns(shards), {stage.name: stage for stage in chain(*shards)}
        own, at = list(chain(*turns)), count()
        for turn in turns:
            for _ in turn:
                interrupts.check()
                self._stage(next(at), own, commits)
            commits.drain()
            for record in self._sharing.others(self._records[len(self._records) - len(turn) :]):
                self._commit(named[record.stage], record, None)

    def _tuning(self) -> LayerTuning | None:
        if self._forward is None:
            return None
        from streamprune.pruning.tuned_shard import LayerTuning

        return LayerTuning.of(self._layout.windows, self._target, self._forward, self._spec.expert_tokens)

    def check(self) -> Output | None:
        """The checks before the first stage, which write nothing; returns the output, as far as it has been written."""
        check_disk(self._job, self._target, self._forward, self._newest_cache(), self._means.spool_bytes(self._records))
        if not self._begun and not self._spec.allow_zeros and not self._setup.checkpoint.streamed:
            self._means.refuse_empty()
        if self._target is None:
            return None
        output = Output(self._state.partial, self._target, self._resolved.shard_bytes)
        if not self._ranks.rank:
            output.resume(self._records)
        return output

    def _begin(self) -> None:
        """Allocates the sparsity if asked to, and creates the state of the job."""
        spec, windows = self._spec, self._job.windows
        known, kind = self._job.given, self._target.recipe.allocate if self._target else None
        if self._target is not None and kind and spec.sparsity is not None and known is not None:
            from streamprune.pruning.allocate import allocate

            shares = allocate(kind, self._target, self._means.tensors, known, spec.sparsity, self._progress)
            self._target = self._target.sharing(shares)
            self._resolved = replace(self._resolved, allocation=shares)
        self._begun = True
        job = {"job": spec.fixed(), "content": self._job.content, "spent": self._job.spent}
        begin(self._state, job | {"resolved": self._resolved.to_json()}, windows)

    def _agree(self) -> None:
        """Tells all ranks what rank 0 has resolved when the job began, and finds out what they share."""
        self._resolved = self._ranks.broadcast(self._resolved)
        if self._target is not None and self._resolved.allocation:
            self._target = self._target.sharing(self._resolved.allocation)
        self._sharing = Sharing(self._job)
        self._records = self._sharing.records(self._records)

    def _newest_cache(self) -> int:
        """Number of the last durable cache, -1 if there is none. Cache n is written by the stage of record n."""
        return max((n for n, record in enumerate(self._records) if record.cache), default=-1)

    def _stage(self, position: int, stages: Sequence[Stage], commits: BackgroundWorker[Commit]) -> None:
        """Steps 1 to 3 of a stage. What can run in the background (see above) is queued, at most one stage late."""
        stage, forward = stages[position], self._forward
        give_back_free_memory()
        at_work, late = self._means.stages_at_work()
        self._means.maps.upcoming([s.tensors for s in stages[max(0, position - late) :]], at_work)
        self._expect(stages[position : position + 2])
        record = StageRecord(stage.name)
        stats: dict[str, InputStats] = {}
        grams = None
        if self._target is not None and forward is not None:
            grams = forward.grams_of(self._target, stage, self._layout.room)
        if forward is not None and stage.kind != "head":
            if forward.persists():
                commits.drain()  # removes an old cache before the next one grows, so that there are never more than two
            stats = self._calibrate(forward, stage, record, grams)
        dense = self._setup.propagate == "dense"
        if self._layout.layers > 2 and dense:
            commits.drain()  # only one part is filled at a time
            if grams is None and self._tuner is None:
                commits.put(lambda: self._commit(stage, record, self._fill(stage, stats, record)))
                return
        file = self._fill(stage, stats, record, grams)
        del grams  # tuning uses their memory
        output = self._output
        if self._tuner is not None and output is not None and stage.kind == "layer":
            if file is not None:
                self._durable(file)
            file = self._tuner.layer(stage, output, record)
            self._uncommitted += [] if file is None else [file]
        if forward is not None and output is not None and not dense and self._more(stage):
            if file is not None:
                self._durable(file)
            file = None
            record.cache = forward.persists()
            forward.pruned_layer(stage, self._sharing.written(output, stage), record.cache)
            record.batch = forward.streamed.max_samples
        if self._ranks.size == 1 or self._deals:
            commits.put(lambda: self._commit(stage, record, file))
            return
        if not self._ranks.rank:
            self._commit(stage, record, file)
        self._ranks.barrier()
        if self._ranks.rank:
            self._commit(stage, record, None)

    def _durable(self, file: durable.FilePart) -> None:
        file.commit()
        self._uncommitted.remove(file)

    def _expect(self, stages: Sequence[Stage]) -> None:
        """Starts prefetching the weights of this stage and the next; to a device, only those of layers."""
        copies, target = self._loader.copies, self._target
        for stage in stages[: self._layout.layers] if copies else stages:
            if not copies or (stage.kind == "layer" and self._forward is not None):
                self._loader.expect(stage.tensors if self._forward is None else stage.resident_tensors)
            elif target is not None and stage.kind == "layer":
                self._loader.expect(stage.linears[n] for n in target.linears_of(stage) if n not in stage.expert_of)

    def _more(self, stage: Stage) -> bool:
        """Whether a layer comes after this one."""
        return stage.kind == "layer" and stage.index + 1 < len(self._model.layer_stages)

    def _calibrate(
        self, forward: CalibrationPass, stage: Stage, record: StageRecord, grams: LayerGrams | None
    ) -> dict[str, InputStats]:
        """The forward pass through the embedding or a layer; returns the statistics of each linear's input."""
        persist = forward.persists()
        if stage.kind == "embed":
            forward.embed(persist)
            record.cache, record.batch = persist, forward.streamed.max_samples
            return {}
        write = self._more(stage) and self._setup.propagate == "dense"
        routed = self._tuner is not None and self._tuner.wants_routed(stage)
        collector = forward.layer(stage, write, persist, grams, routed=routed)
        record.cache, record.batch = write and persist, forward.streamed.max_samples
        found = collector.finish()
        if pooled := pool(stage.experts, found, collector.groups, self._spec.expert_tokens):
            record.pooled = pooled
        shared = sum_uses(self._model, stage, found, collector.groups, self._state.layer_stats, self._ranks)
        if grams is not None:
            grams.leave_out([*pooled, *shared])
        if not self._ranks.rank:
            path = self._state.layer_stats(stage.index)
            record.statistics = write_statistics(
                path, found.items(), collector.groups, {}, {}, {stage.prefix: collector.update}
            )  # fmt: skip
        return {name: found[leader] for name, leader in collector.groups.items()}

    def _fill(
        self, stage: Stage, stats: dict[str, InputStats], record: StageRecord, grams: LayerGrams | None = None
    ) -> durable.FilePart | None:
        """Writes the stage's part of a shard, not yet durable; returns its file, or None for `calibrate`."""
        file = None
        if self._ranks.rank and not self._deals:
            if grams is not None and self._target is not None:
                refit = self._means.tensor_writer(self._target).refit_elsewhere
                refit(stage, lambda name, width: self._stats(stats, name, width), grams)
        elif self._writer is not None and self._output is not None:
            file = self._output.begin(stage)
            record.linears = self._writer.fill(
                file, self._output.part(stage), stage, lambda name, width: self._stats(stats, name, width), grams
            )
            self._uncommitted.append(file)
            record.shard = self._output.entry(stage, file)
            if self._given and (pooled := [n for n in stage.linears if is_pooled(self._given.groups.get(n))]):
                record.pooled = pooled
            if grams is not None and self._forward is not None:  # passes for Grams may have reduced the batch
                record.batch, record.gram_passes = self._forward.streamed.max_samples, grams.passes or None
        self._loader.release(stage.tensors)  # before the layer after the next is sent to the device
        return file

    def _commit(self, stage: Stage, record: StageRecord, file: durable.FilePart | None) -> None:
        """The fsync of step 3, and steps 4 and 5 of a stage."""
        if file is not None:
            self._durable(file)
        now = time.perf_counter()
        record.seconds, record.peak = now - self._since, record.peak or peak_resident_bytes()
        self._since = now
        before = self._newest_cache()
        record.ranks = self._ranks.size if self._ranks.size > 1 else None
        if not self._ranks.rank:
            journal.append(self._state.journal, record.to_json())
        self._records.append(record)
        if self._forward is not None and (record.cache or (stage.kind == "layer" and not self._more(stage))):
            from streamprune.disk.cache import remove_cache

            for old in range(max(before, 0), len(self._records) - 1):  # also those that a resumed run has recomputed
                remove_cache(self._job.cache, old)
        if record.cache and self._forward is not None:
            self._forward.made_durable()
        stages = len(self._model.stages) - (self._target is None)
        self._progress(Progress(stage.name, len(self._records), stages, record.seconds))

    def _stats(self, gathered: dict[str, InputStats], name: str, in_features: int) -> InputStats:
        if self._given is not None:
            return self._given.load(name, in_features)
        if name not in gathered:
            raise UsageError(
                f"{name} was not called on this text, so there are no statistics for it; leave it out with --skip"
            )
        return gathered[name]

    def _finish(self, startup: float, since: float) -> dict[str, Any]:
        ranks = self._sharing.end(self._forward)
        if self._ranks.rank:
            return {}
        return finish(
            self._setup, self._state, self._target, self._output, self._resolved, self._given, self._records,
            self._job.content, ranks, startup, lambda: self._job.spent + time.perf_counter() - since,
        )  # fmt: skip
