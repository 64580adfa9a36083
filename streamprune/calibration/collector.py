"""Gathers statistics of what linears are given, while a layer is run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from streamprune.errors import CheckpointError
from streamprune.methods.stats import InputStats

Accumulate = Callable[[Tensor, Tensor, Tensor], None]
"""A kernel: adds x (tokens, in) to its second argument (in,) float64, and x² to its third."""


class Collector:
    """Gathers the statistics of one layer. `watch` must be called with each linear's input, in the order of use."""

    def __init__(self, accumulate: Accumulate) -> None:
        self.groups: dict[str, str] = {}
        """Linear -> the first one with the same input."""
        self._accumulate = accumulate
        self._sums: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._last: tuple[Tensor, str] | None = None
        self._relative_updates: Tensor | float = 0.0
        self._updated_tokens = 0

    def watch(self, name: str, x: Tensor) -> None:
        """Adds x (…, in), unless it is the same tensor as for the linear before.

        A linear that is called once more with an input of its own has sums of its own from then on.
        """
        leader = self.groups.get(name)
        if self._last is not None and x is self._last[0]:
            if name not in self._sums:
                self.groups[name] = self._last[1]
                return
        else:
            self._last = (x, name)
        self.groups[name] = name
        if name not in self._sums and leader is not None:
            tokens, total, squares = self._sums[leader]
            self._sums[name] = (tokens, total.clone(), squares.clone())
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        if name not in self._sums:
            zeros = [torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device) for _ in range(2)]
            self._sums[name] = (0, zeros[0], zeros[1])
        tokens, total, squares = self._sums[name]
        self._accumulate(rows, total, squares)
        self._sums[name] = (tokens + rows.shape[0], total, squares)

    def end_batch(self) -> None:
        """Frees the last input."""
        self._last = None

    def flow(self, before: Tensor, after: Tensor) -> None:
        """Adds the relative size of the layer's update, from states (batch, seqlen, hidden) before and after it."""
        out = after.detach().float()
        norm, change = (torch.linalg.vector_norm(states, dim=-1).double() for states in (out, out - before.to(out)))
        self._relative_updates += torch.where(norm > 0, change / norm, 0.0).square().sum()
        self._updated_tokens += norm.numel()

    def tokens(self, name: str) -> int:
        """How many tokens a linear saw."""
        return self._sums[self.groups[name]][0]

    @property
    def update(self) -> tuple[float, float]:
        """(tokens, sum of relative updates) of the layer; see `updates` in statistics.py."""
        return float(self._updated_tokens), float(self._relative_updates)

    def finish(self) -> dict[str, InputStats]:
        """First linear of a group -> its statistics. Raises CheckpointError when an activation was NaN or infinite."""
        result = {}
        for name, (tokens, total, squares) in self._sums.items():
            bad = (~torch.isfinite(total + squares)).nonzero()
            if len(bad):
                raise CheckpointError(
                    f"the input of {name} is not finite (feature {int(bad[0])}): the model overflows on this text; "
                    "try --dtype float32"
                )
            result[name] = InputStats(tokens, total.cpu().numpy(), squares.cpu().numpy())
        return result
