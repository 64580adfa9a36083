"""One run of a job: everything between taking the lock and the result. See job.py for the outline.

The order of writes of a stage; the journal line is the only commit point:

    1  cache i + 1            cache/i+1.bin, then .json                            durable
    2  layer i's statistics   OUT.partial/.streamprune/statistics-i.safetensors   durable
    3  its part of a shard    OUT.partial/model-….safetensors                      durable
       with --tune, written once more when the layer has been tuned                durable
       (with FP8, a scratch file until then: coded_later.py)
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

from streamprune.disk import durable
from streamprune.methods.stats import InputStats
from streamprune.model.experts import is_pooled
from streamprune.model.stages import Stage
from streamprune.process import interrupts
from streamprune.process.background import BackgroundWorker
from streamprune.process.memory import give_back_free_memory
from streamprune.progress import Progress, ProgressCallback
from streamprune.pruning.committed import Committed
from streamprune.pruning.finish import finish
from streamprune.pruning.inputs import gather, known_of
from streamprune.pruning.means import Means
from streamprune.pruning.output import Output
from streamprune.pruning.prepare import Prepared, begin, remove_leftovers
from streamprune.pruning.records import StageRecord
from streamprune.pruning.sharing import Sharing, check_disk

if TYPE_CHECKING:
    from streamprune.calibration.grams import LayerGrams
    from streamprune.pruning.coded_later import CodedLater
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
        self._given = prepared.given if prepared.windows is None else None
        self._ranks = prepared.ranks
        self._deals = self._ranks.size > 1 and prepared.windows is None and not setup.checkpoint.streamed
        """Whether ranks write OUT together, as stages do not depend on each other."""
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        self._means = Means.of(self._job, self._job.records, self._stack)
        self._loader, self._forward = self._means.loader, self._means.forward
        self._committed = Committed(self._job, self._forward, self._progress)
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
        self._tuner, self._later = self._tuning()
        remove_leftovers(self._job, self._committed.newest_cache)
        if self._later is not None:
            self._later.begin()
        stages = self._model.stages
        if self._target is None:
            stages = stages[:-1]  # `calibrate` needs no head
        done = len(self._committed.records)
        self._committed.since = begun - self._job.reading  # the first stage includes drawing the windows
        if self._forward is not None and 0 < done <= len(self._model.layer_stages):
            pruned = None if self._setup.propagate == "dense" else self._output
            shards = None if pruned is None else functools.partial(self._sharing.written, pruned)
            with self._means.out_of_memory_named():
                self._forward.catch_up(self._committed.newest_cache, done, shards)
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
            self._committed.abandon()
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
            records = self._committed.records
            for record in self._sharing.others(records[len(records) - len(turn) :]):
                self._committed.commit(named[record.stage], record, None)

    def _tuning(self) -> tuple[LayerTuning | None, CodedLater | None]:
        if self._forward is None:
            return None, None
        from streamprune.pruning.coded_later import CodedLater
        from streamprune.pruning.tuned_shard import LayerTuning

        done = self._committed.records
        tuner = LayerTuning.of(self._layout.windows, self._target, self._forward, self._spec.expert_tokens, done)
        return tuner, CodedLater.of(self._target, self._job.cache)

    def check(self) -> Output | None:
        """The checks before the first stage, which write nothing; returns the output, as far as it has been written."""
        done, spool = self._committed, self._means.spool_bytes(self._committed.records)
        check_disk(self._job, self._target, self._forward, done.newest_cache, spool)
        if not self._begun and not self._spec.allow_zeros and not self._setup.checkpoint.streamed:
            self._means.refuse_empty()
        if self._target is None:
            return None
        output = Output(self._state.partial, self._target, self._resolved.shard_bytes)
        if not self._ranks.rank:
            output.resume(done.records)
        return output

    def _begin(self) -> None:
        """Allocates the sparsity if asked to, and creates the state of the job."""
        spec, windows = self._spec, self._job.windows
        known, kind = self._job.given, self._target.recipe.allocate if self._target else None
        if self._target is not None and kind and spec.sparsity is not None and known is not None:
            from streamprune.pruning.allocate import allocate

            def told(step: Progress) -> None:
                self._ranks.at_work()
                self._progress(step)

            shares = allocate(kind, self._target, self._means.tensors, known, spec.sparsity, told)
            self._target = self._target.sharing(shares)
            self._resolved = replace(self._resolved, allocation=shares)
        self._begun = True
        job = {"job": spec.fixed(), "content": self._job.content, "spent": self._job.spent}
        begin(self._state, job | {"resolved": self._resolved.to_json()}, windows)

    def _agree(self) -> None:
        """Tells all ranks what rank 0 has resolved when the job began, and finds out what they share."""
        if self._ranks.rank:
            self._ranks.attend()  # sharing a sparsity out may take longer than any timeout
        else:
            self._ranks.at_work(done=True)
        self._resolved = self._ranks.broadcast(self._resolved)
        if self._target is not None and self._resolved.allocation:
            self._target = self._target.sharing(self._resolved.allocation)
        self._sharing = Sharing(self._job)
        self._committed.records = self._sharing.records(self._committed.records)

    def _stage(self, position: int, stages: Sequence[Stage], commits: BackgroundWorker[Commit]) -> None:
        """Steps 1 to 3 of a stage. What can run in the background (see above) is queued, at most one stage late."""
        stage, forward, dense = stages[position], self._forward, self._setup.propagate == "dense"
        give_back_free_memory()
        at_work, late = self._means.stages_at_work()
        self._means.maps.upcoming([s.tensors for s in stages[max(0, position - late) :]], at_work)
        self._means.expect(stages[position : position + 2], self._target)
        record = StageRecord(stage.name)
        stats: dict[str, InputStats] = {}
        grams = None
        if self._target is not None and forward is not None:
            grams = forward.grams_of(self._target, stage, self._layout.room)
        if forward is not None and stage.kind != "head":
            if forward.persists():
                commits.drain()  # removes an old cache before the next one grows, so that there are never more than two
            write = dense and self._model.layer_after(stage)
            routed = self._tuner is not None and self._tuner.wants_routed(stage)
            stats = gather(self._job, forward, stage, record, grams, write=write, routed=routed)
        if self._layout.layers > 2 and dense:
            commits.drain()  # only one part is filled at a time
            if grams is None and self._tuner is None:
                commits.put(lambda: self._committed.commit(stage, record, self._fill(stage, stats, record)))
                return
        file = self._fill(stage, stats, record, grams)
        del grams  # tuning uses their memory
        output = self._output
        if self._tuner is not None and stage.kind == "layer":
            file = self._tuned(self._tuner, stage, stats, record, file)
        if forward is not None and output is not None and not dense and self._model.layer_after(stage):
            if file is not None:
                self._committed.make_durable(file)
            file = None
            record.cache = forward.persists()
            forward.pruned_layer(stage, self._sharing.written(output, stage), record.cache)
            record.batch = forward.streamed.max_samples
        if self._ranks.size == 1 or self._deals:
            commits.put(lambda: self._committed.commit(stage, record, file))
            return
        if not self._ranks.rank:
            self._committed.commit(stage, record, file)
        self._ranks.barrier()
        if self._ranks.rank:
            self._committed.commit(stage, record, None)

    def _tuned(
        self, tuner: LayerTuning, stage: Stage, stats: dict[str, InputStats], record: StageRecord,
        file: durable.FilePart | None,
    ) -> durable.FilePart | None:  # fmt: skip
        """Tunes a layer that has been written to `file`; returns the file of its part of a shard as it will stay, not
        yet durable, or None if that is durable already."""
        output, later = self._output, self._coded_later(stage)
        if output is None or self._forward is None:
            return file
        if file is not None:
            self._committed.make_durable(file)
        file = tuner.layer(stage, output if later is None else later.output, record)
        if file is not None:
            self._committed.opened(file)
        if later is None or self._ranks.rank:
            return file
        if file is not None:
            self._committed.make_durable(file)
        known = known_of(self._given, stats)
        file, record.linears = later.code(stage, self._forward, output, known, record.linears or [])
        self._committed.opened(file)
        record.shard = output.entry(stage, file)
        return file

    def _coded_later(self, stage: Stage) -> CodedLater | None:
        return self._later if self._later is not None and self._later.has(stage) else None

    def _fill(
        self, stage: Stage, stats: dict[str, InputStats], record: StageRecord, grams: LayerGrams | None = None
    ) -> durable.FilePart | None:
        """Writes the stage's part of a shard, not yet durable; returns its file, or None for `calibrate`."""
        file, known, later = None, known_of(self._given, stats), self._coded_later(stage)
        target, output, writer = self._target, self._output, self._writer
        if later is not None:
            target, output, writer = later.target, later.output, self._means.tensor_writer(later.target)
        if self._ranks.rank and not self._deals:
            if grams is not None and target is not None:
                self._means.tensor_writer(target).refit_elsewhere(stage, known, grams)
        elif writer is not None and output is not None:
            file = output.begin(stage)
            record.linears = writer.fill(file, output.part(stage), stage, known, grams)
            self._committed.opened(file)
            record.shard = output.entry(stage, file)
            if self._given and (pooled := [n for n in stage.linears if is_pooled(self._given.groups.get(n))]):
                record.pooled = pooled
            if grams is not None and self._forward is not None:  # passes for Grams may have reduced the batch
                record.batch, record.gram_passes = self._forward.streamed.max_samples, grams.passes or None
        self._loader.release(stage.tensors)  # before the layer after the next is sent to the device
        return file

    def _finish(self, startup: float, since: float) -> dict[str, Any]:
        ranks = self._sharing.end(self._forward)
        if self._ranks.rank:
            return {}
        return finish(
            self._setup, self._state, self._target, self._output, self._resolved, self._given, self._committed.records,
            self._job.content, ranks, startup, lambda: self._job.spent + time.perf_counter() - since,
        )  # fmt: skip
