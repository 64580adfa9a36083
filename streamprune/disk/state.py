"""A job's life on disk: unfinished beside OUT, then finished as OUT, never half of either.

    .OUT.lock                    held while a process works on OUT
    OUT.partial/                 the output as far as it is written
    OUT.partial/.streamprune/    job.json, journal, tokens.npy, statistics of finished layers, cache/; pack: counts
    .OUT.statistics              with --allocate: what was gathered first, by a job of its own; removed at the end
    OUT                          the finished output, renamed from OUT.partial in one step

`job.json` is the first thing written and `streamprune.json`, the report, the last: a folder with the former
is an unfinished job, one with the latter needs only the final rename. With `--work DIR` the activation cache
is in a folder of the job's own below DIR.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from streamprune.disk import durable, journal
from streamprune.errors import CorruptStateError, StateError, UsageError

REPORT = "streamprune.json"

CARD = "README.md"
"""The model card, which people are meant to write in: an output is as it was whatever has become of it."""

Report = dict[str, Any]


class Job(Protocol):
    """What must be known of a job to find its state."""

    @property
    def out(self) -> Path: ...

    @property
    def restart(self) -> bool: ...

    @property
    def work(self) -> Path | None:
        """Where the activation cache is to be, if not within OUT.partial."""

    def fixed(self) -> dict[str, Any]:
        """What makes it this job, as JSON values."""

    def differences(self, recorded: Mapping[str, Any]) -> str:
        """Which of these values differ from recorded ones, in words; empty when none does."""

    def is_touched(self, recorded: Mapping[str, Any], content: object) -> bool:
        """Whether only times of files differ from recorded ones, and their `content` is as recorded."""


@dataclass(frozen=True)
class JobState:
    """Where the parts of one job are. `cache` is the folder of the activation cache."""

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
        """Of `pack`: nonzeros of each row."""
        return self.folder / "counts"

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole and only its last rename is missing."""
        return (self.partial / REPORT).is_file()

    def layer_stats(self, index: int) -> Path:
        return self.folder / f"statistics-{index:04d}.safetensors"

    def create(self, job: Mapping[str, Any], tokens: durable.Buffer | None) -> None:
        """Begins a job: makes its folders, keeps its calibration tokens, and writes `job.json` last."""
        durable.make_folder(self.folder)
        durable.make_folder(self.cache)
        if tokens is not None:
            durable.replace_file(self.tokens, tokens)
        cache = None if self.folder in self.cache.parents else str(self.cache)
        journal.write_json(self.folder / "job.json", "job", {**job, "cache": cache})

    def discard(self) -> None:
        """Throws the unfinished work away, in an order in which each beginning of it can be resumed.

        First it is no longer complete, then nothing of it is done, then it is no job, then it is gone.
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
        """The last steps: removes the state, then gives the output its name."""
        durable.clear(self.cache)
        durable.clear(self.folder)
        durable.publish(self.partial, self.out)


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def statistics_of(out: Path) -> Path:
    """Statistics that a job gathers before it begins, to share out its sparsity; removed when it is done."""
    return out.with_name(f".{out.name}.statistics")


def check_out(out: Path, source: Path) -> None:
    """Refuses an OUT that cannot be renamed into place, or that lies where MODEL, the folder `source`, is read.

    Raises UsageError.
    """
    if out.name in ("", ".."):
        raise UsageError(f"OUT {out}: give the folder that is to be written a name of its own")
    try:
        mount, target, partial, read = out.is_mount(), out.resolve(), partial_of(out).resolve(), source.resolve()
    except (OSError, RuntimeError) as e:  # a name that is too long, links in a circle
        why = e.strerror if isinstance(e, OSError) else e
        raise UsageError(f"OUT {out} cannot be looked at: {why}; choose another OUT") from e
    if mount:
        raise UsageError(f"OUT {out} is a mount point, which cannot be renamed into place; name a folder in it")
    if read in (target, *target.parents):
        raise UsageError(f"OUT {out} lies within MODEL; choose a place outside {source}")
    if partial in (read, *read.parents) or target in read.parents:
        raise UsageError(f"MODEL {source} lies within OUT {out}; choose another OUT")


def new_state(spec: Job) -> JobState:
    """The places of a job that begins now."""
    if spec.work is None:
        return JobState(spec.out, _inside(partial_of(spec.out)))
    key = xxhash.xxh3_64_hexdigest(json.dumps([str(spec.out.absolute()), spec.fixed()]).encode())
    return JobState(spec.out, spec.work.absolute() / f"{spec.out.name}-{key}")


def find_finished(spec: Job) -> Report | None:
    """The report of OUT if it is finished and this very job's; None when there is no OUT.

    Raises StateError when OUT is not ours or another job's, CorruptStateError when files of it are missing.
    """
    out = spec.out
    if not out.exists() and not out.is_symlink():
        return None
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return None
    if not (out / REPORT).is_file():
        raise StateError(f"{out} exists and is not an output of streamprune; choose another OUT or move it away")
    report = _read_report(out)
    if differences := differences_of(spec, report):
        raise StateError(f"{out} is the finished output of another job: {differences}; choose another OUT or remove it")
    _check_files(out, report)
    return report


def differences_of(spec: Job, record: Mapping[str, Any]) -> str:
    """What differs from the job that a report, `job.json` or statistics record; empty when it is the same.

    It is the same, too, where files have other times and the same content, if that was recorded.
    """
    recorded = record.get("job") or {}
    found = spec.differences(recorded)
    return "" if found and spec.is_touched(recorded, record.get("content")) else found


def report_fields(out: Path, report: Mapping[str, Any], **kinds: type | tuple[type, ...]) -> list[Any]:
    """Fields of the report of `out`, in the order asked for.

    Raises CorruptStateError when one is missing or of another type.
    """
    for name, kind in kinds.items():
        if not isinstance(report.get(name), kind):
            raise CorruptStateError(f"{out / REPORT} is damaged ({name}); remove {out} and run again")
    return [report[name] for name in kinds]


def _sound_report(folder: Path) -> Report:
    """What every report says. Raises CorruptStateError."""
    report = journal.read_json(folder / REPORT, "report")
    job, files = report.get("job", {}), report.get("files", [])
    if not (isinstance(job, dict) and isinstance(files, list) and all(map(_is_file, files))):
        raise CorruptStateError(f"{folder / REPORT} is damaged; start again with --restart")
    return report


def _is_file(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("bytes"), int)


def _read_report(folder: Path) -> Report:
    try:
        return _sound_report(folder)
    except CorruptStateError as e:
        what = str(e).removesuffix("; start again with --restart")
        raise CorruptStateError(f"{what}; remove {folder} and run again") from e


def _check_files(folder: Path, report: Report) -> None:
    for file in report.get("files", []):
        path = folder / file["name"]
        if file["name"] != CARD and (not path.is_file() or path.stat().st_size != file["bytes"]):
            raise CorruptStateError(
                f"{path} is missing or not {file['bytes']} bytes long; remove {folder} and run again"
            )


def find_unfinished(spec: Job) -> tuple[JobState, Report] | None:
    """The state and `job.json` of this very job if it has begun; None when there is nothing to go on with.

    What is left of a job that died before its `job.json` was written is removed; so is everything with
    --restart. Raises StateError when OUT.partial is another job's or not ours.
    """
    partial = partial_of(spec.out)
    if not partial.exists() and not partial.is_symlink():
        return None
    folder = partial / ".streamprune"
    begun = (folder / "job.json").is_file() and not partial.is_symlink()
    if begun and spec.restart:
        JobState(spec.out, _recorded_cache(folder, partial)).discard()
        return None
    if (partial / REPORT).is_file() and not partial.is_symlink():
        return _complete(spec, partial)
    if not begun:
        if not _just_begun(partial, folder):
            raise StateError(
                f"{partial} exists and is not the state of a streamprune job; move it away or choose another OUT"
            )
        durable.clear(partial)
        return None
    job = journal.read_json(folder / "job.json", "job")
    if differences := differences_of(spec, job):
        raise StateError(
            f"{partial} is the unfinished work of another job: {differences}; "
            "choose another OUT, or throw that work away with --restart"
        )
    state = JobState(spec.out, _recorded_cache(folder, partial))
    if spec.work is not None and spec.work.absolute() != state.cache.parent:
        advice = f"--work {state.cache.parent}" if job["cache"] else "no --work"
        raise StateError(
            f"the activations of {partial} are in {state.cache}: go on with {advice}, or throw the work away with "
            "--restart"
        )
    return state, job


def _just_begun(partial: Path, folder: Path) -> bool:
    """Whether a folder holds nothing but what a job writes before its `job.json`."""
    if partial.is_symlink() or not partial.is_dir() or {p.name for p in partial.iterdir()} - {".streamprune"}:
        return False
    if not folder.exists():
        return True
    early = {"cache", "tokens.npy", ".tokens.npy.tmp", "counts", ".counts.tmp", ".job.json.tmp"}
    return folder.is_dir() and not {p.name for p in folder.iterdir()} - early


def _complete(spec: Job, partial: Path) -> tuple[JobState, Report] | None:
    """A partial output that is complete but for the last rename. Without its `job.json`, it is finished work, which
    --restart never throws away: it may be somebody's OUT that happens to have this name."""
    report = _read_report(partial) if not (partial / ".streamprune" / "job.json").is_file() else _sound_report(partial)
    if differences := differences_of(spec, report):
        raise StateError(f"{partial} is the work of another job: {differences}; choose another OUT or move it away")
    _check_files(partial, report)
    return JobState(spec.out, _recorded_cache(partial / ".streamprune", partial)), report


def _inside(partial: Path) -> Path:
    return partial / ".streamprune" / "cache"


def _recorded_cache(folder: Path, partial: Path) -> Path:
    """Where a job's cache is, as far as its `job.json` can still tell."""
    try:
        cache = journal.read_json(folder / "job.json", "job").get("cache")
    except CorruptStateError:
        cache = None
    return Path(cache) if cache else _inside(partial)
