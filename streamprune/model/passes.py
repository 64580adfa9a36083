"""Passes of all batches through one stage: cached hidden states in, cached hidden states out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
from streamprune.model.finite import finite_rows
from streamprune.model.loader import WeightLoader
from streamprune.model.routed import InputHook, Routed
from streamprune.model.routed_inputs import RoutedInputs
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.model.streamed import StreamedModel
from streamprune.process.memory import is_out_of_memory
from streamprune.process.share import Share

_CHECK_BYTES = 16 << 20

Result = TypeVar("Result")


class Watcher(Protocol):
    """Sees the inputs of a layer's linears, in the order of use, and is told when a batch is done."""

    def watch(self, name: str, x: Tensor, /) -> None: ...

    def end_batch(self) -> None: ...


class LazyBatches(Sequence[Tensor], ABC):
    """Batches of token ids (samples, seqlen) int64, each made when it is used."""

    @abstractmethod
    def batch(self, index: int) -> Tensor:
        """The batch number `index`, from 0 to len - 1."""

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.batch(range(len(self))[index])


class Batches(LazyBatches):
    """Windows (samples, seqlen) as batches of at most `batch`; each is read when it is used."""

    def __init__(self, windows: Tokens | Windows, batch: int) -> None:
        self._windows, self._batch = windows, batch

    def __len__(self) -> int:
        return math.ceil(len(self._windows) / self._batch)

    def batch(self, index: int) -> Tensor:
        begin = index * self._batch
        return torch.from_numpy(self._windows[begin : begin + self._batch])


class Dealt(LazyBatches):
    """The batches of one rank among all `batches`."""

    def __init__(self, batches: Sequence[Tensor], share: Share) -> None:
        self._batches, self._numbers = batches, list(share.numbers())

    def __len__(self) -> int:
        return len(self._numbers)

    def batch(self, index: int) -> Tensor:
        return self._batches[self._numbers[index]]


def embed_pass(
    streamed: StreamedModel, batches: Sequence[Tensor], activations: Activations, *, persist: bool = True
) -> None:
    """Computes the hidden states before layer 0 from token ids."""
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
    """Runs layer i on all states before it; with `write`, stores the results as the states before layer i + 1.

    `watchers` see the inputs of its linears, `flow` the hidden states before and after it. `persist` is as for
    Activations.write, `loader` and `sources` as for StreamedModel.layer. `routed` collects the inputs of the layer's
    experts; by default it is a new one.
    """

    def watch(name: str, x: Tensor) -> None:
        for watcher in watchers:
            watcher.watch(name, x)

    hook = watch if watchers else None
    if stage.experts and routed is None:
        routed = routed_to(streamed, stage)
    with (
        streamed.layer(stage, loader=loader, sources=sources, watch=hook, routed=routed) as run,
        activations.write(stage.index + 1, persist=persist) if write else nullcontext(_discard) as put,
    ):
        for states in _with_experts(streamed, stage, activations, run, routed, hook):
            after = run(states)
            if flow is not None:
                between = streamed.skeleton.between
                flow(between.states(states), between.states(after))
            put(after)
            for watcher in watchers:
                watcher.end_batch()


def routed_to(streamed: StreamedModel, stage: Stage, kept: RoutedInputs | None = None) -> Routed:
    """A new Routed for a layer; with `kept`, it records the experts' inputs there."""
    return Routed({ref.name: ref for ref in stage.tensors}, streamed.weighted, kept)


def _with_experts(
    streamed: StreamedModel, stage: Stage, activations: Activations, run: Callable[[Tensor], Tensor],
    routed: Routed | None, watch: InputHook | None,
) -> Iterator[Tensor]:  # fmt: skip
    """The states before a layer, chunk by chunk, each after the layer's experts have computed for it."""
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
            routed.compute(watch)
        if not chunks:
            return
        routed.complete()
        yield from islice(last, streamed.batches_at_once)


def _discard(states: Tensor) -> None:
    """In place of a cache's `put`, where the states after a layer are not needed."""


def check_weights(loader: WeightLoader, skeleton: Skeleton, stage: Stage) -> None:
    """Checks a stage's weights before use. Raises CheckpointError for NaN and Inf, as finite_rows.

    Those of experts are checked when they are first used (routed.py).
    """
    known = {ref.name for ref in skeleton.sources.values()}
    for ref in stage.resident_tensors if stage.kind == "layer" else stage.tensors:
        # a pass uses only a few rows of the embeddings and the head: they are checked without being loaded as a whole
        in_chunks = stage.kind != "layer"
        if ref.name in known:
            for begin, rows in finite_rows(loader.maps if in_chunks else loader, ref, _CHECK_BYTES):
                if in_chunks:
                    at = ref.begin + begin * (ref.nbytes // max(1, ref.shape[0] if ref.shape else 1))
                    loader.maps.release([replace(ref, begin=at, end=at + rows.nbytes)], drop_cache=True)


def retry_smaller(streamed: StreamedModel, work: Callable[[], Result]) -> Result:
    """The result of `work`, which is repeated with batches of half the size when it runs out of memory.

    Raises ResourceError when a single sample does not fit.
    """
    while True:
        try:
            return work()
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
        streamed.halve_batch()  # not in the except block, where the traceback still holds the attempt's tensors


@contextmanager
def out_of_memory_named(device: torch.device) -> Iterator[None]:
    """Turns out-of-memory errors within it, of torch or of Python, into a ResourceError."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        what = " ".join(str(e).split())[:120] or "a Python object did not fit"
        raise ResourceError(f"{device} ran out of memory: {what}; free some and run the same command again") from e
