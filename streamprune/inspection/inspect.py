"""Inspects a checkpoint's linears: zeros, N:M patterns, and faults (-0.0, NaN, Inf, bad scales).

Reads headers and bytes only and builds no model, so that any safetensors checkpoint can be inspected: of an unknown
architecture, quantised, or packed (it is unpacked on the fly). disk/linears.py defines what counts as a linear.

A row is an output; along it lie the inputs. transformers' Conv1D stores (in, out), so that a row is a column on disk.
Tensors are read in chunks of rows: about 20 MiB of memory for each checkpoint, whatever its size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.header import show
from streamprune.disk.hub import resolve_model
from streamprune.disk.linears import FLOATING, by_number, compile_filter, is_transposed
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.quantised import inspectable
from streamprune.disk.report import REPORT
from streamprune.errors import UnsupportedError, UsageError
from streamprune.inspection.count import inspect_linear, parse_expectation
from streamprune.inspection.difference import (
    CHANGED,
    EQUAL,
    EXTRA,
    MISSING,
    OTHER_DTYPE,
    OTHER_SHAPE,
    Difference,
    LinearComparison,
    relative_error,
    same_bytes,
)
from streamprune.inspection.pruned import find_pruned
from streamprune.inspection.report import Inspection, LinearReport, totals_of
from streamprune.inspection.stored import StoredTensor, find_tensors, linears_of
from streamprune.model.decoded import maps_of
from streamprune.process import interrupts


def inspect(
    model: str | Path,
    *,
    against: str | Path | None = None,
    expect: str | Sequence[str] | None = None,
    only: str | None = None,
    skip: str | None = None,
    revision: str | None = None,
    quiet: bool = False,
    on_linear: Callable[[LinearReport], None] | None = None,
) -> Inspection:
    """Inspects every linear of `model`, a folder or a hub name, dense or packed.

    `against` is another checkpoint with the same tensor names, usually the one that `model` was made from; all tensors
    are compared with it. `only` and `skip` are regular expressions searched for in the names of linears; linears that
    they exclude are not compared either.

    `expect` is "N:M" (at most N nonzeros in every M inputs), a sparsity such as "0.5" (at least floor(0.5 · in) zeros
    in every row), "fp8" (F8_E4M3 with a weight_scale), or several of them as "2:4,fp8" or a list. NaN, Inf, -0.0 and
    bad scales fail any expectation; with `against`, so does every tensor that is missing, extra or of another shape,
    and every difference in a tensor other than a linear. Of linears that were not pruned, by the report in the folder
    of an output of prune (`left_dense`), only NaN, Inf and bad scales fail it. `on_linear` is called after each linear.

    Raises:
        UsageError: `expect`, `only` or `skip` is malformed, or no linear is selected.
        UnsupportedError: the checkpoint has no linears as defined in disk/linears.py.
        CheckpointError: the checkpoint or `against` cannot be read.
        CorruptStateError: the report of an output of prune is damaged, and something is expected.
    """
    expected = None if expect is None else parse_expectation(expect)
    chosen = _Filter(compile_filter("--only", only), compile_filter("--skip", skip))
    reports: list[LinearReport] = []
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        mine = _open(resolve_model(model, revision=revision, quiet=quiet), stack)
        source = None if against is None else _open(resolve_model(against, quiet=quiet), stack, mine.checkpoint)
        names = _choose(mine, chosen)
        left = _left_dense(mine, names) if expected else {}
        if left and len(left) == len(names):
            failures.append(f"none of these linears was pruned ({len(left)}), says {mine.checkpoint.path / REPORT}")
        for name in names:
            interrupts.check()
            tensor = mine.linears[name]
            other = source.tensors.get(tensor.name) if source else None
            comparison = None
            if source and other and _comparable(tensor, other):
                comparison = LinearComparison(mine.maps, tensor, source.maps, other)
            report, amiss = inspect_linear(
                mine.maps,
                tensor,
                transposed=is_transposed(mine.checkpoint, name),
                expected=expected.of_dense if expected and name in left else expected,
                comparison=comparison,
            )
            reports.append(report)
            failures += amiss
            if on_linear:
                on_linear(report)
        difference = _compare(mine, source, chosen, reports) if source else None
    if expected and difference:
        failures += [
            f"{show(name)}: {status}, compared with {show(against)}" for name, status in difference.amiss.items()
        ]
    ok = None if expected is None else not failures
    text = expected.text if expected else None
    return Inspection(
        mine.checkpoint.path, tuple(reports), totals_of(reports), text, ok, tuple(failures), difference, tuple(left)
    )


@dataclass(frozen=True)
class _Opened:
    checkpoint: Checkpoint
    maps: ShardMaps
    tensors: Mapping[str, StoredTensor]
    linears: Mapping[str, StoredTensor]
    """By module name, in the order of layers."""


@dataclass(frozen=True)
class _Filter:
    keep: re.Pattern[str] | None
    drop: re.Pattern[str] | None

    def takes(self, name: str) -> bool:
        return (not self.keep or bool(self.keep.search(name))) and not (self.drop and self.drop.search(name))


def _open(path: Path, stack: contextlib.ExitStack, against: Checkpoint | None = None) -> _Opened:
    checkpoint = inspectable(open_checkpoint(path), against)
    maps = stack.enter_context(maps_of(checkpoint))
    tensors = find_tensors(checkpoint, maps)
    return _Opened(checkpoint, maps, tensors, linears_of(checkpoint, tensors))


def _choose(opened: _Opened, chosen: _Filter) -> list[str]:
    found = opened.linears
    if not found:
        raise UnsupportedError(
            f"{opened.checkpoint.path}: no tensor looks like a layer's linear (2-D, floating, `layers.N.….weight`); "
            "pass a model's checkpoint"
        )
    names = [name for name in found if chosen.takes(name)]
    if not names:
        raise UsageError(
            f"--only and --skip leave none of {len(found)} linears; the first is {show(next(iter(found)))}"
        )
    return names


def _left_dense(opened: _Opened, names: Sequence[str]) -> dict[str, None]:
    """Those of the linears `names` that were not pruned, as the report of an output says, in their order."""
    shapes = {name: (tensor.shape[0], tensor.shape[1]) for name, tensor in opened.linears.items()}
    pruned = find_pruned(opened.checkpoint.path, shapes)
    return {} if pruned is None else dict.fromkeys(name for name in names if name not in pruned)


def _comparable(tensor: StoredTensor, other: StoredTensor) -> bool:
    return tensor.shape == other.shape and other.dtype in FLOATING


def _compare(mine: _Opened, source: _Opened, chosen: _Filter, reports: Sequence[LinearReport]) -> Difference:
    """Compares all tensors of both checkpoints; the results for selected linears are in `reports` already."""
    compared = {f"{report.name}.weight": report.difference for report in reports}
    modules = {**mine.linears, **source.linears}
    linears = {f"{module}.weight" for module in modules}
    left_out = {f"{module}.weight" for module in modules if not chosen.takes(module)}
    statuses = {}
    for name in sorted((mine.tensors.keys() | source.tensors.keys()) - left_out, key=by_number):
        tensor, other = mine.tensors.get(name), source.tensors.get(name)
        found = compared.get(name)
        if tensor is None or other is None:
            statuses[name] = EXTRA if other is None else MISSING
        elif found:
            statuses[name] = found.status
        elif tensor.shape != other.shape:
            statuses[name] = OTHER_SHAPE
        elif tensor.dtype != other.dtype:
            statuses[name] = OTHER_DTYPE
        else:
            statuses[name] = EQUAL if same_bytes(mine.maps, tensor, source.maps, other) else CHANGED
    sums = [(d.squared_error, d.squared_norm) for d in compared.values() if d]
    known = [(error, norm) for error, norm in sums if error is not None and norm is not None]
    whole = known and len(known) == len(sums)
    error, norm = (sum(e for e, _ in known), sum(n for _, n in known)) if whole else (None, None)
    return Difference(
        source.checkpoint.path, statuses, frozenset(linears & statuses.keys()), relative_error(error, norm)
    )
