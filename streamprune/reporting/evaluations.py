"""What `eval --json` found, read from files: perplexity, distance from a reference, tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.errors import UsageError
from streamprune.reporting.facts import Facts, number, plain

_NUMBERS = ("perplexity", "kl", "kl_stderr", "top1_agreement", "reference_perplexity", "tokens", "windows", "seqlen")


@dataclass(frozen=True)
class Measured:
    """One file. `model`, `text` and `reference` are as they were named; `numbers` are of _NUMBERS."""

    path: Path
    model: str
    text: str | None
    reference: str | None
    numbers: Mapping[str, float]
    tasks: Mapping[str, tuple[float, float | None]]
    """"task: metric" -> value, standard error."""

    def is_of(self, facts: Facts) -> bool:
        """Whether the file is about this OUT: the same folder, or one of this name that has been moved."""
        named = Path(self.model)
        if named.is_dir() and facts.path.is_dir():
            return named.resolve() == facts.path.resolve()
        return named.name == facts.path.absolute().name


def read_measured(path: Path) -> Measured:
    """What a file says. Raises UsageError for one that `eval --json` did not write."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise UsageError(f"--eval {path}: cannot be read: {e.strerror}; make it with `eval --json > FILE`") from None
    except (ValueError, RecursionError):
        raise UsageError(f"--eval {path}: not JSON; make it with `eval --json > FILE`") from None
    if not isinstance(found, dict):
        found = {}
    numbers = {key: value for key in _NUMBERS if (value := number(found.get(key))) is not None}
    tasks = _scores(found["scores"]) if "scores" in found else _tasks(found.get("tasks", found.get("results")))
    model = found.get("model", found.get("model_name"))
    if not isinstance(model, str) or ("perplexity" not in numbers and not tasks):
        raise UsageError(f"--eval {path}: says nothing of a model; make it with `eval --json > FILE`")
    text, reference = (plain(value) if (value := found.get(key)) is not None else None for key in ("text", "reference"))
    return Measured(path, model, text, reference, numbers, tasks)


def _scores(found: Any) -> dict[str, tuple[float, float | None]]:
    """Of the list that `eval --tasks --json` writes; of a reference's scores, too, and of the differences."""
    tasks: dict[str, tuple[float, float | None]] = {}
    for score in found if isinstance(found, list) else ():
        if not isinstance(score, dict):
            continue
        name = _named(score.get("task"), score.get("metric"), score.get("filter"))
        for more, value, error in (
            ("", "value", "stderr"), (", the reference", "reference", "reference_stderr"),
            (", difference from it", "difference", "difference_stderr"),
        ):  # fmt: skip
            if (good := number(score.get(value))) is not None:
                tasks[name + more] = good, number(score.get(error))
    return tasks


def _named(task: object, metric: object, kind: object) -> str:
    """ "arc_easy: acc", and which of the task's filters, where there is one."""
    return plain(f"{task}: {metric}" + (f", {kind}" if kind not in ("", "none", None) else ""))


def _tasks(found: Any) -> dict[str, tuple[float, float | None]]:
    """Of a table task -> metric -> number, in which a metric's standard error is called METRIC_stderr."""
    tasks: dict[str, tuple[float, float | None]] = {}
    for task, metrics in found.items() if isinstance(found, dict) else ():
        named = metrics if isinstance(metrics, dict) else {"": metrics}
        for metric, value in named.items():
            name, _, kind = metric.partition(",")  # lm-eval: "acc,none"
            if (good := number(value)) is None or name.endswith("_stderr"):
                continue
            error = number(named.get(f"{name}_stderr,{kind}" if kind else f"{name}_stderr"))
            tasks[_named(task, name, kind) if name else plain(task)] = good, error
    return tasks


def of_one(measured: Sequence[Measured], facts: Facts) -> list[Measured]:
    """The files that are about an OUT."""
    return [found for found in measured if found.is_of(facts)]
