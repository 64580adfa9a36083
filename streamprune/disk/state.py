"""The state of a job on disk: unfinished work beside OUT, which becomes OUT in one step.

    .OUT.lock                    held while a process works on OUT
    OUT.partial/                 the output written so far
    OUT.partial/.streamprune/    job.json, journal, tokens.npy, statistics of finished layers, cache/; pack: counts
    .OUT.statistics              with --allocate: statistics gathered first, by a job of their own; removed at the end
    OUT                          the finished output, renamed from OUT.partial in one step

`job.json` marks the begin of a job and `streamprune.json`, the report, its end: a folder with the former is an
unfinished job, one with the latter only needs the final rename. With `--work DIR`, the activation cache is in a
folder of the job's own below DIR.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from streamprune.disk import durable, journal
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.report import REPORT, Report, check_files, is_whole, read_report, sound_report
from streamprune.errors import CorruptStateError, StateError, UsageError


class Job(Protocol):
    """What this module needs to know about a job to find its state."""

    @property
    def out(self) -> Path: ...

    @property
    def restart(self) -> bool: ...

    @property
    def work(self) -> Path | None:
        """The folder of --work for the activation cache; None: it is within OUT.partial."""

    def fixed(self) -> dict[str, Any]:
        """The fields that identify the job, as JSON values."""

    def differences(self, recorded: Mapping[str, Any]) -> str:
        """Which of these fields differ from recorded ones, in words; empty if none does."""

    def is_touched(self, recorded: Mapping[str, Any], content: object) -> bool:
        """Whether only mtimes of MODEL's files differ from recorded ones, and their `content` is the recorded one."""


@dataclass(frozen=True)
class JobState:
    """The paths of one job. `cache` is the folder of the activation cache."""

    out: Path
    cache: Path

    @property
    def partial(self) -> Path:
        return partial_of(self.out)

    @property
    def folder(self) -> Path:
        return self.partial / ".streamprune"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens.npy"

    @property
    def counts(self) -> Path:
        """`pack` only: the file with the nonzeros of each row."""
        return self.folder / "counts"

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete and only the final rename is missing."""
        return (self.partial / REPORT).is_file()

    def layer_stats(self, index: int) -> Path:
        return self.folder / f"statistics-{index:04d}.safetensors"

    def create(self, job: Mapping[str, Any], tokens: durable.Buffer | None) -> None:
        """Begins a job: makes its folders, writes its calibration tokens, and then `job.json`."""
        durable.make_folder(self.folder)
        durable.make_folder(self.cache)
        if tokens is not None:
            durable.replace_file(self.tokens, tokens)
        cache = None if self.folder in self.cache.parents else str(self.cache)
        journal.write_json(self.folder / "job.json", "job", {**job, "cache": cache})

    def remove_temporaries(self) -> None:
        """Removes temporary files that a crash left behind."""
        for path in [*self.partial.glob(".*.tmp"), *self.folder.glob(".*.tmp")]:
            durable.remove(path)

    def check_resumable(self, shards: Iterable[Mapping[str, Any] | None]) -> None:
        """Removes temporary files that a crash left behind, and checks the `shards` of the journal (None: no shard).

        Raises CorruptStateError if one is missing or has another size than when it was written.
        """
        self.remove_temporaries()
        for shard in shards:
            if shard and not is_whole(self.partial, shard):
                path = self.partial / shard["name"]
                raise CorruptStateError(f"{path} is missing or damaged; start again with --restart")

    def discard(self) -> None:
        """Deletes the unfinished work, in an order that leaves a valid state after a crash at any point.

        First the report (the job is no longer complete), then the journal (nothing is done), then `job.json` (there is
        no job), then the folder.
        """
        for first in (self.partial / REPORT, self.journal):
            durable.remove(first)
            durable.sync_folder(first.parent)
        durable.clear(self.cache)
        for path in sorted(self.partial.iterdir()):
            if path != self.folder:
                durable.clear(path)
        for path in sorted(self.folder.iterdir()):
            if path.name not in ("job.json", "tokens.npy"):
                durable.clear(path)
        durable.remove(self.folder / "job.json")
        durable.clear(self.partial)

    def publish(self) -> None:
        """The last steps of a job: removes its state, then renames OUT.partial to OUT."""
        durable.clear(self.cache)
        durable.clear(self.folder)
        durable.publish(self.partial, self.out)


def lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def statistics_of(out: Path) -> Path:
    """The file of statistics that --allocate gathers before the job begins; removed when it is done."""
    return out.with_name(f".{out.name}.statistics")


def check_out(out: Path, source: Path) -> None:
    """Raises UsageError if OUT cannot be the target of a rename, or overlaps with MODEL, the folder `source`."""
    if out.name in ("", ".."):
        raise UsageError(f"OUT {out} has no name of its own; name the folder to be written")
    try:
        mount, target, partial, read = out.is_mount(), out.resolve(), partial_of(out).resolve(), source.resolve()
    except (OSError, RuntimeError) as e:  # a name that is too long, a loop of links
        why = e.strerror if isinstance(e, OSError) else e
        raise UsageError(f"OUT {out} cannot be accessed: {why}; choose another OUT") from e
    if mount:
        raise UsageError(f"OUT {out} is a mount point, which cannot be renamed into place; name a folder in it")
    if read in (target, *target.parents):
        raise UsageError(f"OUT {out} lies within MODEL; choose a place outside {source}")
    if partial in (read, *read.parents) or target in read.parents:
        raise UsageError(f"MODEL {source} lies within OUT {out}; choose another OUT")


def new_state(spec: Job) -> JobState:
    """The paths of a new job."""
    if spec.work is None:
        return JobState(spec.out, _inside(partial_of(spec.out)))
    key = xxhash.xxh3_64_hexdigest(json.dumps([str(spec.out.absolute()), spec.fixed()]).encode())
    return JobState(spec.out, spec.work.absolute() / f"{spec.out.name}-{key}")


def find_finished(spec: Job) -> Report | None:
    """The report of OUT if it is the finished output of this job; None if there is no OUT, or an empty folder.

    Raises StateError if OUT is another job's output or not ours, CorruptStateError if files of it are missing.
    """
    out = spec.out
    is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if is_empty or not (out.exists() or out.is_symlink()):
        return None
    if not (out / REPORT).is_file():
        raise StateError(f"{out} exists and is not an output of streamprune; choose another OUT or move it away")
    report = read_report(out)
    if differences := differences_of(spec, report):
        raise StateError(f"{out} is the finished output of another job: {differences}; choose another OUT or remove it")
    check_files(out, report)
    return report


def differences_of(spec: Job, record: Mapping[str, Any]) -> str:
    """How a job differs from the one recorded in a report, `job.json` or statistics, in words; empty if it is the same.

    Jobs whose files differ only in mtimes are the same if the content of the files was recorded, and is the same.
    """
    recorded = record.get("job") or {}
    found = spec.differences(recorded)
    return "" if found and spec.is_touched(recorded, record.get("content")) else found


def check_links(out: Path, checkpoint: Checkpoint, left: Collection[str]) -> None:
    """Raises UsageError if --follow-links is given, and OUT has been finished with links of MODEL among the files that
    it `left` behind."""
    missing = sorted(set(left).intersection(checkpoint.side_files().carried)) if checkpoint.follow_links else []
    if missing:
        names = ", ".join(missing[:3]) + f" and {len(missing) - 3} more" * (len(missing) > 3)
        raise UsageError(
            f"{out} is finished, without what --follow-links would have copied: {names}; copy that from "
            f"{checkpoint.path} by hand, or choose another OUT"
        )


def find_unfinished(spec: Job, *, clears: bool = True) -> tuple[JobState, Report] | None:
    """The state and `job.json` of this job if it has begun; None if there is nothing to resume.

    If it `clears`, removes what is left of a job that died before its `job.json`, and with --restart all its work.
    Raises StateError if OUT.partial is another job's or not ours.
    """
    partial = partial_of(spec.out)
    if not partial.exists() and not partial.is_symlink():
        return None
    folder = partial / ".streamprune"
    begun = (folder / "job.json").is_file() and not partial.is_symlink()
    if begun and spec.restart:
        if clears:
            JobState(spec.out, _recorded_cache(folder, partial)).discard()
        return None
    if (partial / REPORT).is_file() and not partial.is_symlink():
        return _complete(spec, partial)
    if not begun:
        if not _just_begun(partial, folder):
            raise StateError(
                f"{partial} exists and is not the state of a streamprune job; move it away or choose another OUT"
            )
        if clears:
            durable.clear(partial)
        return None
    job = journal.read_json(folder / "job.json", "job")
    if differences := differences_of(spec, job):
        raise StateError(
            f"{partial} is the unfinished work of another job: {differences}; "
            "choose another OUT, or delete that work with --restart"
        )
    state = JobState(spec.out, _recorded_cache(folder, partial))
    if spec.work is not None and spec.work.absolute() != state.cache.parent:
        advice = f"--work {state.cache.parent}" if job["cache"] else "no --work"
        raise StateError(
            f"the activations of {partial} are in {state.cache}: resume with {advice}, or delete the work with "
            "--restart"
        )
    return state, job


def _just_begun(partial: Path, folder: Path) -> bool:
    """Whether a folder holds only what a job writes before its `job.json`."""
    if partial.is_symlink() or not partial.is_dir() or {p.name for p in partial.iterdir()} - {".streamprune"}:
        return False
    if not folder.exists():
        return True
    early = {"cache", "tokens.npy", ".tokens.npy.tmp", "counts", ".counts.tmp", ".job.json.tmp"}
    return folder.is_dir() and not {p.name for p in folder.iterdir()} - early


def _complete(spec: Job, partial: Path) -> tuple[JobState, Report] | None:
    """The state and report of a partial output that only has to be renamed. Without its `job.json` it is never deleted
    by --restart: it may be some other OUT that happens to have this name."""
    report = read_report(partial) if not (partial / ".streamprune" / "job.json").is_file() else sound_report(partial)
    if differences := differences_of(spec, report):
        raise StateError(f"{partial} is the work of another job: {differences}; choose another OUT or move it away")
    check_files(partial, report)
    return JobState(spec.out, _recorded_cache(partial / ".streamprune", partial)), report


def _inside(partial: Path) -> Path:
    return partial / ".streamprune" / "cache"


def _recorded_cache(folder: Path, partial: Path) -> Path:
    """The cache folder recorded in a job's `job.json`; the default if that is damaged."""
    try:
        cache = journal.read_json(folder / "job.json", "job").get("cache")
    except CorruptStateError:
        cache = None
    return Path(cache) if cache else _inside(partial)
