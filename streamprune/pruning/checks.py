"""Checks before a job is prepared: that it does not write over what it reads, and whether it is done already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.state import check_links, check_out, differences_of, find_finished, partial_of
from streamprune.errors import CorruptStateError, StateError, UsageError
from streamprune.pruning.spec import JobSpec

if TYPE_CHECKING:
    from streamprune.calibration.statistics_header import StatisticsHeader


def check_places(spec: JobSpec, checkpoint: Checkpoint) -> None:
    """Checks OUT, --work and --save-stats against MODEL, against each other and against the files that are read.

    Raises UsageError where a job would write into what it reads or into OUT, or cannot write at all; errors as
    state.check_out for OUT itself.
    """
    check_out(spec.out, checkpoint.path)
    source = checkpoint.path.resolve()
    for flag, path in (("--work", spec.work), ("--save-stats", spec.save_stats)):
        if path is not None and (path.resolve() == source or source in path.resolve().parents):
            raise UsageError(f"{flag} {path} lies within MODEL; choose a place outside {checkpoint.path}")
    for flag, path in (("--work", spec.work), ("--save-stats", spec.save_stats)):
        for own in (spec.out, partial_of(spec.out)):
            if path is not None and own.resolve() in (path.resolve(), *path.resolve().parents):
                raise UsageError(f"{flag} {path} lies within {own}; choose a place outside OUT")
    if spec.save_stats is not None:
        if spec.save_stats.is_dir() or not spec.save_stats.absolute().parent.is_dir():
            raise UsageError(f"--save-stats {spec.save_stats} is no file in an existing folder; name one")
        read = (spec.calibration.path if spec.calibration else None, spec.stats_path)
        if any(p is not None and p.resolve() == spec.save_stats.resolve() for p in read):
            raise UsageError(f"--save-stats {spec.save_stats} is also read by this job; choose another file")
        _there(spec.save_stats)


def find_done(spec: JobSpec) -> dict[str, Any] | None:
    """The report of a job that is finished, or what stands for it with `calibrate`; None if there is no OUT.

    Raises StateError if OUT is another job's or not ours, CorruptStateError if it is damaged.
    """
    if spec.verb == "prune":
        return find_finished(spec)
    if not spec.out.exists() and not spec.out.is_symlink():
        return None
    from streamprune.calibration.statistics_header import StatisticsHeader

    try:
        there = StatisticsHeader(spec.out).calibration
    except (UsageError, CorruptStateError) as e:
        raise StateError(f"{spec.out} exists and is not a statistics file; choose another name or move it away") from e
    if there.get("job") is None:
        raise StateError(f"{spec.out} was made by prune --save-stats; choose another name or remove it")
    if differences := differences_of(spec, there):
        raise StateError(f"{spec.out} holds statistics of another job: {differences}; choose another name or remove it")
    return {"recipe": None, "sparsity": None, "seconds": 0.0, "peak_rss_bytes": 0}


def find_done_unlocked(spec: JobSpec) -> dict[str, Any] | None:
    """As find_done where OUT's folder cannot be written, so that no lock can be taken in it, and none is needed."""
    place = spec.out.absolute().parent
    return find_done(spec) if place.is_dir() and not os.access(place, os.W_OK | os.X_OK) else None


def check_finished(spec: JobSpec, checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """Raises UsageError if a job that is finished, with this `report`, lacks something that it is asked for now: its
    statistics in a file, or links of the source."""
    check_links(spec.out, checkpoint, report.get("left_behind", ()))
    _check_saved(spec, checkpoint, report)


def _check_saved(spec: JobSpec, checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """Raises UsageError if a job is finished, with this `report`, and where it was to save its statistics are none, or
    those of another job."""
    if spec.save_stats is None:
        return
    there, advice = _there(spec.save_stats), "with `calibrate`"
    if there is None:
        raise UsageError(f"{spec.out} is finished, and its statistics are gone; make {spec.save_stats} {advice}")
    if there.model != checkpoint.identity() or there.calibration != report.get("calibration"):
        raise UsageError(
            f"{spec.out} is finished, and {spec.save_stats} holds statistics of another job; leave out --save-stats, "
            f"or make them under another name {advice}"
        )


def _there(saved: Path) -> StatisticsHeader | None:
    """The statistics where a job is to save its own; None if there is no file. Raises UsageError for any other one."""
    from streamprune.calibration.statistics_header import StatisticsHeader

    if not saved.exists():
        return None
    try:
        return StatisticsHeader(saved)
    except (UsageError, CorruptStateError) as e:
        raise UsageError(
            f"--save-stats {saved} exists and is not a statistics file; choose another name or move it away"
        ) from e
