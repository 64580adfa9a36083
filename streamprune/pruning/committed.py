"""The stages of a job that are committed, and the commit of each: what is durable by then, and what it removes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from streamprune.disk import journal
from streamprune.disk.durable import FilePart
from streamprune.model.stages import Stage
from streamprune.process.memory import peak_resident_bytes
from streamprune.progress import Progress, ProgressCallback
from streamprune.pruning.prepare import Prepared
from streamprune.pruning.records import StageRecord

if TYPE_CHECKING:
    from streamprune.pruning.forward import CalibrationPass


class Committed:
    """The records of committed stages, and the files of those that are not. See run.py for the order of writes."""

    since = 0.0
    """When the current stage began (perf_counter)."""

    def __init__(self, job: Prepared, forward: CalibrationPass | None, progress: ProgressCallback) -> None:
        self._job, self._forward, self._progress = job, forward, progress
        self.records = list(job.records)
        self._open: list[FilePart] = []

    @property
    def newest_cache(self) -> int:
        """Number of the last durable cache, -1 if there is none. Cache n is written by the stage of record n."""
        return max((n for n, record in enumerate(self.records) if record.cache), default=-1)

    def opened(self, file: FilePart) -> None:
        """Takes note of a part of a shard that is being written, until it is durable."""
        self._open.append(file)

    def make_durable(self, file: FilePart) -> None:
        """The fsync of a part of a shard."""
        file.commit()
        self._open.remove(file)

    def abandon(self) -> None:
        """Closes the files of stages that will not be committed."""
        for file in self._open:
            file.abandon()

    def commit(self, stage: Stage, record: StageRecord, file: FilePart | None) -> None:
        """The fsync of step 3, and steps 4 and 5 of a stage."""
        if file is not None:
            self.make_durable(file)
        job, forward, model, ranks = self._job, self._forward, self._job.setup.model, self._job.ranks
        now = time.perf_counter()
        record.seconds, record.peak = now - self.since, record.peak or peak_resident_bytes()
        self.since = now
        before = self.newest_cache
        record.ranks = ranks.size if ranks.size > 1 else None
        if not ranks.rank:
            journal.append(job.state.journal, record.to_json())
        self.records.append(record)
        if forward is not None and (record.cache or (stage.kind == "layer" and not model.layer_after(stage))):
            from streamprune.disk.cache import remove_cache

            for old in range(max(before, 0), len(self.records) - 1):  # also those that a resumed run has recomputed
                remove_cache(job.cache, old)
        if record.cache and forward is not None:
            forward.made_durable()
        stages = len(model.stages) - (job.setup.target is None)
        self._progress(Progress(stage.name, len(self.records), stages, record.seconds))
