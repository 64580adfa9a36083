"""Writes one stage into its part of a shard through numpy and Numba alone: jobs that only select, on the CPU.

The same bytes and reports as from shard.py, which needs torch, and can refit, quantise and use a GPU. Such a job starts
three times as fast without torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from streamprune.disk.durable import Buffer, FilePart
from streamprune.disk.header import TensorRef
from streamprune.disk.mapped import MappedFiles
from streamprune.disk.shards import Part, fill_in_order
from streamprune.kernels.cpu_arrays import Array, Rows
from streamprune.methods.selection import select_bits
from streamprune.methods.stats import InputStats
from streamprune.model.array_checks import finite_bits, refuse_nonfinite_bits, refuse_zero_bits, row_ranges
from streamprune.model.stages import PRUNABLE, Stage
from streamprune.pruning.linears import CHUNK_BYTES, linear_report, parts_of, pieces
from streamprune.pruning.target import Target

if TYPE_CHECKING:
    from streamprune.calibration.grams import LayerGrams


class ArrayWriter:
    """As shard.ShardWriter, for a target without refit and quantisation."""

    def __init__(self, target: Target, maps: MappedFiles, *, allow_zeros: bool = False) -> None:
        self._target, self._maps, self._allow_zeros = target, maps, allow_zeros
        self._threads = kernel_threads()

    def fill(
        self, file: FilePart, part: Part, stage: Stage, stats: Callable[[str, int], InputStats],
        grams: LayerGrams | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """See and raises as ShardWriter.fill."""
        work = _StageArrays(self._target, self._maps, stage, stats, self._threads, self._allow_zeros)
        fill_in_order(file, part.header, part.tensors, work.content, written=work.release)
        return work.linears


class _StageArrays:
    """The work on one stage: produces the bytes of each of its tensors."""

    def __init__(
        self, target: Target, maps: MappedFiles, stage: Stage, stats: Callable[[str, int], InputStats],
        threads: int, allow_zeros: bool,
    ) -> None:  # fmt: skip
        self.linears: list[dict[str, Any]] = []
        self._target, self._maps, self._stage, self._stats = target, maps, stage, stats
        self._threads, self._allow_zeros = threads, allow_zeros
        self._stored = {ref.name: ref for ref in stage.tensors}
        self._linear_tensors = {ref.name for ref in stage.linears.values()}
        self._parts: Mapping[str, list[tuple[str, TensorRef]]] = parts_of(stage, target.selected)

    def content(self, ref: TensorRef) -> Iterator[Buffer]:
        """The bytes of `ref`, one of the part's tensors, in pieces."""
        if ref.name in self._parts:
            whole, part = self._stored[ref.name], None
            for name, part in self._parts[ref.name]:
                yield from self._pruned(part, name) if name in self._target.selected else self._checked(part)
            if part is not None and part.end < whole.end:  # of experts that give back their input
                yield from pieces(self._maps.raw(replace(whole, begin=part.end)))
        elif ref.name in self._target.skeleton.used and ref.dtype in PRUNABLE:  # or a table of integers
            yield from self._checked(self._stored[ref.name])
        else:
            yield from pieces(self._maps.raw(self._stored[ref.name]))

    def release(self, ref: TensorRef, begin: int, end: int) -> None:
        """Releases the mapped pages behind bytes `begin` to `end` of `ref`, a tensor of the output."""
        if begin < end:
            source = self._stored[ref.name]
            done = replace(source, begin=source.begin + begin, end=source.begin + end)
            self._maps.release([done], drop_cache=True)

    def _checked(self, ref: TensorRef) -> Iterator[Buffer]:
        """The bytes of a tensor that is not pruned, checked for NaN and Inf."""
        chunks = finite_bits(self._maps, ref, CHUNK_BYTES, self._threads, self._stored[ref.name])
        for _, rows in self._not_empty(ref, chunks) if ref.name in self._linear_tensors else chunks:
            yield _bytes(rows)

    def _not_empty(self, ref: TensorRef, chunks: Iterator[tuple[int, Array]]) -> Iterator[tuple[int, Array]]:
        return chunks if self._allow_zeros else refuse_zero_bits(ref, chunks)

    def _pruned(self, ref: TensorRef, name: str) -> Iterator[Buffer]:
        transposed = name in self._target.skeleton.transposed
        width, high = ref.shape if transposed else ref.shape[::-1]
        feature, power = self._target.feature(self._stats, name, width)
        removed = total = 0.0
        chunks = row_ranges(self._maps, ref, ref.nbytes if transposed else CHUNK_BYTES)
        for begin, rows in self._not_empty(ref, chunks):
            weight = np.ascontiguousarray(rows.T) if transposed else rows
            work = Rows(weight, ref.dtype, feature, power, np.empty_like(weight), self._threads)
            found = select_bits(work, self._target.of(name), self._target.recipe.selector)
            if not found.finite:
                refuse_nonfinite_bits(ref, begin, rows, self._threads, self._stored[ref.name])
            removed, total = removed + found.removed, total + found.total
            yield _bytes(np.ascontiguousarray(work.out.T) if transposed else work.out)
        self.linears.append(linear_report(name, high, width, self._target.of(name), removed, total))


def kernel_threads() -> int:
    """How many threads kernels run on: torch's number where it is there, or else OMP_NUM_THREADS, or all processors."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bytes(array: Array) -> Buffer:
    """The bytes of an array, without a copy."""
    view: memoryview = array.reshape(-1).view(np.uint8).data
    return view
