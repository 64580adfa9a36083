"""How much of each linear is pruned and how, and by what its weights are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamprune.kernels import Selection
from streamprune.methods.recipes import Recipe
from streamprune.methods.scores import SCORES
from streamprune.methods.selection import Amount, select
from streamprune.methods.stats import InputStats
from streamprune.pruning.quantise import Quantisation


@dataclass(frozen=True)
class Target:
    """How much to prune, and how."""

    recipe: Recipe
    amount: Amount
    backend: str | None = None
    """Which kernels: "numba", "torch", or by device."""
    damping: str = "auto"
    """Of a refit, see refitting.Refit."""
    quantisation: Quantisation | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    """Linears that prune another share of their weights than `amount` says."""

    def of(self, name: str) -> Amount:
        """How much of a linear is pruned."""
        return Amount(self.shares[name]) if name in self.shares else self.amount

    def select(self, name: str, weight: Tensor, feature: Tensor, power: int) -> Selection:
        """Prunes rows (n, in) of a linear; see selection.select."""
        return select(
            weight, feature, power, selector=self.recipe.selector, backend=self.backend, **self.of(name)._asdict()
        )  # fmt: skip

    def keep(self, name: str, weight: Tensor, feature: Tensor, power: int, share: float) -> Tensor:
        """What of rows (n, in) of a linear stays when `share` of the final amount is reached: (n, in) bool."""
        keep = select(
            weight, feature, power, selector=self.recipe.selector, backend=self.backend, want_keep=True,
            **self.of(name).at(share)._asdict(),
        ).keep  # fmt: skip
        assert keep is not None
        return keep


class Features:
    """What the recipe's score multiplies weights with, computed once for a linear of the stage."""

    def __init__(self, target: Target, stats: Callable[[str, int], InputStats], device: torch.device) -> None:
        self._target, self._stats, self._device = target, stats, device
        self._known: dict[str, tuple[Tensor, int]] = {}

    def of(self, name: str, in_features: int) -> tuple[Tensor, int]:
        """feature (in,) float32 on the device, and the power of |w|."""
        if name not in self._known:
            needs = self._target.recipe.needs_statistics
            given = self._stats(name, in_features) if needs else InputStats.zeros(in_features)
            feature, power = SCORES[self._target.recipe.score](given)
            self._known[name] = (feature.to(self._device), power)
        return self._known[name]

    def power(self, name: str, in_features: int) -> Tensor | None:
        """E[x_j²] (in,) float32 on the device; None where there are no statistics."""
        if not self._target.recipe.needs_statistics:
            return None
        return self._stats(name, in_features).mean_square.float().to(self._device)
