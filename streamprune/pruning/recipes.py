"""Named recipes: which score, which selector. A new method is a new line here.

    recipe      score      selector   source
    swiftprune  lscore     ewma       SwiftPrune, arXiv 2501.16376, with the diagonal kept (see scores.py)
    wanda       wanda      exact      Wanda, arXiv 2306.11695
    magnitude   magnitude  exact

With an N:M pattern the selector has nothing to choose: the N best of every M inputs stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamprune.errors import UsageError

SCORES = ("lscore", "lscore-isotropic", "wanda", "magnitude")
SELECTORS = ("ewma", "exact")


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear: `score` ranks its weights, `selector` finds the ones to prune."""

    score: str
    selector: str

    @property
    def needs_statistics(self) -> bool:
        return self.score != "magnitude"


RECIPES = {
    "swiftprune": Recipe("lscore", "ewma"),
    "wanda": Recipe("wanda", "exact"),
    "magnitude": Recipe("magnitude", "exact"),
}


def make_recipe(method: str, score: str | None = None, selector: str | None = None) -> Recipe:
    """The recipe called `method`, with its score or selector exchanged. Raises UsageError for unknown names."""
    if method not in RECIPES:
        raise UsageError(f"--method {method}: no such recipe; there are {', '.join(RECIPES)}")
    if score is not None and score not in SCORES:
        raise UsageError(f"--score {score}: no such score; there are {', '.join(SCORES)}")
    if selector is not None and selector not in SELECTORS:
        raise UsageError(f"--selector {selector}: no such selector; there are {', '.join(SELECTORS)}")
    recipe = RECIPES[method]
    return replace(recipe, score=score or recipe.score, selector=selector or recipe.selector)
