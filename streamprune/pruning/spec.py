"""What a job is. Two runs belong to the same job when all their fixed fields are equal.

    fixed        verb, model, score, selector, refit, damping, quantize, fp8_scale, fp8_rounding, sparsity, allocate,
                 pattern, only, skip, propagate, calib, samples, seqlen, seed, bos, expert_stats, expert_tokens, stats,
                 device, dtype, backend; and where layers are tuned, tune, tune_epochs, tune_lr
    changeable   max_ram, max_vram, save_stats, shard_size, work (both only before anything has been cached there)

The fixed fields go into `job.json` while the job is unfinished and into `streamprune.json` for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.disk.journal import differences, is_touched
from streamprune.methods.recipes import Recipe
from streamprune.settings import Calibration, Resources


@dataclass(frozen=True)
class DrawnText:
    """Which text the statistics come from: `samples` windows of `seqlen` tokens, drawn by `seed`."""

    path: Path | None
    """The text; None is the built-in one."""
    digest: str
    """xxh3_128 of what its tokens come from (calibration/texts.py)."""
    samples: int
    seqlen: int
    seed: int
    text_field: str = "text"
    """What is read of a text that is records; it is part of the digest."""
    bos: str = "auto"
    """Whether windows begin with a BOS token (calibration/windows.py)."""


@dataclass(frozen=True)
class JobSpec:
    """One prune or calibrate job. See the module's docstring for what may change on resume."""

    verb: str
    model: Mapping[str, str]
    """The checkpoint's fingerprint (disk/checkpoint.py)."""
    recipe: Recipe | None
    """Filled in (Recipe.filled); None for calibrate."""
    sparsity: float | None
    pattern: str | None
    only: str | None
    skip: str | None
    propagate: str
    calibration: DrawnText | None
    stats: str | None
    """xxh3_128 of the statistics file given with --stats."""
    source: Path
    out: Path
    resources: Resources = field(default_factory=Resources)
    expert_stats: str = Calibration.expert_stats
    """Whether the inputs of experts count times the weights of the routing ("weighted"), or as they are ("routed")."""
    expert_tokens: int = Calibration.expert_tokens
    """An expert that sees fewer tokens goes by what all experts of its layer see."""
    stats_path: Path | None = None
    """Statistics that are there before the job begins: those of `stats`, or what `allocate` goes by."""
    save_stats: Path | None = None
    shard_bytes: int | None = None
    """How large shards may get."""
    restart: bool = False
    allow_zeros: bool = False
    """Whether linears may hold nothing but zeros (model/zeros.py)."""
    trust_remote_code: bool = False
    content: Callable[[], str] | None = field(default=None, compare=False)
    """What tells whether the checkpoint is the same where only times differ (Checkpoint.content)."""
    notes: list[str] = field(default_factory=list, compare=False)
    """What is to be told of the job when it is done."""

    @property
    def work(self) -> Path | None:
        """The folder that was asked for as that of the activation cache."""
        return self.resources.work_folder

    def fixed(self) -> dict[str, Any]:
        """The fixed fields as flat JSON values, under the names of the command line."""
        drawn, recipe = self.calibration, self.recipe
        return {
            "verb": self.verb,
            **{f"model {k}": v for k, v in self.model.items()},
            "score": recipe.score if recipe else None,
            "selector": recipe.selector if recipe and self.pattern is None else None,
            "refit": recipe.refit if recipe else None,
            "quantize": recipe.quantize if recipe else None,
            **({"tune": recipe.tune} if recipe and recipe.tune else {}),
            "sparsity": self.sparsity, "pattern": self.pattern, "only": self.only, "skip": self.skip,
            "propagate": self.propagate,
            "calib": drawn.digest if drawn else None, "samples": drawn.samples if drawn else None,
            "seqlen": drawn.seqlen if drawn else None, "seed": drawn.seed if drawn else None,
            "bos": drawn.bos if drawn else None,
            "stats": self.stats, "device": self.resources.device, "dtype": self.resources.dtype,
            "backend": self.resources.backend,
            **{key: getattr(recipe, key, None) for key in ("damping", "allocate", "fp8_scale", "fp8_rounding")},
            **({"tune_epochs": recipe.tune_epochs, "tune_lr": recipe.tune_lr} if recipe and recipe.tune else {}),
            "expert_stats": self.expert_stats, "expert_tokens": self.expert_tokens,
        }  # fmt: skip

    def differences(self, recorded: Mapping[str, Any]) -> str:
        """Says in words which fixed fields differ from those of another job; empty when none does."""
        return differences(self.fixed(), recorded)

    def is_touched(self, recorded: Mapping[str, Any], content: object) -> bool:
        """Whether a recorded job differs in times of the checkpoint's files alone, and its `content` is the same."""
        return is_touched(self.fixed(), recorded, content, self.content, self.notes)
