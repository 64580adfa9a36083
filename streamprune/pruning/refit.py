"""Refits the linears of one layer, in chunks of rows, from the stored dtype to the stored dtype.

The damping of a linear, or that it is not refitted, is chosen when the first linear with its input is reached. This is
judged on some of its rows and on held-out inputs, which are added to the Gram afterwards; then all rows are refitted. A
row whose outputs would be worse than with the mask alone, or whose weights overflow the stored dtype, keeps its values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streamprune.calibration.gram_sums import MOST_HELD
from streamprune.calibration.grams import LayerGrams
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping
from streamprune.methods.refits import METHODS, Choice, Method, Prepared, RefitRequest, Sample, choose
from streamprune.methods.selection import Amount
from streamprune.model.extra_memory import RefitNeeds

WORKING_BYTES = 192 << 20
"""Approximate memory for the arrays of a refit besides the Gram; decides how many rows are refitted at once."""

_AIMING = 3
"""Most matrices of a Gram's size that computing the target weights (Gram.aim) needs."""

_ARRAYS = 10
"""float32 arrays with the shape of a chunk that a refit holds at once."""

PARTS = 8
"""Parts of a linear that ranks share, of at least _LEAST_ROWS rows."""
_LEAST_ROWS = 192

_LEAST_ROOM = 16 << 20
"""Smallest panel that a larger Gram is gathered in."""

_MOST_SAMPLED = 256
_PART_SAMPLED = 16
"""The damping is chosen on a 16th of a linear's rows: at least 64 (or all), at most _MOST_SAMPLED."""


def chunk_rows(in_features: int, out_features: int) -> int:
    """Rows that are refitted at once: of a linear at most about an eighth, so that ranks can share them equally."""
    most = max(1, min(WORKING_BYTES // (4 * _ARRAYS * in_features), max(_LEAST_ROWS, -(-out_features // PARTS))))
    chunks = -(-out_features // most)
    chunks += chunks > PARTS // 2 and chunks % 2  # as many for each of two ranks
    return -(-out_features // max(1, chunks))


@dataclass(frozen=True)
class Refit:
    """The refit of a job. `damping` is "auto" (relative, chosen on held-out inputs), "absolute", or a relative value as
    text."""

    name: str
    damping: str

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def dampings(self) -> list[Damping]:
        """The dampings to try."""
        if self.damping == "auto":
            return [Damping(value) for value in (self.method.damping, *self.method.others)]
        if self.damping == "absolute":
            return [Damping(self.method.damping, relative=False)]
        return [Damping(float(self.damping))]


def needs_of(refit: Refit, layers: Sequence[Collection[int]], beside: int | None = None) -> RefitNeeds:
    """The memory that refitting needs. `layers`: for each layer, the in_features of all Grams that may exist at once.

    `beside` is given with asymmetric calibration: bytes needed beside the Grams, which then are gathered one at a time,
    each with its drift (see memory.beside_grams).
    """
    if beside is not None:
        widest = max((width for widths in layers for width in widths), default=0)
        matrix, held = 4 * widest**2, 2 * 4 * MOST_HELD * widest
        working = WORKING_BYTES + max(refit.method.matrices + 1, _AIMING) * matrix
        return RefitNeeds(2 * matrix, 2 * matrix, held + beside, working)
    whole = [[4 * width * width for width in widths] for widths in layers]
    largest = max((size for sizes in whole for size in sizes), default=0)
    matrices = refit.method.matrices
    least = largest if matrices else min(largest, max(_LEAST_ROOM, largest // 16))
    held = max((4 * MOST_HELD * sum(widths) for widths in layers), default=0)
    return RefitNeeds(max(map(sum, whole), default=0), least, held, WORKING_BYTES + matrices * largest)


@dataclass
class Outcome:
    """How one linear was refitted, and its errors, summed over rows and over the inputs of the Gram."""

    choice: Choice
    used: Damping | None
    whole: float = 0.0
    mask: float = 0.0
    refit: float = 0.0
    rows_left: int = 0
    """Rows that kept their values although the linear was refitted."""

    def fresh(self) -> Outcome:
        """The same choice, without sums."""
        return Outcome(self.choice, self.used)

    def add_(self, other: Outcome) -> None:
        """Adds the sums over other rows."""
        self.whole, self.mask, self.refit = self.whole + other.whole, self.mask + other.mask, self.refit + other.refit
        self.rows_left += other.rows_left

    def report(self) -> dict[str, Any]:
        """For streamprune.json. Errors are relative: ‖(W − Ŵ)X‖² / ‖WX‖²."""
        found: dict[str, Any] = {
            "error_mask": self.mask / self.whole if self.whole else 0.0,
            "error": self.refit / self.whole if self.whole else 0.0,
            "damping": self.used.value if self.used else None,
        }
        if self.used and self.choice.damping and self.used.value != self.choice.damping.value:
            found["damping_asked"] = self.choice.damping.value
        if self.choice.mask is not None:
            found |= {"held_out_error_mask": self.choice.mask, "held_out_error": self.choice.refit}
        if self.rows_left:
            found["rows_not_refitted"] = self.rows_left
        return found


@dataclass
class LayerRefit:
    """Refits the linears of one layer, one after the other: call `begin`, then `rows` for each chunk, then `done`."""

    refit: Refit
    amount: Callable[[str], Amount]
    """Linear -> how much of it is pruned."""
    grams: LayerGrams
    select: Callable[[str, Tensor, float], Tensor]
    """(linear, weights (n, in) float32, fraction of the final sparsity) -> mask of the kept weights, (n, in) bool."""
    backend: str | None
    _chosen: dict[str, Choice] = field(default_factory=dict)
    _prepared: tuple[Gram, Damping, Prepared] | None = None

    def __contains__(self, name: str) -> bool:
        """Whether a linear is refitted."""
        return name in self.grams

    def begin(self, name: str, sample: Callable[[str], Sample]) -> Outcome:
        """Chooses how `name` is refitted; `sample` loads some rows of a linear that has the same input."""
        if name not in self._chosen or not self.grams.ready(name):
            self._prepared = None  # frees its memory, which another Gram or the trials need
        gram = self.grams.take(name)
        if name not in self._chosen:
            samples = {other: sample(other) for other in self.grams.sharing(name)}
            asks = {other: self._ask(other) for other in samples}
            self._chosen |= choose(self.refit.method, samples, gram, asks, self.refit.dampings)
        if len(gram.held):
            gram.absorb_held_()
        gram.settle()
        choice = self._chosen[name]
        used = self._prepare(gram, choice.damping).damping if choice.damping else None
        return Outcome(choice, used)

    def rows(self, name: str, begin: int, weight: Tensor, masked: Tensor, outcome: Outcome) -> Tensor:
        """The refitted rows (n, in) of a linear, from row `begin` on, in the stored dtype.

        `weight` are its dense rows, `masked` the same with the recipe's mask; both (n, in), stored dtype. Works on
        chunk_rows of them at once, even if n is larger (all rows, for a transposed linear). Adds to `outcome`.
        """
        step = chunk_rows(weight.shape[1], 8 * len(weight))
        chunks = zip(torch.split(weight, step), torch.split(masked, step), strict=True)
        fitted = [self._rows(name, begin + i * step, *rows, outcome) for i, rows in enumerate(chunks)]
        return fitted[0] if len(fitted) == 1 else torch.cat(fitted)

    def _rows(self, name: str, begin: int, weight: Tensor, masked: Tensor, outcome: Outcome) -> Tensor:
        gram = self.grams.take(name)
        exact, plain = self.aim(name, begin, weight), masked.float()
        before = gram.energy(exact - plain)
        outcome.whole += float(gram.energy(exact).sum())
        outcome.mask += float(before.sum())
        if outcome.choice.damping is None or torch.equal(weight, masked):
            outcome.refit += float(before.sum())
            return masked
        prepared = self._prepare(gram, outcome.choice.damping)
        fitted = self.refit.method.solve(exact, plain, gram, prepared.state, self._ask(name)).to(weight.dtype)
        fitted += 0.0  # makes +0.0 of −0.0
        after = gram.energy(exact - fitted.float())
        worse = ~(after <= before)  # NaN and Inf, too
        outcome.rows_left += int(worse.sum())
        outcome.refit += float(torch.where(worse, before, after).sum())
        return torch.where(worse[:, None], masked, fitted)

    def gram(self, name: str) -> Gram:
        """The Gram of a linear, between its `begin` and `done`."""
        return self.grams.take(name)

    def aim(self, name: str, begin: int, rows: Tensor) -> Tensor:
        """The target weights (n, in) float32 for the dense `rows` of a linear, from row `begin` on (see Gram.aim)."""
        return self.grams.take(name).aim(rows.float(), name, slice(begin, begin + len(rows)))

    def done(self, name: str) -> None:
        """Ends the work on a linear, and frees what only it needed."""
        self._chosen.pop(name)
        self.grams.done(name)
        if self._prepared is not None and not self.grams.holds(self._prepared[0]):
            self._prepared = None

    def _ask(self, name: str) -> RefitRequest:
        return RefitRequest(*self.amount(name), lambda weight, share: self.select(name, weight, share), self.backend)

    def _prepare(self, gram: Gram, damping: Damping) -> Prepared:
        if self._prepared is None or self._prepared[0] is not gram or self._prepared[1] != damping:
            self._prepared = None  # frees its memory before the next one is made
            self._prepared = (gram, damping, self.refit.method.prepare(gram, damping, gram.ranks))
        return self._prepared[2]


def sampled(rows: int) -> Tensor:
    """Indices (n,) int64 of the rows that the damping is chosen on, evenly spread."""
    count = min(rows, max(64, min(_MOST_SAMPLED, rows // _PART_SAMPLED)))
    return torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long()
