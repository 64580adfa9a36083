"""The end of a run, `finish`: merges the layers' statistics, and writes side files and the index beside the shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprune.calibration.statistics import StatisticsFile, merge_statistics
from streamprune.disk import durable, journal
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.float_quantized import configured
from streamprune.disk.quantised import PlainView
from streamprune.disk.report import CARD, file_digest
from streamprune.disk.shards import write_index
from streamprune.disk.state import JobState
from streamprune.errors import CorruptStateError
from streamprune.model.further import without_further
from streamprune.model.outline import to_json
from streamprune.model.stages import Outline
from streamprune.process.memory import peak_resident_bytes
from streamprune.pruning.card import card_of, kept_as
from streamprune.pruning.output import Output
from streamprune.pruning.records import Resolved, StageRecord
from streamprune.pruning.report import build_report, source_of
from streamprune.pruning.setup import Setup
from streamprune.pruning.spec import JobSpec
from streamprune.pruning.target import Target


def finish(
    setup: Setup, state: JobState, target: Target | None, output: Output | None, resolved: Resolved,
    given: StatisticsFile | None, records: Sequence[StageRecord], content: str,
    ranks: list[dict[str, Any]], startup: float,
    elsewhere: Callable[[], float],
) -> dict[str, Any]:  # fmt: skip
    """The last steps of a job whose stages are done: returns the report, and publishes OUT.

    `content`, `ranks` and `startup` as in report.py; `elsewhere` says how many seconds it took outside of stages.
    """
    spec, checkpoint = setup.spec, setup.checkpoint
    calibration = calibration_of(spec, resolved, given, setup.propagate)
    statistics = spec.save_stats if target else spec.out
    if statistics is not None:
        if given is None:
            save_statistics(statistics, spec, state, checkpoint, setup.model, records, calibration)
        else:  # those that were gathered for --allocate
            outline = to_json(without_further(setup.model))
            merge_statistics(statistics, [given.path], checkpoint.identity(), calibration, outline)
    files = []
    if target is not None and output is not None:
        card = card_of(spec, checkpoint, calibration, records)
        files = write_files(state, checkpoint, target, output, records, card)
    report = build_report(
        spec, resolved, calibration, records, files, source_of(checkpoint, content, target is not None),
        seconds=sum(r.seconds for r in records) + elsewhere(), startup=startup,
        peak=max(peak_resident_bytes(), *(r.peak for r in records)),
        dense=setup.model.dense if target else {}, shared=setup.model.shared if target else {},
        ranks=ranks,
    )  # fmt: skip
    if target is None:
        state.discard()
        return report
    journal.write_json(state.partial / "streamprune.json", "report", report)
    state.publish()
    return report


def calibration_of(spec: JobSpec, resolved: Resolved, given: StatisticsFile | None, propagate: str) -> dict[str, Any]:
    """The tokens that the statistics were gathered on, for reports and statistics files (JSON values)."""
    c = spec.calibration
    if c is None or given is not None:
        found = given.calibration if given else {}
        return {key: value for key, value in found.items() if key not in ("job", "content")}  # fields of `calibrate`
    return {
        "text": c.path.name if c.path else "built-in", "digest": c.digest, "samples": c.samples, "seqlen": c.seqlen,
        "seed": c.seed, "tokens": resolved.tokens, "dtype": resolved.dtype, "propagate": propagate,
        **({"replace_tokens": share} if spec.recipe and (share := spec.recipe.replace_tokens) else {}),
        **{key: value for key in ("bos", "replaced", "text_tokens") if (value := getattr(resolved, key)) is not None},
    }  # fmt: skip


def save_statistics(
    path: Path, spec: JobSpec, state: JobState, checkpoint: Checkpoint, model: Outline,
    records: Sequence[StageRecord], calibration: Mapping[str, Any],
) -> None:  # fmt: skip
    """Merges the layers' statistics into the file `path`. Raises CorruptStateError if one is missing or damaged."""
    parts = []
    for stage, record in zip(model.layer_stages, records[1:], strict=False):
        parts.append(state.layer_stats(stage.index))
        if not parts[-1].is_file() or file_digest(parts[-1]) != record.statistics:
            raise CorruptStateError(f"{parts[-1]} is missing or damaged; start again with --restart")
    job = {"job": spec.fixed(), "content": checkpoint.content()} if spec.verb == "calibrate" else {}
    merge_statistics(path, parts, checkpoint.identity(), {**calibration, **job}, to_json(without_further(model)))


def write_files(
    state: JobState, checkpoint: Checkpoint, target: Target, output: Output, records: Sequence[StageRecord], card: bytes
) -> list[dict[str, Any]]:
    """Writes side files, `card` in place of the source's model card, and an index if there are several shards.

    Returns name, bytes and xxh3_128 of every file of the output, shards included.
    """
    files = output.files(records)
    carried = checkpoint.side_files().carried
    aside = kept_as(carried)
    for name in carried:
        place = aside.get(name, name)
        if name == "config.json" and target.quantisation is not None:
            text = configured(checkpoint.config, target.not_quantised())
            size, digest = len(text), durable.replace_file(state.partial / name, text)
        elif name == "config.json" and isinstance(checkpoint, PlainView) and not target.kept:
            text = checkpoint.configuration()
            size, digest = len(text), durable.replace_file(state.partial / name, text)
        else:
            size, digest = durable.copy_file(checkpoint.path / name, state.partial / place)
        files.append({"name": place, "bytes": size, "xxh3_128": digest})
    files.append({"name": CARD, "bytes": len(card), "xxh3_128": durable.replace_file(state.partial / CARD, card)})
    if not output.has_index:
        return files
    where = {ref.name: ref.shard for stage in target.skeleton.stages for ref in output.part(stage).tensors}
    index = state.partial / "model.safetensors.index.json"
    digest = write_index(index, checkpoint.index_metadata, target.output_bytes, where)
    files.append({"name": index.name, "bytes": index.stat().st_size, "xxh3_128": digest})
    return files
