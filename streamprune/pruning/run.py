"""One run of a job: everything between the lock and the result. See job.py for the outline.

The order of writes of a stage, and the one commit point:

    1  cache i + 1            cache/i+1.bin, then .json                            durable
    2  layer i's statistics   OUT.partial/.streamprune/statistics-i.safetensors   durable
    3  its shard              OUT.partial/model-….safetensors                      durable
       with --tune once more, when the layer has been tuned                        durable
    4  journal line                                                                durable: COMMIT
    5  cache i is removed

With `--propagate pruned` the cache comes after the shard, from whose weights it is made. A crash before 4 does the
stage again from cache i, which is still there; after 4, only rubbish is left. Step 3's fsync, 4 and 5 follow behind in
a thread of their own: without a forward pass the next shard is being filled meanwhile, and on a GPU the whole of step 3
happens beside the next layer's forward pass.

Activations that stay on a GPU are written once a minute only: a record says whether its cache is durable. A resumed
run goes on from the last that is, and runs the layers since then once more, forward only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from streamprune.calibration.grams import LayerGrams
from streamprune.calibration.statistics import write_statistics
from streamprune.calibration.windows import Tokens
from streamprune.disk import durable, journal
from streamprune.disk.cache import remove_cache
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.shards import shard_name
from streamprune.disk.state import JobState, new_state
from streamprune.errors import UsageError
from streamprune.kernels import cpu, torch_ops
from streamprune.methods.stats import InputStats
from streamprune.model.activations import Activations
from streamprune.model.device import compute_dtype, exact_products, resolve_device
from streamprune.model.experts import is_pooled, pool
from streamprune.model.loader import WeightLoader
from streamprune.model.passes import out_of_memory_named
from streamprune.model.skeleton import Stage, build_skeleton, stored_dtype
from streamprune.model.streamed import StreamedModel
from streamprune.model.zeros import refuse_empty
from streamprune.process import interrupts
from streamprune.process.background import BackgroundWorker
from streamprune.process.memory import give_back_free_memory, peak_resident_bytes
from streamprune.progress import Progress, ProgressCallback
from streamprune.pruning.allocate import share_out
from streamprune.pruning.finish import calibration_of, save_statistics, write_files
from streamprune.pruning.forward import CalibrationPass
from streamprune.pruning.paired import PairedPass
from streamprune.pruning.prepare import (
    begin,
    check_disk,
    clear_rubbish,
    layer_grams,
    layout_of,
    make_writer,
    open_given,
    propagated,
    resolve,
    scratch_bytes,
)
from streamprune.pruning.report import build_report, source_of
from streamprune.pruning.spec import JobSpec
from streamprune.pruning.tuned_shard import LayerTuning
from streamprune.pruning.windows import windows_of

Commit = Callable[[], None]


class Run:
    """One run, from skeleton to report. A context manager: the checkpoint stays mapped while it is open."""

    def __init__(
        self, spec: JobSpec, checkpoint: Checkpoint, unfinished: tuple[JobState, dict[str, Any]] | None,
        progress: ProgressCallback, spent: float = 0.0,
    ) -> None:  # fmt: skip
        self.spec, self.checkpoint, self.progress = spec, checkpoint, progress
        self.state = unfinished[0] if unfinished else new_state(spec)
        self.begun = unfinished is not None
        self.content = str((unfinished and unfinished[1].get("content")) or checkpoint.content())
        resolved: dict[str, Any] = unfinished[1]["resolved"] if unfinished else {}
        self.maps = ShardMaps(checkpoint)
        self.device = resolve_device(resolved.get("device", spec.device))
        self.backend = spec.backend if spec.backend != "auto" else "numba" if self.device.type == "cpu" else "torch"
        if self.backend == "numba" and self.device.type != "cpu":
            raise UsageError(f"--backend numba runs on the CPU only, not on {self.device}; leave it out or use torch")
        self.dtype = compute_dtype(resolved.get("dtype", spec.dtype), stored_dtype(checkpoint), self.device)
        self.skeleton = build_skeleton(checkpoint, self.dtype, trust_remote_code=spec.trust_remote_code)
        self.loader = WeightLoader(self.maps, self.device, drop_cache=spec.verb == "prune")
        self.writer = make_writer(spec, self.skeleton, self.loader, self.backend)
        known = open_given(spec, checkpoint, self.skeleton, self.writer)
        shares = share_out(spec, self.writer, known, resolved)
        self.propagate = propagated(spec.propagate, self.skeleton)
        self.records = journal.read(self.state.journal) if self.begun else []
        at = time.perf_counter()
        lay_out = functools.partial(
            layout_of, spec, checkpoint, self.skeleton, self.dtype, self.device, resolved, self.writer, self.propagate
        )
        windows, met, self.layout = windows_of(spec, checkpoint, self.skeleton, self.state.tokens, resolved, lay_out)
        self._reading = time.perf_counter() - at
        batch = int(resolved.get("batch", self.layout.batch))
        self.forward = None if windows is None else self._make_pass(windows, batch)
        self.given = known if windows is None else None
        self.tuner = LayerTuning.of(self.layout.windows, spec, self.writer, self.forward)
        self.resolved = resolved or resolve(
            spec, self.skeleton, self.layout, self.dtype, self.device, batch, windows, shares, met
        )  # fmt: skip
        self._uncommitted: list[durable.AtomicFile] = []
        self._since = time.perf_counter()
        self.spent = float(unfinished[1].get("spent", spent)) if unfinished else spent
        """Seconds of work that was done for this job before it, see job.py."""

    def _make_pass(self, windows: Tokens, batch: int) -> CalibrationPass:
        streamed = StreamedModel(self.skeleton, self.loader, self.dtype)
        streamed.weighted, streamed.group = self.spec.expert_stats == "weighted", self.layout.group
        most = [self.layout.batch, *(r["batch"] for r in self.records if r["batch"])]
        streamed.max_samples = min(most) if min(most) < batch else None
        resident = self.layout.resident
        activations = Activations(self.state.cache, streamed.cache_dtype, self.device, resident=resident)
        kind = PairedPass if self.propagate == "asymmetric" else CalibrationPass
        return kind(streamed, windows, batch, activations, (cpu if self.backend == "numba" else torch_ops).accumulate)

    def __enter__(self) -> Run:
        self.loader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.loader.__exit__(kind, error, trace)
        finally:
            self.maps.close()

    def discard(self) -> None:
        """Throws the unfinished work away: its input is at fault."""
        if self.begun:
            self.state.discard()

    @exact_products()
    def work(self, startup: float) -> dict[str, Any]:
        """Does what is left to do; returns the report. `startup` is how many seconds it took to get here."""
        self.startup, begun = startup, time.perf_counter()
        self._check_disk()
        if not self.begun:
            if not self.spec.allow_zeros:
                refuse_empty(self.maps, [ref for stage in self.skeleton.stages for ref in stage.linears.values()])
            self._create()
        clear_rubbish(self.state, self._newest_cache(), self.records)
        stages = self.skeleton.stages
        if self.writer is None:
            stages = stages[:-1]  # statistics alone need no head
        done = len(self.records)
        self._since = begun - self._reading  # the first stage's seconds are with those that its tokens took
        if self.forward is not None and 0 < done <= len(self.skeleton.layer_stages):
            with out_of_memory_named(self.device):
                self.forward.catch_up(self._newest_cache(), done, None if self.propagate == "dense" else self._shard)
        try:
            with out_of_memory_named(self.device), BackgroundWorker[Commit](lambda commit: commit(), 1) as commits:
                for position in range(done, len(stages)):
                    interrupts.check()
                    self._stage(position, stages, commits)
        finally:
            for file in self._uncommitted:
                file.abandon()
        return self._finish(time.perf_counter() if done < len(stages) else begun)

    def _check_disk(self) -> None:
        written = sum(r["shard"]["bytes"] for r in self.records if r["shard"])
        output = self.writer.output_bytes - written if self.writer else 0
        cache = 0
        if self.forward is not None and len(self.records) < len(self.skeleton.stages) - 1:
            behind = -1 < self._newest_cache() < len(self.records) - 1  # then that one is kept beside the two at work
            cache = (3 if behind and not self.layout.resident else 2) * self.forward.cache_bytes
            refitted = self.writer.refitted if self.writer else frozenset()
            tokens = self.forward.windows.size
            cache += scratch_bytes(self.skeleton, refitted, self.layout, tokens, self.dtype, self.propagate)
        check_disk(self.state, output, cache)

    def _create(self) -> None:
        self.begun = True
        windows = self.forward.windows if self.forward is not None else None
        job = {"job": self.spec.fixed(), "content": self.content, "spent": self.spent, "resolved": self.resolved}
        begin(self.state, job, windows)

    def _newest_cache(self) -> int:
        """The number of the last cache that is durable, -1 if there is none: record n is of the stage that makes it."""
        return max((n for n, record in enumerate(self.records) if record["cache"]), default=-1)

    def _stage(self, position: int, stages: Sequence[Stage], commits: BackgroundWorker[Commit]) -> None:
        """Steps 1 and 2 of a stage; 3 to 5 follow behind, at most one stage late."""
        stage = stages[position]
        give_back_free_memory()
        self._expect(stages[position : position + 2])
        record: dict[str, Any] = {"stage": stage.name, "shard": None, "statistics": None, "linears": []}
        record |= {"cache": False, "batch": None}
        stats: dict[str, InputStats] = {}
        grams = None
        if self.writer is not None and self.forward is not None:
            grams = layer_grams(self.writer, self.forward, stage, self.layout.room, self.state.cache, self.dtype)
        if self.forward is not None and stage.kind != "head":
            if self.forward.persists():
                commits.drain()  # before the next cache grows, so that there are never more than two
            stats = self._pass(self.forward, stage, record, grams)
        path = self._shard(stage)
        dense = self.propagate == "dense"
        if self.layout.layers > 2 and dense:
            commits.drain()  # the writer has one stage at a time
            if grams is None and self.tuner is None:
                commits.put(lambda: self._commit(stage, record, self._fill(path, stage, stats, record)))
                return
        file = self._fill(path, stage, stats, record, grams)
        del grams  # whose room tuning is given
        if self.tuner is not None and file is not None and stage.kind == "layer":
            self._durable(file)
            file = self.tuner.layer(stage, path, record)
            self._uncommitted += [] if file is None else [file]
        if self.forward is not None and self.writer is not None and not dense and self._more(stage):
            if file is not None:
                self._durable(file)
            file = None
            record["cache"] = self.forward.persists()
            self.forward.pruned_layer(stage, path, record["cache"])
            record["batch"] = self.forward.streamed.max_samples
        commits.put(lambda: self._commit(stage, record, file))

    def _durable(self, file: durable.AtomicFile) -> None:
        file.commit()
        self._uncommitted.remove(file)

    def _shard(self, stage: Stage) -> Path:
        return self.state.partial / shard_name(self.skeleton.stages.index(stage) + 1, len(self.skeleton.stages))

    def _expect(self, stages: Sequence[Stage]) -> None:
        """Begins to bring the weights of this stage and the next near; a device needs those of layers only."""
        for stage in stages[: self.layout.layers] if self.loader.copies else stages:
            if not self.loader.copies or (stage.kind == "layer" and self.forward is not None):
                self.loader.expect(stage.tensors if self.forward is None else stage.resident_tensors)
            elif self.writer is not None:
                self.loader.expect(stage.linears[n] for n in self.writer.in_order(stage) if n not in stage.expert_of)

    def _more(self, stage: Stage) -> bool:
        """Whether a layer comes after this one."""
        return stage.kind == "layer" and stage.index + 1 < len(self.skeleton.layers)

    def _pass(
        self, forward: CalibrationPass, stage: Stage, record: dict[str, Any], grams: LayerGrams | None
    ) -> dict[str, InputStats]:
        """The forward pass through the embedding or a layer; returns the statistics of each linear's input."""
        persist = forward.persists()
        if stage.kind == "embed":
            forward.embed(persist)
            record["cache"], record["batch"] = persist, forward.streamed.max_samples
            return {}
        write = self._more(stage) and self.propagate == "dense"
        collector = forward.layer(stage, write, persist, grams)
        record["cache"], record["batch"] = write and persist, forward.streamed.max_samples
        found = collector.finish()
        if fallen := pool(stage.experts, found, collector.groups, self.spec.expert_tokens):
            record["pooled"] = fallen
            if grams is not None:
                grams.leave_out(fallen)
        path = self.state.layer_stats(stage.index)
        record["statistics"] = write_statistics(
            path, found.items(), collector.groups, {}, {}, {stage.prefix: collector.update}
        )  # fmt: skip
        return {name: found[leader] for name, leader in collector.groups.items()}

    def _fill(
        self, path: Path, stage: Stage, stats: dict[str, InputStats], record: dict[str, Any],
        grams: LayerGrams | None = None,
    ) -> durable.AtomicFile | None:  # fmt: skip
        """The stage's shard, all but committed; None for a job that writes none."""
        file = None
        if self.writer is not None:
            file = self.writer.fill(path, stage, lambda name, width: self._stats(stats, name, width), grams)
            self._uncommitted.append(file)
            record["shard"] = {"name": path.name, "bytes": file.size, "xxh3_128": file.digest}
            record["linears"] = self.writer.linears
            if self.given and (fallen := [n for n in stage.linears if is_pooled(self.given.groups.get(n))]):
                record["pooled"] = fallen
            if grams is not None and self.forward is not None:  # whose memory may have run out once more
                record["batch"] = self.forward.streamed.max_samples
                record |= {"gram_passes": grams.passes} if grams.passes else {}
        self.loader.release(stage.tensors)  # now, not when all is durable: the layer after the next is about to be sent
        return file

    def _commit(self, stage: Stage, record: dict[str, Any], file: durable.AtomicFile | None) -> None:
        """Steps 3 (its fsync and rename), 4 and 5 of a stage."""
        if file is not None:
            self._durable(file)
        now = time.perf_counter()
        record |= {"seconds": now - self._since, "peak": peak_resident_bytes()}
        self._since = now
        before = self._newest_cache()
        journal.append(self.state.journal, record)
        self.records.append(record)
        if self.forward is not None and (record["cache"] or (stage.kind == "layer" and not self._more(stage))):
            for old in range(max(before, 0), len(self.records) - 1):  # with those that a resumed run made to catch up
                remove_cache(self.state.cache, old)
        if record["cache"] and self.forward is not None:
            self.forward.kept = now
        stages = len(self.skeleton.stages) - (self.writer is None)
        self.progress(Progress(stage.name, len(self.records), stages, record["seconds"]))

    def _stats(self, gathered: dict[str, InputStats], name: str, in_features: int) -> InputStats:
        if self.given is not None:
            return self.given.load(name, in_features)
        if name not in gathered:
            raise UsageError(f"{name} was not used on this text, so there are no statistics for it; --skip it")
        return gathered[name]

    def _finish(self, since: float) -> dict[str, Any]:
        calibration = calibration_of(self.spec, self.resolved, self.given, self.propagate)
        statistics = self.spec.save_stats if self.writer else self.spec.out
        if statistics is not None:
            save_statistics(
                statistics, self.spec, self.state, self.checkpoint, self.skeleton, self.records, calibration
            )
        files = [] if self.writer is None else write_files(self.state, self.checkpoint, self.writer, self.records)
        report = build_report(
            self.spec, self.resolved, calibration, self.records, files,
            source_of(self.checkpoint, self.content, self.writer is not None),
            seconds=self.spent + sum(r["seconds"] for r in self.records) + time.perf_counter() - since,
            startup=self.startup,
            peak=max(peak_resident_bytes(), *(r["peak"] for r in self.records)),
        )  # fmt: skip
        if self.writer is None:
            self.state.discard()
            return report
        journal.write_json(self.state.partial / "streamprune.json", "report", report)
        self.state.publish()
        return report
