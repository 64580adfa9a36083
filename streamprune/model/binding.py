"""Binds mapped tensors to the skeleton's modules while a stage computes.

If a tensor is stored in the compute dtype, the parameter is the mapped file itself: nothing is copied. Otherwise (bf16
weights on a processor without bf16 arithmetic) large matrices stay mapped and are converted in panels of rows while
they are used, so there is never a converted copy of a whole stage:

    linears            out[:, rows] = x · W[rows]ᵀ, rows converted panel by panel
    embeddings         only the rows that the batch looks up are converted; on a device, only these are copied to it
    everything else    converted when it is bound (norms, biases, small tables)

Linears stored in FP8 are dequantised in the same panels. In models that keep more than hidden states between layers,
what transformers holds in float32 whatever their dtype (weights that mix streams, routers) is float32 here, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from streamprune.disk.float_quantized import SCALE, Scheme
from streamprune.disk.header import TensorRef
from streamprune.methods.fp8 import dequantise
from streamprune.model.bound_experts import bind_experts
from streamprune.model.finite import refuse_bad_scales
from streamprune.model.loader import WeightLoader
from streamprune.model.naming import pieces_of
from streamprune.model.panels import dequantised, in_panels, linear_in_panels, rounded
from streamprune.model.routed import InputHook, Routed
from streamprune.model.skeleton import Skeleton, is_table


@contextmanager
def bound(
    skeleton: Skeleton,
    prefix: str | None,
    loader: WeightLoader,
    dtype: torch.dtype,
    sources: Mapping[str, TensorRef] | None = None,
    head: bool = True,
    watch: InputHook | None = None,
    weighted: bool = True,
    routed: Routed | None = None,
) -> Iterator[list[TensorRef]]:
    """Binds the parameters below `prefix`; with None, all parameters outside the decoder layers.

    Within the context the modules compute in `dtype` on the loader's device; on leaving they are on the meta device
    again. Yields the bound tensors, for the caller to release. `sources` replaces the skeleton's own, to bind tensors
    of other files. Without `head`, the LM head is left out. With `routed`, experts' inputs are collected for a group of
    batches; otherwise experts compute at once, and `watch` sees the inputs of their linears, multiplied by the
    routing's weights if `weighted`.
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
            if full in skeleton.experts:
                undo.append(bind_experts(skeleton, module, full, loader, refs, watch, weighted, routed))
            names = [*module._parameters, *module._buffers]
            for leaf in names:
                name = f"{full}.{leaf}" if full else leaf
                ref = refs.get(name)
                if ref is None and (pieces := pieces_of(refs, name)):
                    used += pieces
                    joined = torch.cat([loader.tensor(piece) for piece in pieces])
                    undo.append(_bind(module, leaf, joined, dtype))
                if ref is None:
                    continue
                used.append(ref)
                scale, called = refs.get(f"{name}{SCALE}"), name not in skeleton.dense
                if scale is not None:
                    used.append(scale)
                    codes, scales = loader.tensor(ref), loader.tensor(scale)
                    refuse_bad_scales(scale, scales, ref, codes)
                    undo.append(_bind_codes(module, codes, scales, skeleton.scheme, dtype, called))
                elif (
                    leaf == "weight"
                    and (module is embedding or (prefix is None and is_table(skeleton.model, module)))
                    and (loader.copies or loader.maps.tensor(ref).dtype != dtype)
                ):
                    undo.append(_bind_embedding(module, loader.maps.tensor(ref), dtype, loader.device))
                else:
                    own = module._parameters.get(leaf)
                    # others are bound in `dtype` throughout, as they were in jobs that may still be resumed
                    exact = own is not None and own.dtype == torch.float32 and not skeleton.ordinary
                    undo.append(_bind(module, leaf, loader.tensor(ref), torch.float32 if exact else dtype, called))
        yield used
    finally:
        for restore in reversed(undo):
            restore()


@contextmanager
def replaced_weights(skeleton: Skeleton, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, bound linears compute with these weights instead: linear -> weight in its stored shape and dtype."""
    before: dict[str, nn.Parameter | None] = {}
    try:
        for name, weight in weights.items():
            parameters = skeleton.model.get_submodule(name)._parameters
            old = before[name] = parameters["weight"]
            assert old is not None
            parameters["weight"] = nn.Parameter(weight.to(old.device, old.dtype), requires_grad=False)
        yield
    finally:
        for name, held in before.items():
            skeleton.model.get_submodule(name)._parameters["weight"] = held


@contextmanager
def replaced_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, the named parameters and buffers below `module` are replaced by these tensors, without a copy."""
    undo: list[Callable[[], None]] = []
    try:
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            if leaf in owner._buffers:
                undo.append(_bind_buffer(owner, leaf, value))
                continue
            undo.append(functools.partial(owner._parameters.__setitem__, leaf, owner._parameters[leaf]))
            owner._parameters[leaf] = value  # type: ignore[assignment]
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _bind(
    module: nn.Module, leaf: str, value: Tensor, dtype: torch.dtype, called: bool = True
) -> Callable[[], None]:  # fmt: skip
    """Puts a stored tensor in place of a module's meta tensor; returns a function that restores that.

    A linear that is not `called` is multiplied with by another module, and so has to be there in `dtype`.
    """
    if leaf in module._buffers:
        return _bind_buffer(module, leaf, value)
    before = module._parameters[leaf]
    held = value if value.dtype == dtype or not value.is_floating_point() else None
    release: Callable[[], object] = _nothing
    if held is None and type(module) is nn.Linear and leaf == "weight" and called:
        held = value
        module.forward = functools.partial(linear_in_panels, module)  # type: ignore[method-assign]
        release = functools.partial(module.__dict__.pop, "forward", None)
    elif held is None:
        held = value.to(dtype)
    module._parameters[leaf] = nn.Parameter(held, requires_grad=False)

    def restore() -> None:
        release()
        module._parameters[leaf] = before

    return restore


def _bind_codes(
    module: nn.Module, codes: Tensor, scale: Tensor, scheme: Scheme | None, dtype: torch.dtype, called: bool
) -> Callable[[], None]:
    """Makes a linear compute with FP8 codes (out, in) and their scale, as the scheme says; returns an undo function."""
    before, forward = module._parameters["weight"], module.forward
    quantised = rounded if scheme is None or scheme.rounds_inputs else _unchanged
    if type(module) is nn.Linear and called:
        # Some callers read the weight's dtype (DeepSeek-V3.2's indexer). If one read its values, NaN would show it.
        placeholder = codes.new_full((), torch.nan, dtype=dtype).expand(codes.shape)
        module._parameters["weight"] = nn.Parameter(placeholder, requires_grad=False)
        module.__dict__["forward"] = lambda x: in_panels(
            quantised(x), len(codes), module.bias, lambda b, e: dequantised(codes, scale, b, e, x.dtype)
        )
    else:  # a subclass with a forward of its own, or see _bind
        exact = dequantise(codes, scale, dtype)
        module._parameters["weight"] = nn.Parameter(exact, requires_grad=False)
        module.__dict__["forward"] = lambda x: forward(quantised(x))

    def restore() -> None:
        module.__dict__.pop("forward", None)
        module._parameters["weight"] = before

    return restore


def _bind_buffer(module: nn.Module, leaf: str, value: Tensor) -> Callable[[], None]:
    before = module._buffers[leaf]
    module._buffers[leaf] = value if before is None else value.to(before.dtype)

    def restore() -> None:
        module._buffers[leaf] = before

    return restore


def _nothing() -> None:
    """Nothing to release."""


def _bind_embedding(module: nn.Module, table: Tensor, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Makes an embedding copy only the rows it looks up to `device` and `dtype`; returns an undo function.

    `table` (vocab, hidden) stays on the CPU, mapped.
    """
    before = module._parameters["weight"]

    def bind_rows(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, places = torch.unique(args[0].cpu(), return_inverse=True)
        module._parameters["weight"] = nn.Parameter(table[rows].to(device, dtype), requires_grad=False)
        return (places.to(device), *args[1:])

    handle = module.register_forward_pre_hook(bind_rows)
    # Llama 4 moves token ids to the device of the weight. If something read its values, NaN would show it.
    placeholder = torch.full((), torch.nan, dtype=dtype, device=device).expand(table.shape)
    module._parameters["weight"] = nn.Parameter(placeholder, requires_grad=False)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        module.__dict__["padding_idx"] = None  # the padding row may not be among those looked up

    def end() -> None:
        handle.remove()
        module.__dict__["padding_idx"] = padding
        module._parameters["weight"] = before

    return end


def _unchanged(x: Tensor) -> Tensor:
    return x
