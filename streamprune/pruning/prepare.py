"""Prepares a run before anything is written: all checks that can refuse a job are made here."""

from __future__ import annotations

import datetime
import functools
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamprune.calibration.statistics import StatisticsFile
from streamprune.calibration.windows import Tokens, tokens_digest
from streamprune.disk import durable, journal
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.room import SLACK_BYTES, check_room
from streamprune.disk.state import JobState, new_state
from streamprune.model.budget import Layout, streaming_layout
from streamprune.model.stages import Outline
from streamprune.process.imports import many_imports
from streamprune.process.memory import format_bytes
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


def check_disk(state: JobState, output: int, cache: int, spool: int = 0) -> None:
    """Raises ResourceError unless the disks have room for `output` + SLACK_BYTES and for `cache` bytes.

    `spool` bytes are for shards that are fetched from the hub, beside the output.
    """
    check_room(
        [(state.partial, output + spool + SLACK_BYTES), (state.cache, cache)],
        "free some space, choose another OUT, or put the activations elsewhere with --work DIR",
        detail=f" ({format_bytes(output)} for the output, {format_bytes(cache)} for activations"
        + (f", {format_bytes(spool)} for shards from the hub)" if spool else ")"),
    )


def remove_leftovers(state: JobState, newest: int) -> None:
    """Removes what a crash left behind: caches other than number `newest`, and temporary files."""
    durable.make_folder(state.cache)
    keep = {f"{newest:04d}.bin", f"{newest:04d}.json"}
    for path in state.cache.iterdir():
        if path.name not in keep:
            durable.remove(path)
    state.remove_temporaries()
