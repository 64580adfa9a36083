"""`evaluate`: perplexity of a model that may be far larger than memory, layer by layer as prune does it.

The whole text is cut into windows of N tokens without overlap, the rest dropped; in each window the N − 1 tokens after
the first are predicted, and the first one, too, where the model's tokenizer puts a BOS token before a text
(calibration/windows.py). Perplexity is exp of the mean negative log-likelihood of all of them. The head works on a few
positions at a time, so that logits stay within LOGITS_BYTES however large the vocabulary.

With a reference, its layers have their turn first; then the model's; then both heads work on the same positions.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.calibration.texts import Text, check_bos, check_seqlen, default_seqlen
from streamprune.calibration.windows import Source, cut_windows
from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.claims import check_claims
from streamprune.disk.float_quantized import read_scheme
from streamprune.disk.hub import resolve_model
from streamprune.disk.lock import Lock
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.places import cache_folder
from streamprune.disk.scratch import ScratchTokens
from streamprune.errors import CheckpointError, LockedError, ResourceError, UsageError
from streamprune.evaluation.one_model import Run, disk_bytes
from streamprune.evaluation.two_models import (
    Divergence,
    Subject,
    check_reference,
    compare_heads,
    lay_out_two,
    open_reference,
)
from streamprune.model.budget import Layout, layout_for
from streamprune.model.device import compute_dtype, exact_products, resolve_device
from streamprune.model.loader import WeightLoader
from streamprune.model.passes import Batches, out_of_memory_named
from streamprune.model.skeleton import build_skeleton, stored_dtype
from streamprune.model.streamed import StreamedModel
from streamprune.process import interrupts
from streamprune.process.memory import format_bytes, give_back_free_memory, peak_resident_bytes
from streamprune.progress import Progress, ProgressCallback, no_progress
from streamprune.settings import Resources

LOGITS_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
"""Memory of one call's logits in float32, twice: a device is kept busy by more positions at a time."""

_RESOURCES = Resources()


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. `tokens` are the predicted ones; `nll` is their mean, in nats.

    What compares with a reference is None without one.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float
    peak_rss_bytes: int
    kl: float | None = None
    """KL(p_reference ‖ p_model), nats per predicted token."""
    kl_stderr: float | None = None
    """Standard error of `kl` over windows; None also where there is one window only."""
    top1_agreement: float | None = None
    """Share of the predicted tokens where both models' most likely token is the same, 0 to 1."""
    reference_perplexity: float | None = None
    bos: bool = False
    """Whether windows began with a BOS token, so that the first token after it is predicted, too."""
    replaced: int = 0
    """Bytes of the text that were no characters, and became U+FFFD."""
    window_nll: tuple[float, ...] = ()
    """The mean nats of each window, in the order of the text: what a paired comparison of two models needs."""

    def to_json(
        self, model: str | Path, text: str | Path, reference: str | Path | None, *, by_window: bool
    ) -> dict[str, Any]:
        """All of it, after what was evaluated; without a reference, what compares with one is left out."""
        compares = {"kl", "kl_stderr", "top1_agreement", "reference_perplexity"}
        left_out = (compares if reference is None else set()) | (set() if by_window else {"window_nll"})
        given = {"model": str(model), "text": str(text)} | ({"reference": str(reference)} if reference else {})
        return given | {k: v for k, v in asdict(self).items() if k not in left_out}


@exact_products()
def evaluate(
    model: str | Path, text: str | Path, *, reference: str | Path | None = None, seqlen: int | None = None,
    windows: int | None = None, text_field: str = "text", bos: str = "auto", resources: Resources = _RESOURCES,
    trust_remote_code: bool = False, progress: ProgressCallback = no_progress,
) -> Evaluation:  # fmt: skip
    """Perplexity of `model` on the file `text` in windows of `seqlen` tokens (default min(2048, model's limit)).

    With `reference`, a model of the same tokenizer, also how far the predictions are from its own: see Evaluation.
    `windows` takes only so many, from the text's beginning. `text` is also a folder or pattern of files; of records
    (JSON, Parquet) `text_field` is read. `bos` says whether windows begin with a BOS token (calibration.Source).
    Activations are kept in a folder of their own below `resources.work` (default: the user's cache folder) and removed
    at the end. Raises the errors of streamprune.errors.
    """
    begun = time.perf_counter()
    checkpoint = open_checkpoint(resolve_model(str(model)))
    read_scheme(checkpoint)
    check_claims(checkpoint)
    named = Text(Path(text), text_field, "--text")
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
        runs = []
        for c, subject, layout in zip(checkpoints, subjects, layouts, strict=True):
            loader = stack.enter_context(WeightLoader(stack.enter_context(ShardMaps(c)), target))
            place = folder / "reference" if c is dense else folder
            durable.make_folder(place)
            runs.append(Run(subject, loader, place, layout, keep=keep, is_reference=c is dense))
        if states := disk_bytes(runs, cut.size):
            check_disk(folder.parent, states + (64 << 20))
        nats, apart = _stream(runs, Batches(cut, layouts[0].batch), progress)
    tokens = len(cut) * (cut.shape[1] - 1)
    nll = check_finite(float(nats.sum()) / tokens, checkpoint)
    found = Evaluation(
        _perplexity(nll), nll, tokens, len(cut), length, time.perf_counter() - begun, peak_resident_bytes(),
        bos=cut.has_bos, replaced=named.tally.replaced, window_nll=tuple((nats / (cut.shape[1] - 1)).tolist()),
    )  # fmt: skip
    return _compared(found, apart, checkpoint, dense) if apart and dense else found


def subject_of(checkpoint: Checkpoint, dtype: str, target: torch.device, trust_remote_code: bool) -> Subject:
    """The model, and what it is computed in on `target`. Raises UsageError for a `dtype` that is none."""
    compute = compute_dtype(dtype, stored_dtype(checkpoint), target)
    return Subject(build_skeleton(checkpoint, compute, trust_remote_code=trust_remote_code), compute)


def _lay_out(
    subjects: list[Subject], shape: tuple[int, int], target: torch.device, max_ram: int | None, max_vram: int | None
) -> tuple[list[Layout], bool]:
    """Each model's layout for windows of `shape`; and whether resident states stay on the device after the layers."""
    samples, length = shape
    if len(subjects) == 1:
        one = subjects[0]
        return [layout_for(one.skeleton, length, samples, one.dtype, target, max_ram, max_vram, head=True)], True
    first, second, keep = lay_out_two(
        subjects[0], subjects[1], length, samples, target, max_ram, max_vram, LOGITS_BYTES[target.type]
    )
    return [first, second], keep


def check_finite(value: float, checkpoint: Checkpoint) -> float:
    """`value`. Raises CheckpointError where it is NaN or infinite."""
    if not math.isfinite(value):
        raise CheckpointError(f"{checkpoint.path}: the model's predictions are not finite; try --dtype float32")
    return value


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def _compared(found: Evaluation, apart: Divergence, checkpoint: Checkpoint, dense: Checkpoint) -> Evaluation:
    """With what a reference adds."""
    reference_nll, kl = check_finite(apart.reference_nll / found.tokens, dense), float(apart.kl.mean())
    if not math.isfinite(kl):
        raise CheckpointError(f"{checkpoint.path}: its divergence from {dense.path} is not finite; try --dtype float32")
    return replace(
        found,
        kl=kl,
        kl_stderr=float(apart.kl.std()) / math.sqrt(found.windows) if found.windows > 1 else None,
        top1_agreement=apart.agreed / found.tokens,
        reference_perplexity=_perplexity(reference_nll),
    )


def _stream(runs: list[Run], batches: Sequence[Tensor], progress: ProgressCallback) -> tuple[Tensor, Divergence | None]:
    """All layers, one model after the other, then the heads; returns the nats of each window, (windows,) float64."""
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
    """Nats of each window (windows,) float64, from the states after the last layer."""
    seqlen = batches[0].shape[1]  # more positions a model may not have
    step = max(1, min(seqlen, LOGITS_BYTES[streamed.device.type] // (streamed.skeleton.vocab_size * 8)))
    windows = []
    with streamed.head() as head:
        for states, ids in zip(chunks, batches, strict=True):
            flat = states[:, :-1].reshape(-1, streamed.skeleton.hidden_size)
            wanted = ids[:, 1:].reshape(-1)
            parts = zip(torch.split(flat, step), torch.split(wanted, step), strict=True)
            found = [_nll(head(some), ids_of_some) for some, ids_of_some in parts]
            windows.append(torch.cat(found).view(len(ids), -1).sum(1).cpu())
    return torch.cat(windows)


def _nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """−log p of each of `wanted` (tokens,) under logits (tokens, vocab), computed in float32, (tokens,) float64."""
    return torch.nn.functional.cross_entropy(logits.float(), wanted.to(logits.device), reduction="none").double()


def check_disk(work: Path, need: int) -> None:
    """Raises ResourceError unless `need` bytes of hidden states have room in the folder `work`."""
    free = shutil.disk_usage(work).free
    if free < need:
        raise ResourceError(
            f"{work} has {format_bytes(free)} free, evaluation needs {format_bytes(need)} for activations; "
            "free some or name another folder with --work"
        )


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """A folder of this process's own below `work`, removed at the end; those of dead processes go too."""
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
