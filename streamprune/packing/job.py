"""`pack` and `unpack`: make a pruned checkpoint small for storing and sending, and restore it; resumable at any time.

Current runtimes no longer load packed checkpoints, so that they must be unpacked before use. A packed folder has one of
the layouts of compressed-tensors up to 0.14 (disk/packed.py), one shard for each source shard, and all the information
needed to restore the source byte for byte. Its shards are called packed-NAME, so that no loader takes it for a model.
Hidden files, and weights that the checkpoint does not use, are not copied; the report names the latter.

survey    reads the source once: nonzeros of each row, choice of the layout, hashes   (pack only, packing/survey.py)
shards    one after the other: packed, restored or unpacked; verified; then committed by a line in the journal
finish    config.json, index, side files; then our report, or the original's own; then the rename
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprune.disk import durable, journal
from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.claims import refuse_adapter
from streamprune.disk.hub import resolve_model
from streamprune.disk.journal import differences, is_touched
from streamprune.disk.lock import Lock
from streamprune.disk.packed import LAYOUTS, is_packed
from streamprune.disk.report import REPORT, report_fields
from streamprune.disk.room import SLACK_BYTES, check_room
from streamprune.disk.state import (
    JobState,
    check_links,
    check_out,
    differences_of,
    find_finished,
    find_unfinished,
    lock_of,
    new_state,
    partial_of,
)
from streamprune.errors import (
    CheckpointError,
    ResourceError,
    StateError,
    UnsupportedError,
    UsageError,
)
from streamprune.packing.files import Originals, is_restored, read_originals, source_name
from streamprune.process import interrupts
from streamprune.process.imports import many_imports
from streamprune.process.memory import peak_resident_bytes
from streamprune.process.versions import version_of
from streamprune.progress import Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    from streamprune.packing.work import Work


@dataclass(frozen=True)
class PackResult:
    """The result of a job. Bytes are those of all shards; `seconds` and the peak memory are those of this call."""

    status: str
    """"done" or "up-to-date"."""
    out: Path
    layout: str
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_rss_bytes: int
    left_out: tuple[str, ...] = ()
    """`pack` only: files of MODEL that were not copied, because they are weights that the checkpoint does not use."""
    notes: tuple[str, ...] = ()
    """Further remarks for the user, one sentence each."""


@dataclass(frozen=True)
class PackSpec:
    """One pack or unpack job; `layout` is None for unpack."""

    verb: str
    model: Mapping[str, str]
    """The checkpoint's fingerprint."""
    layout: str | None
    out: Path
    restart: bool
    work: Path | None = None
    content: Callable[[], str] | None = field(default=None, compare=False)
    """Computes Checkpoint.content, which tells whether shards with other mtimes are the same."""
    notes: list[str] = field(default_factory=list, compare=False)
    """Remarks for PackResult, collected while the job runs."""

    def fixed(self) -> dict[str, Any]:
        """The fields that identify the job, as flat JSON values."""
        return {"verb": self.verb, **{f"model {k}": v for k, v in self.model.items()}, "layout": self.layout}

    def differences(self, recorded: Mapping[str, Any]) -> str:
        """Which of these fields differ from recorded ones, in words; empty if none does."""
        return differences(self.fixed(), recorded)

    def is_touched(self, recorded: Mapping[str, Any], content: object) -> bool:
        """Whether only mtimes of the checkpoint's files differ from a recorded job's, and `content` is the same."""
        return is_touched(self.fixed(), recorded, content, self.content, self.notes)


def pack(
    model: str | Path, out: str | Path, *, layout: str = "auto", follow_links: bool = False, restart: bool = False,
    progress: ProgressCallback = no_progress,
) -> PackResult:  # fmt: skip
    """Packs the layers' linears of the checkpoint `model` (a folder or a hub name) into the folder `out`.

    Linears that become smaller are packed (disk/linears.py says what a linear is), everything else is copied. `layout`
    is "sparse-24-bitmask", "sparse-bitmask", or "auto": the former if all linears worth packing satisfy 2:4. A weight
    is zero only if all its bits are, so that -0.0 and NaN are restored exactly. `follow_links` as for prune. Running
    the same job again resumes it, or finds it done. Raises the errors of streamprune.errors; UnsupportedError if
    nothing would become smaller.
    """
    if layout not in ("auto", *LAYOUTS):
        raise UsageError(f"--layout {layout}: choose auto, {' or '.join(LAYOUTS)}")
    checkpoint = open_checkpoint(resolve_model(str(model)), follow_links=follow_links)
    refuse_adapter(checkpoint)
    if checkpoint.beside:
        raise UnsupportedError(
            f"{checkpoint.path}: the index does not name {checkpoint.beside[0]}, so that `unpack` could not restore "
            "the shards; save the model again, or prune it"
        )
    if is_packed(checkpoint):
        raise UnsupportedError(f"{checkpoint.path}: is packed already; restore it with `unpack`")
    spec = PackSpec("pack", checkpoint.fingerprint(), layout, Path(out), restart, content=checkpoint.content)
    return _carry_out(spec, checkpoint, progress)


def unpack(
    model: str | Path, out: str | Path, *, restart: bool = False, progress: ProgressCallback = no_progress
) -> PackResult:
    """Unpacks the checkpoint `model` (a folder or a hub name) into the folder `out`.

    An output of `pack` is restored byte for byte, and verified against the hashes that `pack` recorded. A checkpoint
    packed by compressed-tensors up to 0.14 becomes an ordinary dense one; FP8 weights stay FP8. Running the same job
    again resumes it, or finds it done. Raises the errors of streamprune.errors.
    """
    checkpoint = open_checkpoint(resolve_model(str(model)))
    if not is_packed(checkpoint):
        raise UnsupportedError(
            f"{checkpoint.path}: holds no packed tensors (NAME.compressed, NAME.bitmask), so there is nothing to "
            "unpack; `pack` makes such checkpoints"
        )
    spec = PackSpec("unpack", checkpoint.fingerprint(), None, Path(out), restart, content=checkpoint.content)
    return _carry_out(spec, checkpoint, progress)


def _carry_out(spec: PackSpec, checkpoint: Checkpoint, progress: ProgressCallback) -> PackResult:
    begun = time.perf_counter()
    check_out(spec.out, checkpoint.path)
    originals = read_originals(checkpoint) if spec.verb == "unpack" else None
    durable.make_folder(spec.out.absolute().parent)
    with Lock(lock_of(spec.out)):
        if originals is None:
            status, report = _reported(spec, checkpoint, progress)
            (found,) = report_fields(spec.out, report, **{f"{spec.verb}ed": dict})
            found = {"left_out": [], **found}
            report_fields(spec.out, found, layout=str, bytes_before=int, bytes_after=int, left_out=list)
        else:
            status = _restored(spec, checkpoint, progress, originals)
            found = {
                "layout": originals.layout,
                "bytes_before": sum(size for size, _ in checkpoint.shard_stats.values()),
                "bytes_after": sum(originals.files[source_name(shard)]["bytes"] for shard in checkpoint.shards),
            }
    return PackResult(
        status, spec.out, found["layout"], found["bytes_before"], found["bytes_after"],
        time.perf_counter() - begun, peak_resident_bytes(), tuple(map(str, found.get("left_out", ()))),
        tuple(spec.notes),
    )  # fmt: skip


def _reported(spec: PackSpec, checkpoint: Checkpoint, progress: ProgressCallback) -> tuple[str, dict[str, Any]]:
    """Runs a job whose output has a report of ours, or finds it done: (status, report)."""
    since = time.perf_counter()
    if (finished := find_finished(spec)) is not None:
        _check_links(spec, checkpoint, finished)
        return "up-to-date", finished
    unfinished = find_unfinished(spec)
    if unfinished is not None and unfinished[0].is_complete:
        _check_links(spec, checkpoint, unfinished[1])
        unfinished[0].publish()
        return "done", unfinished[1]
    state, found = _run(spec, checkpoint, None, unfinished, progress)
    report = {
        "seconds": round(time.perf_counter() - since, 3),
        "peak_rss_bytes": peak_resident_bytes(),
        "job": spec.fixed(),
        "content": checkpoint.content(),
        **found,
        "versions": {"python": platform.python_version(), "streamprune": version_of("streamprune")},
    }
    journal.write_json(state.partial / REPORT, "report", report)
    state.publish()
    return "done", report


def _check_links(spec: PackSpec, checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """See check_links."""
    done = report.get(f"{spec.verb}ed")
    check_links(spec.out, checkpoint, done.get("left_out", ()) if isinstance(done, dict) else ())


def _restored(spec: PackSpec, checkpoint: Checkpoint, progress: ProgressCallback, originals: Originals) -> str:
    """Runs a job that restores what `pack` packed, without any file of ours, or finds it done: its status."""
    out, partial, shards = spec.out, partial_of(spec.out), [source_name(shard) for shard in checkpoint.shards]
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        if not out.is_symlink() and out.is_dir() and is_restored(out, originals, shards):
            return "up-to-date"
        raise StateError(f"{out} exists and is not what {checkpoint.path} unpacks to; choose another OUT or move it")
    state = new_state(spec)
    begun = (state.folder / "job.json").is_file()
    if partial.is_dir() and not partial.is_symlink() and not (begun and spec.restart):
        if not begun:
            whole = is_restored(partial, originals, shards)
        else:  # the original's own report is written last
            recorded = journal.read_json(state.folder / "job.json", "job")
            whole = state.is_complete and not differences_of(spec, recorded)
        if whole:
            state.publish()
            return "done"
    state, _ = _run(spec, checkpoint, originals, find_unfinished(spec), progress)
    state.publish()
    return "done"


def _run(
    spec: PackSpec, checkpoint: Checkpoint, originals: Originals | None,
    unfinished: tuple[JobState, dict[str, Any]] | None, progress: ProgressCallback,
) -> tuple[JobState, dict[str, Any]]:  # fmt: skip
    """All steps but report and rename; returns the state and the fields of the report.

    Unfinished work is kept, unless the content of the input is invalid.
    """
    with many_imports():
        from streamprune.disk.mapping import ShardMaps
        from streamprune.packing.work import make_work

    state = unfinished[0] if unfinished is not None else new_state(spec)
    try:
        with interrupts.work(), ShardMaps(checkpoint) as maps:
            work = make_work(checkpoint, maps, spec.layout, originals)
            if unfinished is None:
                resolved = work.prepare(state)
                room = [(spec.out.parent, work.nbytes() + SLACK_BYTES)]
                check_room(room, "free some, or choose another OUT")
                state.create({"job": spec.fixed(), "content": checkpoint.content(), "resolved": resolved}, None)
            else:
                work.resume(state, unfinished[1]["resolved"])
            records = _shards(state, checkpoint, work, progress)
            return state, work.finish(state.partial, records)
    except (CheckpointError, UnsupportedError, ResourceError) as e:
        begun = (state.folder / "job.json").is_file()
        if begun and not isinstance(e, ResourceError) and not isinstance(e.__cause__, OSError):
            state.discard()
        elif not begun:
            durable.clear(state.partial)
        raise


def _shards(state: JobState, checkpoint: Checkpoint, work: Work, progress: ProgressCallback) -> list[dict[str, Any]]:
    """Writes the shards that are not in the journal yet; returns all its records."""
    records = journal.read(state.journal)
    state.check_resumable(record["shard"] for record in records)
    for number in range(len(records), len(checkpoint.shards)):
        interrupts.check()
        since = time.perf_counter()
        shard = checkpoint.shards[number]
        name = work.name_of(shard)
        file = work.fill(state.partial / name, shard)
        written = None
        if file is not None:
            with file:
                written = {"name": name, "bytes": file.size, "xxh3_128": file.digest}
            work.verify(state.partial / name, shard)
        seconds = time.perf_counter() - since
        record = {"shard": written, "seconds": seconds}
        journal.append(state.journal, record)
        records.append(record)
        progress(Progress(shard, number + 1, len(checkpoint.shards), seconds))
    return records
