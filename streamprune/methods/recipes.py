"""Named recipes: which score, which selector. A new method is a new line here.

    recipe      score      selector  refit       source
    swiftprune  lscore     ewma                  SwiftPrune, arXiv 2501.16376, with the diagonal kept (see scores.py)
    hwpq        lscore     ewma                  HWPQ, arXiv 2501.16376v1: swiftprune, and what stays becomes FP8
    wanda       wanda      exact                 Wanda, arXiv 2306.11695
    magnitude   magnitude  exact
    obs-admm    lscore     exact     obs-admm    ours: ADMM with the optimal brain surgeon's saliency (admm.py)
    gradual-cg  lscore     exact     gradual-cg  ours: pruned in steps, conjugate gradients after each (refit.py)
    admm        wanda      exact     admm        Boža, arXiv 2401.02938 (admm.py)
    sparsegpt   wanda      exact     sparsegpt   Frantar and Alistarh, arXiv 2301.00774 (sparsegpt.py)

`swiftprune-tuned` is swiftprune, and then every layer is tuned as a whole (tuning.py); `tune` goes with any of them.

With an N:M pattern the selector has nothing to choose: the N best of every M inputs stay. gradual-cg chooses by its
score and selector, with the weights as they are at each step; the others have a choice of their own, and score
and selector make the mask that they are compared with. `cg` refits the mask of any score and selector. `quantize` goes
with any of them (fp8.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamprune.errors import UsageError

SCORES = ("lscore", "lscore-isotropic", "wanda", "magnitude")
SELECTORS = ("ewma", "exact")
PROPAGATIONS = ("dense", "pruned", "asymmetric")
ALLOCATIONS = ("uniform", "owl", "error")
REFITS = ("none", "cg", "obs-admm", "gradual-cg", "admm", "sparsegpt")
QUANTIZE = ("none", "fp8")
TUNE = ("none", "block")
TUNE_EPOCHS = 6
TUNE_LR = 0.02
FP8_SCALES = ("amax", "mse")
FP8_ROUNDINGS = ("compensate", "nearest")


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear: `score` ranks its weights, `selector` finds the ones to prune, `refit`, if any,
    gives those that stay new values, `quantize`, if any, stores them in fewer bits, and `tune`, if any, lets each layer
    as a whole learn to give what the dense one gave."""

    score: str
    selector: str
    refit: str | None = None
    quantize: str | None = None
    tune: str | None = None

    @property
    def needs_statistics(self) -> bool:
        return self.score != "magnitude"

    @property
    def needs_gram(self) -> bool:
        return self.refit is not None

    @property
    def aims(self) -> bool:
        """Whether weights get new values, which aim at something."""
        return self.refit is not None or self.tune is not None

    @property
    def propagate(self) -> str:
        """Whose outputs the next layer is calibrated on by default; "auto" is asymmetric where the model allows it."""
        if not self.aims:
            return "dense"
        return "pruned" if self.refit == "sparsegpt" and self.tune is None else "auto"


def check_propagate(recipe: Recipe, propagate: str | None) -> str:
    """What a job is to propagate: as asked, or as the recipe has it. Raises UsageError for what cannot be."""
    if propagate is None:
        return recipe.propagate
    if propagate not in PROPAGATIONS:
        raise UsageError(f"--propagate {propagate}: choose {', '.join(PROPAGATIONS)}")
    if propagate == "asymmetric" and not recipe.aims:
        raise UsageError(
            "--propagate asymmetric is for a refit or --tune: it says what new values aim at; take pruned, or see "
            "--refit"
        )
    return propagate


RECIPES = {
    "swiftprune": Recipe("lscore", "ewma"),
    "swiftprune-tuned": Recipe("lscore", "ewma", tune="block"),
    "hwpq": Recipe("lscore", "ewma", None, "fp8"),
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


def check_fp8(recipe: Recipe, scale: str | None, rounding: str | None) -> tuple[str | None, str | None]:
    """How a recipe chooses FP8 scales and rounds, with the defaults filled in; None where it does not apply.

    Raises UsageError for unknown names, and for a choice that the recipe does not have.
    """
    if recipe.quantize is None:
        if scale is not None or rounding is not None:
            raise UsageError("--fp8-scale and --fp8-rounding are for --quantize fp8 and --method hwpq; leave them out")
        return None, None
    if scale is not None and scale not in FP8_SCALES:
        raise UsageError(f"--fp8-scale {scale}: choose {' or '.join(FP8_SCALES)}")
    if rounding is not None and rounding not in FP8_ROUNDINGS:
        raise UsageError(f"--fp8-rounding {rounding}: choose {' or '.join(FP8_ROUNDINGS)}")
    if rounding == "compensate" and not recipe.needs_gram:
        raise UsageError("--fp8-rounding compensate works within a refit, and this recipe has none; see --refit")
    return scale or "amax", rounding or ("compensate" if recipe.needs_gram else "nearest")


def check_tune(recipe: Recipe, epochs: int | None, rate: float | None) -> tuple[int | None, float | None]:
    """How a recipe tunes, with the defaults filled in; None where it does not.

    Raises UsageError for a choice that the recipe does not have, and for what cannot be.
    """
    if recipe.tune is None:
        if epochs is not None or rate is not None:
            raise UsageError("--tune-epochs and --tune-lr are for --tune block; leave them out")
        return None, None
    if recipe.quantize is not None:
        raise UsageError(
            "--tune block works on weights that are not quantised: tune first, and then let a second prune of the "
            "result, with --sparsity 0 --quantize fp8, store it in FP8"
        )
    if epochs is not None and epochs < 1:
        raise UsageError(f"--tune-epochs {epochs}: at least 1 is needed")
    if rate is not None and not 0 <= rate < 1:
        raise UsageError(f"--tune-lr {rate} is not in [0, 1); it is relative to the weights' mean magnitude")
    return epochs or TUNE_EPOCHS, TUNE_LR if rate is None else float(rate)


def make_recipe(
    method: str, score: str | None = None, selector: str | None = None, refit: str | None = None,
    quantize: str | None = None, tune: str | None = None,
) -> Recipe:  # fmt: skip
    """The recipe called `method`, with what else is given exchanged. Raises UsageError for unknown names."""
    if method not in RECIPES:
        raise UsageError(f"--method {method}: no such recipe; there are {', '.join(RECIPES)}")
    given = {
        "score": (score, SCORES), "selector": (selector, SELECTORS), "refit": (refit, REFITS),
        "quantize": (quantize, QUANTIZE), "tune": (tune, TUNE),
    }  # fmt: skip
    for name, (value, known) in given.items():
        if value is not None and value not in known:
            raise UsageError(f"--{name} {value}: no such {name}; there are {', '.join(known)}")
    recipe = RECIPES[method]
    return replace(
        recipe, score=score or recipe.score, selector=selector or recipe.selector,
        refit=recipe.refit if refit is None else None if refit == "none" else refit,
        quantize=recipe.quantize if quantize is None else None if quantize == "none" else quantize,
        tune=recipe.tune if tune is None else None if tune == "none" else tune,
    )  # fmt: skip
