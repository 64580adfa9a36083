"""Copies between host and device that overlap with computation: on a stream of their own, through pinned memory.

On the CPU the same calls copy synchronously or not at all, so callers need only one code path. Events order the copies:
before a sent tensor is used, `received` makes the caller's stream wait for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream's work, such as torch.cuda.Event."""

    def wait(self) -> None:
        """Makes the caller's current stream wait for it."""

    def synchronize(self) -> None:
        """Blocks the calling thread until then."""


class Sent(NamedTuple):
    """A tensor whose copy has been started, and the event of its arrival (None: it has arrived)."""

    tensor: Tensor
    arrived: Event | None


class CopyStream:
    """A stream for copies to or from a device. Not thread-safe: each thread needs its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def on(self) -> AbstractContextManager[Any]:
        """Makes this stream the current one of the thread."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> Event | None:
        """An event after all work queued on the caller's current stream so far; None on the CPU."""
        event: Event | None = None
        if self._stream is not None:
            event = torch.cuda.current_stream(self.device).record_event()
        return event

    def copy(self, source: Tensor, target: Tensor) -> Event | None:
        """Starts copying a CPU tensor into one on the device; `source` may be overwritten once this returns."""
        if self._stream is None:
            target.copy_(source)
            return None
        with self.on():
            target.copy_(source.pin_memory(), non_blocking=True)
            return self.mark()

    def send(self, host: Tensor) -> Sent:
        """Starts copying a CPU tensor to the device; on the CPU it stays where it is."""
        if self._stream is None:
            return Sent(host.to(self.device), None)
        with self.on():
            target = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        return Sent(target, self.copy(host, target))

    def fetch(self, tensor: Tensor, after: Event | None) -> Tensor:
        """Copies `tensor` to the CPU, after the event if there is one, and blocks until it is there."""
        if self._stream is None:
            return tensor.detach().cpu()
        with self.on():
            if after is not None:
                self._stream.wait_event(after)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor.detach(), non_blocking=True)
            tensor.record_stream(self._stream)
            self._stream.synchronize()
        return host


def is_of_device(error: BaseException) -> bool:
    """Whether an error is a failure of the device, rather than of its input. torch before 2.8 has no type for that."""
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or str(error).startswith(("CUDA error", "HIP error"))


def received(sent: Sent) -> Tensor:
    """The tensor; work that the caller's current stream is given from now on waits for its arrival."""
    if sent.arrived is not None and sent.tensor.is_cuda:
        stream: Any = torch.cuda.current_stream(sent.tensor.device)
        stream.wait_event(sent.arrived)
        sent.tensor.record_stream(stream)
    elif sent.arrived is not None:
        sent.arrived.wait()
    return sent.tensor
