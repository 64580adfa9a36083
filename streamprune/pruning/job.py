"""`prune` and `calibrate`: from arguments to a finished output; can be killed and resumed at any moment.

describe   arguments -> JobSpec (describe.py)
open       lock OUT; find out whether it is finished, unfinished or belongs to another job
prepare    skeleton, memory, tokens, disk: all checks that can refuse a job, before anything is written
run        stage after stage: forward, prune, shard, journal
finish     index, side files, statistics, report; rename
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.lock import Lock
from streamprune.disk.report import report_fields
from streamprune.disk.state import find_unfinished, lock_of
from streamprune.errors import CheckpointError, CorruptStateError, StateError, UnsupportedError, UsageError
from streamprune.methods.recipes import Recipe
from streamprune.process import interrupts
from streamprune.process.imports import many_imports
from streamprune.process.memory import peak_resident_bytes
from streamprune.process.ranks import Ranks
from streamprune.process.torchrun import joined
from streamprune.process.versions import versions
from streamprune.progress import ProgressCallback, no_progress
from streamprune.pruning.checks import check_finished, check_places, find_done, find_done_unlocked
from streamprune.pruning.describe import SHARD_SIZE, describe_calibrate, describe_prune, open_model
from streamprune.pruning.report import notes_of
from streamprune.pruning.spec import JobSpec
from streamprune.settings import Calibration, Resources

if TYPE_CHECKING:
    from streamprune.pruning.run import Run

Tell = Callable[[str], None]

_CALIBRATION, _RESOURCES = Calibration(), Resources()


@dataclass(frozen=True)
class JobResult:
    """Result of a job.

    `report` is the content of `streamprune.json`. `seconds` and `peak_rss_bytes` cover all runs of the job, or only
    this call if the status is "up-to-date".
    """

    status: str
    """"done" or "up-to-date"; of a dry run "up-to-date", "would begin", "would resume" or "would finish"."""
    out: Path
    recipe: str | None
    sparsity: float | None
    """Pruned weights over all weights of the pruned linears."""
    seconds: float
    peak_rss_bytes: int
    report: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """Messages for the user, one sentence each: fallbacks, and files that were not carried over."""


def prune(
    model: str | Path, out: str | Path, amount: float | str, recipe: str | Recipe = "swiftprune", *,
    calibration: Calibration = _CALIBRATION, stats: str | Path | None = None, save_stats: str | Path | None = None,
    propagate: str | None = None, only: str | None = None, skip: str | None = None, resources: Resources = _RESOURCES,
    shard_size: int | str = SHARD_SIZE, follow_links: bool = False, allow_zeros: bool = False, restart: bool = False,
    fetch: str = "whole", dry_run: bool = False, trust_remote_code: bool = False,
    progress: ProgressCallback = no_progress, tell: Tell | None = None,
) -> JobResult:  # fmt: skip
    """Prunes the checkpoint `model` (a folder or a hub name) into the folder `out`.

    `amount` is a sparsity (share of each row, 0 ≤ S < 1) or a pattern ("2:4"), `recipe` the name of one or a Recipe
    (methods/recipes.py). Statistics come from `calibration`, or from the file `stats` that `calibrate` made;
    `save_stats` is a file to keep them in. `propagate` says whose outputs the next layer is calibrated on: those of the
    "dense" model, of the "pruned" one, or, for a refit or tuning, "asymmetric": both, with the dense model's outputs as
    the target that new values are fitted to (methods/gram.py). None is the recipe's default. `only` and `skip` are
    regular expressions that choose linears by name. `follow_links` copies side files that are symlinks out of the
    checkpoint; `allow_zeros` accepts linears that are all zeros (model/zeros.py). Weights are written in shards of up
    to `shard_size` (bytes, or text such as "5GB"), or in a single file without an index if they all fit into it.
    `fetch` is for hub names: "whole" downloads the model first, "stream" each shard when it is needed. `restart`
    discards unfinished work. `dry_run` makes all checks that come before the first stage, and writes nothing. `tell`
    receives lines for people about what is about to be done. Running the same job again resumes it, or finds it done.
    Raises the errors of streamprune.errors.
    """

    def described() -> tuple[JobSpec, Checkpoint]:
        checkpoint = open_model(model, follow_links, fetch)
        return describe_prune(
            checkpoint, Path(out), amount, recipe, calibration=calibration, stats=stats, save_stats=save_stats,
            propagate=propagate, only=only, skip=skip, resources=resources, shard_size=shard_size, restart=restart,
            allow_zeros=allow_zeros, trust_remote_code=trust_remote_code,
        ), checkpoint  # fmt: skip

    if dry_run:
        from streamprune.pruning.rehearse import rehearse

        spec, checkpoint = described()
        found = rehearse(spec, checkpoint)
        return JobResult(found.status, spec.out, spec.recipe.name if spec.recipe else None, None, 0.0,
                         peak_resident_bytes(), {}, found.notes)  # fmt: skip
    return _together(described, progress, tell)


def calibrate(
    model: str | Path, out: str | Path, *, calibration: Calibration = _CALIBRATION,
    resources: Resources = _RESOURCES, allow_zeros: bool = False, restart: bool = False, fetch: str = "whole",
    trust_remote_code: bool = False, progress: ProgressCallback = no_progress,
) -> JobResult:  # fmt: skip
    """Gathers statistics of every linear's input into the file `out`, for `prune(..., stats=out)`.

    Arguments and errors as for `prune`.
    """

    def described() -> tuple[JobSpec, Checkpoint]:
        checkpoint = open_model(model, fetch=fetch)
        return describe_calibrate(
            checkpoint, Path(out), calibration, resources, restart=restart, allow_zeros=allow_zeros,
            trust_remote_code=trust_remote_code,
        ), checkpoint  # fmt: skip

    return _together(described, progress)


def _together(
    described: Callable[[], tuple[JobSpec, Checkpoint]], progress: ProgressCallback, tell: Tell | None = None
) -> JobResult:
    """Carries out a job on all ranks of this run, once they agree on what it is."""

    def identity(found: tuple[JobSpec, Checkpoint]) -> dict[str, Any]:
        spec, checkpoint = found
        kept = {key: value for key, value in spec.fixed().items() if key != "model shards"}  # which has mtimes
        return kept | {"model content": checkpoint.content(), **versions()}

    with joined() as ranks:
        return _carry_out(*ranks.agreed(described, identity), progress, ranks, tell)


def _carry_out(
    spec: JobSpec, checkpoint: Checkpoint, progress: ProgressCallback, ranks: Ranks, tell: Tell | None = None
) -> JobResult:
    if ranks.rank:
        return _follow(spec, checkpoint, ranks)
    begun = time.perf_counter()
    check_places(spec, checkpoint)
    if (finished := find_done_unlocked(spec)) is not None:
        check_finished(spec, checkpoint, finished)
        return ranks.broadcast(_up_to_date(spec, finished, begun))
    durable.make_folder(spec.out.absolute().parent)
    with Lock(lock_of(spec.out)):
        finished = find_done(spec)
        if finished is not None:
            if spec.verb == "calibrate":
                _discard_leftovers(spec)
            check_finished(spec, checkpoint, finished)
            _drop_own_statistics(spec)
            return ranks.broadcast(_up_to_date(spec, finished, begun))
        unfinished = find_unfinished(spec)
        if unfinished is not None and unfinished[0].is_complete:
            check_finished(spec, checkpoint, unfinished[1])
            unfinished[0].publish()
            _drop_own_statistics(spec)
            return ranks.broadcast(_result(spec, unfinished[1], "done"))
        before = 0.0
        if spec.gathers and spec.stats_path is not None:
            if unfinished is None:
                with many_imports():
                    from streamprune.pruning.prepare import check_before_gathering
                check_before_gathering(spec, checkpoint)
            if tell is not None:
                tell("calibrates first, as the sparsity is shared out by what the layers do")
            before = _gather(spec, spec.stats_path, checkpoint, progress, ranks)
        with many_imports():
            from streamprune.pruning.announce import intentions
            from streamprune.pruning.prepare import prepare, together
            from streamprune.pruning.run import Run

        ranks.broadcast(unfinished[1]["resolved"] if unfinished else None)
        prepared = prepare(spec, checkpoint, unfinished, before)
        if tell is not None:
            for line in intentions(prepared):
                tell(line)
        ranks.broadcast(prepared.told())
        with interrupts.work(), Run(together(prepared, ranks), progress) as run:
            report = _discard_on_bad_input(run, lambda: run.work(time.perf_counter() - begun))
        _drop_own_statistics(spec)
        return ranks.broadcast(_result(spec, report, "done"))


def _follow(spec: JobSpec, checkpoint: Checkpoint, ranks: Ranks) -> JobResult:
    """As _carry_out on another rank than 0, which says what is to be done."""
    told: Any = ranks.broadcast(None)
    if told == "gather":
        _follow(spec.gathering(), checkpoint, ranks)
        told = ranks.broadcast(None)
    if isinstance(told, JobResult):
        return told
    with many_imports():
        from streamprune.pruning.prepare import joining, set_up_ahead, together
        from streamprune.pruning.run import Run

    setup = set_up_ahead(spec, checkpoint, told)
    told = ranks.broadcast(None)
    prepared = joining(spec, checkpoint, told, setup)
    with interrupts.work(), Run(together(prepared, ranks), no_progress) as run:
        run.work(0.0)
    told = ranks.broadcast(None)
    assert isinstance(told, JobResult)
    return told


def _gather(
    spec: JobSpec, path: Path, checkpoint: Checkpoint, progress: ProgressCallback, ranks: Ranks
) -> float:  # fmt: skip
    """Calibrates into `path` for a prune job with `allocate`, if that is not done; returns the seconds of work.

    Raises StateError if `path` holds statistics of another job; --restart removes them.
    """
    if spec.restart:
        durable.remove(path)
    ranks.broadcast("gather")
    try:
        return _carry_out(spec.gathering(), checkpoint, progress, ranks).seconds
    except StateError as e:
        what = str(e).rpartition("; ")[0]
        raise StateError(f"{what}; discard them with --restart, or choose another OUT") from e


def _drop_own_statistics(spec: JobSpec) -> None:
    """Removes statistics that were gathered only for `allocate`."""
    if spec.gathers and spec.stats_path is not None:
        durable.remove(spec.stats_path)


def _discard_leftovers(spec: JobSpec) -> None:
    """Removes the state of a finished `calibrate` that crashed between writing its file and removing its state."""
    try:
        leftovers = find_unfinished(spec)
    except (StateError, CorruptStateError):
        return  # of another job
    if leftovers is not None:
        leftovers[0].discard()


def _discard_on_bad_input(run: Run, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Does `work`; discards unfinished work if the input is invalid, but keeps it if the input could not be read."""
    try:
        return work()
    except (CheckpointError, UnsupportedError, UsageError) as e:
        if not isinstance(e.__cause__, OSError):
            run.discard()
        raise


def _up_to_date(spec: JobSpec, report: Mapping[str, Any], begun: float) -> JobResult:
    took = time.perf_counter() - begun
    return replace(_result(spec, report, "up-to-date"), seconds=took, peak_rss_bytes=peak_resident_bytes())


def _result(spec: JobSpec, report: Mapping[str, Any], status: str) -> JobResult:
    number, nothing = (int, float), type(None)
    name, sparsity, seconds, peak = report_fields(
        spec.out, report, recipe=(str, nothing), sparsity=(*number, nothing), seconds=number, peak_rss_bytes=int
    )
    notes = (*spec.notes, *(notes_of(report) if status == "done" else ()))
    return JobResult(status, spec.out, name, sparsity if spec.recipe else None, seconds, peak, report, notes)
