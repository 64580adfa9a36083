"""What a page tells of one OUT, from its `streamprune.json`: linears gathered by layer and kind, and stages.

A kind is what a linear is called within its layer, `self_attn.q_proj`; a layer's experts share one,
`mlp.experts.*.up_proj`, of which the least, the median and the most are kept. So a page of 256 experts a layer is no
longer than one of eight. A report may come from anywhere: every field is looked at before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from streamprune.disk import journal
from streamprune.disk.header import show
from streamprune.disk.report import REPORT, before_packing
from streamprune.disk.state import partial_of
from streamprune.errors import CheckpointError, CorruptStateError, StateError
from streamprune.pruning.report import notes_of

METRICS = (
    "sparsity", "removed_score", "error_mask", "error", "held_out_error_mask", "held_out_error", "damping",
    "error_fp8", "rounding_error",
)  # fmt: skip
"""Numbers that a linear may have in a report: pruning/refit.py and pruning/quantise.py say what they are."""

_IN_LAYER = re.compile(r"^(.*?)\.(\d{1,9})\.(.+)$")
_EXPERT = re.compile(r"(^|\.)experts\.\d+(?=\.|$)")
_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "gate_up_proj", "up_proj", "down_proj")
_MOST_CHARACTERS, _MOST = 200, 1e100


@dataclass(frozen=True)
class Spread:
    """Of `count` numbers."""

    least: float
    median: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of no numbers."""
        return cls(min(values), median(values), max(values), len(values)) if values else None


@dataclass(frozen=True)
class Cell:
    """The linears of one kind in one layer: one, or as many as it has experts."""

    linears: int
    weights: int
    pruned: int
    spreads: Mapping[str, Spread]
    """Of each of METRICS that any of them has."""

    @property
    def sparsity(self) -> float:
        return self.pruned / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class StageFacts:
    """One stage: seconds of work, and the highest resident bytes of the process so far."""

    name: str
    seconds: float
    peak: int
    pooled: int
    gram_passes: int
    tune: Mapping[str, float]
    """As methods/tuning.py reports; empty where nothing was tuned."""


@dataclass(frozen=True)
class Facts:
    """What is known of one OUT."""

    name: str
    path: Path
    report: Mapping[str, Any]
    """`streamprune.json` itself."""
    job: Mapping[str, Any]
    recipe: str
    sparsity: float
    seconds: float
    peak: int
    cells: Mapping[tuple[int | None, str], Cell]
    """By layer and kind; the layer is None of a linear that is in none."""
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    stages: tuple[StageFacts, ...]
    notes: tuple[str, ...]
    """What a user must know of the job: fallbacks, and what was left behind."""

    def spreads(self, metric: str, kind: str) -> dict[int, Spread]:
        """One of METRICS of a kind, by layer."""
        found = ((layer, self.cells.get((layer, kind))) for layer in self.layers)
        return {layer: cell.spreads[metric] for layer, cell in found if cell and metric in cell.spreads}

    def values(self, metric: str) -> dict[tuple[int, str], float]:
        """The medians of one of METRICS, by layer and kind."""
        found = ((place, cell.spreads.get(metric)) for place, cell in self.cells.items())
        return {(layer, kind): spread.median for (layer, kind), spread in found if spread and layer is not None}

    def has(self, metric: str) -> bool:
        """Whether any linear has it."""
        return any(metric in cell.spreads for cell in self.cells.values())

    @property
    def amount(self) -> str:
        """How much was asked for: `2:4`, or `50 %`."""
        pattern, sparsity = self.job.get("pattern"), number(self.job.get("sparsity"))
        return plain(pattern) if pattern is not None else f"{100 * sparsity:.4g} %" if sparsity is not None else "none"


def number(value: object) -> float | None:
    """A number that can be drawn, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_MOST < value < _MOST else None


def plain(value: object, most: int = _MOST_CHARACTERS) -> str:
    """A value from a file as text of one line that every browser can show, of at most so many characters."""
    text = value if isinstance(value, str) else show(value)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def read_facts(out: Path) -> Facts:
    """What is known of the folder `out`, a finished output of prune, or what `pack` made of one.

    Raises:
        CheckpointError: there is no such folder.
        StateError: it is no output of streamprune, or not finished.
        CorruptStateError: its report is damaged, of another version, or says nothing of pruning.
    """
    path = out / REPORT
    if not out.is_dir():
        raise CheckpointError(f"no such folder: {show(out)}; pass an OUT of prune" + _unfinished(out))
    if not path.is_file():
        raise StateError(f"{show(out)} holds no {REPORT}, so it is not an output of streamprune" + _unfinished(out))
    try:
        report = journal.read_json(path, "report")
    except CorruptStateError as e:
        raise CorruptStateError(str(e).replace("start again with --restart", _mend(out))) from e
    if isinstance(packed := report.get("packed"), dict):
        report = before_packing(path, packed) or {}
    if "linears" not in report:
        raise CorruptStateError(f"{path} says nothing of pruning; pass an OUT of prune")
    try:
        return _facts(out, report)
    except _DamagedError as e:
        raise CorruptStateError(f"{path} is damaged ({e}); {_mend(out)}") from None


def _unfinished(out: Path) -> str:
    if (out / ".streamprune").is_dir():
        return "; it is unfinished, the same command goes on"
    partial = partial_of(out) if out.name else None
    return f"; {partial} is unfinished, the same command goes on" if partial is not None and partial.is_dir() else ""


def _named(out: Path) -> str:
    return out.name if out.name not in ("", "..") else out.resolve().name


def _mend(out: Path) -> str:
    return f"leave {show(out)} out, or remove it and prune again"


class _DamagedError(Exception):
    """A field is not what it has to be; its text says which."""


def _number(record: Mapping[str, Any], key: str) -> float:
    found = number(record.get(key))
    if found is None or found < 0:
        raise _DamagedError(key)
    return found


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _DamagedError(key)
    return value


def _list(value: object, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise _DamagedError(key)
    return value


def _facts(out: Path, report: Mapping[str, Any]) -> Facts:
    cells = _cells(_list(report["linears"], "linears"))
    kinds = sorted({kind for _, kind in cells}, key=_place)
    recipe = report.get("recipe")
    return Facts(
        name=plain(_named(out)), path=out, report=report, job=_mapping(report.get("job"), "job"),
        recipe=plain(recipe) if recipe is not None else "no recipe", sparsity=_number(report, "sparsity"),
        seconds=_number(report, "seconds"), peak=int(_number(report, "peak_rss_bytes")), cells=cells,
        layers=tuple(sorted({layer for layer, _ in cells if layer is not None})), kinds=tuple(kinds),
        stages=tuple(_stage(_mapping(s, "stages")) for s in _list(report.get("stages"), "stages")),
        notes=_notes(report),
    )  # fmt: skip


def _notes(report: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return tuple(map(plain, notes_of(report)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _DamagedError("what notes are made of") from None


def _stage(record: Mapping[str, Any]) -> StageFacts:
    tune = record.get("tune", {})
    return StageFacts(
        plain(record.get("name")), _number(record, "seconds"), int(_number(record, "peak_rss_bytes")),
        len(_list(record.get("pooled", []), "pooled")), int(number(record.get("gram_passes", 0)) or 0),
        {key: found for key, value in _mapping(tune, "tune").items() if (found := number(value)) is not None},
    )  # fmt: skip


def _cells(linears: Sequence[Any]) -> dict[tuple[int | None, str], Cell]:
    groups: dict[tuple[int | None, str], list[Mapping[str, Any]]] = {}
    for linear in linears:
        name = _mapping(linear, "linears").get("name")
        if not isinstance(name, str):
            raise _DamagedError("linears")
        groups.setdefault(place_of(name), []).append(linear)
    return {place: _cell(group) for place, group in groups.items()}


def _cell(group: Sequence[Mapping[str, Any]]) -> Cell:
    weights = sum(int(_number(n, "rows")) * int(_number(n, "in_features")) for n in group)
    pruned = sum(int(_number(n, "pruned")) for n in group)
    spreads = {}
    for metric in METRICS:
        if spread := Spread.of([found for n in group if (found := number(n.get(metric))) is not None]):
            spreads[metric] = spread
    return Cell(len(group), weights, pruned, spreads)


def place_of(name: str) -> tuple[int | None, str]:
    """Layer and kind of a linear, by its name; a layer is the first number in it."""
    found = _IN_LAYER.match(name)
    layer, rest = (int(found[2]), found[3]) if found else (None, name)
    return layer, plain(_EXPERT.sub(r"\1experts.*", rest))


def _place(kind: str) -> tuple[bool, bool, int, str]:
    """Attention goes first, experts last; within them the order of use, as far as it is known."""
    leaf = kind.rpartition(".")[2]
    rank = _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER)
    return "attn" not in kind and "attention" not in kind, "experts" in kind, rank, kind
