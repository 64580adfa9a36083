"""Weights on their way to where they are used, one stage ahead of it.

On the CPU a tensor is the mapped file itself, and going ahead means asking the system to read the pages of the next
stage. On a device every tensor is copied there in pieces, file -> pinned memory -> device, by a thread and on a
stream of their own: stage i + 1 travels while stage i computes, and a piece's pages are given back once it is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.model.copies import CopyStream, Event, Sent, is_out_of_memory, received
from streamprune.process.background import BackgroundWorker, Latch

_PIECE_BYTES = 32 << 20
_PIECES_IN_FLIGHT = 2


@dataclass
class _Parcel:
    """A tensor being prefetched. Once `done` is open, it has a result or an error."""

    ref: TensorRef
    done: Latch = field(default_factory=Latch)
    sent: Sent | None = None
    error: BaseException | None = None


class WeightLoader:
    """The tensors of a checkpoint on `device`. A context manager; what it was told to expect arrives in the background.

    `copies` forces the path of a device, which on the CPU copies too; `drop_cache` forgets the system's cached pages
    of what has been copied. Tensors raise on use what went wrong on their way.
    """

    def __init__(
        self, maps: ShardMaps, device: torch.device, *, copies: bool | None = None, drop_cache: bool = False
    ) -> None:
        self.maps, self.device = maps, device
        self.copies = device.type != "cpu" if copies is None else copies
        self._drop_cache = drop_cache
        self._parcels: dict[TensorRef, _Parcel] = {}
        self._own_lane: CopyStream | None = None
        self._behind: BackgroundWorker[_Parcel | list[TensorRef]] = BackgroundWorker(self._work)

    def __enter__(self) -> Self:
        self._behind.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._behind.drop()  # what still waits is no longer wanted
        self._behind.__exit__(kind, error, trace)
        self._parcels.clear()

    def expect(self, refs: Iterable[TensorRef]) -> None:
        """Begins to bring tensors near, and returns at once. Those that are expected already are left alone."""
        if not self.copies:
            self._behind.put(list(refs))
            return
        for ref in refs:
            if ref not in self._parcels:
                self._parcels[ref] = parcel = _Parcel(ref)
                self._behind.put(parcel)

    def tensor(self, ref: TensorRef) -> Tensor:
        """A tensor on the device, in its stored dtype; waits for it where it is on its way. Raises as ShardMaps."""
        parcel = self._parcels.get(ref)
        if parcel is not None:
            parcel.done.wait()
            if parcel.sent is not None:
                return received(parcel.sent)
            self._parcels.pop(ref, None)
            if parcel.error is not None and not is_out_of_memory(parcel.error):
                raise parcel.error
        stored = self.maps.tensor(ref)  # there may be room by now for what there was none while it was sent ahead
        return stored.to(self.device) if self.copies else stored

    def rows(self, ref: TensorRef, begin: int, end: int) -> Tensor:
        """Rows begin to end of a tensor, on the device. Raises as ShardMaps."""
        if ref in self._parcels:
            return self.tensor(ref)[begin:end]
        stored = self.maps.rows(ref, begin, end)
        return stored.to(self.device) if self.copies else stored

    def release(self, refs: Iterable[TensorRef]) -> None:
        """Gives back what tensors occupy, here and on the device."""
        refs = list(refs)
        for ref in refs:
            self._parcels.pop(ref, None)
        self.maps.release(refs)

    def forget(self) -> None:
        """Lets go of everything that is here or on its way."""
        for parcel in list(self._parcels.values()):
            parcel.done.wait()
        self._parcels.clear()

    def _work(self, item: _Parcel | list[TensorRef]) -> None:
        """In the feeding thread. What fails here fails again, with its reason, where the tensor is used."""
        if isinstance(item, list):
            self._read(item)
            return
        try:
            item.sent = self._carry(item.ref)
        except BaseException as e:  # noqa: BLE001 - raised by `tensor`
            item.error = e
        item.done.open()

    def _read(self, refs: list[TensorRef]) -> None:
        try:
            self.maps.prefetch(refs)
        except Exception:  # noqa: BLE001 - only a hint: whoever uses the tensor meets the same error
            return

    @property
    def _lane(self) -> CopyStream:
        self._own_lane = self._own_lane or CopyStream(self.device)  # created lazily: many loaders never prefetch
        return self._own_lane

    def _carry(self, ref: TensorRef) -> Sent:
        """Copies one tensor to the device, a few pieces in flight."""
        flights: deque[Event | None] = deque()
        stored = self.maps.tensor(ref)
        with self._lane.on():
            there = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
        source, target = stored.reshape(-1).view(torch.uint8), there.reshape(-1).view(torch.uint8)
        for begin in range(0, source.numel(), _PIECE_BYTES):
            end = min(begin + _PIECE_BYTES, source.numel())
            flights.append(self._lane.copy(source[begin:end], target[begin:end]))
            if len(flights) > _PIECES_IN_FLIGHT and (landed := flights.popleft()) is not None:
                landed.synchronize()
            done = replace(ref, begin=ref.begin + begin, end=ref.begin + end)
            self.maps.release([done], drop_cache=self._drop_cache)
        return Sent(there, flights[-1] if flights else None)
