"""Block-wise tuning: a pruned layer's weights learn to give what the dense layer gave.

    loss      mean over tokens t of ‖f(x_t) − y_t‖² / ‖y_t‖²
              x what the pruned layer is given, f(x) what it makes of it, y = (1 − PULL) d(x) + PULL d(x′), where d is
              the dense layer and x′ its own input (where both models' states are there; else see --propagate)
    gradient  of the weights that the mask keeps, of norms and of biases; nothing else moves
              (a step sums what it means over: Adam does not mind, and small gradients stay within float16)
    step      Adam: m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  w_ij ← w_ij − rate · s(t) · c_j · m̂ / √v̂
    column    c_j = (mean_i |w_ij| + a tenth of the tensor's mean |w|) / 1.1, over what is kept, when tuning begins; of
              a vector, column j is its element j
    schedule  s rises over the first tenth of the steps, and falls to 0 along a half cosine

After EBFT (arXiv 2402.12419): one block at a time, the mask fixed. Ours differs in three things. The error of a token
counts relative to its state: a few tokens have massive activations, and would own a plain mean; and relative to what
the dense layer adds to them, those would own it that it adds little to, whose errors nothing can mend any more. Where
both models' states are there, x is what the pruned layers before really give, and y goes half of the way to the dense
model's own, so that a layer also makes up for those before it. The rate goes with a column's mean magnitude (with an
output's for GPT-2's Conv1D), as the scales of a model's tensors differ by orders of magnitude, and so do those of its
features: where inputs are large, weights are small, and the steps of other weights would be too long for them.

With PULL 0 a layer would learn only to do what the dense layer does, and nothing would make up for the layers before;
with 1 it is asked for what it cannot give, as most of what went wrong before is noise to it, and learns by heart how
that came out for the calibration's tokens.

Master weights are float32, and only those that stay have one, with two moments. The layer always computes with what
would be stored: the masters rounded to the stored dtype. So a loss is that of the weights that are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PULL = 0.5
"""How far the aim is from the dense layer's outputs for x to those for its own input (refits have another, gram.py)."""
BETAS = (0.9, 0.9)
WARM = 0.1
"""Of the steps, the part in which the rate rises."""

_LEAST_REACH = 0.1
_EPSILON = 1e-12
_PIECE = 1 << 21


def token_weights(wanted: Tensor) -> Tensor:
    """What a squared error of each token counts: 1 / ‖y‖², (…,) float32 of states (…, hidden); 0 where y is 0."""
    size = wanted.float().square().sum(-1)
    return torch.where(size > 0, size.reciprocal(), 0.0).nan_to_num(0.0, 0.0, 0.0)


def error_sum(made: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """The weighted squared errors of states (…, hidden), summed over tokens: a scalar, float32 or wider."""
    wide = torch.promote_types(made.dtype, torch.float32)
    return ((made.to(wide) - wanted.to(wide)).square().sum(-1) * weights).sum()


def schedule(step: int, steps: int) -> float:
    """s of step 0 ≤ `step` < `steps`."""
    rise = min(1.0, (step + 1) / max(1.0, WARM * steps))
    return rise * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def places(keep: Tensor) -> Tensor | None:
    """Where a mask (out, in) bool keeps a weight: flat, int32 if that will do; None where it keeps all."""
    if bool(keep.all()):
        return None
    found = keep.flatten().nonzero().flatten()
    return found if keep.numel() > torch.iinfo(torch.int32).max else found.int()


@dataclass
class Tuned:
    """One tensor that is tuned. `parameter` is what the layer computes with; what is not kept of it never changes.

    `values`, `first` and `second` moment are (kept,) float32, or float64 for a tensor that is.
    """

    parameter: Tensor
    where: Tensor | None
    stored: torch.dtype
    values: Tensor
    first: Tensor
    second: Tensor
    reach: Tensor
    """c_j, (columns,) in the dtype of the values: how far a step goes in each column, relative to the rate."""

    @classmethod
    def of(cls, parameter: Tensor, stored: Tensor, *, masked: bool) -> Tuned:
        """Begins with the values of `stored`, which has the parameter's shape; `masked`: with those that are not 0."""
        where = places(stored != 0) if masked else None
        values = _taken(stored, where).to(torch.promote_types(stored.dtype, torch.float32))
        zeros = torch.zeros_like(values)
        return cls(parameter, where, stored.dtype, values, zeros, zeros.clone(), reach_of(stored).to(values))

    def step(self, rate: float, number: int) -> None:
        """Step `number`, from 1, along `parameter.grad`, which is used up; `rate` is relative to `reach`."""
        gradient = self.parameter.grad
        self.parameter.grad = None
        if gradient is None or not self.values.numel():
            return
        given = _taken(gradient, self.where)
        size = rate / (1 - BETAS[0] ** number)
        spread = (1 - BETAS[1] ** number) ** -0.5
        for begin in range(0, len(given), _PIECE):
            part = slice(begin, begin + _PIECE)
            g, m, v = given[part].to(self.values.dtype), self.first[part], self.second[part]
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            reach = self.reach[self._columns(begin, begin + len(g))]
            self.values[part].addcdiv_(reach.mul_(m), v.sqrt().mul_(spread).add_(_EPSILON), value=-size)
        self.show(self.rounded())

    def _columns(self, begin: int, end: int) -> Tensor:
        """Which column each of these values is in."""
        if self.where is None:
            return torch.arange(begin, end, device=self.values.device) % len(self.reach)
        return self.where[begin:end] % len(self.reach)

    def rounded(self) -> Tensor:
        """The values (kept,) as they would be stored; never −0.0."""
        return self.values.to(self.stored).add_(0.0)

    def show(self, kept: Tensor) -> None:
        """Lets the layer compute with these values (kept,)."""
        with torch.no_grad():
            _put(self.parameter.view(-1), self.where, kept)

    def begin_again(self, kept: Tensor) -> None:
        """Goes back to these values (kept,), with nothing learnt."""
        self.values.copy_(kept)
        self.first.zero_()
        self.second.zero_()
        self.show(kept)


def reach_of(stored: Tensor) -> Tensor:
    """c_j of a tensor (…, columns): (columns,) float64. What is 0 is not kept."""
    size = stored.reshape(-1, stored.shape[-1]).abs()
    total, count = size.sum(0, dtype=torch.float64), (size != 0).sum(0)
    mean = total.sum() / count.sum().clamp_min(1)
    return (total / count.clamp_min(1) + _LEAST_REACH * mean) / (1 + _LEAST_REACH)


def _taken(tensor: Tensor, where: Tensor | None) -> Tensor:
    flat = tensor.reshape(-1)
    return flat.clone() if where is None else flat.index_select(0, where)


def filled(stored: Tensor, where: Tensor | None, kept: Tensor) -> Tensor:
    """A copy of `stored` with values (kept,) of its dtype in their places, from `places`."""
    made = stored.clone(memory_format=torch.contiguous_format)
    _put(made.view(-1), where, kept)
    return made


def _put(flat: Tensor, where: Tensor | None, kept: Tensor) -> None:
    if where is None:
        flat.copy_(kept)
        return
    for begin in range(0, len(kept), _PIECE):
        part = slice(begin, begin + _PIECE)
        flat.index_copy_(0, where[part].long(), kept[part].to(flat.dtype))


def state_bytes(weights: int, kept: int, compute: int, stored: int) -> int:
    """Memory that tuning a tensor takes: `weights` of them, of which `kept` stay; bytes an element computed, stored.

    The parameter and its gradient; of what stays its place, master, two moments, its gradient, and as stored the first
    values, the best so far and those that may be better.
    """
    return 2 * weights * compute + kept * (4 + 3 * 4 + compute + 3 * stored)
