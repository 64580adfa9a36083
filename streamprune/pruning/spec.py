"""What a job is. Two runs belong to the same job when all their fixed fields are equal.

    fixed        verb, model, score, selector, refit, damping, quantize, fp8_scale, fp8_rounding, sparsity, allocate,
                 pattern, only, skip, propagate, calib, samples, seqlen, seed, bos, expert_stats, expert_tokens, stats,
                 device, dtype, backend; and where layers are tuned, tune, tune_epochs, tune_lr
    changeable   max_ram, max_vram, save_stats, work (only before anything has been cached there)

The fixed fields go into `job.json` while the job is unfinished and into `streamprune.json` for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from streamprune.disk.journal import differences, is_touched
from streamprune.methods.recipes import Recipe

_CHANGEABLE = {"fixed": False}


@dataclass(frozen=True)
class Calibration:
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
    sparsity: float | None
    pattern: str | None
    only: str | None
    skip: str | None
    propagate: str
    calibration: Calibration | None
    stats: str | None
    """xxh3_128 of the statistics file given with --stats."""
    device: str
    dtype: str
    backend: str
    source: Path = field(metadata=_CHANGEABLE)
    out: Path = field(metadata=_CHANGEABLE)
    stats_path: Path | None = field(default=None, metadata=_CHANGEABLE)
    """Statistics that are there before the job begins: those of `stats`, or what `allocate` goes by."""
    max_ram: int | None = field(default=None, metadata=_CHANGEABLE)
    """Bytes of resident memory that may be used."""
    max_vram: int | None = field(default=None, metadata=_CHANGEABLE)
    """Bytes of the device's memory that may be used."""
    save_stats: Path | None = field(default=None, metadata=_CHANGEABLE)
    work: Path | None = field(default=None, metadata=_CHANGEABLE)
    damping: str | None = None
    """Of a refit: "auto", "absolute" or a number; None where nothing is refitted."""
    allocate: str | None = None
    """How the sparsity is shared out; None is evenly."""
    fp8_scale: str | None = None
    """How FP8 scales are chosen (recipes.check_fp8); None where nothing is quantised."""
    fp8_rounding: str | None = None
    tune_epochs: int | None = None
    """How long layers are tuned; None where they are not."""
    tune_lr: float | None = None
    expert_stats: str = "weighted"
    """Whether the inputs of experts count times the weights of the routing ("weighted"), or as they are ("routed")."""
    expert_tokens: int = 64
    """An expert that sees fewer tokens goes by what all experts of its layer see."""
    restart: bool = field(default=False, metadata=_CHANGEABLE)
    allow_zeros: bool = field(default=False, metadata=_CHANGEABLE)
    """Whether linears may hold nothing but zeros (model/zeros.py)."""
    content: Callable[[], str] | None = field(default=None, metadata=_CHANGEABLE, compare=False)
    """What tells whether the checkpoint is the same where only times differ (Checkpoint.content)."""
    notes: list[str] = field(default_factory=list, metadata=_CHANGEABLE, compare=False)
    """What is to be told of the job when it is done."""
    trust_remote_code: bool = field(default=False, metadata=_CHANGEABLE)

    def fixed(self) -> dict[str, Any]:
        """The fixed fields as flat JSON values, under the names of the command line."""
        flat: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if not f.metadata.get("fixed", True) or (f.name.startswith("tune_") and value is None):
                continue
            if f.name == "model":
                flat |= {f"model {k}": v for k, v in value.items()}
            elif f.name == "recipe":
                flat["score"] = value.score if value else None
                flat["selector"] = value.selector if value and self.pattern is None else None
                flat["refit"] = value.refit if value else None
                flat["quantize"] = value.quantize if value else None
                flat |= {"tune": value.tune} if value and value.tune else {}
            elif f.name == "calibration":
                flat |= dict.fromkeys(("calib", "samples", "seqlen", "seed", "bos"))
                if value:
                    flat |= {
                        "calib": value.digest,
                        "samples": value.samples,
                        "seqlen": value.seqlen,
                        "seed": value.seed,
                        "bos": value.bos,
                    }
            else:
                flat[f.name] = value
        return flat

    def differences(self, recorded: Mapping[str, Any]) -> str:
        """Says in words which fixed fields differ from those of another job; empty when none does."""
        return differences(self.fixed(), recorded)

    def is_touched(self, recorded: Mapping[str, Any], content: object) -> bool:
        """Whether a recorded job differs in times of the checkpoint's files alone, and its `content` is the same."""
        return is_touched(self.fixed(), recorded, content, self.content, self.notes)
