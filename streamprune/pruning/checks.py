"""What a job may be asked for: arguments that contradict one another are refused before anything is read or written."""

from __future__ import annotations

from pathlib import Path

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.state import check_out, partial_of
from streamprune.errors import UsageError
from streamprune.methods.recipes import Recipe
from streamprune.pruning.spec import JobSpec


def check_amount(sparsity: float | None, pattern: str | None) -> None:
    """Exactly one of a sparsity and a pattern, and one that means something. Raises UsageError, as all of these."""
    if (sparsity is None) == (pattern is None):
        raise UsageError("say how much to prune: either --sparsity S or --pattern N:M")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UsageError(f"--sparsity {sparsity} is not in [0, 1); 0.5 prunes half of each row")
    if pattern is not None:
        from streamprune.methods.selection import parse_pattern

        parse_pattern(pattern)


def check_aims(recipe: Recipe, stats: str | Path | None, samples: int) -> None:
    """What needs more than statistics is not given statistics."""
    if stats is not None and recipe.needs_gram:
        raise UsageError(f"--stats has sums only, and {recipe.refit} needs more: leave it out, or choose --refit none")
    if stats is not None and recipe.tune is not None:
        raise UsageError("--stats has sums only, and --tune learns from states: leave one of them out")
    if samples < 2 and recipe.tune is not None:
        raise UsageError("--tune holds a window out to judge by: --samples must be at least 2")


def check_given(stats: str | Path | None, calibrates: bool, expert_stats: str, expert_tokens: int) -> None:
    """Statistics that are given are not asked for in another way as well."""
    if stats is not None and calibrates:
        raise UsageError("--stats takes the place of calibration: leave out --calib, --save-stats and --propagate")
    if stats is not None and (expert_stats, expert_tokens) != (JobSpec.expert_stats, JobSpec.expert_tokens):
        raise UsageError("--stats were gathered already: leave out --expert-stats and --expert-tokens")


def check_choices(backend: str, expert_stats: str, expert_tokens: int) -> None:
    """Words and numbers that are among those there are."""
    if expert_stats not in ("weighted", "routed"):
        raise UsageError(f"--expert-stats {expert_stats}: choose weighted or routed")
    if expert_tokens < 1:
        raise UsageError("--expert-tokens must be at least 1")
    if backend not in ("auto", "numba", "torch"):
        raise UsageError(f"--backend {backend}: choose auto, numba (CPU) or torch (any device)")


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
