"""Hidden states between two stages: in chunks on disk, and on the device as well if they fit.

A killed job resumes from those on disk (disk/cache.py). Reading the next chunk and writing the previous one overlap
with computing the current one. Resident states also stay on the device from one stage to the next; they are rounded to
the cache's dtype like those on disk, so that both give the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk.cache import CacheReader, CacheWriter, remove_cache
from streamprune.disk.scratch import ScratchMatrix
from streamprune.model.copies import CopyStream, Event, Sent, received
from streamprune.process.background import BackgroundWorker, read_ahead


class Activations:
    """The states before each layer (between.py), cached in `folder`, in chunks (batch, seqlen, width) of `dtype`.

    With `resident`, they are kept on `device` as well.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, *, resident: bool = False) -> None:
        self.folder, self.dtype, self.device, self.resident = folder, dtype, device, resident
        self._current: tuple[int, list[Tensor]] = (-1, [])
        """(layer, resident states before it)"""
        self._previous = self._current  # needed again if its layer's pass is repeated
        # created once: torch has a pool of 32 streams, and its allocator caches free memory for each separately
        self._reading, self._writing = CopyStream(device), CopyStream(device)

    def read(self, stage: int) -> Iterator[Tensor]:
        """The states before layer `stage`, chunk by chunk, on the device. Raises CorruptStateError as CacheReader."""
        for layer, chunks in (self._current, self._previous):
            if layer == stage:
                yield from chunks
                return
        for sent in read_ahead(_Sending(CacheReader(self.folder, stage), self._reading)):
            yield received(sent)

    @contextmanager
    def write(self, stage: int, *, persist: bool = True) -> Iterator[Callable[[Tensor], None]]:
        """Yields a function that stores the next chunk of states before layer `stage`.

        On leaving, all are durable. Without `persist`, which needs resident states, nothing is written.
        """
        stream, chunks = self._writing, list[Tensor]()
        self._previous = (-1, [])

        def store(item: tuple[Tensor, Event | None]) -> None:
            if writer is not None:
                writer.append(stream.fetch(*item))

        def put(states: Tensor) -> None:
            states = states.detach().to(self.dtype)
            if self.resident:
                chunks.append(states)
            if persist:
                background.put((states, stream.mark()))

        ahead = None if self.resident else 1
        with (
            CacheWriter(self.folder, stage, self.dtype) if persist else nullcontext() as writer,
            BackgroundWorker(store, ahead) as background,
        ):
            yield put
        self._previous, self._current = self._current, (stage, chunks) if self.resident else (-1, [])

    def drop(self, stage: int) -> None:
        """Removes what is on disk of the states before layer `stage`."""
        remove_cache(self.folder, stage)


class RaggedActivations(Activations):
    """Chunks that differ in all dimensions, of `tokens` in all and of `width` at the most, in two unnamed files in
    `folder` that take turns.

    Nothing of it can be resumed, or is left behind. Raises ResourceError when the disk has no room.
    """

    def __init__(
        self, folder: Path, tokens: int, width: int, dtype: torch.dtype, device: torch.device, *, resident: bool
    ) -> None:
        super().__init__(folder, dtype, device, resident=resident)
        self._files = () if resident else tuple(ScratchMatrix(folder, tokens, width, dtype) for _ in range(2))
        self._shapes: list[torch.Size] = []

    def read(self, stage: int) -> Iterator[Tensor]:
        """As Activations.read."""
        if self.resident:
            yield from super().read(stage)
            return
        file, begin = self._files[stage % 2], 0
        for shape in self._shapes:
            end = begin + shape[0] * shape[1]
            states = file.tensor[begin:end, : shape[2]].reshape(shape).to(self.device, copy=True)
            file.forget(begin, end)
            begin = end
            yield states

    @contextmanager
    def write(self, stage: int, *, persist: bool = True) -> Iterator[Callable[[Tensor], None]]:
        """A function that takes the chunks before layer `stage`, one after the other; the same shapes for each."""
        if self.resident:
            with super().write(stage, persist=False) as put:
                yield put
            return
        file, shapes = self._files[stage % 2], list[torch.Size]()
        at = 0

        def store(states: Tensor) -> None:
            nonlocal at
            begin, at = at, at + states.shape[0] * states.shape[1]
            file.tensor[begin:at, : states.shape[2]] = states.detach().to("cpu", self.dtype).flatten(0, 1)
            file.forget(begin, at)
            shapes.append(states.shape)

        yield store
        self._shapes = shapes

    def drop(self, stage: int) -> None:
        """Nothing: the next stage's states take its place."""


class StateBuffer:
    """States kept for a second pass through the same layer: all are put, then taken in the same order.

    They are in an unnamed temporary file in `folder` with room for `tokens` rows of `width` numbers or, if `resident`,
    on the device.
    """

    def __init__(self, folder: Path, tokens: int, width: int, dtype: torch.dtype, *, resident: bool) -> None:
        self._file = None if resident else ScratchMatrix(folder, tokens, width, dtype)
        self._held: list[Tensor] = []
        self._dtype = dtype
        self.rewind()

    def rewind(self) -> None:
        """Starts again at the first: after the last put, and before another pass."""
        self._at = 0

    def put(self, states: Tensor) -> None:
        """Stores states (batch, seqlen, width)."""
        states = states.detach().to(self._dtype)
        if self._file is None:
            self._held.append(states)
            return
        begin, end = self._at, self._at + states.shape[0] * states.shape[1]
        self._file.tensor[begin:end] = states.reshape(end - begin, -1).cpu()
        self._file.forget(begin, end)
        self._at = end

    def take(self, like: Tensor) -> Tensor:
        """The next states, of as many windows and tokens as `like` and on its device."""
        if self._file is None:
            self._at += 1
            return self._held[self._at - 1]
        begin, end = self._at, self._at + like.shape[0] * like.shape[1]
        found = self._file.tensor[begin:end].view(*like.shape[:2], -1).to(like.device, copy=True)
        self._file.forget(begin, end)
        self._at = end
        return found


class _Sending:
    """The chunks of a cache as a sequence; reading one starts its copy to the device."""

    def __init__(self, reader: CacheReader, stream: CopyStream) -> None:
        self._reader, self._stream = reader, stream

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, chunk: int) -> Sent:
        return self._stream.send(self._reader[chunk])
