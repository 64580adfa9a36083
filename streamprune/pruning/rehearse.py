"""A rehearsal of a job (`prune --dry-run`): all that can refuse it before its first stage, and nothing written."""

from __future__ import annotations

from dataclasses import dataclass

from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.lock import check_free
from streamprune.disk.state import find_unfinished, lock_of
from streamprune.progress import no_progress
from streamprune.pruning.checks import check_finished, check_places, find_done, find_done_unlocked
from streamprune.pruning.prepare import check_before_gathering, prepare
from streamprune.pruning.run import Run
from streamprune.pruning.spec import JobSpec


@dataclass(frozen=True)
class Rehearsal:
    """What a job would do: `status` is "up-to-date", "would begin", "would resume" or "would finish"."""

    status: str
    notes: tuple[str, ...] = ()


def rehearse(spec: JobSpec, checkpoint: Checkpoint) -> Rehearsal:
    """Checks a job as far as its first stage. Raises what the job itself would raise until then."""
    check_places(spec, checkpoint)
    if (finished := find_done_unlocked(spec)) is None:
        durable.check_folder(spec.out.absolute().parent)
        check_free(lock_of(spec.out))
        finished = find_done(spec)
    if finished is not None:
        check_finished(spec, checkpoint, finished)
        return Rehearsal("up-to-date")
    unfinished = find_unfinished(spec, clears=False)
    if unfinished is not None and unfinished[0].is_complete:
        check_finished(spec, checkpoint, unfinished[1])
        return Rehearsal("would finish")
    if spec.gathers:
        if unfinished is None:
            check_before_gathering(spec, checkpoint)
        found = rehearse(spec.gathering(), checkpoint)
        if found.status != "up-to-date":
            return found
    job = prepare(spec, checkpoint, unfinished)
    with Run(job, no_progress) as run:
        run.check()
    if unfinished is None:
        return Rehearsal("would begin")
    return Rehearsal("would resume", (f"{len(job.records)} of {len(job.setup.model.stages)} stages are done",))
