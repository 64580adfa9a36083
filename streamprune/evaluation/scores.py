"""Scores of tasks with their standard errors, of one model and of the difference to another.

A score that is the mean of n documents' values has the standard error s/√n (s² with n − 1). Of a difference it is that
of the documents' differences: paired, it is far smaller than what the two errors give where both models mostly answer
alike. A group's score is a weighted mean of its tasks', whose errors are taken as independent. What is no mean, as a
perplexity, has no error here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streamprune.errors import UsageError

Key = tuple[str, str, str]
"""Task or group, metric, filter."""


@dataclass(frozen=True)
class Measured:
    """One metric of a task or of a group, by one model."""

    task: str
    metric: str
    filter: str
    value: float
    documents: int
    num_fewshot: int | None = None
    higher_is_better: bool | None = None
    values: Sequence[tuple[Any, Any]] = ()
    """Of a task: each document and its value."""
    members: frozenset[str] = frozenset()
    """Of a group: its tasks."""

    @property
    def key(self) -> Key:
        """What it is called."""
        return self.task, self.metric, self.filter


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task or of a group of tasks; what is not known is None."""

    task: str
    metric: str
    filter: str
    """Which of the task's filters came before the metric; "none" for none."""
    value: float
    stderr: float | None
    """Standard error of `value`; None where it is no mean over two documents or more."""
    documents: int
    num_fewshot: int | None
    higher_is_better: bool | None
    reference: float | None = None
    """The reference's value."""
    reference_stderr: float | None = None
    difference: float | None = None
    """value − reference."""
    difference_stderr: float | None = None
    """Paired, document by document."""


def scores(found: Sequence[Measured], reference: Sequence[Measured] | None = None) -> tuple[TaskScore, ...]:
    """A score of each; with a reference's, also those and the differences.

    Raises UsageError where the two were not measured on the same documents.
    """
    errors = _errors(found)
    plain = tuple(
        TaskScore(m.task, m.metric, m.filter, m.value, errors[m.key], m.documents, m.num_fewshot, m.higher_is_better)
        for m in found
    )
    if reference is None:
        return plain
    theirs = {m.key: m for m in reference}
    apart = [_difference(m, theirs.get(m.key)) for m in found]
    their_errors, errors_apart = _errors(reference), _errors(apart)
    return tuple(
        replace(
            score,
            reference=theirs[m.key].value,
            reference_stderr=their_errors[m.key],
            difference=m.value,
            difference_stderr=errors_apart[m.key],
        )
        for score, m in zip(plain, apart, strict=True)
    )


def _difference(ours: Measured, theirs: Measured | None) -> Measured:
    if theirs is None or [document for document, _ in ours.values] != [document for document, _ in theirs.values]:
        raise UsageError(f"task {ours.task}: its documents differ from one run to the next; leave out --reference")
    pairs = zip(ours.values, theirs.values, strict=True)
    are_means = all(_of_mean([v for _, v in m.values], m.value) is not None for m in (ours, theirs))
    values = [(document, a - b) for (document, a), (_, b) in pairs] if are_means else []
    return replace(ours, value=ours.value - theirs.value, values=values)


def _errors(found: Sequence[Measured]) -> dict[Key, float | None]:
    """The standard error of each, where it has one."""
    errors = {m.key: _of_mean([v for _, v in m.values], m.value) for m in found if not m.members}
    return {m.key: _of_group(m, found, errors) if m.members else errors[m.key] for m in found}


def _of_mean(values: Sequence[Any], mean: float) -> float | None:
    """Of `mean`, if it is that of two or more of `values`, all of them numbers."""
    if len(values) < 2 or not all(isinstance(v, int | float | np.number | np.bool_) for v in values):
        return None
    numbers = np.asarray(values, np.float64)
    if not math.isclose(float(numbers.mean()), mean, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return float(numbers.std(ddof=1)) / math.sqrt(len(numbers))


def _of_group(group: Measured, found: Sequence[Measured], errors: Mapping[Key, float | None]) -> float | None:
    """From its tasks', with the weights that make its value of theirs: by their documents, or equal ones."""
    parts = [m for m in found if m.task in group.members and m.key[1:] == group.key[1:]]
    known = [e for e in (errors.get(m.key) for m in parts) if e is not None]
    if not parts or len(known) < len(parts):
        return None
    values, sizes = np.asarray([(m.value, m.documents) for m in parts], np.float64).T
    for weights in (sizes / sizes.sum(), np.full(len(parts), 1 / len(parts))):
        if math.isclose(float(weights @ values), group.value, rel_tol=1e-9, abs_tol=1e-12):
            return math.sqrt(float(np.sum((weights * np.asarray(known)) ** 2)))
    return None
