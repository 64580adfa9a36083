"""The refits by name: what each prepares once for a Gram, and what it does to rows of a linear.

    cg          new values on the mask of the recipe's score and selector             refit.py
    gradual-cg  prunes in steps, chosen anew each time, with a refit after each       refit.py
    obs-admm    ADMM with the optimal brain surgeon's saliency, over-relaxed          admm.py
    admm        Boža, arXiv 2401.02938                                                admm.py
    sparsegpt   Frantar and Alistarh, arXiv 2301.00774                                sparsegpt.py

Which damping is best depends on the model and on how much text there is. Relative dampings are therefore tried on rows
of the linear, with the inputs that were kept out of the Gram as judges; so is no refit at all: `choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprune.methods import admm, sparsegpt
from streamprune.methods.conjugate import Metric, descend, gradually
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping, Factor
from streamprune.methods.selection import Pattern


@dataclass(frozen=True)
class RefitRequest:
    """What a refit is asked for. Exactly one of sparsity and pattern is set."""

    sparsity: float | None
    pattern: Pattern | None
    select: Callable[[Tensor, float], Tensor]
    """(weights (n, in) float32, share of the final sparsity) -> keep (n, in) bool, by the recipe's score."""
    backend: str | None = None


_STRETCHES = 8
_TINY = 1e-300


class Prepared(NamedTuple):
    """What a method needs of a Gram, and the damping that it really has: more than asked for where that failed."""

    state: Any
    damping: Damping


@dataclass(frozen=True)
class Method:
    """One refit."""

    damping: float
    """The published one, or ours."""
    others: tuple[float, ...]
    """Stronger ones, relative as well, that may be tried beside it."""
    prepare: Callable[[Gram, Damping], Prepared]
    solve: Callable[[Tensor, Tensor, Gram, Any, RefitRequest], Tensor]
    """(weights to come close to, the dense ones with zeros where the recipe's mask prunes, Gram, state, request) -> new
    weights, (n, in) float32."""
    matrices: int
    """Matrices of the Gram's size that it holds beside it at the most; none means that the Gram may be in a file."""


def _metric(gram: Gram, damping: Damping) -> Prepared:
    return Prepared(Metric.of(gram, damping), damping)


def _cg(weight: Tensor, masked: Tensor, gram: Gram, state: Metric, ask: RefitRequest) -> Tensor:
    keep = ask.select(weight, 1.0)
    return descend(weight, torch.where(keep, weight, 0.0), keep, state, 10)


def _gradual(weight: Tensor, masked: Tensor, gram: Gram, state: Metric, ask: RefitRequest) -> Tensor:
    return gradually(weight, ask.select, state, steps=16, iterations=5, last=10)


def _operator(variant: admm.Variant) -> Callable[[Gram, Damping], Prepared]:
    def prepare(gram: Gram, damping: Damping) -> Prepared:
        products = gram.products if variant is admm.OBS else torch.float32
        operator = admm.prepare(gram.matrix, damping, variant, products)
        return Prepared(operator, damping._replace(value=operator.damping))

    return prepare


def _alternating(variant: admm.Variant) -> Callable[[Tensor, Tensor, Gram, admm.Operator, RefitRequest], Tensor]:
    def solve(weight: Tensor, masked: Tensor, gram: Gram, state: admm.Operator, ask: RefitRequest) -> Tensor:
        return admm.solve(
            weight, state, sparsity=ask.sparsity, pattern=ask.pattern, variant=variant, backend=ask.backend
        )[0]  # fmt: skip

    return solve


def _sparsegpt_factor(gram: Gram, damping: Damping) -> Prepared:
    factor = sparsegpt.prepare(gram.matrix, damping)
    return Prepared(factor, damping._replace(value=factor.damping))


def _sparsegpt(weight: Tensor, masked: Tensor, gram: Gram, state: Factor, ask: RefitRequest) -> Tensor:
    return sparsegpt.solve(weight, state, sparsity=ask.sparsity, pattern=ask.pattern, backend=ask.backend)[0]


METHODS = {
    "cg": Method(0.05, (0.2, 1.0), _metric, _cg, 0),
    "gradual-cg": Method(0.05, (0.2, 1.0), _metric, _gradual, 0),
    "obs-admm": Method(0.05, (0.2, 1.0), _operator(admm.OBS), _alternating(admm.OBS), 3),
    "admm": Method(0.1, (0.4, 1.0), _operator(admm.PUBLISHED), _alternating(admm.PUBLISHED), 3),
    "sparsegpt": Method(0.01, (0.1, 1.0), _sparsegpt_factor, _sparsegpt, 3),
}


class Choice(NamedTuple):
    """What was chosen for a linear. Errors are relative, ‖(W − Ŵ)X‖² / ‖WX‖² on the inputs that were kept out, of
    asymmetric calibration ‖WD − ŴX‖² / ‖WD‖² (gram.py)."""

    damping: Damping | None
    """None: no refit."""
    mask: float | None
    """Error of the mask alone; None where nothing was kept out to judge by."""
    refit: float | None
    """Error of the refit that was chosen; of the best one where none was."""


class Sample(NamedTuple):
    """Rows `which` of a linear: weight (n, in) float32, and masked, these with zeros where the recipe's mask prunes."""

    weight: Tensor
    masked: Tensor
    which: Tensor | slice = slice(None)


def choose(
    method: Method,
    samples: Mapping[str, Sample],
    gram: Gram,
    asks: Mapping[str, RefitRequest],
    dampings: Sequence[Damping],
) -> dict[str, Choice]:
    """For each of the linears that share an input, how it is refitted: judged by what was kept out of the Gram.

    Dampings are tried from the weakest up, until a stronger one is better for none of the linears. Of no refit and
    those that were tried, from the strongest down, the first is taken whose error is not above the least one by more
    than a standard error of their difference, over eight stretches of the tokens (the one-standard-error rule of
    Breiman et al. 1984: what cannot be told apart is settled in favour of the original weights). Without inputs kept
    out, or with a single damping, there is nothing to choose but no refit at all where that errs less.
    """
    if not len(gram.held):
        return dict.fromkeys(samples, Choice(dampings[0], None, None))
    whole = {name: gram.held_by_token(sample.weight).sum() for name, sample in samples.items()}
    aims = {name: gram.aim(sample.weight, name, sample.which) for name, sample in samples.items()}

    def errors(name: str, fitted: Tensor) -> Tensor:
        """Relative errors on stretches of the tokens, whose sum is the error on all."""
        by_token = gram.held_by_token(samples[name].weight, fitted, name, samples[name].which)
        return torch.stack([part.sum() for part in by_token.chunk(_STRETCHES)]) / whole[name].clamp_min(_TINY)

    tried: dict[str, list[tuple[Damping | None, Tensor]]] = {name: [] for name in samples}
    for damping in sorted(dampings, key=lambda d: d.value):
        state = method.prepare(gram, damping).state
        for name, sample in samples.items():
            fitted = method.solve(aims[name], sample.masked, gram, state, asks[name])
            tried[name].append((damping, errors(name, fitted)))
        if all(len(found) > 1 and found[-1][1].sum() >= found[-2][1].sum() for found in tried.values()):
            break
    masks = {name: errors(name, sample.masked) for name, sample in samples.items()}
    return {name: _first_as_good([(None, masks[name]), *reversed(found)]) for name, found in tried.items()}


def _first_as_good(tried: Sequence[tuple[Damping | None, Tensor]]) -> Choice:
    """Of (damping, errors on stretches), the mask alone first: the choice among those that are finite."""
    sound = [pair for pair in tried if bool(torch.isfinite(pair[1]).all())]
    mask = float(tried[0][1].sum())
    if not sound:
        return Choice(None, mask, mask)  # the weights are not finite; whoever reads all rows says where
    best = min((errors for _, errors in sound), key=lambda errors: float(errors.sum()))

    def is_as_good(errors: Tensor) -> bool:
        more = errors - best
        return float(more.sum()) <= (float(more.std()) * len(more) ** 0.5 if len(more) > 1 else 0.0)

    damping, errors = next(pair for pair in sound if is_as_good(pair[1]))
    if damping is None:
        refits = [float(e.sum()) for d, e in sound if d is not None]
        return Choice(None, mask, min(refits, default=mask))
    return Choice(damping, mask, float(errors.sum()))
