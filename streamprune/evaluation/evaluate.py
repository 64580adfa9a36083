"""`evaluate`: perplexity of a model that may be far larger than memory, streamed layer by layer as in prune.

The text is cut into windows of N tokens without overlap; a shorter rest is dropped. In each window the N − 1 tokens
after the first are predicted, and the first one as well if the model's tokenizer begins texts with a BOS token
(calibration/windows.py). Perplexity is exp of the mean negative log-likelihood over all predicted tokens. The head is
applied to a few positions at a time, so that logits take at most LOGITS_BYTES, however large the vocabulary.

With a reference, the layers of the reference are streamed first, then those of the model, and then both heads are
applied to the same positions.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from streamprune.calibration.texts import Text, check_bos, check_seqlen, default_seqlen
from streamprune.calibration.windows import Source, Windows, cut_windows, tokens_digest
from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.claims import check_claims
from streamprune.disk.hub import resolve_model
from streamprune.disk.lock import Lock
from streamprune.disk.places import cache_folder
from streamprune.disk.quantised import computable
from streamprune.disk.room import SLACK_BYTES, check_room
from streamprune.disk.scratch import ScratchTokens
from streamprune.errors import LockedError, UsageError
from streamprune.evaluation.one_model import Run, disk_bytes
from streamprune.evaluation.result import Evaluation, check_finite, compared, perplexity
from streamprune.evaluation.two_models import (
    Divergence,
    Subject,
    check_reference,
    compare_heads,
    lay_out_two,
    open_reference,
)
from streamprune.model.budget import Layout, layout_for
from streamprune.model.decoded import maps_of
from streamprune.model.device import compute_dtype, exact_products, resolve_device
from streamprune.model.loader import WeightLoader
from streamprune.model.passes import Batches, Dealt, out_of_memory_named
from streamprune.model.skeleton import build_skeleton, stored_dtype
from streamprune.model.streamed import StreamedModel
from streamprune.model.tracing import traced
from streamprune.process import interrupts
from streamprune.process.memory import give_back_free_memory, peak_resident_bytes
from streamprune.process.ranks import Ranks
from streamprune.process.share import Share
from streamprune.process.torchrun import joined
from streamprune.process.versions import versions
from streamprune.progress import Progress, ProgressCallback, no_progress
from streamprune.settings import Resources

LOGITS_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
"""Memory for the float32 logits of one call of the head and a copy; larger on a GPU, which needs more work per call."""

_RESOURCES = Resources()


@exact_products()
def evaluate(
    model: str | Path, text: str | Path, *, reference: str | Path | None = None, seqlen: int | None = None,
    windows: int | None = None, text_field: str = "text", bos: str = "auto", resources: Resources = _RESOURCES,
    trust_remote_code: bool = False, progress: ProgressCallback = no_progress,
) -> Evaluation:  # fmt: skip
    """Perplexity of `model` on the file `text` in windows of `seqlen` tokens (default min(2048, model's limit)).

    With `reference`, a model with the same tokenizer, also the distance between the predictions of the two, see
    Evaluation. `windows` limits the number of windows, from the beginning of the text. `text` may also be a folder or
    a pattern of files; in records (JSON, Parquet), `text_field` is read. `bos` says whether windows begin with a BOS
    token (calibration.windows.Source). Activations are kept in a folder of their own below `resources.work` (default:
    the user's cache folder), which is removed at the end. Raises the errors of streamprune.errors.
    """
    with joined() as ranks:
        return _evaluate(
            str(model), Text(Path(text), text_field, "--text"), reference, seqlen, windows, bos, resources,
            trust_remote_code, progress, ranks,
        )  # fmt: skip


def _evaluate(
    model: str, named: Text, reference: str | Path | None, seqlen: int | None, windows: int | None, bos: str,
    resources: Resources, trust_remote_code: bool, progress: ProgressCallback, ranks: Ranks,
) -> Evaluation:  # fmt: skip
    begun = time.perf_counter()
    checkpoint = computable(open_checkpoint(resolve_model(model)))
    check_claims(checkpoint)
    length = seqlen if seqlen is not None else default_seqlen(checkpoint.config)
    named.files()
    check_bos(bos)
    if windows is not None and windows < 1:
        raise UsageError("--windows must be at least 1")
    check_seqlen(length, checkpoint.config)
    dense = open_reference(reference, length) if reference is not None else None
    target = resolve_device(resources.device)
    checkpoints = [dense, checkpoint] if dense else [checkpoint]
    subjects = [subject_of(c, resources.dtype, target, trust_remote_code) for c in checkpoints]
    vocabulary = subjects[-1].skeleton.vocab_size
    source = Source(named, checkpoint.path, checkpoint.config, vocabulary, bos, trust_remote_code)
    with (
        interrupts.work(),
        _scratch(resources.work_folder or cache_folder()) as folder,
        ScratchTokens(folder) as ids,
        ExitStack() as stack,
        out_of_memory_named(target),
    ):
        cut = cut_windows(source, length, ids, windows)
        if dense:
            check_reference(dense, subjects[0], subjects[1], source, cut, folder)
        layouts, keep = _lay_out(subjects, cut.shape, target, resources.ram, resources.vram)
        same = {"model": " ".join(c.content() for c in checkpoints), "device": target.type}
        same |= {"dtype": " ".join(str(subject.dtype).removeprefix("torch.") for subject in subjects)}
        share, layouts = _shared(ranks, cut, same, layouts)
        runs = []
        for c, subject, layout in zip(checkpoints, subjects, layouts, strict=True):
            loader = stack.enter_context(WeightLoader(stack.enter_context(maps_of(c)), target))
            place = folder / "reference" if c is dense else folder
            durable.make_folder(place)
            runs.append(Run(subject, loader, place, layout, keep=keep, is_reference=c is dense))
        if states := disk_bytes(runs, share.own_windows, cut.shape[1]):
            check_disk(folder.parent, states)
        nats, apart = _of_all(share, *_stream(runs, Dealt(Batches(cut, share.batch), share), progress))
    tokens = len(cut) * (cut.shape[1] - 1)
    nll = check_finite(float(nats.sum()) / tokens, checkpoint)
    found = Evaluation(
        perplexity(nll), nll, tokens, len(cut), length, time.perf_counter() - begun, peak_resident_bytes(),
        bos=cut.has_bos, replaced=named.tally.replaced, window_nll=tuple((nats / (cut.shape[1] - 1)).tolist()),
    )  # fmt: skip
    return compared(found, apart, checkpoint, dense) if apart and dense else found


def _shared(
    ranks: Ranks, cut: Windows, same: Mapping[str, str], layouts: Sequence[Layout]
) -> tuple[Share, list[Layout]]:  # fmt: skip
    """This rank's share of the windows, and layouts that all ranks can follow. `same` has to be so on all of them.

    Raises UsageError if ranks are given other models or texts, or if there are fewer batches than ranks.
    """
    batch = layouts[0].batch
    if ranks.size > 1:
        mine = {**same, "text": tokens_digest(cut), "seqlen": cut.shape[1], **versions()}
        ranks.agreed(lambda: mine, lambda found: found)
        batch = min(ranks.gather(batch))
        group = min(chain(*ranks.gather([layout.group for layout in layouts])))
        layouts = [replace(layout, batch=batch, group=group) for layout in layouts]
    share = Share(ranks, len(cut), batch, layouts[0].group)
    share.check("a longer text")
    return share, list(layouts)


def _of_all(share: Share, nats: Tensor, apart: Divergence | None) -> tuple[Tensor, Divergence | None]:
    """What _stream has found for the windows of all ranks, in the order of the text."""
    if share.ranks.size == 1:
        return nats, apart
    sizes = [share.size(number) for number in share.numbers()]
    figures = [nats] if apart is None else [nats, apart.reference_nll, apart.kl]
    batches = zip(share.numbers(), *(torch.split(figure, sizes) for figure in figures), strict=True)
    told = share.ranks.gather((list(batches), apart.agreed if apart else 0))
    ordered = sorted(chain(*(found for found, _ in told)), key=lambda found: found[0])
    whole = [torch.cat(parts) for parts in list(zip(*ordered, strict=True))[1:]]
    if apart is None:
        return whole[0], None
    return whole[0], Divergence(whole[0], whole[1], sum(agreed for _, agreed in told), whole[2])


def subject_of(checkpoint: Checkpoint, dtype: str, target: torch.device, trust_remote_code: bool) -> Subject:
    """The model, and what it is computed in on `target`. Raises UsageError for a `dtype` that is none."""
    compute = compute_dtype(dtype, stored_dtype(checkpoint), target)
    skeleton = build_skeleton(checkpoint, compute, trust_remote_code=trust_remote_code)
    return Subject(traced(checkpoint, skeleton, compute), compute)


def _lay_out(
    subjects: list[Subject], shape: tuple[int, int], target: torch.device, max_ram: int | None, max_vram: int | None
) -> tuple[list[Layout], bool]:
    """The layout of each model for windows of `shape`, and whether resident states stay on the device for the heads."""
    samples, length = shape
    if len(subjects) == 1:
        one = subjects[0]
        return [layout_for(one.skeleton, length, samples, one.dtype, target, max_ram, max_vram, head=True)], True
    first, second, keep = lay_out_two(
        subjects[0], subjects[1], length, samples, target, max_ram, max_vram, LOGITS_BYTES[target.type]
    )
    return [first, second], keep


def _stream(runs: list[Run], batches: Sequence[Tensor], progress: ProgressCallback) -> tuple[Tensor, Divergence | None]:
    """Runs all layers, one model after the other, then the heads.

    Returns the summed −log p of each window in nats, (windows,) float64, and with two models how far they are apart.
    """
    steps = [(run, stage) for run in runs for stage in run.stages[:-1]]
    for done, (run, stage) in enumerate(steps, 1):
        interrupts.check()
        at = time.perf_counter()
        run.do(stage, batches, last=run is runs[-1])
        if stage is run.stages[-2] and len(runs) > 1:
            run.make_room()
        progress(Progress(run.name_of(stage), done, len(steps) + 1, time.perf_counter() - at))
    at = time.perf_counter()
    for run in runs:
        if not run.streamed.loader.copies:
            run.streamed.loader.expect(run.stages[-1].tensors)
        run.check(run.stages[-1])
    states = [run.last_states() for run in runs]
    apart = None
    if len(runs) == 1:
        nats = _loss(runs[0].streamed, batches, states[0])
    else:
        streamed = runs[1].streamed
        pairs = zip(*states, strict=True)
        apart = compare_heads(runs[0].streamed, streamed, pairs, batches, LOGITS_BYTES[streamed.device.type])
        nats = apart.nll
    for run in runs:
        run.streamed.loader.release(run.stages[-1].tensors)
    give_back_free_memory()
    progress(Progress("head" if len(runs) == 1 else "heads", len(steps) + 1, len(steps) + 1, time.perf_counter() - at))
    return nats, apart


def _loss(streamed: StreamedModel, batches: Sequence[Tensor], chunks: Iterator[Tensor]) -> Tensor:
    """Summed −log p of each window in nats, (windows,) float64, from the states after the last layer."""
    seqlen = batches[0].shape[1]  # never more positions per call, which some models do not support
    step = max(1, min(seqlen, LOGITS_BYTES[streamed.device.type] // (streamed.skeleton.vocab_size * 8)))
    windows = []
    with streamed.head() as head:
        for states, ids in zip(chunks, batches, strict=True):
            flat = states[:, :-1].reshape(-1, states.shape[-1])
            wanted = ids[:, 1:].reshape(-1)
            parts = zip(torch.split(flat, step), torch.split(wanted, step), strict=True)
            found = [_nll(head(some), ids_of_some) for some, ids_of_some in parts]
            windows.append(torch.cat(found).view(len(ids), -1).sum(1).cpu())
    return torch.cat(windows)


def _nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """−log p of the tokens `wanted` (tokens,) given logits (tokens, vocab): computed in float32, (tokens,) float64."""
    return torch.nn.functional.cross_entropy(logits.float(), wanted.to(logits.device), reduction="none").double()


def check_disk(work: Path, need: int) -> None:
    """Raises ResourceError unless `need` bytes of hidden states, and SLACK_BYTES, have room in the folder `work`."""
    advice = "free some, or name another folder with --work"
    check_room([(work, need + SLACK_BYTES)], advice, detail=" for activations")


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """A folder for this process below `work`, removed at the end; removes those that killed processes left behind."""
    durable.make_folder(work)
    for old in work.glob("eval-*.lock"):
        if not re.fullmatch(r"eval-[0-9]+-[0-9a-f]+", old.stem):
            continue
        try:
            with Lock(old):
                durable.clear(old.with_suffix(""))
        except LockedError:
            continue
    folder = work.absolute() / f"eval-{os.getpid()}-{time.time_ns():x}"
    with Lock(folder.with_name(folder.name + ".lock")):
        durable.make_folder(folder)
        try:
            yield folder
        finally:
            durable.clear(folder)
