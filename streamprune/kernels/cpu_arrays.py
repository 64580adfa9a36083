"""The drivers of the CPU kernels, on arrays of numpy: work for several threads. cpu.py has the same for tensors.

Weights are raw bits, uint16 for bf16 and fp16, uint32 for fp32, C-contiguous and aligned. Imports no torch, so that
pruning from a statistics file begins without it.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from streamprune.kernels import cpu_groups, cpu_rows, cpu_stats
from streamprune.kernels.cpu_tiles import EIGHT, in_planes
from streamprune.kernels.lanes import COUNT

Array = np.ndarray[Any, np.dtype[Any]]

FORMS = {
    "BF16": (np.int32(0x7FFF), np.int32(16), np.float32(1), np.int32(0x7F80)),
    "F16": (np.int32(0x7FFF), np.int32(13), np.float32(2.0**112), np.int32(0x7C00)),
    "F32": (np.int32(0x7FFFFFFF), np.int32(0), np.float32(1), np.int32(0x7F800000)),
}
"""Mask of all bits but the sign; shift and factor that convert magnitude bits to float32; bits of infinity."""

PART = 1 << 18
"""Least number of weights per unit of work, so that the cost of a call does not matter."""


class Outcome(NamedTuple):
    """`removed`, `total` and `finite` of a Selection."""

    removed: float
    total: float
    finite: bool


@dataclass(frozen=True)
class Rows:
    """Rows of weights to prune, and where to.

    weight and out (rows, in_features) bits of the dtype `dtype`; out may be weight itself, but not overlap it
    otherwise. feature (in_features,) float32; power 1 or 2. keep (rows, in_features) bool receives the mask; (rows, 0)
    if it is not wanted.
    """

    weight: Array
    dtype: str
    feature: Array
    power: int
    out: Array
    threads: int
    keep: Array = field(default_factory=lambda: np.empty((0, 0), np.bool_))

    def __post_init__(self) -> None:
        if not self.keep.size:
            object.__setattr__(self, "keep", np.empty((len(self.weight), 0), np.bool_))

    def ewma(self, count: int, block: int, alpha: float) -> Outcome:
        """Prunes `count` weights of every row, see cpu.prune_ewma; with block = 0 as cpu.prune_exact."""
        block = min(block, self.weight.shape[1])
        padded, power, root = self._padded(COUNT), self.power, int(block > 0 and self.power == 2)
        if root:
            padded, power = np.sqrt(padded), 1
        form = FORMS[self.dtype]

        def part(begin: int, end: int, loss: Array) -> None:
            rows = slice(begin, end)
            cpu_rows.prune_rows(
                self.weight[rows], padded, power, root, form, count, block, float(alpha), self.out[rows],
                self.keep[rows], loss[rows],
            )  # fmt: skip

        return self._run(part)

    def n_of_m(self, n: int, m: int) -> Outcome:
        """Keeps n of every m consecutive weights, see cpu.prune_n_of_m."""
        form = FORMS[self.dtype]
        feature, shape = in_groups(self._padded(1), m, self.dtype)

        def part(begin: int, end: int, loss: Array) -> None:
            rows = slice(begin, end)
            cpu_groups.prune_groups(
                self.weight[rows], feature, self.power, shape, form, m - n, m, self.out[rows], self.keep[rows],
                loss[rows],
            )  # fmt: skip

        return self._run(part)

    def _padded(self, multiple: int) -> Array:
        """The feature, padded with zeros to a multiple of `multiple`. Its zeros are +0.0: the bits of -0.0 would sort
        before them."""
        return np.pad(self.feature + np.float32(0), (0, -self.feature.size % multiple))

    def _run(self, part: Callable[[int, int, Array], None]) -> Outcome:
        rows, width = self.weight.shape
        if not width:
            return Outcome(0.0, 0.0, True)
        loss = np.ones((rows, 3), np.float64)  # removed, total, is the row finite
        share(rows, max(1, PART // width), lambda begin, end: part(begin, end, loss), self.threads)
        removed, total = (math.fsum(loss[:, i]) for i in range(2))
        return Outcome(removed, total, bool(loss[:, 2].all()))


def in_groups(feature: Array, m: int, dtype: str) -> tuple[Array, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(feature, shape) as cpu_groups.prune_groups wants them, of a feature (n,) whose zeros are +0.0, n % m == 0."""
    size, shift = 1 << (m - 1).bit_length(), int(FORMS[dtype][1])
    groups = np.zeros((-(-feature.size // (m * EIGHT)) * EIGHT, size), np.float32)
    groups[: feature.size // m, size - m :] = feature.reshape(-1, m)
    return in_planes(groups.reshape(-1), size, 2 if shift else 1), ((0,) * size, (0,) * shift)


def first_nonfinite(bits: Array, dtype: str, threads: int) -> int | None:
    """Index of the first NaN or Inf in an array (n,) of bits, or None."""
    found: list[int] = []

    def part(begin: int, end: int) -> None:
        index = cpu_stats.first_nonfinite(bits[begin:end], FORMS[dtype])
        if index >= 0:
            found.append(begin + int(index))

    share(bits.size, PART, part, threads)
    return min(found, default=None)


def share(size: int, step: int, part: Callable[[int, int], None], threads: int, multiple: int = 1) -> None:
    """Calls part(begin, end) for ranges that cover 0..size, on `threads` threads; the caller's is one of them.

    There are about four ranges per thread, to balance the load. All but the last are at least `step` long, and
    multiples of `multiple`.
    """
    step = max(step, -(-size // (4 * threads) // multiple) * multiple)
    stretches = deque((begin, min(begin + step, size)) for begin in range(0, size, step))

    def work() -> None:
        while stretches:
            try:
                stretch = stretches.popleft()
            except IndexError:
                return
            part(*stretch)

    helpers = min(threads, len(stretches)) - 1
    if helpers < 1:
        work()
        return
    pool = _pool(os.getpid(), helpers)
    others = [pool.submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        for other in others:
            if not other.cancel():  # it may still be queued behind another call's work
                other.result()


@lru_cache(maxsize=1)
def _pool(process: int, helpers: int) -> ThreadPoolExecutor:
    """A pool of threads that is kept, because starting threads takes 0.1 ms, or 1 ms on a busy machine.

    `process` is part of the cache key because threads do not survive a fork. A request for another number of threads
    replaces the pool.
    """
    return ThreadPoolExecutor(helpers, thread_name_prefix="streamprune-kernel")
