"""Measures the speeds of this machine, in about two seconds, on parts of the model to be pruned.

    products     linears of the largest layer, with enough rows for a stable measurement
    float32      for a refit: products of rows with matrices as wide as these linears' inputs
    elementwise  the model's first layer, with zero weights that take no memory and without its products
    attention    the attention call of that layer, on a few heads of a whole window
    others       our kernels on rows of each linear's width; reading up to 64 MiB of the mapped checkpoint, dropped
                 from the page cache first; hashing and copying in memory

Nothing is written to disk. The memory used does not depend on the size of the model.
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
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.planning.cost import embedding_bytes
from streamprune.planning.work import RunShape, Speeds, StageWork

READ_BYTES = 64 << 20
_FETCHED_BYTES = 8 << 20
_SECONDS = 0.08
"""How long a measurement is repeated: at least twice, after one run that does not count."""
_OPERATIONS = {"cpu": 8e9, "cuda": 6e11}
"""Operations of one measured product or attention; on a device, enough to keep it busy."""
_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""Largest memory of one operand, bytes."""
_WEIGHTS = 1 << 23
"""Weights of a linear that are pruned in a measurement: about as many as a run prunes at once."""
_REFITTED = 1024
"""Rows that are multiplied with a Gram at once, roughly."""
_LOADING = 2.0
"""Limit on `loading`, seconds: kernels that had to be compiled now are found in a cache later."""
UNKNOWN = Speeds(
    products=inf, float32=inf, attention=inf, elementwise=inf, embedding=inf, statistics=inf, selection=inf,
    scanning=inf, hashing=inf, reading=inf, writing=inf, link=inf, loading=0.0,
)  # fmt: skip
"""Speeds that have not been measured: their work takes no time."""


@dataclass
class Clock:
    """Measures seconds. `loading` sums the extra time of first calls over later ones."""

    device: torch.device
    now: Callable[[], float]
    loading: float = 0.0

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one call, including work on the device."""
        self._wait()
        begun = self.now()
        work()
        self._wait()
        return max(self.now() - begun, 1e-9)

    def typical(self, work: Callable[[], object], *, loads: bool = False) -> float:
        """Median seconds of a call after the first. With `loads`, the extra time of the first is added to `loading`."""
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
    """The speeds of this machine for the `work` of a layer, with batches of `batch` windows of `seqlen` tokens.

    `now` returns seconds. Raises UnsupportedError for a model whose layers cannot be run one by one, and whatever
    reading the checkpoint raises.
    """
    clock = Clock(device, now)
    stage = max(skeleton.layer_stages, key=lambda s: s.nbytes)
    shapes = [linear_shape(skeleton, name, stage) for name in stage.linears]
    speeds = UNKNOWN
    if run.tokens:
        speeds, widths = _layer_speeds(checkpoint, skeleton, dtype, clock, work, batch, seqlen)
        products = _products(shapes, batch * seqlen, skeleton.dtype, dtype, clock)
        speeds = replace(speeds, products=products, statistics=_statistics(widths, batch * seqlen, work, dtype, clock))
        if work.refit.float32:
            squares = {(width, width) for _, width in shapes}
            single = _products(sorted(squares), _REFITTED, torch.float32, torch.float32, clock)
            speeds = replace(speeds, float32=single)
    elif device.type == "cuda":
        speeds = replace(speeds, elementwise=_copying(clock))
    reading, scanning = _fetch(checkpoint, clock) if checkpoint.streamed else _read(checkpoint, clock)
    return replace(
        speeds, selection=_selection(stage, skeleton, clock), scanning=scanning, hashing=_hashing(clock),
        reading=reading, writing=inf if checkpoint.streamed else reading, link=_link(clock),
        loading=min(clock.loading, _LOADING),
    )  # fmt: skip


def _products(
    shapes: Iterable[tuple[int, int]], tokens: int, stored: torch.dtype, dtype: torch.dtype, clock: Clock
) -> float:
    """Operations per second of a layer's linears `shapes` (out, in), each measured at its `product_size`."""
    operations = seconds = 0.0
    known: dict[tuple[int, int], float] = {}
    for rows, width in shapes:
        if (rows, width) not in known:
            n_tokens, n_rows = product_size(rows, width, tokens, clock.device.type)
            x = torch.full((n_tokens, width), 0.5, dtype=dtype, device=clock.device)
            w = torch.full((n_rows, width), 0.5, dtype=stored, device=clock.device)
            with torch.inference_mode():
                spent = clock.typical(lambda x=x, w=w: F.linear(x, w.to(x.dtype)))  # type: ignore[misc]
            known[rows, width] = 2 * n_tokens * n_rows * width / spent
        operations += 2 * rows * width
        seconds += 2 * rows * width / known[rows, width]
    return operations / seconds if seconds else inf


def product_size(rows: int, width: int, tokens: int, device: str) -> tuple[int, int]:
    """(tokens, rows) of a product (tokens, in) · (rows, in)ᵀ to measure: the whole one, if it is small enough.

    Large products are reduced in rows rather than in tokens, because the speed depends on the number of tokens.
    """
    most = max(1, _BYTES[device] // (4 * width))
    n_tokens = max(1, min(tokens, most))
    n_rows = min(int(_OPERATIONS[device] / (2 * width * n_tokens)), most) // 64 * 64
    return n_tokens, max(1, min(rows, max(n_rows, 128)))


def _layer_speeds(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    dtype: torch.dtype,
    clock: Clock,
    work: StageWork,
    batch: int,
    seqlen: int,
) -> tuple[Speeds, list[int]]:
    """Speeds of a layer besides its products, and the widths of the inputs with statistics."""
    windows, length = window_size(skeleton, batch, seqlen, dtype, clock.device.type)
    layer = BlankLayer(checkpoint, skeleton, dtype, clock.device, windows, length)
    speeds, called, widths = _rest_of_layer(layer, work, clock), layer.called, layer.widths
    del layer  # frees its activations
    if called is not None:
        speeds = replace(speeds, attention=_attention(called, work, seqlen, dtype, clock))
    elif length < seqlen:
        half = BlankLayer(checkpoint, skeleton, dtype, clock.device, windows, length // 2)
        speeds = growing(speeds, _rest_of_layer(half, work, clock), length, work, seqlen)
    return speeds, widths


def _rest_of_layer(layer: BlankLayer, work: StageWork, clock: Clock) -> Speeds:
    """Speeds of the embedding, and of a layer besides products and F.scaled_dot_product_attention."""
    before = clock.typical(layer.embed, loads=True)
    with layer.ready() as run:
        clock.once(run)  # newly allocated memory is slower, which in a run matters only in the first layer
        rest = clock.typical(run)
    embedded = embedding_bytes(layer.states.nbytes, layer.depth)
    return replace(UNKNOWN, elementwise=layer.tokens * work.traffic / rest, embedding=embedded / before)


def growing(whole: Speeds, half: Speeds, length: int, work: StageWork, seqlen: int) -> Speeds:
    """Speeds at `seqlen` tokens of a layer with its own attention code, from those at `length` and at half of it.

    The seconds of a token are a + b · length: a is elementwise work, b · seqlen is attention.
    """
    slope = max(0.0, (work.traffic / whole.elementwise - work.traffic / half.elementwise) / (length - length // 2))
    if not slope:
        return whole
    flat = max(1e-12, work.traffic / whole.elementwise - slope * length)
    return replace(whole, elementwise=work.traffic / flat, attention=work.attention / (slope * seqlen))


def _attention(called: Called, work: StageWork, seqlen: int, dtype: torch.dtype, clock: Clock) -> float:
    """Operations per second of attention over a whole window, on as few heads as are enough."""
    queries_per_key = max(1, called.query[1] // called.key[1])
    per_group = queries_per_key * work.attention * seqlen / max(1, called.query[1])
    per_group = max(per_group, 1.0)
    heads = max(1, min(called.key[1], round(_OPERATIONS[clock.device.type] / per_group)))
    width = seqlen * max(called.query[-1], called.value[-1]) * 4
    heads = max(1, min(heads, _BYTES[clock.device.type] // (queries_per_key * width)))
    make = {"dtype": dtype, "device": clock.device}
    q = torch.full((1, heads * queries_per_key, seqlen, called.query[-1]), 0.5, **make)  # type: ignore[call-overload]
    k = torch.full((1, heads, seqlen, called.key[-1]), 0.5, **make)  # type: ignore[call-overload]
    v = torch.full((1, heads, seqlen, called.value[-1]), 0.5, **make)  # type: ignore[call-overload]
    mask = torch.zeros(1, 1, seqlen, seqlen, **make) if called.masked else None  # type: ignore[call-overload]
    with torch.inference_mode():
        spent = clock.typical(lambda: F.scaled_dot_product_attention(q, k, v, mask, **called.options))
    return heads * per_group / spent


def _statistics(widths: list[int], tokens: int, work: StageWork, dtype: torch.dtype, clock: Clock) -> float:
    """Bytes of `StageWork.inputs` per second, for statistics of inputs of these `widths`."""
    accumulate = (cpu if clock.device.type == "cpu" else torch_ops).accumulate
    seconds = 0.0
    for width in sorted(set(widths)):
        n_tokens = max(1, min(tokens, (_BYTES[clock.device.type] // 8) // (width * dtype.itemsize)))
        x = torch.full((n_tokens, width), 0.5, dtype=dtype, device=clock.device)
        sums = [torch.zeros(width, dtype=torch.float64, device=clock.device) for _ in range(2)]
        spent = clock.typical(lambda x=x, s=sums: accumulate(x, *s), loads=True)  # type: ignore[misc]
        seconds += widths.count(width) * spent / n_tokens
    return work.inputs / seconds if seconds else inf


def _selection(stage: Stage, skeleton: Skeleton, clock: Clock) -> float:
    """Bytes of weights per second, on some rows of each of the layer's linears: `ewma` at 50 %."""
    nbytes = seconds = 0.0
    known: dict[tuple[int, int], float] = {}
    widest = max((ref.nbytes for ref in stage.linears.values()), default=0)
    random = torch.randn(min(_WEIGHTS // 4, widest)).repeat(4)
    for name, ref in stage.linears.items():
        rows, width = shape = linear_shape(skeleton, name, stage)
        if shape not in known:
            dtype, n_rows = TORCH_DTYPES[ref.dtype], max(1, min(rows, _WEIGHTS // width))
            weight = random[: n_rows * width].view(n_rows, width).to(clock.device, dtype)
            feature = torch.rand(width).to(clock.device)
            spent = clock.typical(lambda w=weight, f=feature: select(w, f, 2, sparsity=0.5), loads=True)  # type: ignore[misc]
            known[shape] = spent / n_rows
        seconds += known[shape] * rows
        nbytes += ref.nbytes
    return nbytes / seconds if seconds else inf


def _read(checkpoint: Checkpoint, clock: Clock) -> tuple[float, float]:
    """Bytes per second of checking mapped weights: from the disk (if the page cache can be dropped), and cached."""
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


def _fetch(checkpoint: Checkpoint, clock: Clock) -> tuple[float, float]:
    """As _read, of a checkpoint on the hub: bytes per second that come from there, and that are checked in memory."""
    shard = checkpoint.shards[0]
    size = min(_FETCHED_BYTES, checkpoint.shard_stats[shard][0])
    with checkpoint.reading(shard) as read:
        seconds = clock.once(lambda: read(0, size))
    weights = torch.zeros(READ_BYTES // 2, dtype=torch.bfloat16)
    return size / seconds, READ_BYTES / clock.typical(lambda: cpu.first_nonfinite(weights), loads=True)


def _hashing(clock: Clock) -> float:
    """Bytes per second that one thread hashes and copies into the write buffer (disk/direct.py)."""
    data, block = memoryview(bytes(8 << 20)), memoryview(bytearray(8 << 20))

    def work() -> None:
        xxhash.xxh3_128(data).digest()
        block[:] = data

    return len(data) / clock.typical(work)


def _link(clock: Clock) -> float:
    """Bytes per second from mapped memory to the device, copied as in model/loader.py."""
    if clock.device.type != "cuda":
        return inf
    piece = torch.zeros(32 << 20, dtype=torch.uint8)
    there = torch.empty(32 << 20, dtype=torch.uint8, device=clock.device)
    return piece.nbytes / clock.typical(lambda: there.copy_(piece.pin_memory(), non_blocking=True))


def _copying(clock: Clock) -> float:
    """Bytes per second read and written on the device."""
    data = torch.zeros(64 << 20, dtype=torch.uint8, device=clock.device)
    return 2 * data.nbytes / clock.typical(lambda: data.clone())
