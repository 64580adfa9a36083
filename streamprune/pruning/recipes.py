"""Named recipes: which score, which selector. A new method is a new line here.

    recipe      score      selector  refit       source
    swiftprune  lscore     ewma                  SwiftPrune, arXiv 2501.16376, with the diagonal kept (see scores.py)
    wanda       wanda      exact                 Wanda, arXiv 2306.11695
    magnitude   magnitude  exact
    obs-admm    lscore     exact     obs-admm    ours: ADMM with the optimal brain surgeon's saliency (admm.py)
    gradual-cg  lscore     exact     gradual-cg  ours: pruned in steps, conjugate gradients after each (refit.py)
    admm        wanda      exact     admm        Boža, arXiv 2401.02938 (admm.py)
    sparsegpt   wanda      exact     sparsegpt   Frantar and Alistarh, arXiv 2301.00774 (sparsegpt.py)

With an N:M pattern the selector has nothing to choose: the N best of every M inputs stay. gradual-cg chooses by its
score and selector, with the weights as they are at each step; the others have a choice of their own, and score
and selector make the mask that they are compared with. `cg` refits the mask of any score and selector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamprune.errors import UsageError

SCORES = ("lscore", "lscore-isotropic", "wanda", "magnitude")
SELECTORS = ("ewma", "exact")
ALLOCATIONS = ("uniform", "owl", "error")
REFITS = ("none", "cg", "obs-admm", "gradual-cg", "admm", "sparsegpt")


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear: `score` ranks its weights, `selector` finds the ones to prune, and `refit`, if any,
    gives those that stay new values."""

    score: str
    selector: str
    refit: str | None = None

    @property
    def needs_statistics(self) -> bool:
        return self.score != "magnitude"

    @property
    def needs_gram(self) -> bool:
        return self.refit is not None


RECIPES = {
    "swiftprune": Recipe("lscore", "ewma"),
    "wanda": Recipe("wanda", "exact"),
    "magnitude": Recipe("magnitude", "exact"),
    "gradual-cg": Recipe("lscore", "exact", "gradual-cg"),
    "obs-admm": Recipe("lscore", "exact", "obs-admm"),
    "admm": Recipe("wanda", "exact", "admm"),
    "sparsegpt": Recipe("wanda", "exact", "sparsegpt"),
}


def check_damping(damping: str | float) -> str:
    """ "auto", "absolute", or a number above 0 in one way of writing it. Raises UsageError for anything else."""
    if damping in ("auto", "absolute"):
        return str(damping)
    try:
        value = float(damping)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"--damping {damping}: choose auto, absolute, or a number above 0, such as 0.05")
    return repr(value)


def make_recipe(method: str, score: str | None = None, selector: str | None = None, refit: str | None = None) -> Recipe:
    """The recipe called `method`, with its score, selector or refit exchanged. Raises UsageError for unknown names."""
    if method not in RECIPES:
        raise UsageError(f"--method {method}: no such recipe; there are {', '.join(RECIPES)}")
    if score is not None and score not in SCORES:
        raise UsageError(f"--score {score}: no such score; there are {', '.join(SCORES)}")
    if selector is not None and selector not in SELECTORS:
        raise UsageError(f"--selector {selector}: no such selector; there are {', '.join(SELECTORS)}")
    if refit is not None and refit not in REFITS:
        raise UsageError(f"--refit {refit}: no such refit; there are {', '.join(REFITS)}")
    recipe = RECIPES[method]
    return replace(
        recipe, score=score or recipe.score, selector=selector or recipe.selector,
        refit=recipe.refit if refit is None else None if refit == "none" else refit,
    )  # fmt: skip
