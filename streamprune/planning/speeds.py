"""What this machine does in a second, measured in about two on pieces of the model at hand.

    products     the widest layer's linears, on as many rows as take a moment; speed does not depend on more
    float32      for a refit: products of rows with matrices as wide as these linears' inputs
    elementwise  the model's own first layer on weights of zeros that take no memory, its products left out
    attention    as that layer called it, on few heads of a whole window
    others       our kernels on rows of each linear's width; mapped reading of up to 64 MiB of the checkpoint,
                 which the system is asked to forget first; hashing and copying in memory

Nothing is written to a disk. What is allocated does not depend on how large the model is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf
from statistics import median

import torch
import xxhash
from torch.nn import functional as F

from streamprune.disk.checkpoint import Checkpoint
from streamprune.kernels import cpu, torch_ops
from streamprune.methods.selection import select
from streamprune.model.blank_layer import BlankLayer, Called, window_size
from streamprune.model.decoded import maps_of
from streamprune.model.naming import TORCH_DTYPES
from streamprune.model.shapes import linear_shape
from streamprune.model.skeleton import Skeleton, Stage
from streamprune.planning.cost import RunShape, Speeds, StageWork, embedding_bytes

READ_BYTES = 64 << 20
_SECONDS = 0.08
"""How long one thing is repeated; at least twice, and once before that does not count."""
_OPERATIONS = {"cpu": 8e9, "cuda": 6e11}
"""Operations of one product or attention; on a device as many as keep it busy."""
_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""Memory of one operand."""
_WEIGHTS = 1 << 23
"""Weights of a linear that are pruned for the clock: as many as a run prunes at once."""
_REFITTED = 1024
"""Rows that are multiplied with a Gram at once, about."""
_LOADING = 2.0
"""Kernels that had to be compiled now are found in a cache later: no more than this is expected of a run."""
UNKNOWN = Speeds(
    products=inf, float32=inf, attention=inf, elementwise=inf, embedding=inf, statistics=inf, selection=inf,
    scanning=inf, hashing=inf, reading=inf, writing=inf, link=inf, loading=0.0,
)  # fmt: skip
"""What is not measured takes no time."""


@dataclass
class Clock:
    """Takes times, in seconds; `loading` adds up what first uses took beyond later ones."""

    device: torch.device
    now: Callable[[], float]
    loading: float = 0.0

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one call, the device's share included."""
        self._wait()
        begun = self.now()
        work()
        self._wait()
        return max(self.now() - begun, 1e-9)

    def typical(self, work: Callable[[], object], *, loads: bool = False) -> float:
        """Median seconds of a call after the first. `loads` counts what the first took beyond it as loading."""
        first, times = self.once(work), list[float]()
        begun = time.perf_counter()
        while len(times) < 2 or (time.perf_counter() - begun < _SECONDS and len(times) < 20):
            times.append(self.once(work))
        usual = median(times)
        if loads:
            self.loading += max(0.0, first - usual)
        return usual

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    checkpoint: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, device: torch.device, work: StageWork,
    run: RunShape, batch: int, seqlen: int, *, now: Callable[[], float] = time.perf_counter,
) -> Speeds:  # fmt: skip
    """The speeds of this machine for `work`, a layer's, in batches of `batch` windows of `seqlen` tokens.

    Raises UnsupportedError for a model that cannot be walked through, and what reading the checkpoint raises.
    """
    clock = Clock(device, now)
    stage = max(skeleton.layer_stages, key=lambda s: s.nbytes)
    shapes = [linear_shape(skeleton, name, stage) for name in stage.linears]
    speeds = UNKNOWN
    if run.tokens:
        speeds, widths = _besides(checkpoint, skeleton, dtype, clock, work, batch, seqlen)
        products = _products(shapes, batch * seqlen, skeleton.dtype, dtype, clock)
        speeds = replace(speeds, products=products, statistics=_statistics(widths, batch * seqlen, work, dtype, clock))
        if work.refit.float32:
            squares = {(width, width) for _, width in shapes}
            single = _products(sorted(squares), _REFITTED, torch.float32, torch.float32, clock)
            speeds = replace(speeds, float32=single)
    elif device.type == "cuda":
        speeds = replace(speeds, elementwise=_copying(clock))
    reading, scanning = _read(checkpoint, clock)
    return replace(
        speeds, selection=_selection(stage, skeleton, clock), scanning=scanning, hashing=_hashing(clock),
        reading=reading, writing=reading, link=_link(clock), loading=min(clock.loading, _LOADING),
    )  # fmt: skip


def _products(
    shapes: Iterable[tuple[int, int]], tokens: int, stored: torch.dtype, dtype: torch.dtype, clock: Clock
) -> float:
    """Operations a second of a layer's linears (out, in), each measured on `product_size` of it."""
    operations = seconds = 0.0
    known: dict[tuple[int, int], float] = {}
    for rows, width in shapes:
        if (rows, width) not in known:
            few, some = product_size(rows, width, tokens, clock.device.type)
            x = torch.full((few, width), 0.5, dtype=dtype, device=clock.device)
            w = torch.full((some, width), 0.5, dtype=stored, device=clock.device)
            with torch.inference_mode():
                spent = clock.typical(lambda x=x, w=w: F.linear(x, w.to(x.dtype)))  # type: ignore[misc]
            known[rows, width] = 2 * few * some * width / spent
        operations += 2 * rows * width
        seconds += 2 * rows * width / known[rows, width]
    return operations / seconds if seconds else inf


def product_size(rows: int, width: int, tokens: int, device: str) -> tuple[int, int]:
    """Tokens and rows of a product (tokens, in) · (rows, in)ᵀ that takes a moment: the whole one if it does.

    Of a large one rows are left out rather than tokens: long activations are slower than short ones.
    """
    most = max(1, _BYTES[device] // (4 * width))
    few = max(1, min(tokens, most))
    some = min(int(_OPERATIONS[device] / (2 * width * few)), most) // 64 * 64
    return few, max(1, min(rows, max(some, 128)))


def _besides(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    dtype: torch.dtype,
    clock: Clock,
    work: StageWork,
    batch: int,
    seqlen: int,
) -> tuple[Speeds, list[int]]:
    """Speeds of all but the products, and the widths of the inputs of which there are statistics."""
    windows, length = window_size(skeleton, batch, seqlen, dtype, clock.device.type)
    layer = BlankLayer(checkpoint, skeleton, dtype, clock.device, windows, length)
    speeds, called, widths = _layer(layer, work, clock), layer.called, layer.widths
    del layer  # and its activations
    if called is not None:
        speeds = replace(speeds, attention=_attention(called, work, seqlen, dtype, clock))
    elif length < seqlen:
        half = BlankLayer(checkpoint, skeleton, dtype, clock.device, windows, length // 2)
        speeds = growing(speeds, _layer(half, work, clock), length, work, seqlen)
    return speeds, widths


def _layer(layer: BlankLayer, work: StageWork, clock: Clock) -> Speeds:
    """Speeds before the layers, and of a layer besides products and attention by F.scaled_dot_product_attention."""
    before = clock.typical(layer.embed, loads=True)
    with layer.ready() as run:
        clock.once(run)  # memory that is new to the process costs more, and a run has it only in the first layer
        rest = clock.typical(run)
    embedded = embedding_bytes(layer.states.nbytes, layer.depth)
    return replace(UNKNOWN, elementwise=layer.tokens * work.traffic / rest, embedding=embedded / before)


def growing(whole: Speeds, half: Speeds, length: int, work: StageWork, seqlen: int) -> Speeds:
    """Speeds for `seqlen` tokens, from those for `length` and for half of it, of a layer that attends in its own way.

    A token's seconds are a + b · length; a is elementwise work, b · seqlen is attention.
    """
    slope = max(0.0, (work.traffic / whole.elementwise - work.traffic / half.elementwise) / (length - length // 2))
    if not slope:
        return whole
    flat = max(1e-12, work.traffic / whole.elementwise - slope * length)
    return replace(whole, elementwise=work.traffic / flat, attention=work.attention / (slope * seqlen))


def _attention(called: Called, work: StageWork, seqlen: int, dtype: torch.dtype, clock: Clock) -> float:
    """Operations a second of attention over one whole window, with few heads where that is enough."""
    groups = max(1, called.query[1] // called.key[1])
    a_group = groups * work.attention * seqlen / max(1, called.query[1])
    a_group = max(a_group, 1.0)
    some = max(1, min(called.key[1], round(_OPERATIONS[clock.device.type] / a_group)))
    width = seqlen * max(called.query[-1], called.value[-1]) * 4
    some = max(1, min(some, _BYTES[clock.device.type] // (groups * width)))
    make = {"dtype": dtype, "device": clock.device}
    q = torch.full((1, some * groups, seqlen, called.query[-1]), 0.5, **make)  # type: ignore[call-overload]
    k = torch.full((1, some, seqlen, called.key[-1]), 0.5, **make)  # type: ignore[call-overload]
    v = torch.full((1, some, seqlen, called.value[-1]), 0.5, **make)  # type: ignore[call-overload]
    mask = torch.zeros(1, 1, seqlen, seqlen, **make) if called.masked else None  # type: ignore[call-overload]
    with torch.inference_mode():
        spent = clock.typical(lambda: F.scaled_dot_product_attention(q, k, v, mask, **called.options))
    return some * a_group / spent


def _statistics(widths: list[int], tokens: int, work: StageWork, dtype: torch.dtype, clock: Clock) -> float:
    """Bytes of `StageWork.inputs` a second, when there are statistics of inputs of these widths."""
    accumulate = (cpu if clock.device.type == "cpu" else torch_ops).accumulate
    seconds = 0.0
    for width in sorted(set(widths)):
        few = max(1, min(tokens, (_BYTES[clock.device.type] // 8) // (width * dtype.itemsize)))
        x = torch.full((few, width), 0.5, dtype=dtype, device=clock.device)
        sums = [torch.zeros(width, dtype=torch.float64, device=clock.device) for _ in range(2)]
        spent = clock.typical(lambda x=x, s=sums: accumulate(x, *s), loads=True)  # type: ignore[misc]
        seconds += widths.count(width) * spent / few
    return work.inputs / seconds if seconds else inf


def _selection(stage: Stage, skeleton: Skeleton, clock: Clock) -> float:
    """Bytes of weights a second, from some rows of each of the layer's linears: `ewma`, half of the weights."""
    nbytes = seconds = 0.0
    known: dict[tuple[int, int], float] = {}
    widest = max((ref.nbytes for ref in stage.linears.values()), default=0)
    random = torch.randn(min(_WEIGHTS // 4, widest)).repeat(4)
    for name, ref in stage.linears.items():
        rows, width = shape = linear_shape(skeleton, name, stage)
        if shape not in known:
            dtype, some = TORCH_DTYPES[ref.dtype], max(1, min(rows, _WEIGHTS // width))
            weight = random[: some * width].view(some, width).to(clock.device, dtype)
            feature = torch.rand(width).to(clock.device)
            spent = clock.typical(lambda w=weight, f=feature: select(w, f, 2, sparsity=0.5), loads=True)  # type: ignore[misc]
            known[shape] = spent / some
        seconds += known[shape] * rows
        nbytes += ref.nbytes
    return nbytes / seconds if seconds else inf


def _read(checkpoint: Checkpoint, clock: Clock) -> tuple[float, float]:
    """Bytes a second of mapped weights that are looked at: not in the system's cache (where that can be), and in it."""
    ref = max((r for r in checkpoint.tensors.values() if r.dtype in TORCH_DTYPES and r.shape), key=lambda r: r.nbytes)
    rows = max(1, min(ref.shape[0], READ_BYTES // max(1, ref.nbytes // ref.shape[0])))
    piece = replace(ref, end=ref.begin + ref.nbytes // ref.shape[0] * rows)
    small = torch.zeros(64, dtype=TORCH_DTYPES[ref.dtype])
    clock.typical(lambda: cpu.first_nonfinite(small), loads=True)
    with maps_of(checkpoint) as maps:

        def look() -> None:
            cpu.first_nonfinite(maps.rows(ref, 0, rows))

        def cold() -> None:
            maps.prefetch([piece])
            look()

        maps.raw(piece)  # maps the file
        maps.release([piece], drop_cache=True)
        read = clock.once(cold)
        times = []
        for _ in range(3):
            maps.release([piece])
            times.append(clock.once(look))
        maps.release([piece], drop_cache=True)
    return piece.nbytes / read, piece.nbytes / median(times)


def _hashing(clock: Clock) -> float:
    """Bytes a second that one thread hashes and gathers for the disk (disk/direct.py)."""
    data, block = memoryview(bytes(8 << 20)), memoryview(bytearray(8 << 20))

    def work() -> None:
        xxhash.xxh3_128(data).digest()
        block[:] = data

    return len(data) / clock.typical(work)


def _link(clock: Clock) -> float:
    """Bytes a second from mapped memory to the device, as model/loader.py sends them."""
    if clock.device.type != "cuda":
        return inf
    piece = torch.zeros(32 << 20, dtype=torch.uint8)
    there = torch.empty(32 << 20, dtype=torch.uint8, device=clock.device)
    return piece.nbytes / clock.typical(lambda: there.copy_(piece.pin_memory(), non_blocking=True))


def _copying(clock: Clock) -> float:
    """Bytes a second read and written on the device."""
    data = torch.zeros(64 << 20, dtype=torch.uint8, device=clock.device)
    return 2 * data.nbytes / clock.typical(lambda: data.clone())
