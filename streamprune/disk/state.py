"""A job's life on disk: unfinished beside OUT, then finished as OUT, never half of either.

    .OUT.lock                    held while a process works on OUT
    OUT.partial/                 the output as far as it is written
    OUT.partial/.streamprune/    job.json, journal, tokens.npy, statistics of finished layers, cache/
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
from typing import Any

import xxhash

from streamprune.disk import durable, journal
from streamprune.errors import CorruptStateError, StateError
from streamprune.spec import JobSpec

REPORT = "streamprune.json"

Report = dict[str, Any]


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
        journal.write_json(self.folder / "job.json", "job", {**job, "cache": str(self.cache)})

    def discard(self) -> None:
        """Throws the unfinished work away."""
        durable.clear(self.cache)
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


def new_state(spec: JobSpec) -> JobState:
    """The places of a job that begins now."""
    if spec.work is None:
        return JobState(spec.out, partial_of(spec.out) / ".streamprune" / "cache")
    key = xxhash.xxh3_64_hexdigest(json.dumps([str(spec.out.absolute()), spec.fixed()]).encode())
    return JobState(spec.out, spec.work.absolute() / f"{spec.out.name}-{key}")


def find_finished(spec: JobSpec) -> Report | None:
    """The report of OUT if it is finished and this very job's; None when there is no OUT.

    Raises StateError when OUT is not ours or another job's, CorruptStateError when files of it are missing.
    """
    out = spec.out
    if not out.exists() and not out.is_symlink():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not (out / REPORT).is_file():
        raise StateError(f"{out} exists and is not an output of streamprune; choose another OUT or move it away")
    report = journal.read_json(out / REPORT, "report")
    if differences := spec.differences(report.get("job", {})):
        raise StateError(f"{out} is the finished output of another job: {differences}; choose another OUT or remove it")
    for file in report.get("files", []):
        path = out / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise CorruptStateError(f"{path} is missing or not {file['bytes']} bytes long; remove {out} and run again")
    return report


def find_unfinished(spec: JobSpec) -> tuple[JobState, Report] | None:
    """The state and `job.json` of this very job if it has begun; None when there is nothing to go on with.

    What is left of a job that died before its `job.json` was written is removed; so is everything with
    --restart. Raises StateError when OUT.partial is another job's or not ours.
    """
    partial = partial_of(spec.out)
    if not partial.exists() and not partial.is_symlink():
        return None
    folder = partial / ".streamprune"
    if (partial / REPORT).is_file():
        return _complete(spec, partial)
    if not (folder / "job.json").is_file():
        if not _just_begun(partial, folder):
            raise StateError(
                f"{partial} exists and is not the state of a streamprune job; move it away or choose another OUT"
            )
        durable.clear(partial)
        return None
    if spec.restart:
        JobState(spec.out, _recorded_cache(folder, partial)).discard()
        return None
    job = journal.read_json(folder / "job.json", "job")
    if differences := spec.differences(job.get("job", {})):
        raise StateError(
            f"{partial} is the unfinished work of another job: {differences}; "
            "choose another OUT, or throw that work away with --restart"
        )
    state = JobState(spec.out, Path(job["cache"]))
    if spec.work is not None and new_state(spec).cache != state.cache:
        raise StateError(
            f"the activations of {partial} are in {state.cache.parent}: pass --work with that, or --restart"
        )
    return state, job


def _just_begun(partial: Path, folder: Path) -> bool:
    """Whether a folder holds nothing but what a job writes before its `job.json`."""
    if partial.is_symlink() or not partial.is_dir() or {p.name for p in partial.iterdir()} - {".streamprune"}:
        return False
    if not folder.exists():
        return True
    early = {"cache", "tokens.npy", ".tokens.npy.tmp", ".job.json.tmp"}
    return folder.is_dir() and not {p.name for p in folder.iterdir()} - early


def _complete(spec: JobSpec, partial: Path) -> tuple[JobState, Report] | None:
    """A partial output that is complete but for the last rename."""
    report = journal.read_json(partial / REPORT, "report")
    cache = _recorded_cache(partial / ".streamprune", partial)
    if spec.restart:
        JobState(spec.out, cache).discard()
        return None
    if differences := spec.differences(report.get("job", {})):
        raise StateError(f"{partial} is the work of another job: {differences}; choose another OUT, or pass --restart")
    return JobState(spec.out, cache), report


def _recorded_cache(folder: Path, partial: Path) -> Path:
    """Where a job's cache is, as far as its `job.json` can still tell."""
    inside = partial / ".streamprune" / "cache"
    try:
        return Path(journal.read_json(folder / "job.json", "job")["cache"])
    except (CorruptStateError, KeyError):
        return inside
