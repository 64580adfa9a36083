"""One run of a job: everything between the lock and the result. See job.py for the outline.

The order of writes of a stage, and the one commit point:

    1  cache i + 1            cache/i+1.bin, then .json                            durable
    2  layer i's statistics   OUT.partial/.streamprune/statistics-i.safetensors   durable
    3  its shard              OUT.partial/model-….safetensors                      durable
    4  journal line                                                                durable: COMMIT
    5  cache i is removed

With `--propagate pruned` the cache comes after the shard, from whose weights it is made. A crash before 4 does the
stage again from cache i, which is still there; after 4, only rubbish is left.
"""

from __future__ import annotations

import datetime
import io
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from streamprune.disk import durable, journal
from streamprune.disk.cache import remove_cache
from streamprune.disk.checkpoint import Checkpoint, open_shard
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.shards import shard_name, write_index
from streamprune.disk.state import JobState, file_digest, new_state
from streamprune.errors import CorruptStateError, UsageError
from streamprune.job_prepare import batch_of, check_disk, make_writer, open_given, windows_of
from streamprune.kernels import cpu, torch_ops
from streamprune.memory import peak_resident_bytes
from streamprune.model.budget import (
    compute_dtype,
    resolve_device,
)
from streamprune.model.calibration import tokens_digest
from streamprune.model.passes import check_weights, embed_pass, layer_pass, split_batches
from streamprune.model.skeleton import Stage, build_skeleton, stored_dtype
from streamprune.model.statistics import Collector, merge_statistics, write_statistics
from streamprune.model.walk import Walk
from streamprune.pruning.stats import InputStats
from streamprune.report import build_report
from streamprune.spec import JobSpec, Progress, ProgressCallback


class Run:
    """One run, from skeleton to report. A context manager: the checkpoint stays mapped while it is open."""

    def __init__(
        self,
        spec: JobSpec,
        checkpoint: Checkpoint,
        unfinished: tuple[JobState, dict[str, Any]] | None,
        progress: ProgressCallback,
    ) -> None:
        self.spec, self.checkpoint, self.progress = spec, checkpoint, progress
        self.state = unfinished[0] if unfinished else new_state(spec)
        self.begun = unfinished is not None
        resolved: dict[str, Any] = unfinished[1]["resolved"] if unfinished else {}
        self.maps = ShardMaps(checkpoint)
        self.device = resolve_device(resolved.get("device", spec.device))
        self.backend = spec.backend if spec.backend != "auto" else "numba" if self.device.type == "cpu" else "torch"
        if self.backend == "numba" and self.device.type != "cpu":
            raise UsageError(f"--backend numba runs on the CPU only, not on {self.device}; leave it out or use torch")
        self.dtype = compute_dtype(resolved.get("dtype", spec.dtype), stored_dtype(checkpoint), self.device)
        self.skeleton = build_skeleton(checkpoint, self.dtype, trust_remote_code=spec.trust_remote_code)
        self.walk = Walk(self.skeleton, self.maps, self.dtype, self.device)
        self.writer = make_writer(spec, self.skeleton, self.maps, self.device, self.backend)
        self.given = open_given(spec, checkpoint, self.skeleton, self.writer)
        self.batch = batch_of(spec, self.skeleton, self.dtype, resolved)
        self.windows = windows_of(spec, self.skeleton, self.state.tokens, resolved)
        self.records = journal.read(self.state.journal) if self.begun else []
        self.resolved = resolved or {
            "dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device), "batch": self.batch,
            "tokens": tokens_digest(self.windows) if self.windows is not None else None,
        }  # fmt: skip

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.maps.close()

    def discard(self) -> None:
        """Throws the unfinished work away: its input is at fault."""
        if self.begun:
            self.state.discard()

    # ---- run

    def work(self, startup: float) -> dict[str, Any]:
        """Does what is left to do; returns the report. `startup` is how many seconds it took to get here."""
        self.startup, begun = startup, time.perf_counter()
        self._check_disk()
        if not self.begun:
            self._create()
        self._clean()
        stages = self.skeleton.stages
        if self.writer is None:
            stages = stages[:-1]  # statistics alone need no head
        done = len(self.records)
        if self.windows is not None and 0 < done <= len(self.skeleton.layer_stages):
            self.walk.learn_calls(split_batches(self.windows, self.batch))
        for position in range(done, len(stages)):
            at = time.perf_counter()
            record = self._stage(position, stages[position])
            record |= {
                "seconds": time.perf_counter() - (begun if position == done else at),
                "peak": peak_resident_bytes(),
            }
            journal.append(self.state.journal, record)
            self.records.append(record)
            if stages[position].kind == "layer":
                remove_cache(self.state.cache, stages[position].index)
            self.progress(Progress(stages[position].name, position + 1, len(stages), record["seconds"]))
        return self._finish(time.perf_counter() if done < len(stages) else begun)

    def _check_disk(self) -> None:
        written = sum(r["shard"]["bytes"] for r in self.records if r["shard"])
        output = self.checkpoint.nbytes - written if self.writer else 0
        cache = 0
        if self.windows is not None and len(self.records) < len(self.skeleton.stages) - 1:
            cache = 2 * self.windows.size * self.skeleton.hidden_size * self.walk.cache_dtype.itemsize
        check_disk(self.state, output, cache)

    def _create(self) -> None:
        self.begun = True
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        tokens = None
        if self.windows is not None:
            buffer = io.BytesIO()
            np.save(buffer, self.windows, allow_pickle=False)
            tokens = buffer.getbuffer()
        self.state.create({"job": self.spec.fixed(), "resolved": self.resolved, "started": started}, tokens)

    def _clean(self) -> None:
        """Removes what a crash left behind: caches of other stages than the next, and temporary files."""
        durable.make_folder(self.state.cache)
        keep = {f"{len(self.records) - 1:04d}.bin", f"{len(self.records) - 1:04d}.json"}
        for path in [
            *self.state.cache.iterdir(),
            *self.state.partial.glob(".*.tmp"),
            *self.state.folder.glob(".*.tmp"),
        ]:
            if path.parent != self.state.cache or path.name not in keep:
                durable.remove(path)
        for record in self.records:
            if record["shard"]:
                path = self.state.partial / record["shard"]["name"]
                if not path.is_file() or path.stat().st_size != record["shard"]["bytes"]:
                    raise CorruptStateError(f"{path} is missing or damaged; start again with --restart")

    def _stage(self, position: int, stage: Stage) -> dict[str, Any]:
        """Steps 1 to 3 of a stage; returns its journal record."""
        record: dict[str, Any] = {"stage": stage.name, "shard": None, "statistics": None, "linears": []}
        stats: dict[str, InputStats] = {}
        folder, pruned = self.state.cache, self.spec.propagate == "pruned"
        more = stage.kind == "layer" and stage.index + 1 < len(self.skeleton.layers)
        collector = Collector((cpu if self.backend == "numba" else torch_ops).accumulate)
        if self.windows is not None:
            for touched in (stage, self.skeleton.stages[-1]) if stage.kind == "embed" else (stage,):
                check_weights(self.maps, self.skeleton, touched)
        if self.windows is not None and stage.kind == "embed":
            embed_pass(self.walk, split_batches(self.windows, self.batch), folder)
        if self.windows is not None and stage.kind == "layer":
            layer_pass(self.walk, stage, folder, write=more and not pruned, collector=collector)
            found = collector.finish()
            stats = {name: found[leader] for name, leader in collector.groups.items()}
            path = self.state.layer_stats(stage.index)
            record["statistics"] = write_statistics(path, found.items(), collector.groups, {}, {})
        if self.writer is not None:
            path = self.state.partial / shard_name(position + 1, len(self.skeleton.stages))
            summary = self.writer.write(path, stage, lambda name, width: self._stats(stats, name, width))
            record["shard"] = {"name": summary.name, "bytes": summary.nbytes, "xxh3_128": summary.digest}
            record["linears"] = self.writer.linears
            if self.windows is not None and pruned and more:
                self._propagate_pruned(stage, path)
        return record

    def _stats(self, gathered: dict[str, InputStats], name: str, in_features: int) -> InputStats:
        if self.given is not None:
            return self.given.load(name, in_features)
        if name not in gathered:
            raise UsageError(f"{name} was not used on this text, so there are no statistics for it; --skip it")
        return gathered[name]

    def _propagate_pruned(self, stage: Stage, shard: Path) -> None:
        """The second forward pass, with the weights that have just been written."""
        written = open_shard(shard)
        sources = {
            name: written.tensors[ref.name]
            for name, ref in self.skeleton.sources.items()
            if name.startswith(stage.prefix + ".")
        }
        with ShardMaps(written) as maps, self.walk.layer(stage, maps=maps, sources=sources) as run:
            layer_pass(self.walk, stage, self.state.cache, write=True, run=run)

    # ---- finish

    def _calibration(self) -> dict[str, Any]:
        c = self.spec.calibration
        if c is None:
            return dict(self.given.calibration) if self.given else {}
        return {
            "text": c.path.name if c.path else "built-in", "digest": c.digest, "samples": c.samples, "seqlen": c.seqlen,
            "seed": c.seed, "tokens": self.resolved["tokens"], "dtype": self.resolved["dtype"],
            "propagate": self.spec.propagate,
        }  # fmt: skip

    def _finish(self, since: float) -> dict[str, Any]:
        statistics = self.spec.save_stats if self.writer else self.spec.out
        if statistics is not None:
            parts = []
            for stage, record in zip(self.skeleton.layer_stages, self.records[1:], strict=False):
                parts.append(self.state.layer_stats(stage.index))
                if not parts[-1].is_file() or file_digest(parts[-1]) != record["statistics"]:
                    raise CorruptStateError(f"{parts[-1]} is damaged; start again with --restart")
            merge_statistics(statistics, parts, self.checkpoint.identity(), self._calibration() | self._job())
        if self.writer is None:
            report = self._report([], since)
            self.state.discard()
            return report
        files = self._write_files()
        report = self._report(files, since)
        journal.write_json(self.state.partial / "streamprune.json", "report", report)
        self.state.publish()
        return report

    def _job(self) -> dict[str, Any]:
        return {"job": self.spec.fixed()} if self.writer is None else {}

    def _write_files(self) -> list[dict[str, Any]]:
        """Side files and index; returns name, bytes and hash of every file of the output."""
        partial = self.state.partial
        files = [dict(r["shard"]) for r in self.records]
        for name in self.checkpoint.side_files():
            size, digest = durable.copy_file(self.checkpoint.path / name, partial / name)
            files.append({"name": name, "bytes": size, "xxh3_128": digest})
        where = {
            ref.name: r["shard"]["name"]
            for s, r in zip(self.skeleton.stages, self.records, strict=True)
            for ref in s.tensors
        }
        index = partial / "model.safetensors.index.json"
        digest = write_index(index, self.checkpoint.index_metadata, self.checkpoint.nbytes, where)
        files.append({"name": index.name, "bytes": index.stat().st_size, "xxh3_128": digest})
        return files

    def _report(self, files: list[dict[str, Any]], since: float) -> dict[str, Any]:
        return build_report(
            self.spec, self.resolved, self._calibration(), self.records, files,
            seconds=sum(r["seconds"] for r in self.records) + time.perf_counter() - since,
            startup=self.startup,
            peak=max(peak_resident_bytes(), *(r["peak"] for r in self.records)),
        )  # fmt: skip
