"""A stand-in for a GPU: tensors that say they are on cuda:0 (or cuda:1 …) and hold their values in host memory.

An operation that mixes them with tensors of the host, or of another device, raises as CUDA would; so do `numpy` and
its like. Values are computed at once by the CPU's kernels, so whole jobs give what the CPU gives. What may come late
on a GPU is not left to chance: each stream, and each thread of the host, has a vector clock, and memory remembers who
wrote and read it last. An access that no event, stream or synchronisation puts behind what it needs is a fault, in
whatever order things happened to come this time. Threads tell each other what they have waited for by the package's
queues and latches (process/background.py), and by nothing else. It is a fault, too, to give memory back while another
stream may be at work on it. Copies to pinned memory do land late: until the host has waited, the target is full of ones
(NaN). So is fresh memory.

It does not see races within one operation or in host memory; parts of one storage (two streams that write to different
rows of it are a fault); the temporaries of kernels, of which its memory figures know nothing; what takes how long; and
what only CUDA's kernels do: their rounding, the dtypes and shapes that they refuse.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradients
import pytest
import torch
from torch import Tensor

from streamprune.process.background import Latch

aten = torch.ops.aten
_CUDA, _META = 1, 14  # c10::DeviceType
_COPIES = (aten.copy_.default, aten._to_copy.default)
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_MAKING = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm")
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}
_WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
_SHAPES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class Fault(RuntimeError):  # noqa: N818 - no error of the stand-in
    """What would have been a race, or worse, on a GPU."""


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.card = _plugged_in()
        self.device = self.card.indexed(device)
        self.clock: dict[int, int] = {}
        self.number = self.card.count(self.clock)

    def wait_event(self, event: Event) -> None:
        self.card.join(self.clock, event.at)

    def wait_stream(self, stream: Stream) -> None:
        self.card.join(self.clock, stream.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.card.host_waits(self.clock)

    def query(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"stream {self.number} of {self.device}"


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.at: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.at = dict((stream or _plugged_in().current_stream()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _plugged_in().current_stream()).wait_event(self)

    def synchronize(self) -> None:
        _plugged_in().host_waits(self.at)

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class _Memory:
    """What one storage of a device has been through; moments are (stream, number of its operation)."""

    def __init__(self, card: Card, nbytes: int, stream: Stream, moment: int, what: str) -> None:
        self.card, self.nbytes, self.home = card, nbytes, stream
        self.written = (stream.number, moment, what)
        self.read: dict[int, tuple[int, str]] = {}
        self.recorded: set[int] = set()
        card.allocate(self)

    def __del__(self) -> None:
        self.card.freed(self)


class DeviceTensor(Tensor):
    """A tensor of the stand-in."""

    inner: Tensor
    memory: _Memory

    @staticmethod
    def __new__(cls, inner: Tensor, memory: _Memory, device: torch.device) -> DeviceTensor:
        with torch.inference_mode(inner.is_inference()):
            made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=device,
            )  # fmt: skip
        made.inner, made.memory = inner, memory
        return made

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _plugged_in().run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:  # which has other kernels for other devices
            return _plugged_in().run(func, args, kwargs or {})
        if func is Tensor.backward:
            return gradients.backward(*args)
        if func is torch.autograd.grad:
            (root,), leaves = args
            return gradients.grad(root, leaves, kwargs["grad_outputs"])
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # lists become tensors of the device behind our back
            args = (args[0], _listed(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def record_stream(self, stream: Stream) -> None:
        self.memory.recorded.add(stream.number)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def data_ptr(self) -> int:
        raise Fault("the address of a device's tensor means nothing to the host")

    def pin_memory(self, device: Any = None) -> Tensor:
        raise RuntimeError("cannot pin a tensor of a device: only dense CPU tensors can be pinned")

    def __repr__(self, **kwargs: Any) -> str:
        return f"DeviceTensor({self.inner}, device='{self.device}')"

    __str__ = __repr__


class Card:
    """The device, or several, and the host's view of them. `faults` has all that were raised, whoever caught them."""

    def __init__(self, total: int = 64 << 30) -> None:
        self.total, self.limit = total, total
        self.allocated = self.peak = 0
        self.faults: list[str] = []
        self.devices: set[torch.device] = set()
        """On which something was allocated."""
        self._clocks: list[dict[int, int]] = []
        self._lock = threading.RLock()
        self._local = threading.local()
        self._default: dict[torch.device, Stream] = {}
        self._pinned: set[int] = set()
        self._travelling: list[tuple[int, int, Tensor, Tensor, bool]] = []
        """Copies that nobody has waited for: stream, moment, host tensor, values, whether it is the target."""

    # ---- streams

    def count(self, clock: dict[int, int]) -> int:
        """The number of a new stream with this clock."""
        with self._lock:
            self._clocks.append(clock)
            return len(self._clocks)

    @property
    def streams(self) -> int:
        return len(self._clocks)

    def indexed(self, device: Any) -> torch.device:
        device = torch.device("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)
        return device if device.index is not None else torch.device("cuda", self.current_device())

    def current_device(self) -> int:
        return getattr(self._local, "device", 0)

    def current_stream(self, device: Any = None) -> Stream:
        device = self.indexed(device)
        stream: Stream | None = getattr(self._local, "streams", {}).get(device)
        with self._lock:
            if stream is None and device not in self._default:
                self._default[device] = Stream(device)
        return stream or self._default[device]

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        before = dict(getattr(self._local, "streams", {})), self.current_device()
        self._local.streams, self._local.device = {**before[0], stream.device: stream}, stream.device.index
        try:
            yield
        finally:
            self._local.streams, self._local.device = before

    @property
    def host(self) -> dict[int, int]:
        """The clock of this thread: what it has waited for, or was told of by one that had."""
        if not hasattr(self._local, "clock"):
            self._local.clock = {}
        clock: dict[int, int] = self._local.clock
        return clock

    def join(self, clock: dict[int, int], other: dict[int, int]) -> None:
        with self._lock:
            for number, moment in dict(other).items():
                clock[number] = max(clock.get(number, 0), moment)

    def host_waits(self, clock: dict[int, int]) -> None:
        """The host has waited for `clock`: what has been copied by then has landed."""
        with self._lock:
            self.join(self.host, clock)
            landed = [c for c in self._travelling if self.host.get(c[0], 0) >= c[1]]
            self._travelling = [c for c in self._travelling if self.host.get(c[0], 0) < c[1]]
            for _, _, host, values, is_target in landed:
                if is_target:
                    host.copy_(values)
                elif not torch.equal(_raw(host), _raw(values)):
                    self.fault("pinned memory was changed while a copy of it was on its way")

    def synchronize(self, device: Any = None) -> None:
        for clock in list(self._clocks):
            self.host_waits(clock)

    def fault(self, what: str) -> Fault:
        self.faults.append(what)
        return Fault(what)

    # ---- memory

    def allocate(self, memory: _Memory) -> None:
        with self._lock:
            self.allocated += memory.nbytes
            if self.allocated > self.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {memory.nbytes} bytes.")
            self.peak = max(self.peak, self.allocated)
            self.devices.add(memory.home.device)

    def freed(self, memory: _Memory) -> None:
        with self._lock:
            self.allocated -= memory.nbytes
            number, moment, what = memory.written
            for stream, (when, who) in {**memory.read, number: (moment, what)}.items():
                known = max(memory.home.clock.get(stream, 0), self.host.get(stream, 0))
                if stream != memory.home.number and stream not in memory.recorded and known < when:
                    self.fault(
                        f"memory of {memory.home} was given back while {who} on stream {stream} may be at work on it; "
                        "record_stream is missing"
                    )

    def set_fraction(self, share: float, device: Any = None) -> None:
        self.limit = int(share * self.total)

    # ---- operations

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation on tensors of which one at least is on a device."""
        how = _KINDS.get(func) or _KINDS.setdefault(func, _Kind(func))
        if how.falls_apart:  # under inference_mode, what torch makes of several operations comes as one
            return func.decompose(*args, **kwargs)
        flat = [*_flat(args), *_flat(kwargs.values())]
        ours = [x for x in flat if isinstance(x, DeviceTensor)]
        changed = how.changed(args, kwargs)
        if func in _COPIES and (host := self._copied(func, args, kwargs)) is not None:
            return host
        device = ours[0].device
        for x in flat:
            if isinstance(x, Tensor) and x.device != device and not self._may_mix(func, args, x, changed):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"{device} and {x.device}! ({how.name})"
                )
        if how.multiplies and ours[0].dtype == torch.float32 and _allows_tf32():
            raise self.fault(f"{how.name} of float32 may be computed in TF32")
        stream, moment = self._launch(how.name, device, ours, changed, how.is_view)
        asked = kwargs.get("device") and torch.device(kwargs["device"]).type
        inner = {k: _inner(v) for k, v in kwargs.items()}
        out = func(*_inner(args), **inner | ({"device": "meta" if asked == "meta" else "cpu"} if asked else {}))
        if how.waits:
            self.host_waits(stream.clock)
        if asked in ("cpu", "meta"):
            return out
        return self._wrapped(out, ours, stream, moment, how.name)

    def _wrapped(self, out: Any, ours: list[DeviceTensor], stream: Stream, moment: int, what: str) -> Any:
        if isinstance(out, tuple | list):
            return type(out)(self._wrapped(part, ours, stream, moment, what) for part in out)
        if not isinstance(out, Tensor):
            return out
        for x in ours:
            if x.inner is out:
                if x.shape != out.shape or x.stride() != out.stride():
                    raise NotImplementedError(f"{what} changes the shape of its argument; the stand-in cannot do that")
                return x
        storage = out.untyped_storage()
        alias = next((x for x in ours if x.inner.untyped_storage()._cdata == storage._cdata), None)
        memory = alias.memory if alias is not None else _Memory(self, storage.nbytes(), stream, moment, what)
        return DeviceTensor(out, memory, stream.device if alias is None else alias.device)

    def fresh(self, inner: Tensor, device: Any) -> DeviceTensor:
        """A tensor of new memory with these values."""
        device = self.indexed(device)
        stream = self.current_stream(device)
        moment = self._tick(stream)
        memory = _Memory(self, inner.untyped_storage().nbytes(), stream, moment, "allocation")
        return DeviceTensor(inner, memory, device)

    def _tick(self, stream: Stream) -> int:
        with self._lock:
            self.join(stream.clock, self.host)
            stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
            return stream.clock[stream.number]

    def _launch(
        self, what: str, device: torch.device, ours: list[DeviceTensor], changed: list[Any], is_view: bool
    ) -> tuple[Stream, int]:
        """The moment of an operation, which must come after all that its tensors have been through."""
        stream = self.current_stream(device)
        with self._lock:
            moment = self._tick(stream)
            for x in [] if is_view else ours:
                self._access(x.memory, stream, moment, what, any(x is c for c in changed))
        return stream, moment

    def _access(self, memory: _Memory, stream: Stream, moment: int, what: str, writes: bool) -> None:
        number, when, who = memory.written
        before = {number: (when, who)}
        if writes:
            before = {**memory.read, **before} if number not in memory.read else {**before, **memory.read}
        for other, (then, whose) in before.items():
            if other != stream.number and stream.clock.get(other, 0) < then:
                verb = "writes" if writes else "reads"
                raise self.fault(f"{what} on {stream} {verb} what {whose} on stream {other} may not be done with")
        if writes:
            memory.written, memory.read = (stream.number, moment, what), {}
        else:
            memory.read[stream.number] = (moment, what)

    def _may_mix(self, func: Any, args: Any, x: Tensor, changed: list[Any]) -> bool:
        """Numbers in host memory, as long as they are only read; indices of what is on a device."""
        if x.device.type != "cpu" or any(x is c for c in changed):
            return False
        name = getattr(func, "_opname", "")
        as_index = name in _INDEXING and isinstance(args[0], DeviceTensor) and any(x is i for i in args[1])
        return x.dim() == 0 or as_index

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The result of a copy from or to the host; None if it is neither."""
        if func is aten._to_copy.default:
            asked = kwargs.get("device")
            if asked is None or torch.device(asked).type != "cpu":
                if asked is not None and self.indexed(asked) != args[0].device:
                    raise NotImplementedError("copies from one device to another")
                return None
            source, late = args[0], bool(kwargs.get("non_blocking"))
            how = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
            return self._fetched(source, source.inner.to("cpu", copy=True, **_plain(how)), late)
        target, source, late = args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
            return None
        if isinstance(source, DeviceTensor):
            values = torch.empty_like(target).copy_(source.inner)
            return self._fetched(source, values, late, target)
        stream, moment = self._launch("a copy from the host", target.device, [target], [target], False)
        target.inner.copy_(source)
        if late and self.is_pinned(source):
            with self._lock:
                self._travelling.append((stream.number, moment, source.detach(), source.detach().clone(), False))
        else:
            self.host_waits(stream.clock)
        return target

    def _fetched(self, source: DeviceTensor, values: Tensor, late: bool, target: Tensor | None = None) -> Tensor:
        stream, moment = self._launch("a copy to the host", source.device, [source], [], False)
        if not late:
            self.host_waits(stream.clock)
            return values if target is None else target.copy_(values)
        target = values.clone() if target is None else target
        if target.numel():
            target.copy_(_full_of_ones(torch.empty_like(values)))
        with self._lock:
            self._travelling.append((stream.number, moment, target.detach(), values, True))
        return target

    # ---- pinned memory

    def pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self._lock:
            self._pinned.add(pinned.untyped_storage().data_ptr())
        return pinned

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned


def _allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _inner(x: Any) -> Any:
    """Its own tensors for those of the device, in lists and tuples too."""
    if isinstance(x, tuple | list):
        return type(x)(map(_inner, x))
    return x.inner if isinstance(x, DeviceTensor) else x


def _listed(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_listed, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _plain(how: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in how.items() if k in ("dtype", "memory_format") and v is not None}


def _whole(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _full_of_ones(tensor: Tensor) -> Tensor:
    if tensor.untyped_storage().nbytes():
        _whole(tensor).fill_(255)
    return tensor


class _Kind:
    """What its schema says of an operation."""

    def __init__(self, func: Any) -> None:
        self.name = str(func)
        is_op = isinstance(func, torch._ops.OpOverload)
        self.falls_apart = is_op and func._can_decompose()
        arguments = func._schema.arguments if is_op else ()
        aliases = [(i, a.name, a.alias_info) for i, a in enumerate(arguments) if a.alias_info is not None]
        self._writes = [(i, name) for i, name, alias in aliases if alias.is_write]
        self.is_view = bool(aliases) and not self._writes
        self.multiplies = self.name.removeprefix("aten.").split(".")[0].strip("_") in _PRODUCTS
        self.waits = func in _WAITING or bool(_SHAPES & set(getattr(func, "tags", ())))

    def changed(self, args: Any, kwargs: Any) -> list[Any]:
        """The arguments that it writes to."""
        return [*_flat([kwargs.get(name, args[i] if i < len(args) else None) for i, name in self._writes])]


_KINDS: dict[Any, _Kind] = {}
_CARDS: list[Card] = []


def _plugged_in() -> Card:
    if not _CARDS:
        raise Fault("a tensor of a device outlives it")
    return _CARDS[-1]


class _Queue(queue.SimpleQueue):  # type: ignore[type-arg]
    """Tells who takes an item what its giver has waited for."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put((dict(_plugged_in().host), item))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        clock, item = super().get(block, timeout)
        _plugged_in().host_waits(clock)
        return item


def _telling(patch: pytest.MonkeyPatch) -> None:
    """Lets what threads wait for each other with carry their clocks along."""
    opened, wait = Latch.open, Latch.wait

    def tell(latch: Any) -> None:
        latch.clock = dict(_CARDS[-1].host) if _CARDS else {}
        opened(latch)

    def hear(latch: Any) -> None:
        wait(latch)
        if _CARDS:
            _CARDS[-1].host_waits(getattr(latch, "clock", {}))

    patch.setattr(Latch, "open", tell)
    patch.setattr(Latch, "wait", hear)
    patch.setattr("streamprune.process.background.queue", SimpleNamespace(SimpleQueue=_Queue))


@contextmanager
def _guarded() -> Iterator[None]:
    """Many of torch's functions ask for the guard of a tensor's device, and it was built without that of CUDA's: within
    this they get the guard of the meta device, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[_CUDA] = guards[_CUDA], guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


@contextmanager
def plugged_in(card: Card) -> Iterator[Card]:
    """Within it torch has this device, under the name cuda. Raises Fault at the end if there was any, caught or not.

    Skips the test with a torch that is built for CUDA, whose place it would take.
    """
    if torch.backends.cuda.is_built():
        pytest.skip("the stand-in needs a torch that is built without CUDA")
    real: Callable[..., Tensor] = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        pinned = kwargs.pop("pin_memory", False)
        made = real(*args, **kwargs)
        return card.pin(made) if pinned else made

    def allocate(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> Tensor:
        return card.fresh(_full_of_ones(real(size, dtype=dtype, device="cpu")), device)

    def allocate_strided(
        size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any
    ) -> Tensor:
        return card.fresh(_full_of_ones(torch.empty_strided(size, stride, dtype=dtype, device="cpu")), device)

    def making(name: str) -> Callable[..., Tensor]:
        op, overload = name.split(".") if "." in name else (name, "default")

        def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
            return card.fresh(getattr(getattr(aten, op), overload)(*args, device="cpu", **kwargs), device)

        return make

    def tensor(data: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Tensor:
        made = plain_tensor(data, dtype=dtype, **more)  # which puts values into its memory behind our back
        return made if device is None else made.to(device)

    plain_tensor = torch.tensor
    kernels = torch.library.Library("aten", "IMPL", "CUDA")
    with pytest.MonkeyPatch.context() as patch, _guarded():
        for name, stand_in in {
            "_lazy_init": lambda: None, "Stream": Stream, "Event": Event, "stream": card.stream,
            "current_stream": card.current_stream, "current_device": card.current_device,
            "synchronize": card.synchronize, "empty_cache": lambda: None, "device_count": lambda: 2,
            "mem_get_info": lambda device=None: (card.limit - card.allocated, card.total),
            "memory_allocated": lambda device=None: card.allocated,
            "memory_reserved": lambda device=None: card.allocated,
            "max_memory_allocated": lambda device=None: card.peak,
            "set_per_process_memory_fraction": card.set_fraction,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: card.pin(tensor))
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor, device=None: card.is_pinned(tensor))
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        kernels.impl("empty.memory_format", allocate)
        kernels.impl("empty_strided", allocate_strided)
        for name in _MAKING:
            kernels.impl(name, making(name))
        _telling(patch)
        _CARDS.append(card)
        try:
            yield card
        finally:
            kernels._destroy()
            _CARDS.remove(card)
    if card.faults:
        raise Fault(card.faults[0])
