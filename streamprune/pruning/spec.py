"""The specification of a job. Two runs belong to the same job if all their fixed fields are equal.

    fixed        verb, model, score, selector, refit, damping, quantize, fp8_scale, fp8_rounding, sparsity, allocate,
                 pattern, only, skip, propagate, calib, samples, seqlen, seed, bos, expert_stats, expert_tokens, stats,
                 device, dtype, backend; where layers are tuned, tune, tune_epochs, tune_lr; and replace_tokens
    changeable   max_ram, max_vram, save_stats, shard_size (which a resumed job ignores), work (only before anything has
                 been cached there)

The fixed fields are written to `job.json` while the job is unfinished, and to `streamprune.json` when it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamprune.disk.journal import differences, is_touched
from streamprune.methods.recipes import Recipe
from streamprune.settings import Calibration, Resources


@dataclass(frozen=True)
class DrawnText:
    """The calibration text, and how it is sampled: `samples` windows of `seqlen` tokens, drawn with `seed`."""

    path: Path | None
    """The text; None for the built-in one."""
    digest: str
    """xxh3_128 of the text's content (calibration/texts.py)."""
    samples: int
    seqlen: int
    seed: int
    text_field: str = "text"
    """The field that is read from records; part of the digest."""
    bos: str = "auto"
    """Whether windows begin with a BOS token (calibration/windows.py)."""


_IF_ANY = ("tune", "mtp", "replace_tokens")
"""Options of a recipe that are among the fixed fields only if they are set."""


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
    """Whether inputs of experts count with their routing weights ("weighted") or all alike ("routed")."""
    expert_tokens: int = Calibration.expert_tokens
    """An expert that sees fewer tokens falls back to statistics pooled over its layer's experts."""
    stats_path: Path | None = None
    """Statistics file that exists before the job begins: that of --stats, or the one gathered for --allocate."""
    save_stats: Path | None = None
    shard_bytes: int | None = None
    """Largest size of a shard; None: each stage has a shard of its own."""
    restart: bool = False
    allow_zeros: bool = False
    """Whether to accept linears that are all zeros (model/zeros.py)."""
    trust_remote_code: bool = False
    content: Callable[[], str] | None = field(default=None, compare=False)
    """Checkpoint.content: identifies the checkpoint if only the times of its files differ."""
    notes: list[str] = field(default_factory=list, compare=False)
    """Messages for the user, to be shown when the job is done."""

    @property
    def work(self) -> Path | None:
        """The folder given with --work."""
        return self.resources.work_folder

    @property
    def gathers(self) -> bool:
        """Whether statistics are gathered by a job of its own first, for --allocate."""
        allocates = self.recipe is not None and self.recipe.allocate is not None
        return allocates and self.stats is None and self.stats_path is not None

    def gathering(self) -> JobSpec:
        """The calibrate job that gathers them."""
        assert self.stats_path is not None
        return replace(
            self, verb="calibrate", recipe=None, sparsity=None, pattern=None, only=None, skip=None, propagate="dense",
            stats_path=None, save_stats=None, out=self.stats_path,
        )  # fmt: skip

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
            **{key: value for key in _IF_ANY if (value := getattr(recipe, key, None)) is not None},
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
        """Describes which fixed fields differ from the `recorded` ones of another job; empty if none does."""
        return differences(self.fixed(), recorded)

    def is_touched(self, recorded: Mapping[str, Any], content: object) -> bool:
        """Whether a recorded job differs only in the times of the checkpoint's files, with the same `content`."""
        return is_touched(self.fixed(), recorded, content, self.content, self.notes)
