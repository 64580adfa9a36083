"""Binds mapped tensors to the skeleton's modules for as long as a stage is at work.

Where the stored dtype is the one that is computed in, a parameter is the mapped file itself: nothing is
copied. Where it is not (bf16 weights on a processor without bf16 arithmetic), large matrices stay mapped and
are converted in panels of rows while they are used, so a converted copy of a stage never exists:

    linears            out[:, rows] = x · W[rows]ᵀ, rows converted panel by panel
    input embedding    only the rows that the batch looks up are converted
    everything else    converted when it is bound (norms, biases, small tables)
"""

from __future__ import annotations

import functools
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
    skeleton: Skeleton,
    prefix: str | None,
    maps: ShardMaps,
    dtype: torch.dtype,
    device: torch.device,
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
    value = stored.to(device)
    if leaf in module._buffers:
        return _bind_buffer(module, leaf, value)
    before = module._parameters[leaf]
    held = value if value.dtype == dtype or not value.is_floating_point() else None
    release: Callable[[], object] = _nothing
    if held is None and type(module) is nn.Linear and leaf == "weight":
        held = value
        module.forward = functools.partial(_linear_in_panels, module)  # type: ignore[method-assign]
        release = functools.partial(module.__dict__.pop, "forward", None)
    elif held is None and is_embedding and leaf == "weight":
        held = value
        release = _narrow(module, value, dtype)
    elif held is None:
        held = value.to(dtype)
    module._parameters[leaf] = nn.Parameter(held, requires_grad=False)

    def restore() -> None:
        release()
        module._parameters[leaf] = before

    return restore


def _bind_buffer(module: nn.Module, leaf: str, value: Tensor) -> Callable[[], None]:
    before = module._buffers[leaf]
    module._buffers[leaf] = value if before is None else value.to(before.dtype)

    def restore() -> None:
        module._buffers[leaf] = before

    return restore


def _nothing() -> None:
    """Nothing to release."""


def _narrow(module: nn.Module, table: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Makes an embedding convert only the rows it is asked for; returns what ends that."""

    def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, places = torch.unique(args[0], return_inverse=True)
        module._parameters["weight"] = nn.Parameter(table[rows].to(dtype), requires_grad=False)
        return (places, *args[1:])

    handle = module.register_forward_pre_hook(narrow)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        module.__dict__["padding_idx"] = None  # its row may not be among those that are looked up

    def end() -> None:
        handle.remove()
        module.__dict__["padding_idx"] = padding

    return end


def _linear_in_panels(module: nn.Linear, x: Tensor) -> Tensor:
    """x (…, in) · Wᵀ + b with W (out, in) converted to x's dtype a panel of rows at a time."""
    rows = max(1, _PANEL_BYTES // (module.in_features * x.dtype.itemsize))
    out = x.new_empty(*x.shape[:-1], module.out_features)
    for begin in range(0, module.out_features, rows):
        end = min(begin + rows, module.out_features)
        bias = None if module.bias is None else module.bias[begin:end].to(x.dtype)
        out[..., begin:end] = F.linear(x, module.weight[begin:end].to(x.dtype), bias)
    return out
