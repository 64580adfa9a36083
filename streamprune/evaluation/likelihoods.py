"""Log-likelihoods of requests, all of them in one pass through a model that may be far larger than memory.

Layer by layer, as `evaluate` does it, but with batches of different lengths (requests.py). Their hidden states wait in
two unnamed files. The head sees the positions that something is predicted from and no others, a few at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamprune.calibration.texts import longest_context
from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.claims import check_claims
from streamprune.disk.hub import resolve_model
from streamprune.disk.places import cache_folder
from streamprune.disk.quantised import computable
from streamprune.errors import UsageError
from streamprune.evaluation.evaluate import LOGITS_BYTES, check_disk, subject_of
from streamprune.evaluation.one_model import Run
from streamprune.evaluation.requests import RaggedBatches, Request, Sequences, Wanted, border_of
from streamprune.evaluation.result import check_finite
from streamprune.model.activations import RaggedActivations
from streamprune.model.budget import layout_for
from streamprune.model.decoded import maps_of
from streamprune.model.device import cache_dtype, exact_products, resolve_device
from streamprune.model.loader import WeightLoader
from streamprune.model.passes import out_of_memory_named
from streamprune.model.streamed import StreamedModel
from streamprune.process import interrupts
from streamprune.process.memory import give_back_free_memory, peak_resident_bytes
from streamprune.progress import Progress, ProgressCallback, no_progress
from streamprune.settings import Resources

_RESOURCES = Resources()

DEFAULT_LONGEST = 2048
"""Tokens that a model is given at the most where its config names no limit."""


@dataclass(frozen=True)
class Likelihoods:
    """What `likelihoods` found, request by request."""

    logprobs: NDArray[np.float64]
    """Natural logarithm of the probability of each request's last `count` tokens."""
    greedy: NDArray[np.bool_]
    """Whether each of these tokens is the most likely one; of equal logits the first counts."""
    sequences: int
    """Distinct sequences that went through the model."""
    tokens: int
    """Their tokens, without what fills up batches."""
    truncated: int
    """Requests whose context was too long, so that its beginning was left out."""
    seconds: float
    peak_rss_bytes: int


def open_model(model: str | Path, seqlen: int | None = None) -> tuple[Checkpoint, int]:
    """The checkpoint, and how many tokens it is given at the most: `seqlen`, or its own limit.

    Raises as `evaluate`, and UsageError for a `seqlen` that is none.
    """
    checkpoint = computable(open_checkpoint(resolve_model(str(model))))
    check_claims(checkpoint)
    limit = longest_context(checkpoint.config)
    if seqlen is not None and seqlen < 1:
        raise UsageError(f"--seqlen {seqlen} must be at least 1")
    if seqlen is not None and limit is not None and seqlen > limit:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context of {limit} tokens")
    return checkpoint, seqlen or limit or DEFAULT_LONGEST


@exact_products()
def likelihoods(
    model: str | Path, requests: Sequence[Request], *, seqlen: int | None = None, resources: Resources = _RESOURCES,
    trust_remote_code: bool = False, progress: ProgressCallback = no_progress,
) -> Likelihoods:  # fmt: skip
    """The log-likelihoods of `requests`, whose contexts are cut to `seqlen` tokens (default: the model's limit).

    Hidden states wait in unnamed files below `resources.work` (default: the user's cache folder). Raises the errors of
    streamprune.errors.
    """
    begun = time.perf_counter()
    checkpoint, most = open_model(model, seqlen)
    target = resolve_device(resources.device)
    subject = subject_of(checkpoint, resources.dtype, target, trust_remote_code)
    _check_ids(requests, subject.skeleton.vocab_size)
    sequences = Sequences(requests, most, border_of(subject.skeleton.model.config))
    logprobs, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    if requests:
        padded = sequences.padded
        longest, tokens = padded[0], sum(padded)
        layout = layout_for(
            subject.skeleton,
            longest,
            -(-tokens // longest),
            subject.dtype,
            target,
            resources.ram,
            resources.vram,
            head=True,
        )
        batches = RaggedBatches(sequences, layout.batch * longest)
        folder = resources.work_folder or cache_folder()
        with interrupts.work(), ExitStack() as stack, out_of_memory_named(target):
            durable.make_folder(folder)
            hidden = subject.skeleton.between.most(longest)
            # in what is computed in where the disk takes them, so that nothing is rounded on the way
            kept = subject.dtype if target.type == "cpu" else cache_dtype(subject.skeleton.dtype, subject.dtype)
            if not layout.resident:
                check_disk(folder, 2 * tokens * hidden * kept.itemsize + (64 << 20))
            states = RaggedActivations(folder, tokens, hidden, kept, target, resident=layout.resident)
            loader = stack.enter_context(WeightLoader(stack.enter_context(maps_of(checkpoint)), target))
            run = Run(subject, loader, folder, layout, activations=states)
            _stream(run, batches, logprobs, greedy, progress)
        check_finite(float(logprobs.sum()), checkpoint)
    return Likelihoods(
        logprobs, greedy, len(sequences), sum(map(len, sequences.ids)), sequences.truncated,
        time.perf_counter() - begun, peak_resident_bytes(),
    )  # fmt: skip


def _check_ids(requests: Sequence[Request], vocabulary: int) -> None:
    for number, request in enumerate(requests, 1):
        if len(request.ids) and (largest := int(request.ids.max())) >= vocabulary:
            raise UsageError(
                f"request {number} of {len(requests)} holds token id {largest}, the model's vocabulary has "
                f"{vocabulary}; its tokenizer belongs to another model"
            )


def _stream(
    run: Run, batches: RaggedBatches, logprobs: NDArray[np.float64], greedy: NDArray[np.bool_],
    progress: ProgressCallback,
) -> None:  # fmt: skip
    """All layers, then the head; adds to what is known of each request."""
    total = len(run.stages)
    for done, stage in enumerate(run.stages[:-1], 1):
        interrupts.check()
        at = time.perf_counter()
        run.do(stage, batches, last=True)
        progress(Progress(run.name_of(stage), done, total, time.perf_counter() - at))
    at, loader = time.perf_counter(), run.streamed.loader
    if not loader.copies:
        loader.expect(run.stages[-1].tensors)
    run.check(run.stages[-1])
    answer_all(run.streamed, batches, run.last_states(), logprobs, greedy)
    loader.release(run.stages[-1].tensors)
    give_back_free_memory()
    progress(Progress("head", total, total, time.perf_counter() - at))


def answer_all(
    streamed: StreamedModel, batches: RaggedBatches, chunks: Iterable[Tensor], logprobs: NDArray[np.float64],
    greedy: NDArray[np.bool_],
) -> None:  # fmt: skip
    """What is wanted of `batches`, from the states after the last layer, (samples, length, hidden) for each.

    Positions are gathered over batches until there are as many as the head takes at once.
    """
    most = LOGITS_BYTES[streamed.device.type] // (streamed.skeleton.vocab_size * 8)
    step = max(1, min(batches.sequences.most, most))  # more positions a model may not have
    held, wanted = list[Tensor](), list[Wanted]()
    count = 0
    with streamed.head() as head:
        for number, states in enumerate(chunks):
            interrupts.check()
            here = batches.wanted(number)
            distinct, rows = np.unique(here.places, return_inverse=True)
            held.append(states.flatten(0, 1)[torch.from_numpy(distinct).to(states.device)])
            wanted.append(here._replace(places=rows + count))
            count += len(distinct)
            last = number == len(batches) - 1
            if count < step and not last:
                continue
            rows_held = torch.cat(held)
            all_wanted = Wanted(*(np.concatenate(parts) for parts in zip(*wanted, strict=True)))
            end = count if last else count // step * step
            for begin in range(0, end, step):
                inside = (all_wanted.places >= begin) & (all_wanted.places < begin + step)
                some = Wanted(*(part[inside] for part in all_wanted))
                _answer(
                    head(rows_held[begin : begin + step]), some._replace(places=some.places - begin), logprobs, greedy
                )
            rest = all_wanted.places >= end
            left = Wanted(*(part[rest] for part in all_wanted))
            held, wanted, count = [rows_held[end:]], [left._replace(places=left.places - end)], count - end


def _answer(logits: Tensor, wanted: Wanted, logprobs: NDArray[np.float64], greedy: NDArray[np.bool_]) -> None:
    """Adds log p of each of the tokens under logits (positions, vocab), computed in float32, to its request's."""
    logits = logits.float()
    places, tokens = (torch.from_numpy(part).to(logits.device) for part in (wanted.places, wanted.tokens))
    found = (logits[places, tokens] - logits.logsumexp(-1)[places]).double()
    np.add.at(logprobs, wanted.requests, found.cpu().numpy())
    np.logical_and.at(greedy, wanted.requests, (logits.argmax(-1)[places] == tokens).cpu().numpy())
