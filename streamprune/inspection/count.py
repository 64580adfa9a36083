"""Inspection of one linear: counts, comparison with its source if there is one, and check of what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from streamprune.disk.header import TensorRef, show
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.packed import BITMASK, TWO_FOUR, packed_refs
from streamprune.errors import UsageError
from streamprune.inspection.difference import LinearComparison
from streamprune.inspection.report import LinearReport, ScaleReport
from streamprune.inspection.scales import WeightScales, is_bad, read_scales
from streamprune.inspection.stored import BitStream, StoredTensor
from streamprune.methods.counting import MatrixCount, group_counts, long_run
from streamprune.methods.selection import Pattern, parse_pattern, parse_sparsity, prune_count

_BLOCK_BYTES = 2**18  # counted at a time; stays in the cache


@dataclass(frozen=True)
class Expectation:
    """What every linear should have: a pattern, a sparsity in each row, FP8; None or False where it does not matter.

    `text` is the expectation as the user wrote it, joined by commas.
    """

    text: str
    pattern: Pattern | None
    sparsity: float | None
    fp8: bool

    @property
    def of_dense(self) -> Expectation:
        """The same of a linear that is dense on purpose: no zeros, and -0.0 does not matter."""
        return Expectation(self.text, None, None, fp8=False)

    @property
    def is_of_dense(self) -> bool:
        return self.pattern is None and self.sparsity is None and not self.fp8


def parse_expectation(given: str | Sequence[str]) -> Expectation:
    """Parses "2:4", "0.5", "fp8", several of them joined by commas, or a sequence of such texts.

    Raises:
        UsageError: anything else, or several patterns or sparsities.
    """
    texts = [given] if isinstance(given, str) else list(given)
    words = [word.strip() for text in texts for word in text.split(",")]
    patterns = {parse_pattern(word) for word in words if ":" in word}
    sparsities = {_parse_sparsity(word) for word in words if ":" not in word and word.lower() != "fp8"}
    if len(patterns) > 1 or len(sparsities) > 1 or not words:
        raise UsageError(
            f"--expect {show(','.join(words))}: at most one pattern, one sparsity and fp8, such as --expect 2:4,fp8"
        )
    fp8 = any(word.lower() == "fp8" for word in words)
    return Expectation(",".join(words), next(iter(patterns), None), next(iter(sparsities), None), fp8)


def _parse_sparsity(word: str) -> float:
    try:
        number = not math.isnan(float(word))
    except ValueError:
        number = False
    if not number:
        raise UsageError(
            f"--expect {show(repr(word))}: give a pattern such as 2:4, a sparsity such as 0.5, fp8, or both as 2:4,fp8"
        )
    sparsity = parse_sparsity(word)
    if not sparsity:
        raise UsageError("--expect 0 is true of any checkpoint; give a pattern such as 2:4, a sparsity or fp8")
    return sparsity


def inspect_linear(
    maps: ShardMaps,
    tensor: StoredTensor,
    *,
    transposed: bool,
    expected: Expectation | None,
    comparison: LinearComparison | None,
) -> tuple[LinearReport, list[str]]:
    """Reads one linear once; returns its report, and a line for each way in which it is not as expected.

    Raises:
        CheckpointError: it cannot be read, or the parts of a packed one do not fit together.
    """
    rows, width = tensor.shape
    shape = (width, rows) if transposed else (rows, width)
    pattern = expected.pattern if expected else None
    limit = pattern if pattern and shape[1] % pattern.m == 0 else None
    count = MatrixCount(tensor.dtype, shape, limit)
    most_of_four = _read(maps, tensor, count, transposed, comparison)
    scales = read_scales(maps, tensor)
    report = _report(tensor, count, transposed, most_of_four <= 2, scales, comparison)
    if expected is None:
        return report, []
    return report, [f"{show(report.name)}: {why}" for why in _amiss(tensor, count, scales, expected)]


def _read(
    maps: ShardMaps,
    tensor: StoredTensor,
    count: MatrixCount,
    transposed: bool,
    comparison: LinearComparison | None,
) -> int:
    """Passes all rows to `count` and `comparison`; returns the largest number of nonzero items in four stored columns.

    This number decides whether the linear can be packed as 2:4. Packing works along stored rows and on bits, so that
    -0.0 counts as nonzero, and a Conv1D is packed along its outputs. 4 if stored rows are not a multiple of 4 long.
    """
    rows, width = tensor.shape
    row_bytes = tensor.dense_nbytes // rows
    multiple = math.lcm(32, count.limit[1] if count.limit else 1) if transposed else 1
    step = -(-max(1, _BLOCK_BYTES // row_bytes) // multiple) * multiple
    stream = BitStream(maps, tensor)
    most = 4 if width % 4 else 0
    for at in range(0, rows, step):
        block = stream.take(min(step, rows - at) * width).reshape(-1, width)
        negative_zeros = count.found["-0.0"]
        if transposed:
            count.add(0, at, block.T)
        else:
            count.add(at, 0, block)
        if most <= 2 and (transposed or count.found["-0.0"] > negative_zeros):
            most = int(group_counts(np.not_equal(block, 0, order="C"), 4).max())
        if comparison:
            comparison.add(at, block)
    stream.finish()
    return most if transposed else max(most, count.fullest.get(4, 4))


def _report(
    tensor: StoredTensor,
    count: MatrixCount,
    transposed: bool,
    holds_two_four: bool,
    scales: WeightScales | None,
    comparison: LinearComparison | None,
) -> LinearReport:
    zeros = count.row_zeros
    dense = TensorRef(tensor.name, tensor.parts[0].shard, tensor.dtype, tensor.shape, 0, tensor.dense_nbytes)
    kept = int(count.row_nonzeros.sum()) + count.found["-0.0"]
    beside = tensor.scale.nbytes if tensor.scale else 0

    def packed_bytes(layout: str) -> int:
        return beside + sum(part.nbytes for part in packed_refs(dense, layout, kept))

    return LinearReport(
        name=tensor.name.removesuffix(".weight"),
        shard=dense.shard,
        dtype=tensor.dtype,
        shape=(tensor.shape[0], tensor.shape[1]),
        transposed=transposed,
        packed=tensor.layout,
        zeros=int(zeros.sum()),
        min_row_zeros=int(zeros.min()),
        max_row_zeros=int(zeros.max()),
        pattern=str(Pattern(*count.pattern)) if count.pattern else None,
        negative_zeros=count.found["-0.0"],
        nans=count.found["NaN"],
        infs=count.found["Inf"],
        zero_rows=long_run(zeros == count.shape[1]),
        scale=_scale_report(scales),
        nbytes=tensor.nbytes,
        nbytes_dense=dense.nbytes + beside,
        nbytes_two_four=packed_bytes(TWO_FOUR) if holds_two_four and not tensor.is_part else None,
        nbytes_bitmask=packed_bytes(BITMASK) if not tensor.is_part else dense.nbytes + beside,
        difference=comparison.finish() if comparison else None,
    )


def _scale_report(scales: WeightScales | None) -> ScaleReport | None:
    if scales is None:
        return None
    if scales.values is None:
        return ScaleReport(scales.dtype, scales.shape, None, None, 0, scales.fault)
    finite = scales.values[np.isfinite(scales.values)]
    least, largest = (float(finite.min()), float(finite.max())) if finite.size else (None, None)
    return ScaleReport(scales.dtype, scales.shape, least, largest, scales.bad, None)


def _amiss(
    tensor: StoredTensor, count: MatrixCount, scales: WeightScales | None, expected: Expectation
) -> Iterator[str]:
    if expected.sparsity is not None:
        yield from _too_few_zeros(count, expected.sparsity)
    if expected.pattern:
        yield from _overfull(count, expected.pattern)
    for kind, number in count.found.items():
        if number and not (kind == "-0.0" and expected.is_of_dense):
            row, column = count.first[kind]
            yield f"row {row}, input {column}: {kind} ({number} in all)"
    if expected.fp8 and tensor.dtype != "F8_E4M3":
        yield f"is {tensor.dtype}, not F8_E4M3"
    elif expected.fp8 and scales is None:
        yield "is F8_E4M3 without a weight_scale"
    if scales and scales.fault:
        yield scales.fault
    elif scales and scales.values is not None and scales.bad:
        row = int(np.flatnonzero(is_bad(scales.values))[0])
        yield f"row {row}: its scale is {scales.values[row, 0]:g} ({scales.bad} bad ones in all)"


def _too_few_zeros(count: MatrixCount, sparsity: float) -> Iterator[str]:
    inputs = count.shape[1]
    least = prune_count(sparsity, inputs)
    short = np.flatnonzero(count.row_zeros < least)
    if len(short):
        row = int(short[0])
        yield (
            f"row {row} has {count.row_zeros[row]} zeros, a sparsity of {sparsity:g} asks for {least} of "
            f"{inputs} ({len(short)} such rows)"
        )


def _overfull(count: MatrixCount, pattern: Pattern) -> Iterator[str]:
    inputs = count.shape[1]
    if inputs % pattern.m:
        yield f"has {inputs} inputs, which do not divide into groups of {pattern.m}"
    elif count.overfull:
        row, column = count.first["group"]
        yield (
            f"row {row}, inputs {column} to {column + pattern.m - 1}: {count.first_overfull} nonzeros, "
            f"{pattern} allows {pattern.n} ({count.overfull} such groups)"
        )
