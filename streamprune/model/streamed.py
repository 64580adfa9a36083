"""Runs a model stage by stage: embed, one layer after the other, head.

To learn how the model calls its layers, every decoder layer is replaced by a recorder, which passes its input on
unchanged and keeps its arguments. One run of the model's own forward then yields exactly the arguments that the
architecture gives each layer: masks of each kind, rotary embeddings, alibi. The real layers are called with these, one
at a time, on states from the disk cache. For the head, the last recorder returns the cached states, so that the final
norm, softcaps and lm_head are the model's own code.

No batch has a mask of its own, so the arguments depend on its shape only, and are recorded once for each shape. An
architecture whose arguments depend on the tokens is detected and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamprune.errors import ResourceError, UnsupportedError
from streamprune.model.binding import bound
from streamprune.model.calls import Call, RecordedCalls, same
from streamprune.model.copies import is_of_device, is_out_of_memory
from streamprune.model.device import cache_dtype
from streamprune.model.loader import WeightLoader
from streamprune.model.prunable import is_linear
from streamprune.model.routed import Enough, InputHook, ReachedExperts, Routed
from streamprune.model.skeleton import Skeleton, Stage

_SECOND_OUTPUT = object()
"""Second element of the tuple that recorders return to models that expect one. No layer may get it as an argument."""


class _Recorder(nn.Module):
    """Takes the place of a decoder layer: keeps its arguments and returns its input, or `replace` if that is set.

    With `compare`, `handed_on` tells whether its input is what the `first` recorder passed on.
    """

    def __init__(self, as_tuple: bool, first: _Recorder | None, compare: bool) -> None:
        super().__init__()
        self.compare = compare
        self.as_tuple = as_tuple
        self.first = [first] if first else []  # in a list, so that it does not become a submodule
        self.received: Tensor | None = None
        self.handed_on = False
        self.call: Call | None = None
        self.replace: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_keyword = "hidden_states" in kwargs
        states = kwargs.pop("hidden_states") if by_keyword else args[0]
        if not self.first:
            self.received = states.clone()  # the model may change the states in place later
            self.handed_on = True
        elif self.compare:
            given = self.first[0].received
            self.handed_on = given is not None and states.shape == given.shape and bool(torch.equal(states, given))
        else:
            self.handed_on = True
        self.call = Call(args if by_keyword else args[1:], kwargs, by_keyword)
        out = states if self.replace is None else self.replace
        return (out, _SECOND_OUTPUT) if self.as_tuple else out


class StreamedModel:
    """Runs a skeleton's stages on batches of token ids (batch, seqlen) or hidden states (batch, seqlen, hidden).

    Computes in `dtype` on the device of `loader`. Batches may differ in both dimensions. Batches of more than
    `max_samples` are computed in parts. With `weighted`, `watch` sees experts' inputs multiplied by their routing
    weights. Experts process up to `group` batches together.
    """

    def __init__(
        self, skeleton: Skeleton, loader: WeightLoader, dtype: torch.dtype, *,
        max_samples: int | None = None, weighted: bool = True, group: int = 1,
    ) -> None:  # fmt: skip
        self.skeleton, self.loader, self.dtype, self.device = skeleton, loader, dtype, loader.device
        self.cache_dtype = cache_dtype(skeleton.dtype, dtype)
        self.max_samples, self.weighted, self.group = max_samples, weighted, group
        self._calls = RecordedCalls()
        self._as_tuple: bool | None = None
        for buffer_owner in skeleton.model.modules():
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    buffer_owner._buffers[name] = buffer.to(self.device)

    def embed(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Hidden states before layer 0 for each batch of ids; records the layers' arguments on the way.

        Raises UnsupportedError when the model computes something between layers, or when layers' arguments depend on
        the tokens.
        """
        with self._outside(head=False):
            for ids in batches:
                states = [self._embed(part) for part in torch.split(ids.to(self.device), self.max_samples or len(ids))]
                yield states[0] if len(states) == 1 else torch.cat(states)

    def _embed(self, ids: Tensor) -> Tensor:
        self._calls.see(ids)
        states, calls = self._record(ids)
        known = self._calls.remember(ids.shape[0], ids.shape[1], calls)
        if known is not calls and not all(same(a, b) for a, b in zip(known, calls, strict=True)):
            raise UnsupportedError(
                f"{_kind(self.skeleton)} gives its layers arguments that depend on the tokens; "
                "its layers cannot be replayed from hidden states alone"
            )
        return states

    def learn_calls(self, batches: Sequence[Tensor]) -> None:
        """Records the layers' arguments for each shape in `batches`, for a job that resumes at a layer."""
        firsts = {ids.shape: ids for ids in reversed(batches)}
        for _ in self.embed(list(firsts.values())):
            pass

    def halve_batch(self) -> None:
        """Halves `max_samples` after memory ran out. Raises ResourceError when it is one already."""
        largest = self.max_samples or self._calls.largest
        if largest == 1:
            flag = "--max-ram or" if self.device.type == "cpu" else "--max-vram or"
            raise ResourceError(
                f"{self.device} ran out of memory with a single sample at a time; free some ({flag} other programs "
                "may hold it), or take a smaller --seqlen"
            )
        self.max_samples = -(-largest // 2)
        self.loader.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def batches_at_once(self) -> int:
        """Batches in a group that experts process together; fewer after memory ran out."""
        largest = self._calls.largest
        return max(1, self.group * min(self.max_samples or largest, largest) // largest)

    @contextmanager
    def _outside(self, head: bool) -> Iterator[None]:
        """Binds the parameters outside the decoder layers; without `head`, not those of the LM head."""
        with bound(self.skeleton, None, self.loader, self.dtype, head=head) as used:
            try:
                yield
            finally:
                self.loader.release(used)

    @torch.inference_mode()
    def _record(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        objection, failure = "", None
        for as_tuple in (False, True) if self._as_tuple is None else (self._as_tuple,):
            compare = self._calls.of(ids.shape[0], ids.shape[1]) is None  # once for each shape of a batch
            with _recorders(self.skeleton, as_tuple, compare) as recorders:
                model = self.skeleton.model
                base = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
                base = model.get_decoder() if base is None else base  # type: ignore[operator]
                try:
                    final = base(input_ids=ids, use_cache=False)[0]
                except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as e:
                    if is_out_of_memory(e) or is_of_device(e):
                        raise  # says nothing about the model; as an UnsupportedError it would discard unfinished work
                    failure = e.with_traceback(None)  # its frames hold tensors
                    final = None  # probably it expects a tuple from its layers, or none
                objection = _objection(recorders, final, self.skeleton.hidden_size)
                first = recorders[0].received
                if first is not None and not objection:
                    self._as_tuple = as_tuple
                    return first, [r.call for r in recorders if r.call is not None]
        raise UnsupportedError(f"{_kind(self.skeleton)} {objection}") from failure

    @contextmanager
    def layer(
        self,
        stage: Stage,
        *,
        loader: WeightLoader | None = None,
        sources: dict[str, Any] | None = None,
        watch: InputHook | None = None,
        routed: Routed | None = None,
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yields the forward of one decoder layer with bound weights: from states to states, (batch, seqlen, hidden).

        `watch(linear, x)` sees the input (tokens, in) of each linear. With `routed`, that shows experts' inputs;
        while it is collecting, outputs are invalid and `watch` is not called. Outputs are invalid, too, when `watch`
        raises Enough. `loader` and `sources` replace where weights come from, to run the pruned layer for example. On a
        device the weights stay until the caller releases them; on the CPU their pages are released on leaving.
        """
        layer = self.skeleton.layers[stage.index]
        hooks = [
            module.register_forward_pre_hook(_watching(watch, f"{stage.prefix}.{path}", routed), with_kwargs=True)
            for path, module in layer.named_modules()
            if watch is not None and is_linear(module)
        ]

        @torch.inference_mode()
        def part(states: Tensor) -> Tensor:
            call = self.calls_of(states.shape[0], states.shape[1])[stage.index]
            states = states.to(self.device, self.dtype)
            if routed is not None:
                routed.call()
            try:
                if call.by_keyword:
                    out = layer(*call.args, hidden_states=states, **call.kwargs)
                else:
                    out = layer(states, *call.args, **call.kwargs)
            except (ReachedExperts, Enough):
                return states
            result: Tensor = out[0] if isinstance(out, tuple | list) else out
            return result

        def run(states: Tensor) -> Tensor:
            parts = [part(chunk) for chunk in torch.split(states, self.max_samples or len(states))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        source = loader or self.loader
        try:
            with bound(
                self.skeleton, stage.prefix, source, self.dtype, sources, watch=watch, weighted=self.weighted,
                routed=routed,
            ) as used:  # fmt: skip
                try:
                    yield run
                finally:
                    if not source.copies:
                        source.release(used)
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def experts(self, path: str, routed: Routed) -> Iterator[None]:
        """Binds the weights of one module of experts, for `routed.again`."""
        with bound(self.skeleton, path, self.loader, self.dtype, routed=routed) as used:
            try:
                yield
            finally:
                if not self.loader.copies:
                    self.loader.release(used)

    def calls_of(self, samples: int, seqlen: int | None = None) -> list[Call]:
        """The layers' arguments for batches of this shape, recorded if they are not known.

        `seqlen` may be left out where all batches have the same.
        """
        length = self._calls.length if seqlen is None else seqlen
        found = self._calls.of(samples, length)
        if found is None:
            with self._outside(head=False):
                recorded = self._record(self._calls.example(samples, length))[1]
            found = self._calls.remember(samples, length, recorded)
        return found

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yields the head with bound weights: states (tokens, hidden) -> logits (tokens, vocab).

        The final norm and lm_head treat each position separately, so a call may mix positions of any windows.
        """
        assert self._as_tuple is not None, "embed or learn_calls comes first"
        with (
            self._outside(head=True),
            _recorders(self.skeleton, self._as_tuple, compare=False) as recorders,
        ):

            @torch.inference_mode()
            def run(states: Tensor) -> Tensor:
                recorders[-1].replace = states.to(self.device, self.dtype).unsqueeze(0)
                ids = torch.zeros(1, states.shape[0], dtype=torch.long, device=self.device)
                logits: Tensor = self.skeleton.causal(input_ids=ids, use_cache=False)[0]
                return logits[0]

            yield run


def _watching(watch: InputHook, name: str, routed: Routed | None) -> Callable[..., None]:
    """A forward pre-hook that passes a linear's input to `watch`, whether positional or by keyword."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if routed is None or not routed.collecting:
            watch(name, args[0] if args else next(iter(kwargs.values())))

    return hook


@contextmanager
def _recorders(skeleton: Skeleton, as_tuple: bool, compare: bool = True) -> Iterator[list[_Recorder]]:
    """Replaces every decoder layer by a recorder, see _Recorder for `compare`."""
    layers = skeleton.layers
    real = list(layers)
    recorders = [_Recorder(as_tuple, None, compare)]
    recorders += [_Recorder(as_tuple, recorders[0], compare) for _ in real[1:]]
    for i, (recorder, layer) in enumerate(zip(recorders, real, strict=True)):
        for attribute in ("attention_type", "layer_type", "is_sliding", "block_type"):  # some models read these
            if hasattr(layer, attribute):
                setattr(recorder, attribute, getattr(layer, attribute))
        layers[i] = recorder
    try:
        yield recorders
    finally:
        for i, layer in enumerate(real):
            layers[i] = layer


def _objection(recorders: list[_Recorder], final: Tensor | None, width: int) -> str:
    """Why layers cannot be streamed, after a recorded run with output `final` (None: it failed); "" if they can be."""
    first, calls = recorders[0].received, [r.call for r in recorders if r.call is not None]
    if any(value is _SECOND_OUTPUT for call in calls for value in (*call.args, *call.kwargs.values())):
        return "hands more than hidden states from layer to layer; its layers cannot be streamed one by one"
    if first is not None and (first.dim() != 3 or first.shape[-1] != width):
        return f"gives its layers states {list(first.shape)} instead of (batch, tokens, {width}), which cannot be kept"
    if first is None or final is None or not all(r.handed_on for r in recorders) or final.shape[:2] != first.shape[:2]:
        return (
            "does something between its decoder layers (or does not call them all in order); its layers cannot be "
            "streamed one by one"
        )
    return ""


def _kind(skeleton: Skeleton) -> str:
    return str(getattr(skeleton.model.config, "model_type", type(skeleton.model).__name__))
