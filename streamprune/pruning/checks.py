"""Places that a job must not read and write at once."""

from __future__ import annotations

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.state import check_out, partial_of
from streamprune.errors import UsageError
from streamprune.pruning.spec import JobSpec


def check_places(spec: JobSpec, checkpoint: Checkpoint) -> None:
    """Refuses places that would be read and written at once, or that are not there."""
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
            raise UsageError(f"--save-stats {spec.save_stats}: name a file in a folder that exists")
        read = (spec.calibration.path if spec.calibration else None, spec.stats_path)
        if any(p is not None and p.resolve() == spec.save_stats.resolve() for p in read):
            raise UsageError(f"--save-stats {spec.save_stats} would replace what is read; choose another name")
