"""Passes of all batches through one stage, from cache to cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError, ResourceError
from streamprune.kernels import cpu, torch_ops
from streamprune.model.activations import Activations
from streamprune.model.calibration import Tokens
from streamprune.model.feed import Feed
from streamprune.model.lane import is_out_of_memory
from streamprune.model.skeleton import Skeleton, Stage
from streamprune.model.walk import Walk

_CHECK_BYTES = 16 << 20

Result = TypeVar("Result")


class Watcher(Protocol):
    """What sees the inputs of a layer's linears, in the order of use, and is told when a batch is through."""

    def watch(self, name: str, x: Tensor, /) -> None: ...

    def end_batch(self) -> None: ...


def split_batches(windows: Tokens, batch: int) -> list[Tensor]:
    """Windows (samples, seqlen) as batches (≤ batch, seqlen) int64."""
    ids = torch.from_numpy(windows)
    return [ids[begin : begin + batch] for begin in range(0, len(ids), batch)]


def embed_pass(walk: Walk, batches: list[Tensor], activations: Activations, *, persist: bool = True) -> None:
    """Token ids to the states before layer 0."""
    with activations.write(0, persist=persist) as put:
        for states in walk.embed(batches):
            put(states)


def layer_pass(
    walk: Walk,
    stage: Stage,
    activations: Activations,
    *,
    write: bool,
    persist: bool = True,
    watchers: Sequence[Watcher] = (),
    flow: Callable[[Tensor, Tensor], None] | None = None,
    run: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """States before layer i through it to those before i + 1 (if `write`).

    `watchers` see its linears' inputs, `flow` the states before and after it.

    `run` takes the place of the layer with the checkpoint's weights; `persist` as for Activations.write.
    """
    if run is None:

        def watch(name: str, x: Tensor) -> None:
            for watcher in watchers:
                watcher.watch(name, x)

        with walk.layer(stage, watch=watch if watchers else None) as dense:
            layer_pass(walk, stage, activations, write=write, persist=persist, watchers=watchers, flow=flow, run=dense)
        return
    with activations.write(stage.index + 1, persist=persist) if write else nullcontext(_nowhere) as put:
        for states in activations.read(stage.index):
            after = run(states)
            if flow is not None:
                flow(states, after)
            put(after)
            for watcher in watchers:
                watcher.end_batch()


def _nowhere(states: Tensor) -> None:
    """The states after the last layer that is run are not needed."""


def check_weights(feed: Feed, skeleton: Skeleton, stage: Stage) -> None:
    """Looks at every weight of a stage before it is used. Raises CheckpointError for NaN and Inf, as finite_rows."""
    known = {ref.name for ref in skeleton.sources.values()}
    together = {ref.name for ref in stage.together}
    for ref in stage.tensors:
        # of the embeddings and the head, a pass touches a few rows only; of a layer's experts, one after the other
        in_passing = stage.kind != "layer" or ref.name not in together
        if ref.name in known:
            for begin, rows in finite_rows(feed.maps if in_passing else feed, ref, _CHECK_BYTES):
                if in_passing:
                    at = ref.begin + begin * (ref.nbytes // max(1, ref.shape[0] if ref.shape else 1))
                    done = [replace(ref, begin=at, end=at + rows.nbytes)]
                    feed.maps.release(done, drop_cache=stage.kind != "layer")


def rows_of(source: Feed | ShardMaps, ref: TensorRef, chunk_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """A stored tensor in chunks of whole rows, each with the number of its first; a scalar in one piece."""
    count = ref.shape[0] if ref.shape else 1
    step = max(1, chunk_bytes * count // max(ref.nbytes, 1))
    for begin in range(0, count, step):
        yield begin, source.rows(ref, begin, min(begin + step, count)) if ref.shape else source.tensor(ref)


def finite_rows(
    source: Feed | ShardMaps, ref: TensorRef, chunk_bytes: int, whole: TensorRef | None = None
) -> Iterator[tuple[int, Tensor]]:
    """As rows_of. Raises CheckpointError naming file, tensor and index of the first NaN or Inf."""
    for begin, rows in rows_of(source, ref, chunk_bytes):
        refuse_nonfinite(ref, begin, rows, whole)
        yield begin, rows


def refuse_nonfinite(ref: TensorRef, begin: int, rows: Tensor, whole: TensorRef | None = None) -> None:
    """Raises CheckpointError naming the first NaN or Inf of a tensor's rows from `begin` on, if there is one.

    `ref` may be one of the equal parts of the tensor `whole`, along its first axis.
    """
    if rows.dtype == torch.float8_e4m3fn:
        found = ((rows.reshape(-1).view(torch.uint8) & 0x7F) == 0x7F).nonzero()
        flat = int(found[0]) if len(found) else None
    else:
        flat = (cpu if rows.device.type == "cpu" else torch_ops).first_nonfinite(rows)
    if flat is None:
        return
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), rows.shape)]
    place = [begin + index[0], *index[1:]] if index else []
    if whole is not None and whole.shape != ref.shape:
        place.insert(0, (ref.begin - whole.begin) // ref.nbytes)
    raise CheckpointError(
        f"{ref.shard}: tensor {ref.name} is {float(rows.reshape(-1)[flat])} at {place}; "
        "the checkpoint is damaged, download it again"
    )


def retry_smaller(walk: Walk, work: Callable[[], Result]) -> Result:
    """What `work` returns; when it runs out of memory it starts again with batches of half the size.

    Raises ResourceError when a single sample does not fit.
    """
    while True:
        try:
            return work()
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
        walk.give_way()  # out here, where the failed attempt's tensors are no longer held by its traceback


@contextmanager
def out_of_memory_named(device: torch.device) -> Iterator[None]:
    """Turns what is left of torch's out-of-memory errors into a ResourceError."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise ResourceError(
            f"{device} ran out of memory: {' '.join(str(e).split())[:120]}; free some and run the same command again"
        ) from e
