"""`prune` and `calibrate`: from arguments to a finished output, resumable at every moment.

describe   arguments -> JobSpec; only headers and texts are read, so a finished job is recognised at once
open       lock; is OUT finished, half done, or somebody else's?
prepare    skeleton, memory, tokens, disk: everything that can be refused is refused before anything is written
run        stage after stage: forward, prune, shard, journal
finish     index, side files, statistics, report; rename
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint, open_checkpoint, refuse_quantised
from streamprune.disk.claims import check_claims
from streamprune.disk.hub import resolve_model
from streamprune.disk.lock import Lock
from streamprune.disk.packed import is_packed
from streamprune.disk.state import (
    differences_of,
    file_digest,
    find_finished,
    find_unfinished,
    lock_of,
    report_fields,
    statistics_of,
)
from streamprune.errors import CheckpointError, CorruptStateError, StateError, UnsupportedError, UsageError
from streamprune.methods.recipes import ALLOCATIONS, check_damping, check_fp8, check_propagate, check_tune, make_recipe
from streamprune.process import interrupts
from streamprune.process.memory import peak_resident_bytes
from streamprune.progress import ProgressCallback, no_progress
from streamprune.pruning.checks import check_aims, check_amount, check_choices, check_given, check_places
from streamprune.pruning.report import notes_of
from streamprune.pruning.spec import Calibration, JobSpec

if TYPE_CHECKING:
    from streamprune.pruning.run import Run

DEFAULT_SAMPLES = 128

MOST_TOKENS = 1 << 27
"""Calibration tokens of a job; their ids alone take a GiB then."""


@dataclass(frozen=True)
class JobResult:
    """What a job came to. `report` is what `streamprune.json` says; `seconds` and `peak_rss_bytes` are the job's, over
    all runs it took, or this call's when it was up to date already."""

    status: str
    """"done" or "up-to-date"."""
    out: Path
    recipe: str | None
    sparsity: float | None
    """Pruned weights over all weights of the pruned linears."""
    seconds: float
    peak_rss_bytes: int
    report: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """What is to be told of it, each a sentence: what was left behind, fallbacks."""


def prune(
    model: str | Path, out: str | Path, *,
    sparsity: float | None = None, pattern: str | None = None,
    method: str = "swiftprune", score: str | None = None, selector: str | None = None,
    refit: str | None = None, damping: str | float | None = None, allocate: str = "uniform",
    quantize: str | None = None, fp8_scale: str | None = None, fp8_rounding: str | None = None,
    tune: str | None = None, tune_epochs: int | None = None, tune_lr: float | None = None,
    calib: str | Path | None = None, samples: int = DEFAULT_SAMPLES, seqlen: int | None = None, seed: int = 0,
    text_field: str = "text", bos: str = "auto", expert_stats: str = "weighted", expert_tokens: int = 64,
    stats: str | Path | None = None, save_stats: str | Path | None = None,
    only: str | None = None, skip: str | None = None, propagate: str | None = None,
    device: str = "auto", dtype: str = "auto", backend: str = "auto",
    max_ram: int | None = None, max_vram: int | None = None, work: str | Path | None = None,
    follow_links: bool = False, allow_zeros: bool = False, restart: bool = False, trust_remote_code: bool = False,
    progress: ProgressCallback = no_progress,
) -> JobResult:  # fmt: skip
    """Prunes the checkpoint `model` (a folder or a hub name) into the folder `out`.

    Exactly one of `sparsity` (share of each row, 0 ≤ S < 1) and `pattern` ("N:M") says how much goes; `allocate` shares
    a sparsity out by layer ("owl", "error"), from statistics that are gathered first. `method` names a recipe
    (methods/recipes.py), of which `score`, `selector` and `refit` can be exchanged; `damping` of a refit is "auto",
    "absolute" or a number relative to each feature's own power (methods/refits.py). `quantize` = "fp8" stores pruned
    linears in FP8 E4M3, with scales and rounding as `fp8_scale` and `fp8_rounding` say (methods/fp8.py). `tune` =
    "block" then tunes each layer as a whole, for `tune_epochs` at a rate of `tune_lr` (methods/tuning.py). `propagate`
    says whose outputs the next layer is calibrated on: the "dense" model's, the "pruned" one's, or for a refit
    and `tune` "asymmetric", both: it aims at what the dense model makes of its own inputs (methods/gram.py); None is
    the recipe's own choice (recipes.Recipe.propagate). Statistics come from
    `samples` windows of `seqlen` tokens of `calib` (default: a built-in text; default length min(2048, the model's
    limit)), or from the file `stats`. `calib` is a file, a folder or a pattern of files, of whose records (JSON,
    Parquet …) `text_field` is read; `bos` says whether windows begin with a BOS token ("auto": where the tokenizer adds
    one by itself, "always", "never"). Tokens count for an expert as the routing weights them, or
    with `expert_stats` = "routed" all alike; one that sees fewer than `expert_tokens` goes by what all see. `backend`
    chooses the kernels that prune: Numba on the CPU, Torch elsewhere, unless it says "numba" or "torch". `max_ram` and
    `max_vram` (of a GPU) are in bytes. `follow_links` carries side files that are links out of the checkpoint;
    `allow_zeros` prunes linears that hold nothing but zeros, too (model/zeros.py).
    Running the same job again resumes it, or finds it done. Raises the errors of streamprune.errors.
    """
    recipe = make_recipe(method, score, selector, refit, quantize, tune)
    epochs, rate = check_tune(recipe, tune_epochs, tune_lr)
    scale, rounding = check_fp8(recipe, fp8_scale, fp8_rounding)
    if damping is not None and not recipe.needs_gram:
        raise UsageError("--damping is for a refit, and this recipe has none; see --refit")
    check_aims(recipe, stats, samples)
    check_amount(sparsity, pattern)
    if allocate not in ALLOCATIONS:
        raise UsageError(f"--allocate {allocate}: choose {', '.join(ALLOCATIONS)}")
    if allocate != "uniform" and pattern is not None:
        raise UsageError(
            f"--allocate {allocate} shares out a --sparsity; --pattern {pattern} says what each linear keeps"
        )
    propagation = check_propagate(recipe, propagate)
    calibrates = calib is not None or save_stats is not None or propagation != "dense"
    check_given(stats, calibrates, expert_stats, expert_tokens)
    check_choices(backend, expert_stats, expert_tokens)
    checkpoint = _open_model(model, follow_links)
    needs_pass = stats is None and (
        recipe.needs_statistics or recipe.aims or save_stats is not None or propagation == "pruned"
        or allocate != "uniform"
    )  # fmt: skip
    known = Path(stats) if stats is not None else statistics_of(Path(out)) if allocate != "uniform" else None
    calibration = _describe_calibration(checkpoint, calib, samples, seqlen, seed, text_field, bos)
    spec = JobSpec(
        verb="prune", model=checkpoint.fingerprint(), recipe=recipe, sparsity=sparsity, pattern=pattern,
        only=only, skip=skip, propagate=propagation, calibration=calibration if needs_pass else None,
        stats=_stats_digest(Path(stats)) if stats is not None else None, device=device, dtype=dtype, backend=backend,
        damping=check_damping("auto" if damping is None else damping) if recipe.needs_gram else None,
        allocate=None if allocate == "uniform" else allocate, fp8_scale=scale, fp8_rounding=rounding,
        tune_epochs=epochs, tune_lr=rate, expert_stats=expert_stats, expert_tokens=expert_tokens,
        source=checkpoint.path, out=Path(out), stats_path=known,
        max_ram=max_ram, max_vram=max_vram, save_stats=Path(save_stats) if save_stats is not None else None,
        work=Path(work) if work is not None else None, restart=restart, trust_remote_code=trust_remote_code,
        content=checkpoint.content, allow_zeros=allow_zeros,
    )  # fmt: skip
    return _carry_out(spec, checkpoint, progress)


def calibrate(
    model: str | Path, out: str | Path, *,
    calib: str | Path | None = None, samples: int = DEFAULT_SAMPLES, seqlen: int | None = None, seed: int = 0,
    text_field: str = "text", bos: str = "auto", expert_stats: str = "weighted", expert_tokens: int = 64,
    device: str = "auto", dtype: str = "auto", backend: str = "auto",
    max_ram: int | None = None, max_vram: int | None = None, work: str | Path | None = None,
    allow_zeros: bool = False, restart: bool = False, trust_remote_code: bool = False,
    progress: ProgressCallback = no_progress,
) -> JobResult:  # fmt: skip
    """Gathers the statistics of every linear's input into the file `out`, for `prune(..., stats=out)`.

    Arguments and errors as for `prune`.
    """
    check_choices(backend, expert_stats, expert_tokens)
    checkpoint = _open_model(model)
    spec = JobSpec(
        verb="calibrate", model=checkpoint.fingerprint(), recipe=None, sparsity=None, pattern=None,
        only=None, skip=None, propagate="dense",
        calibration=_describe_calibration(checkpoint, calib, samples, seqlen, seed, text_field, bos),
        stats=None, device=device, dtype=dtype, backend=backend, damping=None,
        expert_stats=expert_stats, expert_tokens=expert_tokens, source=checkpoint.path, out=Path(out),
        max_ram=max_ram, max_vram=max_vram, work=Path(work) if work is not None else None,
        restart=restart, trust_remote_code=trust_remote_code, content=checkpoint.content, allow_zeros=allow_zeros,
    )  # fmt: skip
    return _carry_out(spec, checkpoint, progress)


def _open_model(model: str | Path, follow_links: bool = False) -> Checkpoint:
    checkpoint = open_checkpoint(resolve_model(str(model)), follow_links=follow_links)
    refuse_quantised(checkpoint)
    check_claims(checkpoint)
    if is_packed(checkpoint):
        raise UnsupportedError(f"{checkpoint.path}: the weights are packed; make them plain with `unpack`")
    return checkpoint


def _describe_calibration(
    checkpoint: Checkpoint, calib: str | Path | None, samples: int, seqlen: int | None, seed: int, text_field: str,
    bos: str,
) -> Calibration:  # fmt: skip
    from streamprune.calibration.texts import Text, check_bos, check_seqlen, default_seqlen

    text = Text(Path(calib) if calib is not None else None, text_field)
    check_bos(bos)
    if samples * (seqlen or 2048) > MOST_TOKENS:
        raise UsageError(f"--samples {samples} is more than memory should hold; {MOST_TOKENS} tokens are the limit")
    if samples < 1 or seed < 0:
        raise UsageError("--samples must be at least 1, --seed not negative")
    length = seqlen if seqlen is not None else default_seqlen(checkpoint.config)
    check_seqlen(length, checkpoint.config)
    return Calibration(text.path, text.digest(), samples, length, seed, text_field, bos)


def _stats_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as e:
        raise UsageError(f"--stats {path}: cannot be read ({e.strerror}); make it with `calibrate`") from e


def _carry_out(spec: JobSpec, checkpoint: Checkpoint, progress: ProgressCallback) -> JobResult:
    begun = time.perf_counter()
    check_places(spec, checkpoint)
    durable.make_folder(spec.out.absolute().parent)
    with Lock(lock_of(spec.out)):
        finished = find_finished(spec) if spec.verb == "prune" else _find_statistics(spec)
        if finished is not None:
            if spec.verb == "calibrate":
                _clear_rest(spec)
            _check_saved(spec)
            _drop_own_statistics(spec)
            took = time.perf_counter() - begun
            return replace(_result(spec, finished, "up-to-date"), seconds=took, peak_rss_bytes=peak_resident_bytes())
        unfinished = find_unfinished(spec)
        if unfinished is not None and unfinished[0].is_complete:
            _check_saved(spec)
            unfinished[0].publish()
            _drop_own_statistics(spec)
            return _result(spec, unfinished[1], "done")
        before = 0.0
        if spec.allocate is not None and spec.stats is None and spec.stats_path is not None:
            before = _gather(spec, spec.stats_path, checkpoint, progress)
        from streamprune.pruning.run import Run

        prepared = Run(spec, checkpoint, unfinished, progress, before)
        with interrupts.work(), prepared as run:
            report = _discard_on_bad_input(run, lambda: run.work(time.perf_counter() - begun))
        _drop_own_statistics(spec)
        return _result(spec, report, "done")


def _gather(spec: JobSpec, path: Path, checkpoint: Checkpoint, progress: ProgressCallback) -> float:
    """Makes the statistics that a prune job's `allocate` goes by, unless they are there; returns the seconds it took.

    Raises StateError where those of another job are there, which --restart throws away.
    """
    if spec.restart:
        durable.remove(path)
    job = replace(
        spec, verb="calibrate", recipe=None, sparsity=None, pattern=None, only=None, skip=None, propagate="dense",
        damping=None, allocate=None, fp8_scale=None, fp8_rounding=None, tune_epochs=None, tune_lr=None,
        stats_path=None, save_stats=None, out=path,
    )  # fmt: skip
    try:
        return _carry_out(job, checkpoint, progress).seconds
    except StateError as e:
        what = str(e).rpartition("; ")[0]
        raise StateError(f"{what}; throw them away with --restart, or choose another OUT") from e


def _drop_own_statistics(spec: JobSpec) -> None:
    """Removes what was gathered for `allocate` alone."""
    if spec.allocate is not None and spec.stats is None and spec.stats_path is not None:
        durable.remove(spec.stats_path)


def _clear_rest(spec: JobSpec) -> None:
    """`calibrate` makes its one file before it removes its state: a crash in between is mended here."""
    try:
        rest = find_unfinished(spec)
    except (StateError, CorruptStateError):
        return  # somebody else's
    if rest is not None:
        rest[0].discard()


def _find_statistics(spec: JobSpec) -> dict[str, Any] | None:
    """As find_finished, for the one file that `calibrate` makes."""
    if not spec.out.exists() and not spec.out.is_symlink():
        return None
    from streamprune.calibration.statistics_header import StatisticsHeader

    try:
        there = StatisticsHeader(spec.out).calibration
    except (UsageError, CorruptStateError) as e:
        raise StateError(f"{spec.out} exists and is not a statistics file; choose another name or move it away") from e
    if there.get("job") is None:
        raise StateError(f"{spec.out} was made by prune --save-stats; choose another name or remove it")
    if differences := differences_of(spec, there):
        raise StateError(f"{spec.out} holds statistics of another job: {differences}; choose another name or remove it")
    return {"recipe": None, "sparsity": None, "seconds": 0.0, "peak_rss_bytes": 0}


def _discard_on_bad_input(run: Run, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Unfinished work is kept for a resume, except when the input's content is at fault: a disk may come back."""
    try:
        return work()
    except (CheckpointError, UnsupportedError, UsageError) as e:
        if not isinstance(e.__cause__, OSError):
            run.discard()
        raise


def _check_saved(spec: JobSpec) -> None:
    if spec.save_stats is not None and not spec.save_stats.is_file():
        raise UsageError(f"{spec.out} is finished, its statistics are gone: make {spec.save_stats} with `calibrate`")


def _result(spec: JobSpec, report: Mapping[str, Any], status: str) -> JobResult:
    number, nothing = (int, float), type(None)
    name, sparsity, seconds, peak = report_fields(
        spec.out, report, recipe=(str, nothing), sparsity=(*number, nothing), seconds=number, peak_rss_bytes=int
    )
    notes = (*spec.notes, *(notes_of(report) if status == "done" else ()))
    return JobResult(status, spec.out, name, sparsity if spec.recipe else None, seconds, peak, report, notes)
