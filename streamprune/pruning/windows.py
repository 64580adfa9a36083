"""The calibration windows of a job: drawn from its text when it begins, and saved for resuming it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from streamprune.calibration import windows as drawing
from streamprune.calibration.texts import Text
from streamprune.calibration.windows import Opened, Source, Tokens, draw_windows, tokens_digest
from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import CorruptStateError
from streamprune.model.budget import Layout
from streamprune.pruning.records import Resolved
from streamprune.pruning.spec import DrawnText, JobSpec


def calibration_for_pass(spec: JobSpec) -> DrawnText | None:
    """The text that a job runs through the model; None if existing statistics are all it needs."""
    recipe = spec.recipe
    if spec.stats_path is None or recipe is None or recipe.aims or spec.propagate == "pruned":
        return spec.calibration
    return None


def windows_of(
    spec: JobSpec, checkpoint: Checkpoint, vocab_size: int, kept: Path, resolved: Resolved | None,
    lay_out: Callable[[tuple[int, int]], Layout],
) -> tuple[Tokens | None, dict[str, Any], Layout]:  # fmt: skip
    """Calibration windows (from the file `kept`, or drawn now), fields of Resolved about them, and the job's layout.

    The layout is found first, so that a job that does not fit into memory is refused before a long text is read. Raises
    the errors of kept_windows, open_text, windows_from and `lay_out`.
    """
    if resolved:
        windows = kept_windows(spec, kept, resolved.tokens)
        return windows, {}, lay_out((0, 1) if windows is None else windows.shape)
    opened = open_text(spec, checkpoint, vocab_size)
    if opened is None:
        return None, {}, lay_out((0, 1))
    layout = lay_out(opened.shape)
    return *windows_from(spec, opened), layout


def open_text(spec: JobSpec, checkpoint: Checkpoint, vocab_size: int) -> Opened | None:
    """The opened calibration text; None without calibration. Raises as Source.begin."""
    c = calibration_for_pass(spec)
    if c is None:
        return None
    text, trust = Text(c.path, c.text_field), spec.trust_remote_code
    source = Source(text, spec.source, checkpoint.config, vocab_size, c.bos, trust)
    return source.begin(c.seqlen, c.samples)


def windows_from(spec: JobSpec, opened: Opened) -> tuple[Tokens, dict[str, Any]]:
    """Calibration windows (samples, tokens) drawn from a text, and fields of Resolved. Raises as draw_windows."""
    parents = (spec.work, *spec.out.absolute().parents)
    folder = next(place for place in parents if place is not None and place.is_dir())
    seed = spec.calibration.seed if spec.calibration else 0
    windows = draw_windows(opened, seed, folder)
    if spec.recipe is not None and (share := spec.recipe.replace_tokens):
        spared = drawing.held_out(len(windows)) if spec.recipe.tune else ()
        drawing.replace_tokens(windows, share, opened.source.vocab_size, seed, spared)
    text_fields: dict[str, Any] = {"bos": opened.bos is not None}
    tally = opened.source.text.tally
    if tally.replaced:
        text_fields["replaced"] = tally.replaced
    if tally.tokens < len(windows) * opened.inside:
        text_fields["text_tokens"] = tally.tokens
    return windows, text_fields


def kept_windows(spec: JobSpec, kept: Path, digest: str | None) -> Tokens | None:
    """Calibration windows (samples, tokens), as saved when the job began; None without calibration.

    Raises CorruptStateError if they cannot be read, or do not have this `digest`.
    """
    if calibration_for_pass(spec) is None:
        return None
    try:
        windows: Tokens = np.load(kept, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise CorruptStateError(f"{kept} cannot be read ({e}); start again with --restart") from e
    if tokens_digest(windows) != digest:
        raise CorruptStateError(f"{kept} is damaged; start again with --restart")
    return windows
