"""Copies between host and device beside the computation: a stream of their own, through pinned memory.

On the CPU, and on devices without CUDA streams, the same calls copy at once or not at all, so what uses them has one
path. A tensor that was sent is used after `take`, on whichever stream the caller computes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sent(NamedTuple):
    """A tensor on its way, and the event that tells when it has arrived (None: it is there)."""

    tensor: Tensor
    arrived: Any


class Lane:
    """One direction of traffic to or from a device. Each thread should have its own; methods do not lock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def on(self) -> AbstractContextManager[Any]:
        """Within it, this thread's work goes to this lane's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def send(self, host: Tensor) -> Sent:
        """Starts copying a CPU tensor to the device; on the CPU it stays where it is."""
        if self._stream is None:
            return Sent(host.to(self.device), None)
        with self.on():
            there = host.pin_memory().to(self.device, non_blocking=True)
            return Sent(there, self._stream.record_event())

    def mark(self) -> Any:
        """An event after all that the caller's stream has been given so far, for `fetch`."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def fetch(self, tensor: Tensor, after: Any) -> Tensor:
        """`tensor` on the CPU, complete; waits for the event `after`, and blocks this thread only."""
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


def take(sent: Sent) -> Tensor:
    """The tensor, safe to use on the caller's current stream from now on."""
    if sent.arrived is not None:
        stream = torch.cuda.current_stream(sent.tensor.device)
        stream.wait_event(sent.arrived)
        sent.tensor.record_stream(stream)
    return sent.tensor
