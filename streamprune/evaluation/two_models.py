"""Comparison of two models, for `evaluate`: how they share memory, and how far apart their predictions are.

The layers of one model are streamed, then those of the other. The hidden states after the last layer are kept, on the
device or on disk, until both heads are applied to the same few positions at a time. Per predicted token, in nats:

    KL(p_dense ‖ p) = Σ_v p_dense(v) (log p_dense(v) − log p(v))        (Kullback and Leibler 1951, eq. 2.4)

with log-softmax in float32 and sums in float64. Terms with p_dense(v) = 0 are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from streamprune.calibration.texts import check_seqlen
from streamprune.calibration.windows import Source, Windows, cut_windows, tokens_digest
from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.claims import check_claims
from streamprune.disk.hub import resolve_model
from streamprune.disk.quantised import computable
from streamprune.disk.scratch import ScratchTokens
from streamprune.errors import ResourceError, UsageError
from streamprune.model.budget import (
    RESERVE,
    Budget,
    Layout,
    choose_batch,
    device_layout,
    estimate,
    group_of,
)
from streamprune.model.device import cache_dtype, free_on, limit_memory
from streamprune.model.extra_memory import CONTEXT
from streamprune.model.pass_memory import memory_of
from streamprune.model.skeleton import Skeleton
from streamprune.model.streamed import StreamedModel
from streamprune.process.memory import format_bytes

POSITION_BYTES = 12
"""Peak bytes per position and vocabulary entry: log p of the reference, logits of the model, and their log p."""

_PARTS = 8
"""Divergences are computed for an eighth of the positions at a time, so that temporaries do not exceed that peak."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, and the dtype that it is computed in."""

    skeleton: Skeleton
    dtype: torch.dtype

    def state_bytes(self, windows: int, length: int) -> int:
        """Bytes of what is kept between stages of `windows` windows of `length` tokens, at the most."""
        return (
            windows
            * length
            * self.skeleton.between.most(length)
            * cache_dtype(self.skeleton.dtype, self.dtype).itemsize
        )

    @property
    def head_bytes(self) -> int:
        """Bytes of weights that the head needs; with tied embeddings, its matrix is part of the first stage."""
        return max(s.nbytes for s in (self.skeleton.stages[0], self.skeleton.stages[-1]))


@dataclass(frozen=True)
class Divergence:
    """The result of `compare_heads`, in nats."""

    nll: Tensor
    """(windows,) float64 on the CPU: −log p of the model, summed over each window's predicted tokens."""
    reference_nll: Tensor
    """The same for the reference."""
    agreed: int
    """Number of positions at which both models' most likely token is the same; of equal logits, the first counts."""
    kl: Tensor
    """(windows,) float64 on the CPU: each window's mean KL in nats per predicted token."""


def open_reference(reference: str | Path, seqlen: int) -> Checkpoint:
    """Opens the checkpoint to compare with.

    Raises as for the model itself, and UsageError if its context is shorter than `seqlen`.
    """
    checkpoint = computable(open_checkpoint(resolve_model(str(reference))))
    check_claims(checkpoint)
    try:
        check_seqlen(seqlen, checkpoint.config)
    except UsageError as e:
        raise UsageError(f"--reference {checkpoint.path}: {e}; give a smaller --seqlen") from e
    return checkpoint


def check_reference(
    checkpoint: Checkpoint, reference: Subject, model: Subject, source: Source, windows: Windows, folder: Path
) -> None:
    """Raises UsageError unless the reference has the model's vocabulary and its tokenizer gives the same `windows`.

    `source` is the text as the model's tokenizer reads it; `folder` is for temporary files.
    """
    theirs, ours = reference.skeleton.vocab_size, model.skeleton.vocab_size
    if theirs != ours:
        raise UsageError(
            f"--reference {checkpoint.path}: its vocabulary has {theirs} tokens, the model's has {ours}; "
            "only models of one vocabulary can be compared"
        )
    try:
        with ScratchTokens(folder) as ids:
            made = cut_windows(replace(source, model=checkpoint.path), windows.seqlen, ids, len(windows))
            same = made.shape == windows.shape and tokens_digest(made) == tokens_digest(windows)
    except UsageError:  # the text has too few tokens for it, so the tokenizers differ
        same = False
    if not same:
        raise UsageError(
            f"--reference {checkpoint.path}: its tokenizer cuts {source.text.path} into other tokens than the model's; "
            "only models of one tokenizer can be compared"
        )


def ram_of_two(reference: Subject, model: Subject, seqlen: int, *, on_device: bool, base: int | None = None) -> Budget:
    """Estimate of the RAM for streaming one model after the other, then applying both heads."""
    two = [estimate(s.skeleton, seqlen, s.dtype, base, on_device=on_device) for s in (reference, model)]
    if on_device:  # chunks of hidden states of both are in flight at the end
        return replace(two[0], per_sample=two[0].per_sample + two[1].per_sample)
    heads = reference.head_bytes + model.head_bytes
    widest = max(b.per_sample for b in two)  # a layer's; more than chunks of both models' states, read ahead
    waits = max(two, key=lambda b: b.waiting)
    largest = max(heads, *(b.stage for b in two))
    return Budget(two[0].base, RESERVE, largest, widest, waiting=waits.waiting, enough=waits.enough)


def lay_out_two(
    reference: Subject, model: Subject, seqlen: int, samples: int, device: torch.device,
    max_ram: int | None, max_vram: int | None, logits: int,
) -> tuple[Layout, Layout, bool]:  # fmt: skip
    """The layouts of both models, and whether resident hidden states stay on the device after the last layer.

    Both have the same batch size, so that their chunks of states hold the same windows. `logits` is in bytes. Raises
    ResourceError with the smallest sufficient limit, as layout_for, and UsageError for --max-vram without a GPU.
    """
    on_device = device.type != "cpu"
    if max_vram is not None and not on_device:
        raise UsageError("--max-vram is for a GPU, and this job runs on the CPU; leave it out, or see --device")
    budget = ram_of_two(reference, model, seqlen, on_device=on_device)
    most = choose_batch(budget, samples, seqlen, max_ram)
    if not on_device:
        layout = Layout(most, 1, False, 0, group=group_of(budget, most, samples, max_ram))
        return layout, layout, True
    limit_memory(max_vram, device)
    whose, limit = "--max-vram", max_vram
    if limit is None:
        whose, limit = f"{device}'s free memory of", free_on(device)
    return fit_two(reference, model, seqlen, samples, device, limit, logits, whose)


def fit_two(
    reference: Subject, model: Subject, seqlen: int, samples: int, device: torch.device, limit: int | None, logits: int,
    whose: str = "--max-vram",
) -> tuple[Layout, Layout, bool]:  # fmt: skip
    """As lay_out_two, within `limit` bytes of a device; None if that is unknown, and then no states are kept there.

    To save memory, first the final states are no longer kept on the device, then as in device_layout, then batches
    shrink.
    """
    two = (reference, model)
    whole = [s.state_bytes(samples, seqlen) for s in two]

    def heads(batch: int, kept: int) -> int:
        """Bytes on the device while both heads are applied."""
        return CONTEXT + logits + kept + sum(s.head_bytes + 4 * s.state_bytes(batch, seqlen) for s in two)

    def layouts(kept: int) -> list[Layout]:
        """The layout of each model on its own; the second one has `kept` bytes less."""
        rooms = [limit, limit if limit is None else limit - kept]
        return [device_layout(s.skeleton, seqlen, samples, s.dtype, device, r) for s, r in zip(two, rooms, strict=True)]

    least = max(heads(1, 0), *(memory_of(s.skeleton, seqlen, samples, s.dtype, 1, False, 1) for s in two))
    if limit is not None and least > limit:
        raise ResourceError(
            f"{whose} {format_bytes(limit)} is not enough: this job needs --max-vram {-(-least >> 20) + 1}MiB"
        )
    found, keep = layouts(0), False
    batch = min(layout.batch for layout in found)
    if limit is not None:
        with suppress(ResourceError):
            beside = layouts(whole[0] if found[0].resident else 0)
            at_once = min(layout.batch for layout in beside)
            kept = sum(size for size, layout in zip(whole, beside, strict=True) if layout.resident)
            if heads(at_once, kept) <= limit:
                found, batch, keep = beside, at_once, True
        if not keep:
            batch = max(1, min(batch, (limit - heads(0, 0)) // (heads(1, 0) - heads(0, 0))))
    return replace(found[0], batch=batch), replace(found[1], batch=batch), keep


def compare_heads(
    reference: StreamedModel,
    model: StreamedModel,
    states: Iterable[tuple[Tensor, Tensor]],
    batches: Sequence[Tensor],
    limit: int,
) -> Divergence:
    """Applies both heads to the same positions, so few at a time that logits and temporaries take `limit` bytes.

    `states` yields both models' chunks of hidden states after the last layer, (batch, seqlen, hidden) each, in the
    order of `batches` of token ids (batch, seqlen).
    """
    seqlen = batches[0].shape[1]  # never more positions per call, which some models do not support
    step = max(1, min(seqlen, limit // (POSITION_BYTES * max(w.skeleton.vocab_size for w in (reference, model)))))
    agreed = torch.zeros((), dtype=torch.int64, device=model.device)
    windows, nats, dense_nats = list[Tensor](), list[Tensor](), list[Tensor]()
    with reference.head() as dense_head, model.head() as head:
        for (dense, pruned), ids in zip(states, batches, strict=True):
            before, after = (s[:, :-1].reshape(-1, s.shape[-1]) for s in (dense, pruned))
            wanted = ids[:, 1:].reshape(-1, 1).to(model.device)
            found, lost, dense_lost = [], [], []
            for begin in range(0, len(wanted), step):
                here = slice(begin, begin + step)
                log_p, top_p = predictions(dense_head(before[here]))
                log_q, top_q = predictions(head(after[here]))
                loss, dense_loss = (-log.gather(-1, wanted[here]).double() for log in (log_q, log_p))
                agreed += (top_p == top_q).sum()
                lost.append(loss)
                dense_lost.append(dense_loss)
                found.append(divergence(log_p, log_q))
                del log_p, log_q  # before the next ones are computed
            windows.append(torch.cat(found).view(len(ids), -1).mean(1).cpu())
            for whole, parts in ((nats, lost), (dense_nats, dense_lost)):
                whole.append(torch.cat(parts).view(len(ids), -1).sum(1).cpu())
    return Divergence(torch.cat(nats), torch.cat(dense_nats), int(agreed), torch.cat(windows))


def predictions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p (tokens, vocab) float32 and the most likely tokens (tokens,) int64, from logits (tokens, vocab)."""
    return torch.log_softmax(logits, -1, dtype=torch.float32), logits.argmax(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of each row of log p and log q (tokens, vocab) float32: (tokens,) float64. See the top."""
    part = -(-len(log_p) // _PARTS)
    found = []
    for p, q in zip(torch.split(log_p, part), torch.split(log_q, part), strict=True):
        terms = (p - q).mul_(p.exp()).masked_fill_(p == -torch.inf, 0.0)
        found.append(terms.sum(-1, dtype=torch.float64))
    return torch.cat(found)
