"""Checks that a job does not write over what it reads."""

from __future__ import annotations

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.state import check_out, partial_of
from streamprune.errors import UsageError
from streamprune.pruning.spec import JobSpec


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
