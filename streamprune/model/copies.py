"""Copies between host and device beside the computation: a stream of their own, through pinned memory.

On the CPU the same calls copy at once or not at all, so what uses them has one path. Copies are ordered by events: what
was sent is used after `received`, on whichever stream the caller computes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A moment on a stream, such as torch.cuda.Event."""

    def wait(self) -> None:
        """Lets what the caller's stream does from now on wait for this moment."""

    def synchronize(self) -> None:
        """Lets the calling thread wait for it."""


class Sent(NamedTuple):
    """A tensor on its way, and the event of its arrival (None: it is there)."""

    tensor: Tensor
    arrived: Event | None


class CopyStream:
    """One direction of traffic to or from a device. Each thread has its own; methods do not lock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def on(self) -> AbstractContextManager[Any]:
        """Within it, what this thread does on the device goes to this lane's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> Event | None:
        """An event after all that the caller's current stream has been given so far."""
        event: Event | None = None
        if self._stream is not None:
            event = torch.cuda.current_stream(self.device).record_event()
        return event

    def copy(self, source: Tensor, target: Tensor) -> Event | None:
        """Starts copying a CPU tensor into one on the device; `source` may be changed when this returns."""
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
            there = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        return Sent(there, self.copy(host, there))

    def fetch(self, tensor: Tensor, after: Event | None) -> Tensor:
        """`tensor` on the CPU, complete: after the event, or what this thread did on this lane. Blocks the thread."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what gave out: torch's allocators, of a device or the CPU, or one of CUDA's libraries."""
    said = ("DefaultCPUAllocator", "CUDA error: out of memory", "HIP error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in said)


def is_of_device(error: BaseException) -> bool:
    """Whether a device is what failed, not what it was given. torch below 2.8 has no type of its own for it."""
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or str(error).startswith(("CUDA error", "HIP error"))


def received(sent: Sent) -> Tensor:
    """The tensor, safe to use on the caller's current stream from now on."""
    if sent.arrived is not None and sent.tensor.is_cuda:
        stream: Any = torch.cuda.current_stream(sent.tensor.device)
        stream.wait_event(sent.arrived)
        sent.tensor.record_stream(stream)
    elif sent.arrived is not None:
        sent.arrived.wait()
    return sent.tensor
