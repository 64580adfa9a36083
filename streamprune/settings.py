"""Settings of a job: frozen dataclasses, validated when created, shared by the Python API and the command line.

A field made by `option` is also a flag of the command line, with the same default; `arguments.py` turns these fields
into arguments. The fields of a recipe are in methods/recipes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from streamprune.errors import UsageError
from streamprune.process.memory import parse_bytes

MOST_TOKENS = 1 << 27
"""Limit on the calibration tokens of a job: the ids of so many take 1 GiB."""


@dataclass(frozen=True)
class Flag:
    """How a field is written on the command line."""

    name: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    kind: Callable[[str], Any] | None = None


def option(
    default: Any, text: str, *, flag: str | None = None, metavar: str | None = None,
    choices: tuple[str, ...] | None = None, kind: Callable[[str], Any] | None = None,
) -> Any:  # fmt: skip
    """A dataclass field that is also a flag, called --NAME unless `flag` is given; `text` is its help."""
    return field(default=default, metadata={"flag": Flag(flag or "", text, metavar, choices, kind)})


def flags_of(settings: type) -> Iterator[tuple[str, Any, Flag]]:
    """(field, default, flag) of each field of a class of settings that is a flag."""
    for f in fields(settings):
        if (flag := f.metadata.get("flag")) is not None:
            name = flag.name or "--" + f.name.replace("_", "-")
            yield f.name, f.default, Flag(name, flag.help, flag.metavar, flag.choices, flag.kind)


def check_choice(settings: object, *names: str) -> None:
    """Raises UsageError if a field among `names` has a value that is not among the choices of its flag."""
    known = {name: flag for name, _, flag in flags_of(type(settings))}
    for name in names:
        value, flag = getattr(settings, name), known[name]
        if flag.choices is not None and value not in flag.choices:
            raise UsageError(f"{flag.name} {value}: choose {', '.join(flag.choices)}")


@dataclass(frozen=True)
class Calibration:
    """The calibration text, and how windows are drawn from it. Raises UsageError for invalid values."""

    text: str | Path | None = option(
        None, "calibration text: plain text, JSON records or Parquet, compressed or not; a folder or glob pattern of "
        "such files; or token ids in a .npy file (default: a built-in text)", flag="--calib", metavar="FILE",
    )  # fmt: skip
    text_field: str = option(
        "text", "field to read from JSON or Parquet records: a string, or chat messages, which are formatted with the "
        "tokenizer's chat template (default: %(default)s)", metavar="NAME",
    )  # fmt: skip
    bos: str = option(
        "auto", "begin each window with the BOS token (default: auto, if the tokenizer adds it by itself)",
        choices=("auto", "always", "never"),
    )  # fmt: skip
    samples: int = option(128, "number of calibration windows (default: %(default)s)", metavar="N", kind=int)
    seqlen: int | None = option(
        None, "window length in tokens (default: min(2048, the model's limit))", metavar="N", kind=int
    )
    seed: int = option(0, "seed for drawing the windows (default: %(default)s)", metavar="N", kind=int)
    expert_stats: str = option(
        "weighted", "for mixtures of experts, how much a token counts in the statistics of an expert: weighted, by its "
        "routing weight; routed, as much as any other token routed to it (default: %(default)s)",
        choices=("weighted", "routed"),
    )  # fmt: skip
    expert_tokens: int = option(
        64, "an expert that sees fewer tokens falls back to statistics pooled over its layer's experts (default: "
        "%(default)s)", metavar="N", kind=int,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_choice(self, "bos", "expert_stats")
        if self.expert_tokens < 1:
            raise UsageError("--expert-tokens must be at least 1")
        if self.samples < 1 or self.seed < 0:
            raise UsageError("--samples must be at least 1, --seed not negative")
        if self.samples * (self.seqlen or 2048) > MOST_TOKENS:
            raise UsageError(
                f"--samples {self.samples} of {self.seqlen or 2048} tokens are more than the limit of {MOST_TOKENS} "
                "tokens; choose fewer"
            )


@dataclass(frozen=True)
class Resources:
    """What a job may use of the machine. Sizes are bytes, or text such as "8GiB". Raises UsageError if invalid."""

    device: str = option("auto", "cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    dtype: str = option(
        "auto", "dtype of the computation (default: the stored dtype if the device computes in it fast, else float32)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    backend: str = option(
        "auto", "kernels for pruning: numba (CPU only) or torch (any device) (default: by device)",
        choices=("auto", "numba", "torch"),
    )  # fmt: skip
    max_ram: int | str | None = option(None, "limit on resident memory, such as 4GiB (default: none)", metavar="SIZE")
    max_vram: int | str | None = option(None, "limit on GPU memory (default: what is free)", metavar="SIZE")
    work: str | Path | None = option(
        None, "folder for activations, preferably on a fast disk (default: in OUT.partial; of eval, in ~/.cache)",
        metavar="DIR",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_choice(self, "dtype", "backend")
        _ = self.ram, self.vram  # raise UsageError for sizes that cannot be read

    @property
    def ram(self) -> int | None:
        """`max_ram` in bytes."""
        return _bytes(self.max_ram)

    @property
    def vram(self) -> int | None:
        """`max_vram` in bytes."""
        return _bytes(self.max_vram)

    @property
    def work_folder(self) -> Path | None:
        """`work` as a path."""
        return Path(self.work) if self.work is not None else None


def _bytes(size: int | str | None) -> int | None:
    return parse_bytes(size) if isinstance(size, str) else size
