"""Passes of all batches through one stage, from cache to cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Protocol, TypeVar, overload

import torch
from torch import Tensor

from streamprune.calibration.windows import Tokens, Windows
from streamprune.disk.header import TensorRef
from streamprune.errors import ResourceError
from streamprune.model.activations import Activations
from streamprune.model.copies import is_out_of_memory
from streamprune.model.finite import finite_rows
from streamprune.model.loader import WeightLoader
from streamprune.model.routed import InputHook, Routed, RoutedInputs
from streamprune.model.skeleton import Skeleton, Stage
from streamprune.model.streamed import StreamedModel

_CHECK_BYTES = 16 << 20

Result = TypeVar("Result")


class Watcher(Protocol):
    """What sees the inputs of a layer's linears, in the order of use, and is told when a batch is through."""

    def watch(self, name: str, x: Tensor, /) -> None: ...

    def end_batch(self) -> None: ...


class Batches(Sequence[Tensor]):
    """Windows (samples, seqlen) as batches (≤ `batch`, seqlen) int64, each read when it is asked for."""

    def __init__(self, windows: Tokens | Windows, batch: int) -> None:
        self._windows, self._batch = windows, batch

    def __len__(self) -> int:
        return math.ceil(len(self._windows) / self._batch)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin = range(len(self))[index] * self._batch
        return torch.from_numpy(self._windows[begin : begin + self._batch])


def embed_pass(
    streamed: StreamedModel, batches: Sequence[Tensor], activations: Activations, *, persist: bool = True
) -> None:
    """Token ids to the states before layer 0."""
    with activations.write(0, persist=persist) as put:
        for states in streamed.embed(batches):
            put(states)


def layer_pass(
    streamed: StreamedModel,
    stage: Stage,
    activations: Activations,
    *,
    write: bool,
    persist: bool = True,
    watchers: Sequence[Watcher] = (),
    flow: Callable[[Tensor, Tensor], None] | None = None,
    loader: WeightLoader | None = None,
    sources: dict[str, TensorRef] | None = None,
    routed: Routed | None = None,
) -> None:
    """States before layer i through it to those before i + 1 (if `write`).

    `watchers` see its linears' inputs, `flow` the states before and after it; `persist` as for Activations.write.
    `loader` and `sources` as for StreamedModel.layer. `routed` collects for the layer's experts; by default a new one.
    """

    def watch(name: str, x: Tensor) -> None:
        for watcher in watchers:
            watcher.watch(name, x)

    see = watch if watchers else None
    if stage.experts and routed is None:
        routed = routed_to(streamed, stage)
    with (
        streamed.layer(stage, loader=loader, sources=sources, watch=see, routed=routed) as run,
        activations.write(stage.index + 1, persist=persist) if write else nullcontext(_nowhere) as put,
    ):
        for states in _with_experts(streamed, stage, activations, run, routed, see):
            after = run(states)
            if flow is not None:
                flow(states, after)
            put(after)
            for watcher in watchers:
                watcher.end_batch()


def routed_to(streamed: StreamedModel, stage: Stage, kept: RoutedInputs | None = None) -> Routed:
    """What collects for a layer's experts; with `kept` there, too."""
    return Routed({ref.name: ref for ref in stage.tensors}, streamed.weighted, kept)


def _with_experts(
    streamed: StreamedModel, stage: Stage, activations: Activations, run: Callable[[Tensor], Tensor],
    routed: Routed | None, see: InputHook | None,
) -> Iterator[Tensor]:  # fmt: skip
    """The states before a layer, chunk by chunk, each when the layer's experts have done their part for it."""
    if routed is None:
        yield from activations.read(stage.index)
        return
    *ahead, last = (activations.read(stage.index) for _ in range(len(stage.experts) + 1))
    while True:
        routed.begin()
        chunks = 0
        for reader in ahead:
            for states in islice(reader, streamed.batches_at_once):
                run(states)
                chunks += 1
            routed.compute(see)
        if not chunks:
            return
        routed.complete()
        yield from islice(last, streamed.batches_at_once)


def _nowhere(states: Tensor) -> None:
    """The states after the last layer that is run are not needed."""


def check_weights(loader: WeightLoader, skeleton: Skeleton, stage: Stage) -> None:
    """Looks at a stage's weights before they are used. Raises CheckpointError for NaN and Inf, as finite_rows.

    Those of experts are looked at when their turn comes.
    """
    known = {ref.name for ref in skeleton.sources.values()}
    for ref in stage.resident_tensors if stage.kind == "layer" else stage.tensors:
        # of the embeddings and the head, a pass touches a few rows only
        in_passing = stage.kind != "layer"
        if ref.name in known:
            for begin, rows in finite_rows(loader.maps if in_passing else loader, ref, _CHECK_BYTES):
                if in_passing:
                    at = ref.begin + begin * (ref.nbytes // max(1, ref.shape[0] if ref.shape else 1))
                    loader.maps.release([replace(ref, begin=at, end=at + rows.nbytes)], drop_cache=True)


def retry_smaller(streamed: StreamedModel, work: Callable[[], Result]) -> Result:
    """What `work` returns; when it runs out of memory it starts again with batches of half the size.

    Raises ResourceError when a single sample does not fit.
    """
    while True:
        try:
            return work()
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
        streamed.give_way()  # out here, where the failed attempt's tensors are no longer held by its traceback


@contextmanager
def out_of_memory_named(device: torch.device) -> Iterator[None]:
    """Turns what is left of torch's out-of-memory errors into a ResourceError."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise ResourceError(
            f"{device} ran out of memory: {' '.join(str(e).split())[:120]}; free some and run the same command again"
        ) from e
