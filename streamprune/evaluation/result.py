"""The result of `evaluate`: its figures, refused where they are not finite, and those that compare with a reference."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import CheckpointError
from streamprune.evaluation.two_models import Divergence


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. `tokens` is the number of predicted tokens, `nll` their mean −log p in nats.

    `kl`, `kl_stderr`, `top1_agreement` and `reference_perplexity` are None without a reference.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float
    peak_rss_bytes: int
    kl: float | None = None
    """KL(p_reference ‖ p_model), nats per predicted token."""
    kl_stderr: float | None = None
    """Standard error of `kl` over windows; None for a single window."""
    top1_agreement: float | None = None
    """Fraction of the predicted positions at which both models' most likely token is the same, 0 to 1."""
    reference_perplexity: float | None = None
    bos: bool = False
    """Whether windows began with a BOS token, so that the first token of the text is predicted as well."""
    replaced: int = 0
    """Number of bytes of the text that were not valid characters and were replaced by U+FFFD."""
    window_nll: tuple[float, ...] = ()
    """Mean −log p in nats of each window, in text order, for paired comparisons of two models."""

    def to_json(
        self, model: str | Path, text: str | Path, reference: str | Path | None, *, by_window: bool
    ) -> dict[str, Any]:
        """All of it, after what was evaluated; without a reference, what compares with one is left out."""
        compares = {"kl", "kl_stderr", "top1_agreement", "reference_perplexity"}
        left_out = (compares if reference is None else set()) | (set() if by_window else {"window_nll"})
        given = {"model": str(model), "text": str(text)} | ({"reference": str(reference)} if reference else {})
        return given | {k: v for k, v in asdict(self).items() if k not in left_out}


def check_finite(value: float, checkpoint: Checkpoint) -> float:
    """`value`. Raises CheckpointError where it is NaN or infinite."""
    if not math.isfinite(value):
        raise CheckpointError(f"{checkpoint.path}: the model's predictions are not finite; try --dtype float32")
    return value


def perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def compared(found: Evaluation, apart: Divergence, checkpoint: Checkpoint, dense: Checkpoint) -> Evaluation:
    """The evaluation with the fields that compare it with the reference `dense`."""
    reference_nll, kl = check_finite(float(apart.reference_nll.sum()) / found.tokens, dense), float(apart.kl.mean())
    if not math.isfinite(kl):
        raise CheckpointError(f"{checkpoint.path}: its divergence from {dense.path} is not finite; try --dtype float32")
    return replace(
        found,
        kl=kl,
        kl_stderr=float(apart.kl.std()) / math.sqrt(found.windows) if found.windows > 1 else None,
        top1_agreement=apart.agreed / found.tokens,
        reference_perplexity=perplexity(reference_nll),
    )
