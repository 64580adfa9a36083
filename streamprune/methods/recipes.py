"""Named recipes: which score, selector and refit each method combines. A new recipe is a new line in RECIPES.

    recipe      score      selector  refit       source
    swiftprune  lscore     ewma                  SwiftPrune, arXiv 2501.16376, with the diagonal kept (see scores.py)
    hwpq        lscore     ewma                  HWPQ, arXiv 2501.16376v1: swiftprune, the kept weights stored in FP8
    wanda       wanda      exact                 Wanda, arXiv 2306.11695
    magnitude   magnitude  exact
    obs-admm    lscore     exact     obs-admm    ours: ADMM with the optimal brain surgeon's saliency (admm.py)
    gradual-cg  lscore     exact     gradual-cg  ours: gradual pruning with conjugate gradients (conjugate.py)
    admm        wanda      exact     admm        Boža, arXiv 2401.02938 (admm.py)
    sparsegpt   wanda      exact     sparsegpt   Frantar and Alistarh, arXiv 2301.00774 (sparsegpt.py)

`swiftprune-tuned` and `obs-admm-tuned` are swiftprune and obs-admm followed by tuning every layer as a whole
(tuning.py). `tune`, and `quantize` (fp8.py), can be combined with any recipe.

With a pattern N:M the selector is not used: the N highest scores of every M inputs are kept. `gradual-cg` selects with
the recipe's score and selector, applied to the current weights at each step. The other refits select by criteria of
their own; for them, score and selector make the mask that the refit is compared with. `cg` refits the mask of any
score and selector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamprune.errors import UsageError
from streamprune.settings import option

SCORE_NAMES = ("lscore", "lscore-isotropic", "wanda", "magnitude")
SELECTORS = ("ewma", "exact")
PROPAGATIONS = ("dense", "pruned", "asymmetric")
ALLOCATIONS = ("uniform", "owl", "error")
REFITS = ("none", "cg", "obs-admm", "gradual-cg", "admm", "sparsegpt")
QUANTIZE = ("none", "fp8", "keep")
TUNE = ("none", "block")
TUNE_EPOCHS = 12
TUNE_LR = 0.015
EARLIER_DEFAULTS = {"tune_epochs": (6,), "tune_lr": (0.02,)}
"""Of earlier versions, whose unfinished jobs go on with them."""
REPLACE_TOKENS = 0.3
"""In every second calibration window, the share of the tokens that new values are fitted to which are random ones."""
FP8_SCALES = ("amax", "mse")
FP8_ROUNDINGS = ("compensate", "nearest")


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear. Raises UsageError for unknown names, and for options that cannot be combined.

    `score` ranks its weights and `selector` chooses those to prune. Optionally, `refit` gives the kept weights new
    values, `quantize` stores them in fewer bits, and `tune` trains each layer as a whole to reproduce the outputs of
    the dense layer. An option that is None has its default, see `filled`.
    """

    score: str = option("lscore", f"score, instead of the recipe's: {', '.join(SCORE_NAMES)}")
    selector: str = option("ewma", f"selector for --sparsity, instead of the recipe's: {', '.join(SELECTORS)}")
    refit: str | None = option(
        None,
        f"refit, instead of the recipe's: none, cg (for the mask of any score), {', '.join(REFITS[2:])}",
        metavar="REFIT",
    )
    quantize: str | None = option(
        None, "none; fp8: store pruned linears in FP8 (E4M3, one scale per output channel), in the format of "
        "compressed-tensors; or keep: of a checkpoint in FP8 or int8, set codes to zero and leave all else as it is",
        metavar="HOW",
    )  # fmt: skip
    tune: str | None = option(
        None,
        "none, or block: with the mask fixed, train each layer to reproduce the dense layer's outputs",
        metavar="HOW",
    )
    damping: str | float | None = option(
        None, "damping of the refit: a number, relative to each feature's power; auto (default), such a number chosen "
        "for each linear on held-out tokens; or absolute, as published for sparsegpt", metavar="D",
    )  # fmt: skip
    fp8_scale: str | None = option(
        None, "how each output channel's scale is chosen: amax (default), its largest weight becomes 448; or mse, "
        "least squared error weighted by the inputs' power", metavar="HOW",
    )  # fmt: skip
    fp8_rounding: str | None = option(
        None,
        "nearest, or compensate: the weights rounded later compensate for errors of those before (default with a "
        "refit and without --tune)",
        metavar="HOW",
    )
    tune_epochs: int | None = option(
        None, f"passes over the calibration windows (default: {TUNE_EPOCHS})", metavar="N", kind=int
    )
    tune_lr: float | None = option(
        None, f"learning rate, relative to the weights' mean magnitude (default: {TUNE_LR})", metavar="R", kind=float
    )
    mtp: str | None = option(
        None, "layers for multi-token prediction, which transformers does not run: dense (default), copied as they "
        "are; or prune, by magnitude, as much as other linears and without new values", metavar="HOW",
    )  # fmt: skip
    replace_tokens: float | None = option(
        None, "share of the tokens that are replaced by random ones in every second calibration window, so that new "
        f"values serve tokens that the text lacks, too (default: {REPLACE_TOKENS} with --tune and with the refits "
        "cg, obs-admm and gradual-cg, otherwise 0)", metavar="SHARE", kind=float,
    )  # fmt: skip
    allocate: str | None = option(
        None, "how to distribute --sparsity among layers: uniform (default), owl (layers with outliers keep more) or "
        "error (least sum of relative errors); owl and error calibrate first and read all weights once more",
        metavar="HOW",
    )  # fmt: skip

    @classmethod
    def named(cls, name: str, **changes: Any) -> Recipe:
        """The recipe called `name`, with the `changes` that are not None. Raises UsageError as Recipe does."""
        if name not in RECIPES:
            raise UsageError(f"--method {name}: no such recipe; there are {', '.join(RECIPES)}")
        return replace(RECIPES[name], **{key: value for key, value in changes.items() if value is not None})

    def __post_init__(self) -> None:
        known = {"score": SCORE_NAMES, "selector": SELECTORS, "refit": REFITS, "quantize": QUANTIZE, "tune": TUNE}
        for name, there in known.items():
            value = getattr(self, name)
            if value is not None and value not in there:
                raise UsageError(f"--{name} {value}: no such {name}; there are {', '.join(there)}")
            if value == "none":
                object.__setattr__(self, name, None)
        if self.allocate is not None and self.allocate not in ALLOCATIONS:
            raise UsageError(f"--allocate {self.allocate}: choose {', '.join(ALLOCATIONS)}")
        if self.mtp not in (None, "dense", "prune"):
            raise UsageError(f"--mtp {self.mtp}: choose dense or prune")
        if self.mtp == "dense":
            object.__setattr__(self, "mtp", None)
        if self.allocate == "uniform":
            object.__setattr__(self, "allocate", None)
        self._check_tune()
        self._check_fp8()
        if self.replace_tokens is not None and not 0 <= self.replace_tokens <= 1:
            raise UsageError(f"--replace-tokens {self.replace_tokens} is not in [0, 1]; 0 replaces none")
        if self.replace_tokens and not self.aims:
            raise UsageError("--replace-tokens is for a refit or --tune block, and this recipe has neither")
        if self.keeps_codes and self.aims:
            raise UsageError(
                "--quantize keep leaves the weights that stay as they are, so it goes with a mask alone; leave out "
                "--refit and --tune, or choose --quantize none or fp8"
            )
        if self.damping is not None:
            if not self.needs_gram:
                raise UsageError("--damping is for a refit, and this recipe has none; see --refit")
            _damping(self.damping)

    def _check_fp8(self) -> None:
        scale, rounding = self.fp8_scale, self.fp8_rounding
        if not self.in_fp8 and (scale is not None or rounding is not None):
            raise UsageError("--fp8-scale and --fp8-rounding are for --quantize fp8 and --method hwpq; leave them out")
        if scale is not None and scale not in FP8_SCALES:
            raise UsageError(f"--fp8-scale {scale}: choose {' or '.join(FP8_SCALES)}")
        if rounding is not None and rounding not in FP8_ROUNDINGS:
            raise UsageError(f"--fp8-rounding {rounding}: choose {' or '.join(FP8_ROUNDINGS)}")
        if rounding == "compensate" and not self.needs_gram:
            raise UsageError("--fp8-rounding compensate needs a refit, and this recipe has none; add --refit")
        if rounding == "compensate" and self.tune is not None:
            raise UsageError("--fp8-rounding compensate would undo what --tune has learnt; leave out one of them")

    def _check_tune(self) -> None:
        epochs, rate = self.tune_epochs, self.tune_lr
        if self.tune is None:
            if epochs is not None or rate is not None:
                raise UsageError("--tune-epochs and --tune-lr are for --tune block; leave them out")
            return
        if epochs is not None and epochs < 1:
            raise UsageError(f"--tune-epochs {epochs}: at least 1 is needed")
        if rate is not None and not 0 <= rate < 1:
            raise UsageError(f"--tune-lr {rate} is not in [0, 1); it is relative to the weights' mean magnitude")

    def filled(self, recorded: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe with defaults for all options that apply to it; options that do not apply are None.

        A default of an earlier version is used where `recorded`, the options of a job that has begun, has it; of a job
        that was given none of them only where it has all, as today's may have been given one of these values.
        """
        fp8, tuned, refitted = self.in_fp8, self.tune is not None, self.needs_gram
        earlier = {n: v for n, v in (recorded or {}).items() if v in EARLIER_DEFAULTS.get(n, ())}
        if self.tune_epochs is self.tune_lr is None and len(earlier) < len(EARLIER_DEFAULTS):
            earlier = {}
        rounding = self.fp8_rounding or ("compensate" if refitted and not tuned else "nearest")
        ours = tuned or self.refit in ("cg", "obs-admm", "gradual-cg")
        share: float | None = self.replace_tokens
        if recorded and "replace_tokens" not in recorded:  # by a version that knew of none
            share = share or None
        elif share is None and self.aims:
            share = REPLACE_TOKENS if ours else 0.0
        rate = earlier.get("tune_lr", TUNE_LR) if self.tune_lr is None else float(self.tune_lr)
        return replace(
            self,
            damping=_damping("auto" if self.damping is None else self.damping) if refitted else None,
            fp8_scale=(self.fp8_scale or "amax") if fp8 else None,
            fp8_rounding=rounding if fp8 else None,
            tune_epochs=(self.tune_epochs or earlier.get("tune_epochs", TUNE_EPOCHS)) if tuned else None,
            tune_lr=rate if tuned else None,
            replace_tokens=None if share is None or not self.aims else float(share),
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Its name in reports: a name in RECIPES, or "score+selector…" for any other combination."""
        parts = _parts(self)
        named = next((name for name, recipe in RECIPES.items() if _parts(recipe) == parts), None)
        return named or "+".join(part for part in parts if part)

    @property
    def in_fp8(self) -> bool:
        """Whether pruned linears are stored in FP8, with new codes."""
        return self.quantize == "fp8"

    @property
    def keeps_codes(self) -> bool:
        """Whether the source's codes are kept, but for those of pruned weights."""
        return self.quantize == "keep"

    @property
    def needs_statistics(self) -> bool:
        return self.score != "magnitude"

    @property
    def needs_gram(self) -> bool:
        return self.refit is not None

    @property
    def aims(self) -> bool:
        """Whether kept weights get new values, by a refit or by tuning."""
        return self.refit is not None or self.tune is not None

    @property
    def propagate(self) -> str:
        """Default of --propagate: on whose outputs the next layer is calibrated. "auto" is asymmetric where
        possible."""
        if not self.aims:
            return "dense"
        return "pruned" if self.refit == "sparsegpt" and self.tune is None else "auto"


RECIPES = {
    "swiftprune": Recipe("lscore", "ewma"),
    "swiftprune-tuned": Recipe("lscore", "ewma", tune="block"),
    "hwpq": Recipe("lscore", "ewma", None, "fp8"),
    "wanda": Recipe("wanda", "exact"),
    "magnitude": Recipe("magnitude", "exact"),
    "gradual-cg": Recipe("lscore", "exact", "gradual-cg"),
    "obs-admm": Recipe("lscore", "exact", "obs-admm"),
    "obs-admm-tuned": Recipe("lscore", "exact", "obs-admm", tune="block"),
    "admm": Recipe("wanda", "exact", "admm"),
    "sparsegpt": Recipe("wanda", "exact", "sparsegpt"),
}


def check_propagate(recipe: Recipe, propagate: str | None) -> str:
    """The --propagate of a job: the one given, or the recipe's default. Raises UsageError for an invalid one."""
    if propagate is None:
        return recipe.propagate
    if propagate not in PROPAGATIONS:
        raise UsageError(f"--propagate {propagate}: choose {', '.join(PROPAGATIONS)}")
    if propagate == "asymmetric" and not recipe.aims:
        raise UsageError(
            "--propagate asymmetric needs a refit or --tune, as it only changes the target of new values; choose "
            "pruned, or add --refit"
        )
    return propagate


def _parts(recipe: Recipe) -> tuple[str | None, ...]:
    return recipe.score, recipe.selector, recipe.refit, recipe.quantize, recipe.tune


def _damping(damping: str | float) -> str:
    """ "auto", "absolute", or a positive number in canonical form (repr). Raises UsageError for anything else."""
    if damping in ("auto", "absolute"):
        return str(damping)
    try:
        value = float(damping)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"--damping {damping}: choose auto, absolute, or a number above 0, such as 0.05")
    return repr(value)
