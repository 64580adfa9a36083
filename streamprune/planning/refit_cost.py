"""The work of refitting a layer's linears: mostly products of rows with Gram matrices, most of them in float32.

    Grams     for each input that linears share: tokens · in² multiply-adds; little more than half of them if the
              Gram fits into memory, as only one triangle is computed then
    inverses  in³ / 2 multiply-adds each, in many small products; in³ / 3 for a factor, or where only the diagonal is
              needed: once per Gram, and once more for each damping that is tried
    rows      rows · in² multiply-adds per product; as much for the sampled rows, for each damping
    errors    of the sampled rows on held-out inputs; three products of all rows for the report

and the work between the products: sums of arrays, and selecting weights. A Gram in a file is assumed to be as fast as
one in memory. Arithmetic only; planning/cost.py divides by speeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple


class Effort(NamedTuple):
    """The work of a refit for a linear of (rows, in), and for its Gram."""

    products: int
    """Products (rows, in) · (in, in)."""
    selections: int
    """How often it selects the weights to keep."""
    inverses: float = 0.0
    """Multiply-adds in in³, as if they were as fast as one large product."""
    native: bool = False
    """Whether these products are computed in bf16 if the pass is."""
    swept: int = 0
    """Bytes moved per weight besides those of products, in refits that work column by column."""
    compiled: int = 0
    """Bytes moved per weight in an iteration besides its product, by compiled loops on the CPU; 0 if there are none."""


EFFORTS = {
    "cg": Effort(1 + 10, 1),
    "gradual-cg": Effort(15 * (1 + 5) + 1 + 10, 16),
    "obs-admm": Effort(20, 18, 1.5, native=True, compiled=30),
    "admm": Effort(20, 15, 0.9, compiled=30),
    "sparsegpt": Effort(1, 1, 2 / 3, swept=96),
}
"""By name of the refit (methods/refits.py). SparseGPT's one product is half a product, in blocks of 128 columns; a
pruned weight changes the columns after it in its block, 64 on average."""

_BLOCK = 128
"""Columns that SparseGPT processes in one call, on the CPU."""

TRIED = 2
"""Dampings that are usually tried before no further one is better."""

JUDGED = 3
"""Products with the Gram for the report: of the weights themselves, and the errors of the mask and of the refit."""

PER_PRODUCT = 90
"""Bytes moved per weight in an iteration besides its product: about twenty sums and products of float32 arrays that are
larger than the CPU's caches."""

BLOCKS, LEAST_BLOCK = 8, 256
"""A Gram's triangle is computed in blocks of an eighth of its columns, but at least so many
(calibration/gram_sums.py)."""


@dataclass(frozen=True)
class RefitWork:
    """The work of refitting the linears of a layer, in a whole run: operations and bytes."""

    passes: int = 0
    """Extra passes of all tokens through the layer, for Grams that do not fit into memory during the first."""
    float32: float = 0.0
    """Operations in float32: Grams, products with them, inverses."""
    native: float = 0.0
    """Operations in the dtype of the pass."""
    traffic: float = 0.0
    """Bytes moved besides products."""
    selected: float = 0.0
    """Bytes of stored weights that are selected from, summed over selections."""
    columns: int = 0
    """Blocks of columns that are processed one by one; each costs the overhead of its calls."""
    apart: float = 0.0
    """Of the operations, those for experts, which are refitted one at a time."""

    def __add__(self, other: RefitWork) -> RefitWork:
        return RefitWork(
            self.passes + other.passes, self.float32 + other.float32, self.native + other.native,
            self.traffic + other.traffic, self.selected + other.selected, self.columns + other.columns,
            self.apart + other.apart,
        )  # fmt: skip


NO_REFIT = RefitWork()


class Refitted(NamedTuple):
    """A refitted linear (rows, width) of `nbytes` stored bytes; linears with the same `shares` share their input."""

    shares: str
    rows: int
    width: int
    nbytes: int
    sampled: int
    """Rows that the damping is chosen on."""
    chunks: int
    """Chunks that its rows are refitted in."""


class Trials(NamedTuple):
    """How a refit is chosen: number of dampings tried, and of held-out tokens that they are judged on."""

    dampings: int
    held: int


class Gathered(NamedTuple):
    """How a layer's Grams are gathered: extra `passes`, and for each Gram (width, whether in panels)."""

    passes: int
    grams: list[tuple[int, bool]]


def gathered(linears: Sequence[Refitted], room: int) -> Gathered:
    """How LayerGrams gathers the Grams of linears, given in the order they are written, in `room` bytes."""
    if sum(4 * linear.width**2 for linear in linears) <= room:
        return Gathered(0, [(width, False) for width in {linear.shares: linear.width for linear in linears}.values()])
    passes, grams = 0, list[tuple[int, bool]]()
    ready: set[str] = set()
    for i, linear in enumerate(linears):
        if linear.shares in ready:
            continue
        ready, left = {linear.shares}, room - 4 * linear.width**2
        grams.append((linear.width, left < 0))
        passes += 1 if left >= 0 else -(-linear.width // max(1, room // (4 * linear.width)))
        for other in linears[i + 1 :]:
            if other.shares not in ready and 4 * other.width**2 <= left:
                ready.add(other.shares)
                grams.append((other.width, False))
                left -= 4 * other.width**2
    return Gathered(passes, grams)


def refit_work(effort: Effort, linears: Sequence[Refitted], room: int, tokens: int, trials: Trials) -> RefitWork:
    """The work of refitting a layer's linears, in the order they are written, with `room` bytes for Grams.

    Assumes that linears with the same input choose the same damping.
    """
    passes, grams = gathered(linears, room)
    learned = tokens - trials.held
    float32 = sum(2.0 * learned * width**2 * (1.0 if whole else triangle(width)) for width, whole in grams)
    solved = traffic = selected = 0.0
    columns = 0
    widths = {linear.shares: linear.width for linear in linears}
    prepared = [widths[shares] for shares, _ in groupby(linear.shares for linear in linears)]
    prepared += trials.dampings * list(widths.values())
    float32 += sum(2.0 * effort.inverses * width**3 for width in prepared)
    float32 += sum(
        2.0 * trials.held * width**2 for width in widths.values()
    )  # held-out tokens are added to the Gram in the end
    for _, rows, width, nbytes, sampled, chunks in linears:
        tried = trials.dampings * sampled
        solved += 2.0 * effort.products * (rows + tried) * width**2
        float32 += 2.0 * JUDGED * rows * width**2 + 2.0 * (2 * sampled + tried) * trials.held * width
        moved = (effort.compiled or PER_PRODUCT) * effort.products + effort.swept
        traffic += (rows + tried) * width * moved + rows * width * JUDGED * PER_PRODUCT
        columns += -(-width // _BLOCK) * (chunks + trials.dampings) if effort.swept else 0
        selected += nbytes * effort.selections * (1 + tried / rows)
    native = solved if effort.native else 0.0
    return RefitWork(passes, float32 + solved - native, native, traffic, selected, columns)


def expert_work(effort: Effort, linears: Sequence[Refitted], up: int, tokens: int, trials: Trials) -> RefitWork:
    """The work of refitting an expert that sees `tokens`. Its up projections (`up` weights) are computed once more."""
    work = refit_work(effort, linears, sum(4 * linear.width**2 for linear in linears), tokens, trials)
    return replace(work, native=work.native + 2.0 * tokens * up)


def triangle(width: int) -> float:
    """The fraction of a Gram's products that is computed with one triangle: 9/16 for a wide Gram."""
    step = max(LEAST_BLOCK, -(-width // BLOCKS))
    return sum(min(step, width - begin) * (width - begin) for begin in range(0, width, step)) / width**2
