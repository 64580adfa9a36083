"""The refits by name: what each prepares once for a Gram matrix, and how it refits rows of a linear.

    cg          new values on the mask of the recipe's score and selector             conjugate.py
    gradual-cg  gradual pruning, with a new mask and a refit at each step             conjugate.py
    obs-admm    ADMM with the optimal brain surgeon's saliency, over-relaxed          admm.py
    admm        Boža, arXiv 2401.02938                                                admm.py
    sparsegpt   Frantar and Alistarh, arXiv 2301.00774                                sparsegpt.py

The best damping depends on the model and on the amount of calibration text. `choose` therefore tries several relative
dampings on some rows of each linear, compares their errors on the tokens held out of the Gram matrix, and keeps the
mask without a refit where no refit is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprune.methods import admm, sparsegpt
from streamprune.methods.conjugate import Metric, descend, gradually
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping, Factor
from streamprune.methods.selection import Pattern
from streamprune.process.ranks import ALONE, Ranks
from streamprune.process.share import parts_of, share_


@dataclass(frozen=True)
class RefitRequest:
    """How much a refit prunes (exactly one of sparsity and pattern is set), and by which selection."""

    sparsity: float | None
    pattern: Pattern | None
    select: Callable[[Tensor, float], Tensor]
    """(weights (n, in) float32, share of the final sparsity) -> keep (n, in) bool, by the recipe's score and
    selector."""
    backend: str | None = None


_STRETCHES = 8
_LEAST_ROWS, _LEAST_WORK = 16, 1 << 29
"""The least size of the parts of a sample that ranks share: in rows, and in rows x in^2."""
_TINY = 1e-300


class Prepared(NamedTuple):
    """What a method prepares once for a Gram matrix, and the damping used: larger than requested where that failed."""

    state: Any
    damping: Damping


@dataclass(frozen=True)
class Method:
    """One refit."""

    damping: float
    """Default, relative: the published one, or ours."""
    others: tuple[float, ...]
    """Stronger relative dampings for `choose` to try."""
    prepare: Callable[[Gram, Damping, Ranks], Prepared]
    """(Gram, damping, the ranks that share the work, and call it together) -> what `solve` needs."""
    solve: Callable[[Tensor, Tensor, Gram, Any, RefitRequest], Tensor]
    """(target weights, weights masked by the recipe's mask, Gram, state, request) -> new weights; all (n, in)
    float32."""
    matrices: int
    """Peak number of matrices of the Gram's size that it holds in addition; with 0, the Gram may be in a mapped
    file."""
    own_mask: bool
    """Whether it chooses masks by itself, so that a recipe's score only matters where it is not applied."""


def _metric(gram: Gram, damping: Damping, ranks: Ranks) -> Prepared:
    return Prepared(Metric.of(gram, damping), damping)


def _cg(weight: Tensor, masked: Tensor, gram: Gram, state: Metric, request: RefitRequest) -> Tensor:
    keep = request.select(weight, 1.0)
    return descend(weight, torch.where(keep, weight, 0.0), keep, state, 10)


def _gradual(weight: Tensor, masked: Tensor, gram: Gram, state: Metric, request: RefitRequest) -> Tensor:
    return gradually(weight, request.select, state, steps=16, iterations=5, last=10)


def _operator(variant: admm.Variant) -> Callable[[Gram, Damping, Ranks], Prepared]:
    def prepare(gram: Gram, damping: Damping, ranks: Ranks) -> Prepared:
        products = gram.products if variant is admm.OBS else torch.float32
        known = gram.known_diagonal(damping)
        operator = admm.prepare(gram.matrix, damping, variant, products, known, ranks)
        return Prepared(operator, damping._replace(value=operator.damping))

    return prepare


def _alternating(variant: admm.Variant) -> Callable[[Tensor, Tensor, Gram, admm.Operator, RefitRequest], Tensor]:
    def solve(weight: Tensor, masked: Tensor, gram: Gram, state: admm.Operator, request: RefitRequest) -> Tensor:
        return admm.solve(
            weight, state, sparsity=request.sparsity, pattern=request.pattern, variant=variant, backend=request.backend
        )[0]  # fmt: skip

    return solve


def _sparsegpt_factor(gram: Gram, damping: Damping, ranks: Ranks) -> Prepared:
    factor = sparsegpt.prepare(gram.matrix, damping, ranks)
    return Prepared(factor, damping._replace(value=factor.damping))


def _sparsegpt(weight: Tensor, masked: Tensor, gram: Gram, state: Factor, request: RefitRequest) -> Tensor:
    return sparsegpt.solve(weight, state, sparsity=request.sparsity, pattern=request.pattern, backend=request.backend)[
        0
    ]


METHODS = {
    "cg": Method(0.05, (0.2, 1.0), _metric, _cg, 0, False),
    "gradual-cg": Method(0.05, (0.2, 1.0), _metric, _gradual, 0, False),
    "obs-admm": Method(0.05, (0.2, 1.0), _operator(admm.OBS), _alternating(admm.OBS), 3, True),
    "admm": Method(0.1, (0.4, 1.0), _operator(admm.PUBLISHED), _alternating(admm.PUBLISHED), 3, True),
    "sparsegpt": Method(0.01, (0.1, 1.0), _sparsegpt_factor, _sparsegpt, 3, True),
}


class Choice(NamedTuple):
    """What was chosen for a linear. Errors are relative output errors on the held-out tokens: ‖(W − Ŵ)X‖² / ‖WX‖², or
    ‖WD − ŴX‖² / ‖WD‖² if calibration is asymmetric (gram.py)."""

    damping: Damping | None
    """None: no refit."""
    mask: float | None
    """Error of the mask without a refit; None if no tokens were held out."""
    refit: float | None
    """Error of the chosen refit, or of the best one if no refit was chosen; None if no tokens were held out."""


class Sample(NamedTuple):
    """Rows `which` of a linear to judge refits on: `weight` (n, in) float32, and the same `masked` by the recipe."""

    weight: Tensor
    masked: Tensor
    which: Tensor | slice = slice(None)

    def part(self, rows: slice) -> Sample:
        """Some of its rows."""
        which = self.which[rows] if isinstance(self.which, Tensor) else rows
        return Sample(self.weight[rows], self.masked[rows], which)


def choose(
    method: Method,
    samples: Mapping[str, Sample],
    gram: Gram,
    requests: Mapping[str, RefitRequest],
    dampings: Sequence[Damping],
) -> dict[str, Choice]:
    """Chooses the damping, or no refit, for each of the linears that share an input, by errors on the held-out tokens.

    Dampings are tried from the weakest up, until a stronger one no longer helps any of the linears. The candidates are
    then ordered from the most conservative: no refit, strongest damping, ..., weakest. The first is taken whose error
    exceeds the smallest error by no more than one standard error of the difference, estimated over eight stretches of
    the held-out tokens (the one-standard-error rule of Breiman et al. 1984: among candidates that cannot be told apart,
    the one closest to the original weights). If no tokens are held out, dampings[0] is used without a comparison.
    All of the Gram's ranks must call this together. While there are dampings for all of them, each rank tries one;
    what is left they try together.
    """
    if not len(gram.held):
        return dict.fromkeys(samples, Choice(dampings[0], None, None))
    judged = {name: _Judged(name, sample, method, gram, requests[name]) for name, sample in samples.items()}
    gram.settle()
    tried: dict[str, list[tuple[Damping | None, Tensor]]] = {name: [] for name in samples}
    for damping, errors in _trials(judged, method, gram, sorted(dampings, key=lambda d: d.value)):
        for name, found in tried.items():
            found.append((damping, errors[name]))
        if all(len(found) > 1 and found[-1][1].sum() >= found[-2][1].sum() for found in tried.values()):
            break
    masks = {name: linear.masked() for name, linear in judged.items()}
    return {name: _first_as_good([(None, masks[name]), *reversed(found)]) for name, found in tried.items()}


def _trials(
    judged: Mapping[str, _Judged], method: Method, gram: Gram, dampings: Sequence[Damping]
) -> Iterator[tuple[Damping, dict[str, Tensor]]]:
    """Each of the dampings with the errors (stretches,) of each linear, in this order."""

    def errors(damping: Damping, ranks: Ranks) -> dict[str, Tensor]:
        state = method.prepare(gram, damping, ranks).state
        return {name: linear.refitted(state, ranks) for name, linear in judged.items()}

    ranks = gram.ranks
    alone = len(dampings) // ranks.size * ranks.size if ranks.size > 1 else 0
    for first in range(0, alone, ranks.size):
        yield from zip(dampings[first:], ranks.gather(errors(dampings[first + ranks.rank], ALONE)), strict=False)
    for damping in dampings[alone:]:
        yield damping, errors(damping, ranks)


class _Judged:
    """The errors of refits of one linear's sample on the held-out tokens; ranks share parts of its rows.

    Errors are (stretches,) float64: what stretches of tokens contribute to the relative error, which is their sum.
    """

    def __init__(self, name: str, sample: Sample, method: Method, gram: Gram, request: RefitRequest) -> None:
        self._name, self._method, self._gram, self._request = name, method, gram, request
        rows, width = sample.weight.shape
        least = max(_LEAST_ROWS, min(4 * _LEAST_ROWS, _LEAST_WORK // max(1, width) ** 2))
        self._parts = [sample.part(rows) for rows in parts_of(0, rows, least)]
        self._aims: dict[int, Tensor] = {}
        """Of the parts that this rank refits."""
        whole = self._sums(lambda i: gram.held_by_token(self._parts[i].weight), gram.ranks)
        self._whole = whole.sum().clamp_min(_TINY)

    def refitted(self, state: Any, ranks: Ranks) -> Tensor:
        """Errors of the refit, which `ranks` share; `state` is what the method has prepared."""

        def fit(i: int) -> Tensor:
            part = self._parts[i]
            if i not in self._aims:
                self._aims[i] = self._gram.aim(part.weight, self._name, part.which)
            return self._method.solve(self._aims[i], part.masked, self._gram, state, self._request)

        return self._errors(fit, ranks)

    def masked(self) -> Tensor:
        """Errors of the mask without a refit."""
        return self._errors(lambda i: self._parts[i].masked, self._gram.ranks)

    def _errors(self, fitted: Callable[[int], Tensor], ranks: Ranks) -> Tensor:
        """Errors of `fitted` weights (n, in), by the index of their part."""

        def by_token(i: int) -> Tensor:
            part = self._parts[i]
            return self._gram.held_by_token(part.weight, fitted(i), self._name, part.which)

        return self._sums(by_token, ranks) / self._whole

    def _sums(self, by_token: Callable[[int], Tensor], ranks: Ranks) -> Tensor:
        """Sums (stretches,) over tokens and parts, of (held,) for the index of a part."""
        found = torch.empty(len(self._parts), min(_STRETCHES, len(self._gram.held)), dtype=torch.float64)

        def sums(i: int) -> Tensor:
            return torch.stack([stretch.sum() for stretch in by_token(i).cpu().tensor_split(found.shape[1])])

        share_(list(found), sums, ranks)
        return found.sum(0)


def _first_as_good(tried: Sequence[tuple[Damping | None, Tensor]]) -> Choice:
    """The first of (damping, errors by stretch) that is not significantly worse than the best; finite ones only.

    `tried` is ordered from the most conservative candidate, no refit.
    """
    sound = [pair for pair in tried if bool(torch.isfinite(pair[1]).all())]
    mask = float(tried[0][1].sum())
    if not sound:
        return Choice(None, mask, mask)  # weights are not finite: reported by the pass that reads all rows
    best = min((errors for _, errors in sound), key=lambda errors: float(errors.sum()))

    def is_as_good(errors: Tensor) -> bool:
        more = errors - best
        return float(more.sum()) <= (float(more.std()) * len(more) ** 0.5 if len(more) > 1 else 0.0)

    damping, errors = next(pair for pair in sound if is_as_good(pair[1]))
    if damping is None:
        refits = [float(e.sum()) for d, e in sound if d is not None]
        return Choice(None, mask, min(refits, default=mask))
    return Choice(damping, mask, float(errors.sum()))
