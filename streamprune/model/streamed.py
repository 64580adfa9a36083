"""Runs a model stage by stage: embed, one layer after the other, head.

The arguments of layers are recorded (recorders.py). The real layers are called with these, one at a time, on states
from the disk cache. For the head, the last recorder returns the cached states, so that the final norm, softcaps and
lm_head are the model's own code.

No batch has a mask of its own, so most models' arguments depend on its shape only, and are recorded once for each
shape. Where they depend on the tokens, the tokens' ids are kept with the states (between.py), and what comes before the
layers is computed again for each layer and each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from streamprune.errors import ResourceError, UnsupportedError
from streamprune.model.between import Given
from streamprune.model.binding import bound
from streamprune.model.calls import Call, RecordedCalls, same
from streamprune.model.device import cache_dtype
from streamprune.model.loader import WeightLoader
from streamprune.model.prunable import is_linear
from streamprune.model.recorders import Recorded, kind_of, record, recorders
from streamprune.model.routed import Enough, InputHook, ReachedExperts, Routed
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage


class StreamedModel:
    """Runs a skeleton's stages on batches of token ids (batch, seqlen) or of states (batch, seqlen, width), which are
    what the model keeps between layers: see between.py.

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
        self._between, self._calls = skeleton.between, RecordedCalls()
        self._known: Recorded | None = None
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
        found = self._record(ids)
        if not self._between.ids:
            known = self._calls.remember(ids.shape[0], ids.shape[1], found.calls)
            if known is not found.calls and not all(same(a, b) for a, b in zip(known, found.calls, strict=True)):
                raise UnsupportedError(
                    f"{kind_of(self.skeleton)} gives its layers arguments that depend on the tokens, which did not "
                    "show in a trial; its layers cannot be replayed from hidden states alone"
                )
        return self._between.pack(0, Given(found.states, ids))

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

    def _record(self, ids: Tensor) -> Recorded:
        found = record(self.skeleton, ids, self._known, compare=self._calls.is_new(*ids.shape))
        between = self._between
        sizes = [n for at, n in enumerate(found.states.shape) if at not in between.order]
        if sizes != [*between.streams]:
            raise UnsupportedError(
                f"{kind_of(self.skeleton)} gives its layers states {list(found.states.shape)} instead of (batch, "
                f"tokens, {', '.join(map(str, between.streams))}), which cannot be kept"
            )
        if not between.known and any(call.outputs for call in found.calls):
            raise UnsupportedError(
                f"{kind_of(self.skeleton)} hands more than hidden states from layer to layer; its layers cannot be "
                "streamed one by one"
            )
        self._known = self._known or replace(found, calls=[])
        return found

    @contextmanager
    def replaying(self) -> Iterator[Callable[[int, Given], Call]]:
        """Yields what gives a layer's arguments for an input of it."""
        if not self._between.ids:
            yield lambda layer, given: self.calls_of(*self._between.rows(given.hidden).shape[:2])[layer]
            return
        with self._outside(head=False):
            yield lambda layer, given: self._record(_present(given.ids)).calls[layer]

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
            states = states.to(self.device, self.dtype)
            given = self._between.unpack(stage.index, states)
            call = call_for(stage.index, given)
            if routed is not None:
                routed.call()
            try:
                hidden, handed = call.run(layer, given.hidden, given.values)
            except (ReachedExperts, Enough):
                return states
            after = Given(hidden, given.ids, {**given.values, **handed})
            return self._between.pack(stage.index + 1, after)

        def run(states: Tensor) -> Tensor:
            parts = [part(chunk) for chunk in torch.split(states, self.max_samples or len(states))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        source = loader or self.loader
        try:
            with self.replaying() as call_for, bound(
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
                recorded = self._record(self._calls.example(samples, length)).calls
            found = self._calls.remember(samples, length, recorded)
        return found

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yields the head with bound weights: states (tokens, hidden, of all streams) -> logits (tokens, vocab).

        The final norm and lm_head treat each position separately, so a call may mix positions of any windows.
        """
        assert self._known is not None, "embed or learn_calls comes first"
        with self._outside(head=True), recorders(self.skeleton, self._known.outputs, compare=False) as made:

            @torch.inference_mode()
            def run(states: Tensor) -> Tensor:
                made[-1].replace = self._between.shaped(states.to(self.device, self.dtype).unsqueeze(0))
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


def _present(ids: Tensor | None) -> Tensor:
    assert ids is not None, "a model whose layers' arguments depend on the tokens keeps their ids"
    return ids
