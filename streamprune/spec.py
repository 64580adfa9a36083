"""What a job is. Two runs belong to the same job when all their fixed fields are equal.

    fixed        verb, model, score, selector, refit, damping, quantize, fp8_scale, fp8_rounding, sparsity, allocate,
                 pattern, only, skip, propagate, calib, samples, seqlen, seed, bos, expert_stats, expert_tokens, stats,
                 device, dtype, backend; and where layers are tuned, tune, tune_epochs, tune_lr
    changeable   max_ram, max_vram, save_stats, work (only before anything has been cached there)

The fixed fields go into `job.json` while the job is unfinished and into `streamprune.json` for ever.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from streamprune.errors import UsageError
from streamprune.methods.recipes import Recipe

_CHANGEABLE = {"fixed": False}

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """One finished step: stage `done` of `total`, called `name`, after `seconds`. Jobs tell it from a second thread."""

    name: str
    done: int
    total: int
    seconds: float


ProgressCallback = Callable[[Progress], None]


def no_progress(step: Progress) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics come from: `samples` windows of `seqlen` tokens, drawn by `seed`."""

    path: Path | None
    """The text; None is the built-in one."""
    digest: str
    """xxh3_128 of what its tokens come from (model/texts.py)."""
    samples: int
    seqlen: int
    seed: int
    text_field: str = "text"
    """What is read of a text that is records; it is part of the digest."""
    bos: str = "auto"
    """Whether windows begin with a BOS token (model/calibration.py)."""


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


def differences(mine: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """Says in words which of a job's fixed fields differ from recorded ones; empty when none does."""
    keys = [*mine, *(k for k in recorded if k not in mine)]
    return ", ".join(
        f"{k} is {_show(recorded.get(k))} there and {_show(mine.get(k))} here"
        for k in keys
        if mine.get(k) != recorded.get(k)
    )


def is_touched(
    mine: Mapping[str, Any], recorded: Mapping[str, Any], content: object, now: Callable[[], str] | None,
    notes: list[str],
) -> bool:  # fmt: skip
    """Whether only the checkpoint's times differ, and its recorded `content` is that of `now`. Adds to `notes`."""
    if now is None or {k for k in mine.keys() | recorded.keys() if mine.get(k) != recorded.get(k)} != {"model shards"}:
        return False
    since = time.perf_counter()
    if content != now():
        return False
    notes.append(
        "MODEL's shards have other times than when this job began; their headers and 4 KiB of each tensor are the same "
        f"({time.perf_counter() - since:.1f} s to look), so they count as the same model"
    )
    return True


def _show(value: object) -> str:
    return "not set" if value is None else str(value)


def parse_bytes(text: str) -> int:
    """Bytes from "8GiB", "500 MB", "1.5e9". Raises UsageError for anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else "?"
    unit = {"K": "KIB", "M": "MIB", "G": "GIB", "T": "TIB"}.get(unit, unit)
    if not found or unit not in _UNITS or not 0 < float(found.group(1)) * _UNITS[unit] < 2**63:
        raise UsageError(f"{text!r} is not an amount of memory; write for example 8GiB or 500MB")
    return int(float(found.group(1)) * _UNITS[unit])


def format_bytes(count: float) -> str:
    """Bytes for people: "712 MiB", "1.43 GiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            number = count / size
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{count:.0f} B"


def compile_filter(flag: str, pattern: str | None) -> re.Pattern[str] | None:
    """The compiled --only or --skip expression. Raises UsageError when it is no regular expression."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UsageError(f"{flag} {pattern!r} is not a regular expression: {e}") from e


def version_of(package: str) -> str:
    """Its version, or "not installed": this program may be run from its source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
