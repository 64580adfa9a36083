"""Prefetches weights: stage i + 1 is brought to the device while stage i computes.

On the CPU a tensor is the mapped file itself, and prefetching asks the system to read its pages. For a device every
tensor is copied in pieces, file -> pinned memory -> device, by a background thread on a stream of its own; the mapped
pages of a piece are released once it is copied.
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
from streamprune.model.copies import CopyStream, Event, Sent, received
from streamprune.process.background import BackgroundWorker, Latch
from streamprune.process.memory import is_out_of_memory

_PIECE_BYTES = 32 << 20
_PIECES_IN_FLIGHT = 2


@dataclass
class _Prefetch:
    """A tensor being copied to the device. Once `done` is open, it has a result or an error."""

    ref: TensorRef
    done: Latch = field(default_factory=Latch)
    sent: Sent | None = None
    error: BaseException | None = None


class WeightLoader:
    """Brings the tensors of a checkpoint to `device`; within its context, those passed to `expect` are prefetched.

    `copies` overrides whether tensors are copied, by default to all devices but the CPU. `drop_cache` drops what has
    been copied from the page cache. An error while prefetching a tensor is raised when the tensor is used.
    """

    def __init__(
        self, maps: ShardMaps, device: torch.device, *, copies: bool | None = None, drop_cache: bool = False
    ) -> None:
        self.maps, self.device = maps, device
        self.copies = device.type != "cpu" if copies is None else copies
        self._drop_cache = drop_cache
        self._prefetched: dict[TensorRef, _Prefetch] = {}
        self._stream: CopyStream | None = None
        self._background: BackgroundWorker[_Prefetch | list[TensorRef]] = BackgroundWorker(self._work)

    def __enter__(self) -> Self:
        self._background.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.drop()
        self._background.__exit__(kind, error, trace)
        self._prefetched.clear()

    def expect(self, refs: Iterable[TensorRef]) -> None:
        """Starts prefetching tensors and returns at once. Those that are being prefetched already are skipped."""
        if not self.copies:
            self._background.put(list(refs))
            return
        for ref in refs:
            if ref not in self._prefetched:
                self._prefetched[ref] = prefetch = _Prefetch(ref)
                self._background.put(prefetch)

    def tensor(self, ref: TensorRef) -> Tensor:
        """A tensor on the device, in its stored dtype; waits if it is being prefetched. Raises as ShardMaps."""
        prefetch = self._prefetched.get(ref)
        if prefetch is not None:
            prefetch.done.wait()
            if prefetch.sent is not None:
                return received(prefetch.sent)
            self._prefetched.pop(ref, None)
            if prefetch.error is not None and not is_out_of_memory(prefetch.error):
                raise prefetch.error
        stored = self.maps.tensor(ref)  # after running out of memory while prefetching, too: there may be enough by now
        return stored.to(self.device) if self.copies else stored

    def rows(self, ref: TensorRef, begin: int, end: int) -> Tensor:
        """Rows begin to end of a tensor, on the device. Raises as ShardMaps."""
        if ref in self._prefetched:
            return self.tensor(ref)[begin:end]
        stored = self.maps.rows(ref, begin, end)
        return stored.to(self.device) if self.copies else stored

    def release(self, refs: Iterable[TensorRef]) -> None:
        """Frees the memory of tensors on the device, and their mapped pages."""
        refs = list(refs)
        for ref in refs:
            self._prefetched.pop(ref, None)
        self.maps.release(refs)

    def forget(self) -> None:
        """Frees all prefetched tensors, waiting for those still being copied."""
        for prefetch in list(self._prefetched.values()):
            prefetch.done.wait()
        self._prefetched.clear()

    def _work(self, item: _Prefetch | list[TensorRef]) -> None:
        """Runs in the background thread. Errors are kept for `tensor` to raise."""
        if isinstance(item, list):
            self._read(item)
            return
        try:
            item.sent = self._copy(item.ref)
        except BaseException as e:  # noqa: BLE001 - raised by `tensor`
            item.error = e
        item.done.open()

    def _read(self, refs: list[TensorRef]) -> None:
        try:
            self.maps.prefetch(refs)
        except Exception:  # noqa: BLE001 - only a hint: using the tensor will raise the same error
            return

    @property
    def _copy_stream(self) -> CopyStream:
        self._stream = self._stream or CopyStream(self.device)  # created lazily: many loaders never prefetch
        return self._stream

    def _copy(self, ref: TensorRef) -> Sent:
        """Copies one tensor to the device, with a few pieces in flight at a time."""
        in_flight: deque[Event | None] = deque()
        stored = self.maps.tensor(ref)
        with self._copy_stream.on():
            copied = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
        source, target = stored.reshape(-1).view(torch.uint8), copied.reshape(-1).view(torch.uint8)
        for begin in range(0, source.numel(), _PIECE_BYTES):
            end = min(begin + _PIECE_BYTES, source.numel())
            in_flight.append(self._copy_stream.copy(source[begin:end], target[begin:end]))
            if len(in_flight) > _PIECES_IN_FLIGHT and (oldest := in_flight.popleft()) is not None:
                oldest.synchronize()
            done = replace(ref, begin=ref.begin + begin, end=ref.begin + end)
            self.maps.release([done], drop_cache=self._drop_cache)
        return Sent(copied, in_flight[-1] if in_flight else None)
