"""Binds mapped tensors to the skeleton's modules for as long as a stage is at work.

Where the stored dtype is the one that is computed in, a parameter is the mapped file itself: nothing is
copied. Where it is not (bf16 weights on a processor without bf16 arithmetic), large matrices stay mapped and
are converted in panels of rows while they are used, so a converted copy of a stage never exists:

    linears            out[:, rows] = x · W[rows]ᵀ, rows converted panel by panel
    input embedding    only the rows that the batch looks up are converted
    everything else    converted when it is bound (norms, biases, small tables)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.model.skeleton import Skeleton

_PANEL_BYTES = 32 << 20


@contextmanager
def bound(
    skeleton: Skeleton, prefix: str | None, maps: ShardMaps, dtype: torch.dtype, device: torch.device,
    sources: Mapping[str, TensorRef] | None = None,
) -> Iterator[None]:
    """Binds the parameters below `prefix`, or with None all parameters outside the decoder layers.

    Within the context the modules compute in `dtype` on `device`; on leaving they are on the meta device
    again and the mapped pages are released. `sources` may name other tensors than the checkpoint's own.
    """
    refs = sources or skeleton.sources
    inside = {id(m) for m in skeleton.layers.modules()}
    root = skeleton.model.get_submodule(prefix) if prefix else skeleton.model
    undo: list[Callable[[], None]] = []
    used: list[TensorRef] = []
    embedding = skeleton.model.get_input_embeddings()  # type: ignore[operator]
    try:
        for path, module in root.named_modules():
            if prefix is None and id(module) in inside:
                continue
            full = ".".join(p for p in (prefix, path) if p)
            names = [*module._parameters, *module._buffers]
            for leaf in names:
                ref = refs.get(f"{full}.{leaf}" if full else leaf)
                if ref is not None:
                    used.append(ref)
                    undo.append(_bind(module, leaf, maps.tensor(ref), dtype, device, module is embedding))
        yield
    finally:
        for restore in reversed(undo):
            restore()
        maps.release(used)


def _bind(
    module: nn.Module, leaf: str, stored: Tensor, dtype: torch.dtype, device: torch.device, is_embedding: bool
) -> Callable[[], None]:
    """Puts a stored tensor in a module's place; returns what puts the meta tensor back."""
    slots = module._parameters if leaf in module._parameters else module._buffers
    before = slots[leaf]
    restore: Callable[[], None] = lambda: slots.__setitem__(leaf, before)  # type: ignore[arg-type]  # noqa: E731
    value = stored.to(device)
    if slots is module._buffers:
        slots[leaf] = value if before is None else value.to(before.dtype)
        return restore
    assert before is not None
    if value.dtype == dtype or not value.is_floating_point():
        slots[leaf] = nn.Parameter(value, requires_grad=False)
        return restore
    if type(module) is nn.Linear and leaf == "weight":
        slots[leaf] = nn.Parameter(value, requires_grad=False)
        module.forward = lambda x: _linear_in_panels(module, x)  # type: ignore[method-assign]
        return lambda: (module.__dict__.pop("forward", None), restore())[1]
    if is_embedding and leaf == "weight":
        hook = module.register_forward_pre_hook(lambda m, args: _narrow_embedding(m, args, value, dtype))
        padding, module.padding_idx = module.padding_idx, None  # its row may not be among those looked up
        return lambda: (hook.remove(), setattr(module, "padding_idx", padding), restore())[2]
    slots[leaf] = nn.Parameter(value.to(dtype), requires_grad=False)
    return restore


def _linear_in_panels(module: nn.Linear, x: Tensor) -> Tensor:
    """x (…, in) · Wᵀ + b with W (out, in) converted to x's dtype a panel of rows at a time."""
    rows = max(1, _PANEL_BYTES // (module.in_features * x.dtype.itemsize))
    out = x.new_empty(*x.shape[:-1], module.out_features)
    for begin in range(0, module.out_features, rows):
        end = min(begin + rows, module.out_features)
        bias = None if module.bias is None else module.bias[begin:end].to(x.dtype)
        out[..., begin:end] = F.linear(x, module.weight[begin:end].to(x.dtype), bias)
    return out


def _narrow_embedding(module: nn.Module, args: tuple[Tensor, ...], table: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Replaces the table by the rows that `ids` (batch, seqlen) look up, and the ids by their places there."""
    rows, places = torch.unique(args[0], return_inverse=True)
    module._parameters["weight"] = nn.Parameter(table[rows].to(dtype), requires_grad=False)
    return (places, *args[1:])
