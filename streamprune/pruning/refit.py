"""The linears of one layer, refitted: from stored rows to stored rows, a chunk at a time.

How a linear is refitted is chosen when the first of those that share its input is reached, on some of its rows and on
inputs that were kept out of the Gram; these then go into it, and all rows are refitted with it. Where a row's outputs
would be worse than with the mask alone (or its weights would not fit into the stored dtype), it keeps its own values.
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
"""Memory for the arrays of a refit besides the Gram, about; from it follows how many rows are refitted at once."""

_AIMING = 3
"""Matrices of a Gram's size that finding out what to aim at takes at the most."""

_ARRAYS = 10
"""Arrays of float32 like the weights of a chunk that a refit holds."""

_LEAST_ROOM = 16 << 20
"""A Gram that is larger comes in panels of no less."""

_MOST_SAMPLED = 256
_PART_SAMPLED = 16
"""Of a linear, this many rows at most, or a 16th of them, decide how it is refitted."""


def chunk_rows(in_features: int) -> int:
    """Rows that are refitted at once."""
    return max(1, WORKING_BYTES // (4 * _ARRAYS * in_features))


@dataclass(frozen=True)
class Refit:
    """Which refit a job does. `damping` is "auto" (relative, chosen on inputs that were kept out), "absolute", or a
    relative value as text."""

    name: str
    damping: str

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def dampings(self) -> list[Damping]:
        """Those that are tried."""
        if self.damping == "auto":
            return [Damping(value) for value in (self.method.damping, *self.method.others)]
        if self.damping == "absolute":
            return [Damping(self.method.damping, relative=False)]
        return [Damping(float(self.damping))]


def needs_of(refit: Refit, layers: Sequence[Collection[int]], beside: int | None = None) -> RefitNeeds:
    """What refitting takes; `layers` has the in_features of each layer's linears whose Grams may be there at once.

    With asymmetric calibration, `beside` are the bytes of the largest layer's refitted weights, and Grams come one at
    a time, each with its drift.
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
    """What became of one linear; sums over its rows, of inputs of the Gram."""

    choice: Choice
    used: Damping | None
    whole: float = 0.0
    mask: float = 0.0
    refit: float = 0.0
    rows_left: int = 0
    """Rows that kept their own values although the linear was refitted."""

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
    """Refits the linears of one layer, one after the other: `begin`, `rows` as often as needed, `done`."""

    refit: Refit
    amount: Callable[[str], Amount]
    """How much of a linear is pruned."""
    grams: LayerGrams
    select: Callable[[str, Tensor, float], Tensor]
    """(linear, weights (n, in) float32, share of the final sparsity) -> keep (n, in) bool."""
    backend: str | None
    _chosen: dict[str, Choice] = field(default_factory=dict)
    _prepared: tuple[Gram, Damping, Prepared] | None = None

    def __contains__(self, name: str) -> bool:
        """Whether a linear is refitted."""
        return name in self.grams

    def begin(self, name: str, sample: Callable[[str], Sample]) -> Outcome:
        """Chooses how `name` is refitted; `sample` brings some rows of a linear that shares its input."""
        if name not in self._chosen or not self.grams.ready(name):
            self._prepared = None  # before another Gram is gathered, or trials take as much memory
        gram = self.grams.take(name)
        if name not in self._chosen:
            samples = {other: sample(other) for other in self.grams.sharing(name)}
            asks = {other: self._ask(other) for other in samples}
            self._chosen |= choose(self.refit.method, samples, gram, asks, self.refit.dampings)
        if len(gram.held):
            gram.absorb_held_()
        choice = self._chosen[name]
        used = self._prepare(gram, choice.damping).damping if choice.damping else None
        return Outcome(choice, used)

    def rows(self, name: str, begin: int, weight: Tensor, masked: Tensor, outcome: Outcome) -> Tensor:
        """Rows from `begin` of a linear (n, in), stored dtype, refitted; `masked` are these with the recipe's mask.

        No more than chunk_rows of them at once, however many there are (of a transposed linear, all).
        """
        step = chunk_rows(weight.shape[1])
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
        """The Gram that a linear is refitted with; its rows are at work."""
        return self.grams.take(name)

    def aim(self, name: str, begin: int, rows: Tensor) -> Tensor:
        """The weights (n, in) float32 that rows from `begin` of a linear, being refitted, are to come close to."""
        return self.grams.take(name).aim(rows.float(), name, slice(begin, begin + len(rows)))

    def done(self, name: str) -> None:
        """All rows of the linear are done."""
        self._chosen.pop(name)
        self.grams.done(name)
        if self._prepared is not None and not self.grams.holds(self._prepared[0]):
            self._prepared = None

    def _ask(self, name: str) -> RefitRequest:
        return RefitRequest(*self.amount(name), lambda weight, share: self.select(name, weight, share), self.backend)

    def _prepare(self, gram: Gram, damping: Damping) -> Prepared:
        if self._prepared is None or self._prepared[0] is not gram or self._prepared[1] != damping:
            self._prepared = None  # before the next one takes as much memory
            self._prepared = (gram, damping, self.refit.method.prepare(gram, damping))
        return self._prepared[2]


def sampled(rows: int) -> Tensor:
    """Indices of the rows that decide, evenly spread: int64."""
    count = min(rows, max(64, min(_MOST_SAMPLED, rows // _PART_SAMPLED)))
    return torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long()
