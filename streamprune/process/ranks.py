"""The processes of one run, a single one or several, and what they tell each other.

A single process is the trivial case of everything here, and does not import torch.distributed. torchrun.py says which
processes are together. Data on a GPU travel by NCCL, all other by gloo.

If one rank fails, all end: the one that fails first leaves its error in the store that they share; the others are woken
by the broken connection, or by a timeout, find the error and end silently with the same exit code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from streamprune.errors import ElsewhereError, ResourceError, StreampruneError, UsageError
from streamprune.process.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

_BEAT_SECONDS = 2.0
"""How often rank 0 tells the others, who wait for it, that it is at work."""

_NEWS_SECONDS = 3.0
"""How long a rank whose connection broke waits for the error of the rank that broke it, and rank 0 for the others."""

_GONE = ("onnection", "onnect to", "roken pipe", "ocket", "remote process", "emote error")
"""Words in the errors of gloo, NCCL and the store for a rank that is no longer there."""


class Ranks:
    """One process on its own: rank 0 of 1. Several are `Together`."""

    rank, size = 0, 1
    waited = 0.0
    """Seconds that this rank has waited for others, including what it took to exchange data."""

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank, on each of them."""
        return [value]

    def broadcast(self, value: Value, source: int = 0) -> Value:
        """The value of rank `source`, on all ranks."""
        return value

    def collect(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank, on rank 0; an empty list elsewhere."""
        return [value]

    def barrier(self) -> None:
        """Returns when all ranks have reached it."""
        self.gather(None)

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Fills `tensor`, of one shape on all ranks, with that of rank `source`."""
        self.broadcasting_(tensor, source)()

    def broadcasting_(self, tensor: Tensor, source: int) -> Callable[[], None]:
        """As broadcast_, which it only begins; returns what waits for it."""
        return lambda: None

    def add_in_order_(self, total: Tensor, part: Tensor, owner: int, present: int) -> None:
        """Adds the parts of ranks 0 to `present` − 1, in this order, to the `total` of rank `owner`.

        The parts have one shape; on other ranks `total` is left as it is.
        """
        total += part

    def hand_over_(self, tensor: Tensor, source: int) -> None:
        """Fills the `tensor` of rank 0 with that of rank `source`, which has its shape. For these two ranks only."""

    def at_work(self, *, done: bool = False) -> None:
        """To be called by rank 0 every now and then while the others `attend`, and when it is `done`."""

    def attend(self) -> None:
        """Waits for rank 0 for as long as it is `at_work`, which may be longer than any timeout."""

    def agreed(self, work: Callable[[], Value], identity: Callable[[Value], dict[str, Any]]) -> Value:
        """Does `work` on all ranks; raises the first error of any of them, and UsageError if identities differ."""
        return work()


class Together(Ranks):
    """One of several ranks."""

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._sent: list[tuple[Any, Tensor]] = []
        """Sends in progress, and what they send."""
        self._told = 0.0
        """When this rank last told the others that it is at work (time.monotonic)."""

    def gather(self, value: Value) -> list[Value]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(found, value)
        return found

    def collect(self, value: Value) -> list[Value]:
        import torch.distributed as dist

        found: list[Any] | None = None if self.rank else [None] * self.size
        with self._talking():
            dist.gather_object(value, found)
        return found or []

    def broadcast(self, value: Value, source: int = 0) -> Value:
        import torch.distributed as dist

        held = [value]
        with self._talking():
            dist.broadcast_object_list(held, src=source)
        return held[0]

    def broadcasting_(self, tensor: Tensor, source: int) -> Callable[[], None]:
        import torch.distributed as dist

        with self._talking():
            self._settle()
            work = dist.broadcast(tensor, src=source, async_op=True)

        def wait() -> None:
            with self._talking():
                work.wait()

        return wait

    def add_in_order_(self, total: Tensor, part: Tensor, owner: int, present: int) -> None:
        import torch.distributed as dist

        with self._talking():
            self._settle()
            if self.rank != owner:
                sending = part.contiguous()
                self._sent.append((dist.isend(sending, dst=owner), sending))
                return
            given = part.new_empty(part.shape)
            for source in range(present):
                if source != self.rank:
                    dist.recv(given, src=source)
                total += part if source == self.rank else given

    def hand_over_(self, tensor: Tensor, source: int) -> None:
        import torch.distributed as dist

        with self._talking():
            self._settle()
            if source and self.rank == source:
                dist.send(tensor.contiguous(), dst=0)
            elif source and not self.rank:
                dist.recv(tensor, src=source)

    def at_work(self, *, done: bool = False) -> None:
        if done or time.monotonic() - self._told >= _BEAT_SECONDS:
            self.broadcast(done)
            self._told = time.monotonic()

    def attend(self) -> None:
        while not self.broadcast(True):
            pass

    def agreed(self, work: Callable[[], Value], identity: Callable[[Value], dict[str, Any]]) -> Value:
        found: Value | None = None
        error: StreampruneError | None = None
        mine: dict[str, Any] = {}
        try:
            found = work()
            mine = identity(found)
        except StreampruneError as e:
            error = e
        told = self.gather((error.exit_code if error else 0, mine))
        failed = next((rank for rank, (code, _) in enumerate(told) if code), None)
        if failed is not None:
            raise error if error and failed == self.rank else ElsewhereError(told[failed][0])
        for rank, (_, theirs) in enumerate(told):
            first = told[0][1]
            if differing := [key for key in {**first, **theirs} if first.get(key) != theirs.get(key)]:
                if rank != self.rank:
                    raise ElsewhereError(UsageError.exit_code)
                key = differing[0]
                raise UsageError(
                    f"rank {rank} is given another job than rank 0: {key} is {theirs.get(key)} here and "
                    f"{first.get(key)} there; give all ranks the same model, text, version and arguments"
                )
        assert found is not None
        return found

    @contextmanager
    def _talking(self) -> Iterator[None]:
        since = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as e:  # torch raises nothing more specific
            if is_out_of_memory(e):
                raise ResourceError(
                    f"rank {self.rank} ran out of memory while it exchanged data with other ranks; free some and run "
                    "the same command again, it resumes"
                ) from e
            raise self._lost(e) from e
        finally:
            self.waited += time.perf_counter() - since

    def _settle(self) -> None:
        while self._sent:
            work, _ = self._sent.pop()
            work.wait()

    def _lost(self, error: Exception) -> StreampruneError:
        """What a failed exchange means: the error that another rank has left, or that it could leave none."""
        until = time.monotonic() + _NEWS_SECONDS
        with suppress(RuntimeError):  # the store may be gone as well
            while time.monotonic() < until:
                if self._store.check(["error"]):
                    return ElsewhereError(json.loads(self._store.get("error"))["code"])
                time.sleep(0.05)
        text = " ".join(str(error).split())
        if "imed out" in text:
            why = "another rank did not answer in time"
        elif any(word in text for word in _GONE):
            why = "another rank has died or cannot be reached"
        else:
            why = f"rank {self.rank} could not exchange data with other ranks: {text[:160]}"
        return ResourceError(f"{why}; run the same command again, it resumes")

    def fail(self, code: int) -> ElsewhereError | None:
        """Leaves this rank's error to the others; returns that of a rank that has failed before, if there is one."""
        with suppress(RuntimeError):
            mine = json.dumps({"rank": self.rank, "code": code})
            first = json.loads(self._store.compare_set("error", "", mine))
            if first["rank"] != self.rank:
                return ElsewhereError(first["code"])
        return None

    def end(self) -> None:
        """Lets rank 0, which may hold the store, outlive the others by a little, so that they can read the error."""
        with suppress(RuntimeError):
            ended = self._store.add("ended", 1)
            until = time.monotonic() + _NEWS_SECONDS
            while not self.rank and ended < self.size and time.monotonic() < until:
                time.sleep(0.05)
                ended = self._store.add("ended", 0)


ALONE = Ranks()
