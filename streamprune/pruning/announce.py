"""What a prune job tells its user: at its start what it is about to do, at its end what can be done with OUT."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprune.disk import journal
from streamprune.disk.hub import hub_name, resolve_model
from streamprune.disk.report import REPORT
from streamprune.errors import CorruptStateError
from streamprune.process.memory import format_bytes
from streamprune.pruning.card import loader_of
from streamprune.pruning.spec import JobSpec

if TYPE_CHECKING:
    from streamprune.pruning.prepare import Prepared


def intentions(job: Prepared) -> list[str]:
    """What a prepared job is about to do, in a few lines: model, method, calibration, memory and disk."""
    setup, spec = job.setup, job.setup.spec
    model, target = setup.model, setup.target
    samples, length = (0, 1) if job.windows is None else job.windows.shape
    tensors = setup.checkpoint.tensors.values()
    lines = []
    if target is not None:
        chosen, layers = len(target.selected), len(model.layer_stages)
        lines += [
            f"{_named(spec.source)}: {setup.checkpoint.config.get('model_type')}, "
            f"{_many(sum(math.prod(t.shape) for t in tensors))} parameters, "
            f"{chosen} linear{'s' if chosen != 1 else ''} to prune in {layers} layer{'s' if layers != 1 else ''}",
            f"{target.recipe.name}, {amount_of(spec.fixed())}",
        ]
    lines.append(_calibration(job.setup.spec, samples, length, setup.propagate))
    peak, activations = _needs(job, samples, length)
    memory = f"about {format_bytes(peak)} of memory"
    if job.layout.nbytes and setup.device_name != "cpu":
        memory += f" and {format_bytes(job.layout.nbytes)} on the GPU"
    output = target.output_bytes if target is not None else 0
    disk = f"{format_bytes(output)} of disk for the output, "
    disk += f"{format_bytes(activations)} for activations meanwhile"
    windows = f", {job.layout.batch} windows at a time" if samples else ""
    lines.append(f"{setup.dtype_name} on {setup.device_name}{windows}; {memory}; {disk}")
    if job.records:
        lines.append(f"{len(job.records)} of {len(model.stages)} stages are done already")
    return lines


def _named(source: Path) -> str:
    hub = hub_name(source)
    return hub[0] if hub else str(source)


def _needs(job: Prepared, samples: int, length: int) -> tuple[int, int]:
    """(peak of memory, disk space of activations) of a job, bytes."""
    from streamprune.model.budget import streaming_bytes
    from streamprune.model.stages import Outline

    if type(job.setup.model) is Outline:
        return streaming_bytes(), 0
    from streamprune.pruning.memory import activation_bytes, memory_bytes

    peak, _, _ = memory_bytes(job.setup, job.layout, samples, length)
    return peak, activation_bytes(job.setup, job.layout, samples, length)


def _many(count: int) -> str:
    unit, word = next(((unit, word) for unit, word in ((1e9, "G"), (1e6, "M")) if count >= unit), (1e3, "k"))
    return f"{count / unit:.1f} {word}"


def _calibration(spec: JobSpec, samples: int, length: int, propagate: str) -> str:
    if samples and spec.calibration is not None:
        text = spec.calibration.path.name if spec.calibration.path is not None else "the built-in text"
        inputs = {"dense": "of the dense model", "pruned": "of the pruned layers"}.get(propagate, "of both models")
        share = spec.recipe.replace_tokens if spec.recipe else None
        random = f" ({100 * share:.4g} % of the tokens of every second one random)" if share else ""
        return f"calibrated on {samples} windows of {length} tokens of {text}{random}, with inputs {inputs}"
    if spec.stats_path is not None:
        return f"with the statistics in {spec.stats_path.name}"
    return "without calibration"


def amount_of(job: Mapping[str, Any]) -> str:
    """How much a job with these fixed fields prunes: `2:4`, `50 %`, `50 % shared out by owl`."""
    if job.get("pattern") is not None:
        return str(job["pattern"])
    sparsity = job.get("sparsity")
    share = f"{100 * sparsity:.4g} %" if isinstance(sparsity, int | float) else "nothing"
    return share + (f" shared out by {job['allocate']}" if job.get("allocate") else " of each row")


def next_steps(model: str, out: Path, job: Mapping[str, Any]) -> list[str]:
    """What can be done with the finished output `out` of the model that the user called `model`."""
    folder, expect = _as_argument(str(out)), job.get("pattern")
    recipe = f" --expect {expect}{',fp8' if job.get('quantize') == 'fp8' else ''}" if expect else ""
    return [
        f"measure it: python -m streamprune eval {folder} --text FILE --reference {_as_argument(model)}",
        f"look into it: python -m streamprune inspect {folder}{recipe}",
        f'load it: transformers.{_loader(out)}.from_pretrained({str(out)!r}, dtype="auto")',
    ]


def _as_argument(path: str) -> str:
    """A path for a shell, and as no option of the command that it is given to."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def _loader(out: Path) -> str:
    try:
        return loader_of(json.loads((out / "config.json").read_bytes()))
    except (OSError, ValueError):
        return loader_of({})


def what_is(model: str) -> str:
    """What was done to a model: `swiftprune, 2:4, 50.00 % of the weights in pruned linears`, or dense."""
    path = resolve_model(model) / REPORT
    if not path.is_file():
        return f"dense (it has no {REPORT})"
    try:
        report = journal.read_json(path, "report")
    except CorruptStateError:
        return f"its {REPORT} cannot be read"
    job, sparsity = report.get("job"), report.get("sparsity")
    if not isinstance(job, dict) or not isinstance(sparsity, int | float):
        return f"its {REPORT} says nothing of pruning"
    return f"{report.get('recipe')}, {amount_of(job)}, {100 * sparsity:.2f} % of the weights in pruned linears"
