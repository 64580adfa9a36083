"""Binds experts' weights to modules of experts, which then compute one expert at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import TensorRef
from streamprune.model.expert_forms import Form, form_of
from streamprune.model.finite import refuse_bad_scales
from streamprune.model.loader import WeightLoader
from streamprune.model.panels import dequantised, in_panels, product, rounded
from streamprune.model.routed import Forwards, InputHook, immediate_forward
from streamprune.model.skeleton import Skeleton


class ExpertWeights:
    """The weights of a module's experts, loaded when they are used: see routed.Weights.

    Weights in FP8 or in another dtype than x are converted a panel of rows at a time. Inputs of FP8 experts are not
    rounded to FP8, except for those of Llama 4: transformers, unlike vLLM, does that for nn.Linear only.
    """

    def __init__(
        self, skeleton: Skeleton, loader: WeightLoader, refs: Mapping[str, TensorRef], form: Form
    ) -> None:  # fmt: skip
        self._rounds = form.rounds_inputs and (skeleton.scheme is None or skeleton.scheme.rounds_inputs)
        self._skeleton, self._loader, self._refs = skeleton, loader, refs
        self._held: dict[str, tuple[Tensor, ...]] = {}
        self.device = loader.device

    def stored(self, name: str) -> tuple[TensorRef, Tensor]:
        """A linear's weight in its stored dtype and shape. Raises CheckpointError for bad scales."""
        refs = self._of(name)
        if name not in self._held:
            self._held[name] = tuple(self._loader.tensor(ref) for ref in refs)
            if len(refs) > 1:
                codes, scales = self._held[name]
                refuse_bad_scales(refs[1], scales, refs[0], codes)
        return refs[0], self._held[name][0]

    def product(self, name: str, x: Tensor) -> Tensor:
        """x (n, in) · Wᵀ: (n, out), in x's dtype."""
        weight = self.stored(name)[1]
        if len(self._held[name]) > 1:
            scale, x = self._held[name][1], rounded(x) if self._rounds else x
            return in_panels(x, len(weight), None, lambda begin, end: dequantised(weight, scale, begin, end, x.dtype))
        return product(weight.t() if name in self._skeleton.transposed else weight, x)

    def expect(self, names: Collection[str]) -> None:
        """Starts prefetching weights."""
        if names:
            self._loader.expect(ref for name in names for ref in self._of(name))

    def release(self, names: Collection[str]) -> None:
        """Frees weights."""
        for name in names:
            self._held.pop(name, None)
        self._loader.release(ref for name in names for ref in self._of(name))

    def release_all(self) -> None:
        """Frees all weights still held."""
        self.release(list(self._held))

    def _of(self, name: str) -> list[TensorRef]:
        scale = self._refs.get(f"{name}.weight{SCALE}")
        return [self._refs[f"{name}.weight"], *([] if scale is None else [scale])]


def bind_experts(
    skeleton: Skeleton, module: nn.Module, path: str, loader: WeightLoader, refs: Mapping[str, TensorRef],
    watch: InputHook | None, weighted: bool, routed: Forwards | None,
) -> Callable[[], None]:  # fmt: skip
    """Makes a module of experts compute one expert at a time; returns a function that undoes it."""
    form = form_of(skeleton.model, path, module)
    assert form is not None
    weights, experts = ExpertWeights(skeleton, loader, refs, form), skeleton.experts[path]
    if routed is None:
        forward = immediate_forward(form, experts, weights, watch, weighted)
    else:
        forward = routed.forward_of(form, experts, weights)
    form.caller.__dict__["forward"] = form.replaced(forward)

    def restore() -> None:
        form.caller.__dict__.pop("forward", None)
        weights.release_all()

    return restore


@contextmanager
def bound_experts(
    skeleton: Skeleton, paths: Collection[str], loader: WeightLoader, sources: Mapping[str, TensorRef],
    forwards: Forwards,
) -> Iterator[None]:  # fmt: skip
    """Within it, the modules of experts called `paths` compute as `forwards` has it; all else of them is not bound."""
    undo: list[Callable[[], None]] = []
    try:
        for path in paths:
            module = skeleton.model.get_submodule(path)
            undo.append(bind_experts(skeleton, module, path, loader, sources, None, False, forwards))
        yield
    finally:
        for restore in reversed(undo):
            restore()
