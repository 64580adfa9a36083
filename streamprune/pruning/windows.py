"""The calibration windows of a job: drawn from its text when it begins, and kept for when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from streamprune.calibration.texts import Text
from streamprune.calibration.windows import Opened, Source, Tokens, draw_windows, tokens_digest
from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import CorruptStateError
from streamprune.model.budget import Layout
from streamprune.model.skeleton import Skeleton
from streamprune.pruning.records import Resolved
from streamprune.pruning.spec import DrawnText, JobSpec


def calibration_for_pass(spec: JobSpec) -> DrawnText | None:
    """The text that a job passes through the model; None where statistics that are there already will do."""
    recipe = spec.recipe
    if spec.stats_path is None or recipe is None or recipe.aims or spec.propagate == "pruned" or spec.save_stats:
        return spec.calibration
    return None


def windows_of(
    spec: JobSpec, checkpoint: Checkpoint, skeleton: Skeleton, kept: Path, resolved: Resolved | None,
    lay_out: Callable[[tuple[int, int]], Layout],
) -> tuple[Tokens | None, dict[str, Any], Layout]:  # fmt: skip
    """Calibration windows, those in `kept` or drawn now, what is to be remembered of them, and the job's layout.

    The job is laid out before a text is read. Raises as what it calls.
    """
    if resolved:
        windows = kept_windows(spec, kept, resolved.tokens)
        return windows, {}, lay_out((0, 1) if windows is None else windows.shape)
    opened = open_text(spec, checkpoint, skeleton)
    if opened is None:
        return None, {}, lay_out((0, 1))
    layout = lay_out(opened.shape)
    return *windows_from(spec, opened), layout


def open_text(spec: JobSpec, checkpoint: Checkpoint, skeleton: Skeleton) -> Opened | None:
    """The text that calibration windows are drawn from; None without calibration. Raises as Source.begin."""
    c = calibration_for_pass(spec)
    if c is None:
        return None
    text, trust = Text(c.path, c.text_field), spec.trust_remote_code
    source = Source(text, spec.source, checkpoint.config, skeleton.vocab_size, c.bos, trust)
    return source.begin(c.seqlen, c.samples)


def windows_from(spec: JobSpec, opened: Opened) -> tuple[Tokens, dict[str, Any]]:
    """Calibration windows (samples, tokens) drawn from a text, and what reports say of them. Raises as draw_windows."""
    folder = spec.work if spec.work is not None and spec.work.is_dir() else spec.out.absolute().parent
    windows = draw_windows(opened, spec.calibration.seed if spec.calibration else 0, folder)
    met: dict[str, Any] = {"bos": opened.bos is not None}
    tally = opened.source.text.tally
    if tally.replaced:
        met["replaced"] = tally.replaced
    if tally.tokens < len(windows) * opened.inside:
        met["text_tokens"] = tally.tokens
    return windows, met


def kept_windows(spec: JobSpec, kept: Path, digest: str | None) -> Tokens | None:
    """Calibration windows (samples, tokens) as they were kept when the job began; None without calibration.

    Raises CorruptStateError when they are damaged, not those of `digest`.
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
