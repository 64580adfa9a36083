"""Products with weights of another dtype than their input's, or in FP8: converted a panel of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamprune.methods.fp8 import dequantise

_PANEL_BYTES = 32 << 20
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def product(weight: Tensor, x: Tensor) -> Tensor:
    """x (n, in) · Wᵀ: (n, out), in x's dtype, to which W (out, in) is converted a panel of rows at a time."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    return in_panels(x, len(weight), None, lambda begin, end: weight[begin:end].to(x.dtype))


def dequantised(codes: Tensor, scale: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows begin to end of scale · codes, in `dtype`."""
    return dequantise(codes[begin:end], scale[begin:end] if scale.numel() > 1 else scale, dtype)


def linear_in_panels(module: nn.Linear, x: Tensor) -> Tensor:
    """x (…, in) · Wᵀ + b with W (out, in) converted to x's dtype a panel of rows at a time."""
    weight = module.weight
    return in_panels(x, len(weight), module.bias, lambda begin, end: weight[begin:end].to(x.dtype))


def in_panels(x: Tensor, out_features: int, bias: Tensor | None, panel: Callable[[int, int], Tensor]) -> Tensor:
    """x (…, in) · Wᵀ + b: (…, out) in x's dtype. `panel(begin, end)` returns these rows of W in x's dtype."""
    rows = max(1, _PANEL_BYTES // (x.shape[-1] * x.dtype.itemsize))
    out = x.new_empty(*x.shape[:-1], out_features)
    for begin in range(0, out_features, rows):
        end = min(begin + rows, out_features)
        part = None if bias is None else bias[begin:end].to(x.dtype)
        out[..., begin:end] = F.linear(x, panel(begin, end), part)
    return out


def rounded(x: Tensor) -> Tensor:
    """x (…, in) rounded to FP8 and back, with a scale for each token from its largest value, as vLLM does."""
    scale = x.abs().amax(-1, keepdim=True) / _FP8_MAX
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale
