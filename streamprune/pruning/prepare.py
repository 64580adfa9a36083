"""Prepares a run before anything is written: all checks that can refuse a job are made here."""

from __future__ import annotations

import datetime
import functools
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from streamprune.calibration.statistics import StatisticsFile
from streamprune.calibration.windows import Tokens, tokens_digest
from streamprune.disk import durable, journal
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.state import JobState, new_state, partial_of
from streamprune.errors import ResourceError, StreampruneError
from streamprune.model.budget import Layout, streaming_layout
from streamprune.model.stages import Outline
from streamprune.process.imports import many_imports
from streamprune.process.ranks import ALONE, Ranks
from streamprune.process.share import Share
from streamprune.pruning.records import Resolved, StageRecord
from streamprune.pruning.setup import Setup, check_given, open_given
from streamprune.pruning.spec import JobSpec
from streamprune.pruning.windows import calibration_for_pass, windows_of


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run. This run has not written anything yet, and not read any weights."""

    setup: Setup
    state: JobState
    begun: bool
    """Whether the job is resumed."""
    content: str
    """Checkpoint.content when the job began."""
    spent: float
    """Seconds of work for this job before its first stage: a separate calibration for --allocate (job.py)."""
    records: tuple[StageRecord, ...]
    """Stages that are done."""
    windows: Tokens | None
    """Calibration windows (samples, tokens); None without calibration."""
    given: StatisticsFile | None
    """Statistics from an existing file."""
    layout: Layout
    resolved: Resolved
    reading: float
    """Seconds it took to read the text and draw the windows."""
    ranks: Ranks = ALONE

    @property
    def cache(self) -> Path:
        """The folder of this rank's activation cache."""
        ranks = self.ranks
        return self.state.cache if ranks.size == 1 else self.state.cache / f"{ranks.rank}-of-{ranks.size}"

    def told(self) -> dict[str, Any]:
        """What the other ranks need to know."""
        cache, partial = self.state.cache, self.state.partial
        within = cache.relative_to(partial) if cache.is_relative_to(partial) else cache
        return {
            "resolved": self.resolved.to_json(), "records": [record.to_json() for record in self.records],
            "windows": self.windows, "cache": within, "content": self.content,
        }  # fmt: skip


def prepare(
    spec: JobSpec, checkpoint: Checkpoint, unfinished: tuple[JobState, Mapping[str, Any]] | None, spent: float = 0.0
) -> Prepared:
    """Prepares a new job, or resumes the `unfinished` one given by its state and job.json.

    `spent`: see Prepared. Raises the errors of streamprune.errors.
    """
    state, job = unfinished or (new_state(spec), {})
    resolved = Resolved.from_json(job["resolved"]) if unfinished else None
    given, outline = open_given(spec, checkpoint)
    setup = Setup.of(spec, checkpoint, resolved, outline)
    check_given(given, setup)
    records = tuple(map(StageRecord.from_json, journal.read(state.journal))) if unfinished else ()
    at = time.perf_counter()
    windows, text_fields, layout = _windows(setup, state, resolved)
    return Prepared(
        setup=setup, state=state, begun=unfinished is not None, content=str(job.get("content") or checkpoint.content()),
        spent=float(job.get("spent", spent)), records=records, windows=windows, given=given, layout=layout,
        resolved=resolved or _resolve(setup, layout, windows, text_fields), reading=time.perf_counter() - at,
    )  # fmt: skip


def check_before_gathering(spec: JobSpec, checkpoint: Checkpoint) -> None:
    """Refuses, before statistics are gathered for --allocate, what `prepare` would refuse only after that.

    Raises as Setup.of and layout_of.
    """
    setup = Setup.of(spec, checkpoint)
    with many_imports():
        from streamprune.pruning.memory import layout_of

    drawn = calibration_for_pass(spec)
    layout_of(setup, None, (0, 1) if drawn is None else (drawn.samples, drawn.seqlen))


def _windows(
    setup: Setup, state: JobState, resolved: Resolved | None
) -> tuple[Tokens | None, Mapping[str, Any], Layout]:
    """See and raises as windows_of."""
    spec, checkpoint, resources = setup.spec, setup.checkpoint, setup.spec.resources
    if type(setup.model) is Outline:
        return None, {}, streaming_layout(resources.ram, resources.vram)
    with many_imports():
        from streamprune.pruning.memory import layout_of

    lay_out = functools.partial(layout_of, setup, resolved)
    if calibration_for_pass(spec) is None:
        return None, {}, lay_out((0, 1))
    return windows_of(spec, checkpoint, setup.skeleton.vocab_size, state.tokens, resolved, lay_out)


def set_up_ahead(spec: JobSpec, checkpoint: Checkpoint, chosen: Mapping[str, Any] | None) -> Setup | None:
    """The setup on another rank than 0, while that rank makes its own, with what an unfinished job has `chosen`.

    None where the job is refused: rank 0 will say why.
    """
    try:
        outline = _given_here(spec, checkpoint)[1]
        return Setup.of(spec, checkpoint, Resolved.from_json(chosen) if chosen else None, outline)
    except StreampruneError:
        return None


def joining(spec: JobSpec, checkpoint: Checkpoint, told: Mapping[str, Any], setup: Setup | None) -> Prepared:
    """Prepares another rank than 0, from what that has `told`, with the `setup` that was made ahead if it will do.

    Raises as `prepare`.
    """
    resolved, windows = Resolved.from_json(told["resolved"]), told["windows"]
    given, outline = _given_here(spec, checkpoint)
    if setup is None or (setup.device_name, setup.dtype_name) != (resolved.device, resolved.dtype):
        setup = Setup.of(spec, checkpoint, resolved, outline)
    layout = streaming_layout(None, None)
    if type(setup.model) is not Outline:
        from streamprune.pruning.memory import layout_of

        layout = layout_of(setup, resolved, (0, 1) if windows is None else windows.shape)
    state = JobState(spec.out, partial_of(spec.out) / told["cache"])
    return Prepared(
        setup=setup, state=state, begun=True, content=told["content"], spent=0.0,
        records=tuple(map(StageRecord.from_json, told["records"])), windows=windows,
        given=given, resolved=resolved, reading=0.0, layout=layout,
    )  # fmt: skip


def _given_here(spec: JobSpec, checkpoint: Checkpoint) -> tuple[StatisticsFile | None, Outline | None]:
    """As open_given. Statistics that rank 0 has gathered for --allocate may be on its machine alone; only there are
    they needed."""
    elsewhere = spec.gathers and spec.stats_path is not None and not spec.stats_path.is_file()
    return (None, None) if elsewhere else open_given(spec, checkpoint)


def together(prepared: Prepared, ranks: Ranks) -> Prepared:
    """Settles what all ranks must have in common; each has a cache of its own.

    Raises UsageError if there are fewer batches than ranks, and ResourceError if one of them has too little memory.
    """
    if ranks.size == 1:
        return prepared
    windows, batch = prepared.windows, prepared.resolved.batch
    told = ranks.gather((prepared.layout.resident, prepared.layout.batch))
    layout = replace(prepared.layout, resident=all(resident for resident, _ in told), layers=1)
    if windows is not None:
        Share(ranks, len(windows), batch, layout.group).check("more --samples")
        if (least := min(own for _, own in told)) < batch:
            raise ResourceError(
                f"this job has batches of {batch} windows, and a rank has memory for {least}; run it without torchrun"
            )
    return replace(prepared, ranks=ranks, layout=layout)


def _resolve(setup: Setup, layout: Layout, windows: Tokens | None, text_fields: Mapping[str, Any]) -> Resolved:
    """`text_fields` are the fields about the text: bos, replaced, text_tokens."""
    recipe = setup.spec.recipe
    return Resolved(
        dtype=setup.dtype_name, device=setup.device_name, batch=layout.batch,
        tokens=tokens_digest(windows) if windows is not None else None, **text_fields,
        gram_room=layout.room if recipe and recipe.needs_gram else None,
        group=layout.group if setup.model.has_experts else None, tune_windows=layout.windows or None,
        shard_bytes=setup.spec.shard_bytes,
    )  # fmt: skip


def begin(state: JobState, job: Mapping[str, Any], windows: Tokens | None) -> None:
    """Creates the state of a new job: job.json and its calibration windows."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    tokens = io.BytesIO()
    if windows is not None:
        np.save(tokens, windows, allow_pickle=False)
    state.create({**job, "started": started}, tokens.getbuffer() if windows is not None else None)


def remove_leftovers(prepared: Prepared, newest: int) -> None:
    """Removes what a crash left behind: caches other than number `newest`, and temporary files.

    Rank 0 does so where all write, and each rank in the folder of its cache. A folder there is that of a rank.
    """
    cache, ranks = prepared.cache, prepared.ranks
    durable.make_folder(cache)
    keep = {f"{newest:04d}.bin", f"{newest:04d}.json"}
    for path in cache.iterdir():
        if path.name not in keep:
            durable.clear(path)
    if ranks.rank:
        return
    for path in prepared.state.cache.iterdir() if ranks.size > 1 else ():
        if not path.name.endswith(f"-of-{ranks.size}"):
            durable.clear(path)
    prepared.state.remove_temporaries()
