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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from streamprune.pruning import admm, sparsegpt
from streamprune.pruning.gram import Gram
from streamprune.pruning.inverse import Damping, Factor
from streamprune.pruning.refit import Metric, descend, gradually
from streamprune.pruning.selection import Pattern


@dataclass(frozen=True)
class Ask:
    """What a refit is asked for. Exactly one of sparsity and pattern is set."""

    sparsity: float | None
    pattern: Pattern | None
    select: Callable[[Tensor, float], Tensor]
    """(weights (n, in) float32, share of the final sparsity) -> keep (n, in) bool, by the recipe's score."""
    backend: str | None = None


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
    """Relative dampings that are tried beside it."""
    prepare: Callable[[Gram, Damping], Prepared]
    solve: Callable[[Tensor, Tensor, Gram, Any, Ask], Tensor]
    """(weights, these with zeros where the recipe's mask prunes, Gram, state, Ask) -> new weights, (n, in) float32."""
    matrices: int
    """Matrices of the Gram's size that it holds beside it at the most; none means that the Gram may be in a file."""


def _metric(gram: Gram, damping: Damping) -> Prepared:
    return Prepared(Metric.of(gram, damping), damping)


def _cg(weight: Tensor, masked: Tensor, gram: Gram, state: Metric, ask: Ask) -> Tensor:
    return descend(weight, masked, ask.select(weight, 1.0), state, 10)


def _gradual(weight: Tensor, masked: Tensor, gram: Gram, state: Metric, ask: Ask) -> Tensor:
    return gradually(weight, ask.select, state, steps=16, iterations=5, last=10)


def _operator(variant: admm.Variant) -> Callable[[Gram, Damping], Prepared]:
    def prepare(gram: Gram, damping: Damping) -> Prepared:
        operator = admm.prepare(gram.matrix, damping, variant)
        return Prepared(operator, damping._replace(value=operator.damping))

    return prepare


def _alternating(variant: admm.Variant) -> Callable[[Tensor, Tensor, Gram, admm.Operator, Ask], Tensor]:
    def solve(weight: Tensor, masked: Tensor, gram: Gram, state: admm.Operator, ask: Ask) -> Tensor:
        return admm.solve(
            weight, state, sparsity=ask.sparsity, pattern=ask.pattern, variant=variant, backend=ask.backend
        )[0]  # fmt: skip

    return solve


def _sparsegpt_factor(gram: Gram, damping: Damping) -> Prepared:
    factor = sparsegpt.prepare(gram.matrix, damping)
    return Prepared(factor, damping._replace(value=factor.damping))


def _sparsegpt(weight: Tensor, masked: Tensor, gram: Gram, state: Factor, ask: Ask) -> Tensor:
    return sparsegpt.solve(weight, state, sparsity=ask.sparsity, pattern=ask.pattern, backend=ask.backend)[0]


METHODS = {
    "cg": Method(0.05, (0.2, 1.0), _metric, _cg, 0),
    "gradual-cg": Method(0.05, (0.2, 1.0), _metric, _gradual, 0),
    "obs-admm": Method(0.05, (0.01, 0.2, 1.0), _operator(admm.OBS), _alternating(admm.OBS), 3),
    "admm": Method(0.1, (0.4, 1.0), _operator(admm.PUBLISHED), _alternating(admm.PUBLISHED), 3),
    "sparsegpt": Method(0.01, (0.1, 1.0), _sparsegpt_factor, _sparsegpt, 3),
}


class Choice(NamedTuple):
    """What was chosen for a linear. Errors are relative, ‖(W − Ŵ)X‖² / ‖WX‖² on the inputs that were kept out."""

    damping: Damping | None
    """None: no refit."""
    mask: float | None
    """Error of the mask alone; None where nothing was kept out to judge by."""
    refit: float | None
    """Error of the best refit."""


class Sample(NamedTuple):
    """Some rows of a linear: weight (n, in) float32, and masked, the same with zeros where the recipe's mask prunes."""

    weight: Tensor
    masked: Tensor


def choose(
    method: Method, samples: Mapping[str, Sample], gram: Gram, asks: Mapping[str, Ask], dampings: Sequence[Damping]
) -> dict[str, Choice]:
    """For each of the linears that share an input, the damping whose refit errs least on what was kept out of the Gram.

    No refit at all where the mask alone errs less. Without inputs kept out, the first damping.
    """
    if not len(gram.held):
        return dict.fromkeys(samples, Choice(dampings[0], None, None))
    whole = {name: float(gram.held_energy(sample.weight).sum()) for name, sample in samples.items()}

    def error(name: str, fitted: Tensor) -> float:
        change = gram.held_energy(samples[name].weight - fitted)
        return float(change.sum()) / whole[name] if whole[name] > 0 else 0.0

    found = {name: Choice(None, error(name, sample.masked), None) for name, sample in samples.items()}
    for damping in dampings:
        state = method.prepare(gram, damping).state
        for name, sample in samples.items():
            refit = error(name, method.solve(*sample, gram, state, asks[name]))
            best = found[name]
            if math.isfinite(refit) and (best.refit is None or refit < best.refit):
                better = best.mask is None or refit < best.mask
                found[name] = Choice(damping if better else None, best.mask, refit)
    return found
