"""Scales of FP8 linears: they are in the weights' files and not in a report, so they are read where the files are."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from statistics import median

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import TensorRef, open_file, read_bytes
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.reporting.facts import Cell, Facts, Spread, place_of, plain

_SUFFIX = f".weight{SCALE}"


def with_scales(facts: Facts) -> Facts:
    """The same with `scale` among the spreads of its FP8 linears, over all of their rows.

    Or with a note that says why there are none, where the output's weights are not there or cannot be read.
    """
    if facts.job.get("quantize") != "fp8":
        return facts
    try:
        found = _spreads(facts)
    except (CheckpointError, UnsupportedError) as e:
        return replace(facts, notes=(*facts.notes, f"the scales of its FP8 weights are not shown: {plain(str(e))}"))
    cells = {place: _scaled(cell, found.get(place)) for place, cell in facts.cells.items()}
    return replace(facts, cells=cells)


def _scaled(cell: Cell, spreads: list[Spread] | None) -> Cell:
    if not spreads:
        return cell
    middle = median(s.median for s in spreads)
    whole = Spread(min(s.least for s in spreads), middle, max(s.most for s in spreads), len(spreads))
    return replace(cell, spreads={**cell.spreads, "scale": whole})


def _spreads(facts: Facts) -> dict[tuple[int | None, str], list[Spread]]:
    """The scales of each linear, by layer and kind. Raises CheckpointError, UnsupportedError."""
    found: dict[tuple[int | None, str], list[Spread]] = {}
    checkpoint = open_checkpoint(facts.path)
    refs = [ref for ref in checkpoint.tensors.values() if ref.name.endswith(_SUFFIX)]
    for shard, group in groupby(refs, key=lambda ref: ref.shard):
        path = checkpoint.path / shard
        with open_file(path) as f:
            for ref in group:
                f.seek(ref.begin)
                if spread := Spread.of(_floats(ref, read_bytes(f, path, ref.nbytes))):
                    found.setdefault(place_of(ref.name.removesuffix(_SUFFIX)), []).append(spread)
    return found


def _floats(ref: TensorRef, data: bytes) -> list[float]:
    """What can be drawn of a tensor's numbers; nothing of a dtype that scales do not have."""
    import numpy as np

    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    if ref.dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif ref.dtype in kinds:
        values = np.frombuffer(data, kinds[ref.dtype])
    else:
        return []
    return [float(value) for value in values[np.isfinite(values)]]
