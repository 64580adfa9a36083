"""Experts whose weights do not change, in a layer that is differentiated: one of them in memory at a time.

    out      of token t: Σ_e s_te · f_e(x_t), over the experts e that t is routed to with weight s_te
    forward  nothing is kept but x, the chosen experts and s
    backward each expert once more: ∂out/∂x = Σ_e s_te · ∂f_e/∂x, and ∂out/∂s_te = f_e(x_t)
             (of Llama 4, whose weights multiply inputs: out = Σ_e f_e(s_te · x_t))

Which experts a token is routed to is taken as given, as by autograd.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.disk.header import TensorRef
from streamprune.disk.scratch import ScratchMatrix
from streamprune.model.expert_forms import Form, Forward
from streamprune.model.experts import Experts
from streamprune.model.panels import product
from streamprune.model.routed import Mixture, Weights


class SpareWeight:
    """A copy of a weight in an unnamed file in `folder`. Raises ResourceError if the disk is full."""

    def __init__(self, folder: Path, weight: Tensor) -> None:
        self._shape, self._dtype = weight.shape, weight.dtype
        self._file = ScratchMatrix(folder, 1, weight.nbytes, torch.uint8)
        self._file.tensor[0] = weight.cpu().contiguous().view(-1).view(torch.uint8)
        self.forget()

    @property
    def tensor(self) -> Tensor:
        """It, in memory until `forget`."""
        return self._file.tensor[0].view(self._dtype).view(self._shape)

    def forget(self) -> None:
        """Gives back its memory."""
        self._file.forget(0, 1)


class FrozenExperts:
    """Makes forwards of experts that can be differentiated by states and routing weights (routed.Forwards).

    `new` has weights in place of those that are bound, by linear, as they are stored.
    """

    def __init__(self, new: Mapping[str, SpareWeight]) -> None:
        self.new = dict(new)

    def renewed(self, new: Mapping[str, SpareWeight]) -> dict[str, SpareWeight]:
        """Takes other weights from now on, within forwards that are bound as well; returns those until now."""
        before = dict(self.new)
        self.new.clear()
        self.new.update(new)
        return before

    def forward_of(self, form: Form, experts: Experts, weights: Weights) -> Forward:
        """See routed.Forwards."""
        mixture = Mixture(form, experts, _Renewed(weights, self.new, experts.transposed))

        def forward(hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            found: Tensor = _OneByOne.apply(hidden, chosen, shares, mixture)  # type: ignore[no-untyped-call]
            return found

        return forward


class NoExperts:
    """Makes forwards that compute nothing, for layers on the meta device; gradients go through all the same."""

    def forward_of(self, form: Form, experts: Experts, weights: Weights) -> Forward:
        """See routed.Forwards."""
        return lambda hidden, chosen, shares: hidden * shares.sum(-1, keepdim=True).to(hidden.dtype)


class _Renewed(Weights):
    """`weights`, some of them replaced."""

    def __init__(self, weights: Weights, new: Mapping[str, SpareWeight], transposed: Collection[str]) -> None:
        self._weights, self._new, self._transposed = weights, new, transposed
        self.device = weights.device

    def stored(self, name: str) -> tuple[TensorRef, Tensor]:
        return self._weights.stored(name)

    def product(self, name: str, x: Tensor) -> Tensor:
        if name not in self._new:
            return self._weights.product(name, x)
        weight = self._new[name].tensor.to(x.device)
        return product(weight.t() if name in self._transposed else weight, x)

    def expect(self, names: Collection[str]) -> None:
        self._weights.expect([name for name in names if name not in self._new])

    def release(self, names: Collection[str]) -> None:
        self._weights.release([name for name in names if name not in self._new])
        for name in names:
            if name in self._new:
                self._new[name].forget()


class _OneByOne(torch.autograd.Function):
    """The formulas above."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, chosen: Tensor, shares: Tensor, mixture: Mixture) -> Tensor:
        ctx.save_for_backward(hidden, chosen, shares)
        ctx.mixture = mixture
        return mixture.compute(hidden, chosen, shares, None, False, max(1, len(hidden)))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, Tensor, None]:
        hidden, chosen, shares = ctx.saved_tensors
        mixture: Mixture = ctx.mixture
        wide = torch.promote_types(hidden.dtype, torch.float32)
        of_hidden, of_shares = torch.zeros_like(hidden, dtype=wide), torch.zeros_like(shares)
        for e in mixture.in_turn(chosen):
            tokens, places = torch.where(chosen == e)
            with torch.enable_grad():
                x = hidden[tokens].requires_grad_()
                share = shares[tokens, places, None].requires_grad_()
                given, part = mixture.given_to(x, share)
                made = (mixture.output(e, mixture.intermediate(e, given)) * part).to(slope.dtype)
                by_x, by_share = torch.autograd.grad(made, (x, share), slope[tokens])
            of_hidden.index_add_(0, tokens, by_x.to(wide))
            of_shares[tokens, places] = by_share[:, 0]
        if mixture.form.identities:
            beyond = chosen >= len(mixture.experts.down)
            of_hidden += slope * (shares * beyond).sum(1, keepdim=True)
            of_shares += (hidden * slope).sum(1, keepdim=True) * beyond
        return of_hidden.to(hidden.dtype), None, of_shares, None
