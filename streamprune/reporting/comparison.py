"""What a page says of several OUTs side by side, and of what `eval` measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from streamprune.process.memory import format_bytes
from streamprune.reporting.evaluations import Measured
from streamprune.reporting.facts import Facts, plain
from streamprune.reporting.figures import Line, line_figure, short
from streamprune.reporting.markup import Content, Html, element, figure, joined, table
from streamprune.reporting.sections import METRICS, axis, seconds, sentence, times

_JOB = (
    "score", "selector", "refit", "tune", "quantize", "allocate", "damping", "fp8_scale", "fp8_rounding", "tune_epochs",
    "tune_lr", "replace_tokens", "only", "skip", "mtp", "expert_stats", "expert_tokens", "bos", "backend",
)  # fmt: skip
_CALIBRATION = ("text", "digest", "samples", "seqlen", "seed", "propagate")
"""Settings that may differ between models, in the report's `job` and in its `calibration`."""


def summary(models: Sequence[Facts], places: Sequence[str]) -> Html:
    """A line for each OUT, which leads to its section."""
    errors = ("held_out_error", "error", "error_fp8")
    shown = [metric for metric in errors if any(facts.has(metric) for facts in models)]
    rows: list[list[Content]] = [
        [
            element("a", facts.name, href=f"#{place}"), facts.recipe, facts.amount, f"{100 * facts.sparsity:.2f} %",
            *(_mean(facts, metric) for metric in shown), seconds(facts.seconds), format_bytes(facts.peak),
        ]
        for facts, place in zip(models, places, strict=True)
    ]  # fmt: skip
    head = ("model", "recipe", "asked for", "sparsity", *(METRICS[m][0] for m in shown), "time", "memory at most")
    about = "; errors are geometric means over layers and kinds" if shown else ""
    return table(f"Models{about}", head, rows)


def _mean(facts: Facts, metric: str) -> str:
    values = [value for value in facts.values(metric).values() if value > 0]
    return short(math.exp(sum(map(math.log, values)) / len(values))) if values else "–"


def differences(models: Sequence[Facts]) -> Html:
    """What differs: a line for each setting, source or version that is not the same of all models."""
    found = [_settings(facts) for facts in models]
    names = list(dict.fromkeys(name for settings in found for name in settings))
    rows: list[list[Content]] = []
    for name in names:
        values = [settings.get(name, "–") for settings in found]
        if len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        return element("p", "All were made with the same settings, from the same source.")
    return table("What differs", ("setting", *(facts.name for facts in models)), rows)


def _settings(facts: Facts) -> dict[str, str]:
    """What a job was told and what it was made with, as text."""
    report, job = facts.report, facts.job
    found = {"recipe": facts.recipe, "asked for": facts.amount}
    found |= {key.replace("_", " "): plain(job[key]) for key in _JOB if job.get(key) is not None}
    for section, keys in (("calibration", _CALIBRATION), ("resolved", ("dtype", "device", "batch")), ("versions", ())):
        values = report.get(section)
        if isinstance(values, dict):
            found |= {
                key: plain(value)
                for key, value in values.items()
                if value is not None and (key in keys or section == "versions")
            }
    for key, name in (("base_model", "source"), ("content", "source's content")):
        if report.get(key) is not None:
            found[name] = plain(report[key], 16 if key == "content" else 200)
    return found


def by_kind(models: Sequence[Facts]) -> Html:
    """The error that most models have, kind by kind: means over layers, and how they stand to the first model's."""
    for metric in ("held_out_error", "error", "error_fp8"):
        having = [facts for facts in models if facts.has(metric)]
        if len(having) > 1:
            break
    else:
        return joined(())
    first = _kind_means(having[0], metric)
    rows: list[list[Content]] = []
    for kind in dict.fromkeys(kind for facts in having for kind in facts.kinds):
        row: list[Content] = [kind]
        for facts in having:
            mean, against = _kind_means(facts, metric).get(kind), first.get(kind)
            ratio = f" ({mean / against:.3g} ×)" if facts is not having[0] and mean and against else ""
            row.append("–" if mean is None else short(mean) + ratio)
        rows.append(row)
    what = f"{sentence(METRICS[metric][0])[:-1]} by kind: geometric means over layers, and times {having[0].name}'s"
    return table(what, ("kind", *(facts.name for facts in having)), rows)


def _kind_means(facts: Facts, metric: str) -> dict[str, float]:
    by: dict[str, list[float]] = {}
    for (_, kind), value in facts.values(metric).items():
        if value > 0:
            by.setdefault(kind, []).append(math.log(value))
    return {kind: math.exp(sum(logs) / len(logs)) for kind, logs in by.items()}


def figures(models: Sequence[Facts]) -> Html:
    """The models' means by layer: of errors that several have, and of sparsities that are not all the same."""
    return element("div", *_figures(models), class_="figures")


def _figures(models: Sequence[Facts]) -> Iterator[Html]:
    for metric in ("held_out_error", "error", "error_fp8", "removed_score", "sparsity"):
        having = [facts for facts in models if any(facts.values(metric).values())]
        if metric == "removed_score" and len({plain(facts.job.get("score")) for facts in having}) > 1:
            continue  # of different scores
        lines = [_by_layer(facts, metric) for facts in having]
        values = {round(y, 3) for line in lines for y in line.ys}
        if len(lines) < 2 or (metric == "sparsity" and len(values) < 2):
            continue
        log = metric in ("held_out_error", "error", "error_fp8") and any(y > 0 for line in lines for y in line.ys)
        title = sentence(f"{METRICS[metric][0]} by layer")[:-1]
        about = sentence(f"{METRICS[metric][1]}; the mean over a layer's kinds")
        yield figure(line_figure(title, about, lines, x="layer", y=axis(metric), log=log), title, about)


def _by_layer(facts: Facts, metric: str) -> Line:
    by_layer: dict[int, list[float]] = {}
    for (layer, _), value in sorted(facts.values(metric).items()):
        by_layer.setdefault(layer, []).append(value)
    return Line(facts.name, list(by_layer), [times(metric) * sum(values) / len(values) for values in by_layer.values()])


def evaluations(measured: Sequence[Measured], models: Sequence[Facts], places: Sequence[str]) -> Iterator[Html]:
    """What was measured, a line for each file; those about one of the models lead to its section."""
    yield element("h2", "Measured with eval")
    if any("perplexity" in found.numbers for found in measured):
        yield _perplexities(measured, models, places)
    if any(found.tasks for found in measured):
        yield _tasks(measured, models, places)


def _name(found: Measured, models: Sequence[Facts], places: Sequence[str]) -> Content:
    for facts, place in zip(models, places, strict=True):
        if found.is_of(facts):
            return element("a", facts.name, href=f"#{place}")
    return plain(found.model)


def _perplexities(measured: Sequence[Measured], models: Sequence[Facts], places: Sequence[str]) -> Html:
    rows: list[list[Content]] = []
    for found in measured:
        of = found.numbers
        if "perplexity" in of:
            kl = short(of["kl"]) + (f" ± {of['kl_stderr']:.2g}" if "kl_stderr" in of else "") if "kl" in of else "–"
            agrees = f"{100 * of['top1_agreement']:.2f} %" if "top1_agreement" in of else "–"
            reference = f"{of['reference_perplexity']:.3f}" if "reference_perplexity" in of else "–"
            windows = f"{of['windows']:.0f} × {of['seqlen']:.0f}" if {"windows", "seqlen"} <= of.keys() else "–"
            rows.append([
                _name(found, models, places), f"{of['perplexity']:.3f}", kl, agrees, reference,
                found.reference or "–", found.text or "–", windows,
            ])  # fmt: skip
    head = ("model", "perplexity", "KL, nats a token", "same top token", "reference's perplexity", "reference", "text",
            "windows")  # fmt: skip
    return table("Perplexity, and distance from a reference", head, rows)


def _tasks(measured: Sequence[Measured], models: Sequence[Facts], places: Sequence[str]) -> Html:
    names = list(dict.fromkeys(name for found in measured for name in found.tasks))
    rows: list[list[Content]] = []
    for found in measured:
        if found.tasks:
            row: list[Content] = [_name(found, models, places)]
            for name in names:
                value, error = found.tasks.get(name, (None, None))
                spread = f" ± {error:.2g}" if error is not None else ""
                row.append("–" if value is None else f"{value:.4g}{spread}")
            rows.append(row)
    return table("Tasks", ("model", *names), rows)
