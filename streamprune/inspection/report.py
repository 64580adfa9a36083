"""The result of `inspect`: a report for each linear, totals, and the difference from another checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamprune.disk.packed import BITMASK, TWO_FOUR
from streamprune.inspection.difference import Difference, LinearDifference

VERSION = 2


@dataclass(frozen=True)
class ScaleReport:
    """The scales of an FP8 linear: the least and largest finite one, and how many are NaN, Inf, zero or negative
    (`bad`).

    If their dtype or shape is wrong, `fault` says how; then least and largest are None and bad is 0.
    """

    dtype: str
    shape: tuple[int, ...]
    least: float | None
    largest: float | None
    bad: int
    fault: str | None


@dataclass(frozen=True)
class LinearReport:
    """One linear: `shape` as the dense tensor is stored; zeros include -0.0; rows are outputs.

    `pattern` is the tightest N:M, with M 2, 4, 8, 16, 32 or that of an expected pattern, that all groups satisfy and
    that counts as intended (see methods/counting.py); None if there is none, as for a dense or unstructured matrix.
    `packed` is the layout of a packed linear, else None. Bytes include scales: `nbytes` as stored; `nbytes_dense`
    unpacked; `nbytes_two_four` and `nbytes_bitmask` as `pack` would store it in either layout. `nbytes_two_four` is
    None if its bits do not satisfy 2:4 along stored rows (-0.0 counts as nonzero). `zero_rows` is the length of the
    longest run of zero rows if it is so long that the download may be broken (counting.long_run), else 0.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, int]
    transposed: bool
    packed: str | None
    zeros: int
    min_row_zeros: int
    max_row_zeros: int
    pattern: str | None
    negative_zeros: int
    nans: int
    infs: int
    zero_rows: int
    scale: ScaleReport | None
    nbytes: int
    nbytes_dense: int
    nbytes_two_four: int | None
    nbytes_bitmask: int
    difference: LinearDifference | None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights

    @property
    def bad_scales(self) -> int:
        """Number of scales that are NaN, Inf, zero or negative; 1 if their dtype or shape is wrong."""
        return 0 if self.scale is None else self.scale.bad + (self.scale.fault is not None)

    def nbytes_packed(self, layout: str | None) -> int:
        """Bytes that it takes after `pack` in `layout`: in its dense form if packing would not make it smaller."""
        sizes = {TWO_FOUR: self.nbytes_two_four, BITMASK: self.nbytes_bitmask}
        size = sizes.get(layout or "")
        return self.nbytes_dense if size is None else min(size, self.nbytes_dense)


@dataclass(frozen=True)
class Totals:
    """Totals over linears. `patterns` and `dtypes` count linears ("none" for those without a pattern).

    `packed` is the number of linears that are stored packed; unpacked, all linears take `nbytes_dense`. `layout` is the
    one that `pack` would choose for these linears, None if none would become smaller; packed, they take
    `nbytes_packed`.
    """

    linears: int
    weights: int
    zeros: int
    sparsity: float
    patterns: Mapping[str, int]
    dtypes: Mapping[str, int]
    packed: int
    negative_zeros: int
    nans: int
    infs: int
    zero_rows: int
    bad_scales: int
    nbytes: int
    nbytes_dense: int
    layout: str | None
    nbytes_packed: int


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`. `ok` is None if nothing was expected; `failures` has a line for each failed expectation.

    `expect` is what was expected, joined by commas; `against` is the difference from the source, if one was given.
    `left_dense` are linears of which no zeros were expected, as the report of an output says that they were not pruned.
    """

    model: Path
    linears: tuple[LinearReport, ...]
    totals: Totals
    expect: str | None
    ok: bool | None
    failures: tuple[str, ...]
    against: Difference | None
    left_dense: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, with a format name and version.

        Keys are the fields of these classes, and `sparsity` and `nbytes_packed` of each linear. Version 2; version 1
        had no scales, bytes, packed linears or differences.
        """
        return {
            "format": "streamprune-inspection",
            "version": VERSION,
            "model": str(self.model),
            "expect": self.expect,
            "ok": self.ok,
            "failures": list(self.failures),
            "left_dense": list(self.left_dense),
            "totals": asdict(self.totals),
            "against": self.against and self.against.to_json(),
            "linears": [
                {
                    **asdict(linear),
                    "sparsity": linear.sparsity,
                    "nbytes_packed": linear.nbytes_packed(self.totals.layout),
                    "difference": linear.difference and linear.difference.to_json(),
                }
                for linear in self.linears
            ],
        }


def totals_of(reports: Sequence[LinearReport]) -> Totals:
    """The totals of `reports`, which must not be empty."""
    weights, zeros = sum(r.weights for r in reports), sum(r.zeros for r in reports)
    layout = _layout(reports)
    return Totals(
        linears=len(reports),
        weights=weights,
        zeros=zeros,
        sparsity=zeros / weights,
        patterns=dict(Counter(r.pattern or "none" for r in reports)),
        dtypes=dict(Counter(r.dtype for r in reports)),
        packed=sum(r.packed is not None for r in reports),
        negative_zeros=sum(r.negative_zeros for r in reports),
        nans=sum(r.nans for r in reports),
        infs=sum(r.infs for r in reports),
        zero_rows=sum(r.zero_rows for r in reports),
        bad_scales=sum(r.bad_scales for r in reports),
        nbytes=sum(r.nbytes for r in reports),
        nbytes_dense=sum(r.nbytes_dense for r in reports),
        layout=layout,
        nbytes_packed=sum(r.nbytes_packed(layout) for r in reports),
    )


def _layout(reports: Sequence[LinearReport]) -> str | None:
    """The layout `pack` would choose: 2:4 if every linear that packing makes smaller satisfies it."""
    smaller = [r for r in reports if min(r.nbytes_bitmask, r.nbytes_two_four or r.nbytes_bitmask) < r.nbytes_dense]
    if not smaller:
        return None
    return TWO_FOUR if all(r.nbytes_two_four is not None for r in smaller) else BITMASK
