"""What refitting a layer's linears costs: products of rows with Gram matrices above all, most of them in float32.

    Grams     each input that linears share: tokens · in² multiply-adds, of one triangle only where all has room
    inverses  in³ multiply-adds each, once a Gram and once more for each damping that is tried on it
    rows      rows · in² multiply-adds a product; the same of the rows that are sampled, for each damping
    errors    the sampled rows on inputs that were kept out; three products of all rows for the report

and what goes with them: arrays that are summed between products, and choosing what stays. A Gram in a file is taken to
be as fast as one in memory. Arithmetic only; planning/cost.py divides by speeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple


class Effort(NamedTuple):
    """What a refit does with a linear of (rows, in), and once with its Gram."""

    products: int
    """Products (rows, in) · (in, in)."""
    selections: int
    """How often it chooses what stays."""
    inverses: float = 0.0
    """Factorisation and inverse of a Gram, in³ / 3 and 2 in³ / 3 multiply-adds."""
    native: bool = False
    """Whether these products are in bf16 where the pass computes in it."""
    swept: int = 0
    """Bytes moved for each weight besides those that go with products, where it visits one column after the other."""


EFFORTS = {
    "cg": Effort(1 + 10, 1),
    "gradual-cg": Effort(15 * (1 + 5) + 1 + 10, 16),
    "obs-admm": Effort(20, 18, 2.0, native=True),
    "admm": Effort(20, 15, 1.0),
    "sparsegpt": Effort(1, 1, 2 / 3, swept=96),
}
"""By the names of methods/refits.py. SparseGPT's one product is half a product, a block of 128 columns at a time; a
weight that goes changes the 64 behind it in its block on average."""

_BLOCK = 128
"""Columns that SparseGPT visits in one call, on the CPU."""

TRIED = 2
"""Dampings that are tried before a stronger one is no better, as a rule."""

JUDGED = 3
"""Products with the Gram for what is in the report: the sum itself, and the errors of the mask and of the refit."""

PER_PRODUCT = 90
"""Bytes moved for each weight in what an iteration does besides its product: a score of sums and products of float32
arrays that no cache holds."""

BLOCKS, LEAST_BLOCK = 8, 512
"""Of a Gram one triangle is computed, in blocks of an eighth of its columns, or so many (calibration/grams.py)."""


@dataclass(frozen=True)
class RefitWork:
    """What refitting the linears of a layer is, in the whole run: operations, and bytes."""

    passes: int = 0
    """Passes of all tokens through the layer for Grams that had no room in the first one."""
    float32: float = 0.0
    """Operations in float32: Grams, products with them, inverses."""
    native: float = 0.0
    """Operations in what the pass computes in."""
    traffic: float = 0.0
    """Bytes moved by what is no product."""
    selected: float = 0.0
    """Bytes of stored weights that are chosen from, each time counted."""
    columns: int = 0
    """Blocks of columns that are visited one by one: calls, however few rows there are."""

    def __add__(self, other: RefitWork) -> RefitWork:
        return RefitWork(
            self.passes + other.passes, self.float32 + other.float32, self.native + other.native,
            self.traffic + other.traffic, self.selected + other.selected, self.columns + other.columns,
        )  # fmt: skip


NO_REFIT = RefitWork()


class Refitted(NamedTuple):
    """A linear that is refitted: (rows, width), stored in `nbytes`; `shares` names its input."""

    shares: str
    rows: int
    width: int
    nbytes: int
    sampled: int
    """Rows that decide."""
    chunks: int
    """Parts that all rows are refitted in."""


class Trials(NamedTuple):
    """How a refit is chosen: with so many dampings, on inputs that are kept out of the Grams."""

    dampings: int
    held: int


class Gathered(NamedTuple):
    """How a layer's Grams come: `passes` besides the first, and of each Gram its width and whether in panels."""

    passes: int
    grams: list[tuple[int, bool]]


def gathered(linears: Sequence[Refitted], room: int) -> Gathered:
    """How the Grams of linears, in the order of their shard, are gathered within `room` bytes; as LayerGrams does."""
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
    """The work of refitting a layer's linears, in the order of their shard, with `room` bytes for Grams.

    Linears that share an input are taken to choose the same damping.
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
    float32 += sum(2.0 * trials.held * width**2 for width in widths.values())  # in the end these go into the Gram
    for _, rows, width, nbytes, sampled, chunks in linears:
        tried = trials.dampings * sampled
        solved += 2.0 * effort.products * (rows + tried) * width**2
        float32 += 2.0 * JUDGED * rows * width**2 + 2.0 * (2 * sampled + tried) * trials.held * width
        moved = PER_PRODUCT * effort.products + effort.swept
        traffic += (rows + tried) * width * moved + rows * width * JUDGED * PER_PRODUCT
        columns += -(-width // _BLOCK) * (chunks + trials.dampings) if effort.swept else 0
        selected += nbytes * effort.selections * (1 + tried / rows)
    native = solved if effort.native else 0.0
    return RefitWork(passes, float32 + solved - native, native, traffic, selected, columns)


def expert_work(effort: Effort, linears: Sequence[Refitted], up: int, tokens: int, trials: Trials) -> RefitWork:
    """The work of refitting an expert that sees `tokens`; its first linears, with `up` weights, compute once more."""
    work = refit_work(effort, linears, sum(4 * linear.width**2 for linear in linears), tokens, trials)
    return replace(work, native=work.native + 2.0 * tokens * up)


def triangle(width: int) -> float:
    """The part of a Gram's products that is computed: 9/16 of those of a wide one."""
    step = max(LEAST_BLOCK, -(-width // BLOCKS))
    return sum(min(step, width - begin) * (width - begin) for begin in range(0, width, step)) / width**2
