"""Binds mapped tensors to the skeleton's modules for as long as a stage is at work.

Where the stored dtype is the one that is computed in, a parameter is the mapped file itself: nothing is
copied. Where it is not (bf16 weights on a processor without bf16 arithmetic), large matrices stay mapped and
are converted in panels of rows while they are used, so a converted copy of a stage never exists. On a device the
input embedding stays on the CPU, too:

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
from streamprune.model.feed import Feed
from streamprune.model.skeleton import Skeleton

_PANEL_BYTES = 32 << 20


@contextmanager
def bound(
    skeleton: Skeleton,
    prefix: str | None,
    feed: Feed,
    dtype: torch.dtype,
    sources: Mapping[str, TensorRef] | None = None,
    head: bool = True,
) -> Iterator[list[TensorRef]]:
    """Binds the parameters below `prefix`, or with None all parameters outside the decoder layers.

    Within the context the modules compute in `dtype` on the feed's device; on leaving they are on the meta device
    again. Yields what is in use, for the caller to release. `sources` may name other tensors than the checkpoint's
    own. Without `head`, what makes logits is left out.
    """
    refs = sources or skeleton.sources
    outside = {id(m) for m in skeleton.layers.modules()} if prefix is None else set()
    root = skeleton.model.get_submodule(prefix) if prefix else skeleton.model
    undo: list[Callable[[], None]] = []
    used: list[TensorRef] = []
    embedding = skeleton.model.get_input_embeddings()  # type: ignore[operator]
    if not head:
        outside.add(id(skeleton.model.get_output_embeddings()))  # type: ignore[operator]
    try:
        for path, module in root.named_modules():
            if id(module) in outside and module is not embedding:
                continue
            full = ".".join(p for p in (prefix, path) if p)
            names = [*module._parameters, *module._buffers]
            for leaf in names:
                ref = refs.get(f"{full}.{leaf}" if full else leaf)
                if ref is None:
                    continue
                used.append(ref)
                if module is embedding and leaf == "weight" and (feed.copies or feed.maps.tensor(ref).dtype != dtype):
                    undo.append(_narrow(module, feed.maps.tensor(ref), dtype, feed.device))
                else:
                    undo.append(_bind(module, leaf, feed.tensor(ref), dtype))
        yield used
    finally:
        for restore in reversed(undo):
            restore()


def _bind(module: nn.Module, leaf: str, value: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Puts a stored tensor in a module's place; returns what puts the meta tensor back."""
    if leaf in module._buffers:
        return _bind_buffer(module, leaf, value)
    before = module._parameters[leaf]
    held = value if value.dtype == dtype or not value.is_floating_point() else None
    release: Callable[[], object] = _nothing
    if held is None and type(module) is nn.Linear and leaf == "weight":
        held = value
        module.forward = functools.partial(_linear_in_panels, module)  # type: ignore[method-assign]
        release = functools.partial(module.__dict__.pop, "forward", None)
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


def _narrow(module: nn.Module, table: Tensor, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Makes an embedding bring only the rows it is asked for to `device` and `dtype`; returns what ends that.

    `table` stays on the CPU.
    """
    before = module._parameters["weight"]

    def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, places = torch.unique(args[0].cpu(), return_inverse=True)
        module._parameters["weight"] = nn.Parameter(table[rows].to(device, dtype), requires_grad=False)
        return (places.to(device), *args[1:])

    handle = module.register_forward_pre_hook(narrow)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        module.__dict__["padding_idx"] = None  # its row may not be among those that are looked up

    def end() -> None:
        handle.remove()
        module.__dict__["padding_idx"] = padding
        module._parameters["weight"] = before

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
