"""`evaluate`: perplexity of a model that may be far larger than memory, layer by layer as prune does it.

The whole text is tokenised without special tokens and cut into windows of N tokens without overlap, the rest
dropped; in each window the N − 1 tokens after the first are predicted. Perplexity is exp of the mean negative
log-likelihood of all of them. The head works on a few positions at a time, so that logits stay within
LOGITS_BYTES however large the vocabulary.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk import durable
from streamprune.disk.cache import remove_cache
from streamprune.disk.checkpoint import open_checkpoint, refuse_quantised
from streamprune.disk.hub import resolve_model
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError, LockedError, ResourceError, UsageError
from streamprune.memory import give_back_free_memory, peak_resident_bytes
from streamprune.model.activations import Activations
from streamprune.model.budget import Layout, compute_dtype, layout_for, resolve_device
from streamprune.model.calibration import Tokens, cut_windows
from streamprune.model.feed import Feed
from streamprune.model.passes import (
    check_weights,
    embed_pass,
    layer_pass,
    out_of_memory_named,
    retry_smaller,
    split_batches,
)
from streamprune.model.skeleton import build_skeleton, stored_dtype
from streamprune.model.texts import check_seqlen, default_seqlen
from streamprune.model.walk import Walk
from streamprune.spec import Progress, ProgressCallback, format_bytes, no_progress

LOGITS_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
"""Memory of one call's logits in float32, twice: a device is kept busy by more positions at a time."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. `tokens` are the predicted ones; `nll` is their mean, in nats."""

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float
    peak_rss_bytes: int


def evaluate(
    model: str | Path, text: str | Path, *, seqlen: int | None = None, device: str = "auto", dtype: str = "auto",
    max_ram: int | None = None, max_vram: int | None = None, work: str | Path | None = None,
    trust_remote_code: bool = False, progress: ProgressCallback = no_progress,
) -> Evaluation:  # fmt: skip
    """Perplexity of `model` on the file `text` in windows of `seqlen` tokens (default min(2048, model's limit)).

    Activations are kept in a folder of their own below `work` (default: the user's cache folder) and removed at
    the end. `max_ram` and `max_vram` (of a GPU) are in bytes. Raises the errors of streamprune.errors.
    """
    begun = time.perf_counter()
    checkpoint = open_checkpoint(resolve_model(str(model)))
    refuse_quantised(checkpoint)
    path, length = Path(text), seqlen if seqlen is not None else default_seqlen(checkpoint.config)
    if not path.is_file():
        raise UsageError(f"--text {path}: no such file")
    check_seqlen(length, checkpoint.config)
    target = resolve_device(device)
    compute = compute_dtype(dtype, stored_dtype(checkpoint), target)
    skeleton = build_skeleton(checkpoint, compute, trust_remote_code=trust_remote_code)
    windows = cut_windows(path, checkpoint.path, skeleton.vocab_size, length, trust_remote_code=trust_remote_code)
    layout = layout_for(skeleton, length, len(windows), compute, target, max_ram, max_vram, head=True)
    with (
        _scratch(Path(work) if work is not None else _default_work()) as folder,
        ShardMaps(checkpoint) as maps,
        Feed(maps, target) as feed,
        out_of_memory_named(target),
    ):
        walk = Walk(skeleton, feed, compute)
        activations = Activations(folder, walk.cache_dtype, target, resident=layout.resident)
        if not layout.resident:
            _check_disk(folder, windows, walk)
        total = _stream(walk, windows, layout, activations, progress)
    tokens = windows.shape[0] * (length - 1)
    nll = total / tokens
    if not math.isfinite(nll):
        raise CheckpointError(f"{checkpoint.path}: the model's predictions are not finite; try --dtype float32")
    return Evaluation(
        math.exp(min(nll, 700.0)),
        nll,
        tokens,
        len(windows),
        length,
        time.perf_counter() - begun,
        peak_resident_bytes(),
    )


def _stream(walk: Walk, windows: Tokens, layout: Layout, activations: Activations, progress: ProgressCallback) -> float:
    """Embeds, runs every layer, and sums the loss; returns nats over all predicted tokens."""
    stages, persist = walk.skeleton.stages, not layout.resident
    batches = split_batches(windows, layout.batch)
    total = 0.0
    for position, stage in enumerate(stages):
        at = time.perf_counter()
        for near in stages[position : position + (2 if layout.layers > 1 or not walk.feed.copies else 1)]:
            if near.kind == "layer" or not walk.feed.copies:
                walk.feed.expect(near.tensors)
        retry_smaller(walk, partial(check_weights, walk.feed, walk.skeleton, stage))
        if stage.kind == "embed":
            retry_smaller(walk, partial(embed_pass, walk, batches, activations, persist=persist))
        elif stage.kind == "layer":
            retry_smaller(walk, partial(layer_pass, walk, stage, activations, write=True, persist=persist))
            if persist:
                remove_cache(activations.folder, stage.index)
        else:
            total = _loss(walk, batches, activations)
        walk.feed.release(stage.tensors)
        give_back_free_memory()
        progress(Progress(stage.name, position + 1, len(stages), time.perf_counter() - at))
    return total


def _loss(walk: Walk, batches: list[Tensor], activations: Activations) -> float:
    """Nats over all predicted tokens, from the states after the last layer."""
    seqlen = batches[0].shape[1]  # more positions a model may not have
    step = max(1, min(seqlen, LOGITS_BYTES[walk.device.type] // (walk.skeleton.vocab_size * 8)))
    total = torch.zeros((), dtype=torch.float64, device=walk.device)
    with walk.head() as head:
        for states, ids in zip(activations.read(len(walk.skeleton.layers)), batches, strict=True):
            flat = states[:, :-1].reshape(-1, walk.skeleton.hidden_size)
            wanted = ids[:, 1:].reshape(-1)
            for begin in range(0, len(wanted), step):
                total += _nll(head(flat[begin : begin + step]), wanted[begin : begin + step])
    return float(total)


def _nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """Summed −log p of `wanted` (tokens,) under logits (tokens, vocab), in float32, summed in float64."""
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted.to(logits.device), reduction="none")
    return loss.double().sum()


def _check_disk(folder: Path, windows: Tokens, walk: Walk) -> None:
    need = 2 * windows.size * walk.skeleton.hidden_size * walk.cache_dtype.itemsize + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ResourceError(
            f"{folder.parent} has {format_bytes(free)} free, evaluation needs {format_bytes(need)} for activations; "
            "free some or name another folder with --work"
        )


def _default_work() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamprune"


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """A folder of this process's own below `work`, removed at the end; those of dead processes go too."""
    durable.make_folder(work)
    for old in work.glob("eval-*.lock"):
        if not re.fullmatch(r"eval-[0-9]+-[0-9a-f]+", old.stem):
            continue
        try:
            with durable.Lock(old):
                durable.clear(old.with_suffix(""))
        except LockedError:
            continue
    folder = work.absolute() / f"eval-{os.getpid()}-{time.time_ns():x}"
    with durable.Lock(folder.with_name(folder.name + ".lock")):
        durable.make_folder(folder)
        try:
            yield folder
        finally:
            durable.clear(folder)
