"""From the user's arguments to a JobSpec; contradictory arguments are refused before anything is written.

`prune`, `calibrate` and `plan` all use these functions, so that they accept and refuse the same arguments. Only headers
and calibration texts are read, so that a finished job is recognised without loading the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.claims import check_claims
from streamprune.disk.hub import resolve_model
from streamprune.disk.journal import read_json
from streamprune.disk.packed import is_packed
from streamprune.disk.quantised import plain
from streamprune.disk.report import REPORT, file_digest
from streamprune.disk.state import JobState, statistics_of
from streamprune.errors import CorruptStateError, UnsupportedError, UsageError
from streamprune.methods.recipes import Recipe, check_propagate
from streamprune.process.memory import parse_bytes
from streamprune.pruning.spec import DrawnText, JobSpec
from streamprune.settings import Calibration, Resources, flags_of

SHARD_SIZE = "5GB"

HALF = 0.5
"""Sparsity that `plan` assumes if neither --sparsity nor --pattern is given."""


def open_model(model: str | Path, follow_links: bool = False, fetch: str = "whole") -> Checkpoint:
    """The checkpoint of a folder or a hub name, a quantised one as a plain one.

    With `fetch` "stream", its shards stay on the hub until they are needed (disk/remote.py). Raises CheckpointError or
    UnsupportedError if it cannot be pruned, UsageError for any other `fetch` than "stream" and "whole".
    """
    if fetch not in ("whole", "stream"):
        raise UsageError(f"--fetch {fetch}: choose whole or stream")
    if fetch == "stream":
        from streamprune.disk.remote import open_remote

        opened: Checkpoint = open_remote(str(model), follow_links=follow_links)
    else:
        opened = open_checkpoint(resolve_model(str(model)), follow_links=follow_links)
    checkpoint = plain(opened)
    check_claims(checkpoint)
    if is_packed(checkpoint):
        raise UnsupportedError(f"{checkpoint.path}: the weights are packed; run `unpack` first")
    return checkpoint


def describe_prune(
    checkpoint: Checkpoint, out: Path, amount: float | str, recipe: str | Recipe, *,
    calibration: Calibration, stats: str | Path | None, save_stats: str | Path | None, propagate: str | None,
    only: str | None, skip: str | None, resources: Resources,
    shard_size: int | str = SHARD_SIZE, restart: bool = False, allow_zeros: bool = False,
    trust_remote_code: bool = False,
) -> JobSpec:  # fmt: skip
    """A prune job; arguments as for job.prune. Raises UsageError for invalid or contradictory arguments."""
    recipe = (Recipe.named(recipe) if isinstance(recipe, str) else recipe).filled({} if restart else _recorded(out))
    sparsity, pattern = _amount(amount)
    _check_new_values(recipe, stats, calibration.samples)
    if recipe.allocate is not None and pattern is not None:
        raise UsageError(
            f"--allocate {recipe.allocate} distributes a --sparsity among layers, and --pattern {pattern} fixes it for "
            "each; leave one of them out"
        )
    if recipe.allocate is not None and checkpoint.streamed:
        raise UsageError(
            f"--allocate {recipe.allocate} reads all weights several times, and --fetch stream would fetch them each "
            "time; leave one of them out"
        )
    propagation = check_propagate(recipe, propagate)
    if stats is not None:
        if calibration.text is not None or save_stats is not None or propagation != "dense":
            raise UsageError("--stats replaces calibration: leave out --calib, --save-stats and --propagate")
        if any(getattr(calibration, name) != getattr(Calibration, name) for name in ("expert_stats", "expert_tokens")):
            raise UsageError(
                "--stats are finished statistics: leave out --expert-stats and --expert-tokens, which `calibrate` takes"
            )
    needs_pass = stats is None and (
        recipe.needs_statistics or recipe.aims or save_stats is not None or propagation == "pruned"
        or recipe.allocate is not None
    )  # fmt: skip
    uses = recipe.needs_statistics or recipe.aims or recipe.allocate or recipe.fp8_scale == "mse" or save_stats
    if propagate == "pruned" and not uses:
        raise UsageError(f"--propagate pruned is about calibration, and {recipe.name} needs none; leave it out")
    notes = list[str]()
    if not needs_pass and (given := _given(calibration)):
        why = f"{recipe.name} needs no calibration" if stats is None else "--stats are finished statistics"
        notes.append(f"{why}, so that {given} made no difference")
    known = Path(stats) if stats is not None else statistics_of(out) if recipe.allocate is not None else None
    drawn = _drawn(checkpoint, calibration)
    return JobSpec(
        verb="prune", model=checkpoint.fingerprint(), recipe=recipe, sparsity=sparsity, pattern=pattern,
        only=only, skip=skip, propagate=propagation, calibration=drawn if needs_pass else None,
        stats=_stats_digest(Path(stats)) if stats is not None else None, stats_path=known,
        expert_stats=calibration.expert_stats, expert_tokens=calibration.expert_tokens, resources=resources,
        source=checkpoint.path, out=out, save_stats=Path(save_stats) if save_stats is not None else None,
        shard_bytes=parse_bytes(str(shard_size)),
        restart=restart, trust_remote_code=trust_remote_code, content=checkpoint.content, allow_zeros=allow_zeros,
        notes=notes,
    )  # fmt: skip


def describe_calibrate(
    checkpoint: Checkpoint, out: Path, calibration: Calibration, resources: Resources, *,
    restart: bool = False, allow_zeros: bool = False, trust_remote_code: bool = False,
) -> JobSpec:  # fmt: skip
    """A calibrate job; arguments as for job.calibrate. Raises UsageError for invalid arguments."""
    return JobSpec(
        verb="calibrate", model=checkpoint.fingerprint(), recipe=None, sparsity=None, pattern=None,
        only=None, skip=None, propagate="dense", calibration=_drawn(checkpoint, calibration), stats=None,
        expert_stats=calibration.expert_stats, expert_tokens=calibration.expert_tokens, resources=resources,
        source=checkpoint.path, out=out, restart=restart, trust_remote_code=trust_remote_code,
        content=checkpoint.content, allow_zeros=allow_zeros,
    )  # fmt: skip


def _recorded(out: Path) -> Mapping[str, Any]:
    """The fixed fields of the job at OUT, unfinished or finished; empty if there is none, or it cannot be read."""
    if out.name in ("", ".."):
        return {}  # which is refused later
    for path, kind in ((JobState(out, out).folder / "job.json", "job"), (out / REPORT, "report")):
        try:
            job = read_json(path, kind).get("job")
        except CorruptStateError:
            continue
        if isinstance(job, dict):
            return job
    return {}


def _amount(amount: float | str) -> tuple[float | None, str | None]:
    """(sparsity, pattern), one of which is None. Raises UsageError if `amount` is neither."""
    from streamprune.methods.selection import parse_pattern, parse_sparsity

    if isinstance(amount, str):
        parse_pattern(amount)
        return None, amount
    return parse_sparsity(amount), None


def _check_new_values(recipe: Recipe, stats: str | Path | None, samples: int) -> None:
    """Raises UsageError if a refit or tuning lacks the calibration windows that it needs."""
    if stats is not None and recipe.needs_gram:
        raise UsageError(
            f"--stats has no Gram matrices, which {recipe.refit} needs: leave it out, or choose --refit none"
        )
    if stats is not None and recipe.tune is not None:
        raise UsageError("--stats has no hidden states, which --tune needs: leave one of them out")
    if samples < 2 and recipe.tune is not None:
        raise UsageError("--tune holds out a window to measure its success: --samples must be at least 2")


def _given(calibration: Calibration) -> str:
    """The flags of a calibration that differ from their defaults: `--samples and --seed`."""
    flags = flags_of(Calibration)
    found = [flag.name for name, default, flag in flags if getattr(calibration, name) != default]
    return " and ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))


def _drawn(checkpoint: Checkpoint, calibration: Calibration) -> DrawnText:
    from streamprune.calibration.texts import Text, check_seqlen, default_seqlen

    c = calibration
    text = Text(Path(c.text) if c.text is not None else None, c.text_field)
    length = c.seqlen if c.seqlen is not None else default_seqlen(checkpoint.config)
    check_seqlen(length, checkpoint.config)
    return DrawnText(text.path, text.digest(), c.samples, length, c.seed, c.text_field, c.bos)


def _stats_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as e:
        raise UsageError(f"--stats {path}: cannot be read ({e.strerror}); make it with `calibrate`") from e
