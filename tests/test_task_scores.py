"""Scores and their standard errors: of means, of paired differences, of groups; and none where there is none."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from streamprune.errors import UsageError
from streamprune.evaluation.scores import Measured, scores
from streamprune.evaluation.tasks import TaskEvaluation
from streamprune.tables import task_table


def measured(task: str, values: list[float], **more: object) -> Measured:
    plain = Measured(task, "acc", "none", float(np.mean(values)), len(values), 0, True, tuple(enumerate(values)))
    return replace(plain, **more)  # type: ignore[arg-type]


def spread(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def test_a_mean() -> None:
    (found,) = scores([measured("a", [1, 0, 1, 1])])
    assert (found.task, found.metric, found.filter, found.value, found.documents) == ("a", "acc", "none", 0.75, 4)
    assert found.stderr == pytest.approx(spread([1, 0, 1, 1]))
    assert found.reference is found.difference is found.difference_stderr is None


def test_what_is_no_mean_has_no_error() -> None:
    one, other, pair = measured("a", [1.0]), measured("b", [1, 0, 1], value=0.5), measured("c", [1, 2])
    weighted = replace(pair, values=[(0, (1.0, 3)), (1, (2.0, 4))])
    assert [s.stderr for s in scores([one, other, weighted])] == [None, None, None]
    again = scores([one, other, weighted], [one, other, weighted])
    assert [(s.difference, s.difference_stderr) for s in again] == [(0.0, None)] * 3


def test_a_difference_is_paired() -> None:
    """Both get much the same right: the difference is surer than either score."""
    draw = np.random.default_rng(3)
    dense = draw.integers(0, 2, 400).astype(float)
    pruned = np.where(draw.random(400) < 0.03, 1 - dense, dense)
    (found,) = scores([measured("a", pruned.tolist())], [measured("a", dense.tolist())])
    assert found.reference == pytest.approx(dense.mean()) and found.reference_stderr == pytest.approx(spread([*dense]))
    assert found.difference == pytest.approx(pruned.mean() - dense.mean())
    assert found.difference_stderr == pytest.approx(spread([*(pruned - dense)]))
    assert found.stderr is not None and found.difference_stderr is not None
    assert found.difference_stderr < found.stderr / 2


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group(by_size: bool) -> None:
    """Of its tasks, weighted by size or not: whichever makes its value."""
    a, b, outside = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0]
    share = len(a) / (len(a) + len(b)) if by_size else 0.5
    value = share * np.mean(a) + (1 - share) * np.mean(b)
    group = Measured("g", "acc", "none", float(value), 9, members=frozenset("ab"))
    found = {s.task: s for s in scores([measured("a", a), measured("b", b), measured("c", outside), group])}
    assert found["g"].stderr == pytest.approx(math.hypot(share * spread(a), (1 - share) * spread(b)))
    other = replace(group, value=float(share * 1 + (1 - share) * 0))
    reference = [measured("a", [1.0] * 6), measured("b", [0.0] * 3), measured("c", outside), other]
    found = {s.task: s for s in scores([measured("a", a), measured("b", b), measured("c", outside), group], reference)}
    assert found["g"].difference == pytest.approx(value - other.value)
    assert found["g"].difference_stderr == pytest.approx(math.hypot(share * spread(a), (1 - share) * spread(b)))


def test_a_group_of_another_kind_has_no_error() -> None:
    group = Measured("g", "acc", "none", 0.9, 9, members=frozenset("ab"))
    parts = [measured("a", [1, 0, 1]), measured("b", [0, 1])]
    assert scores([*parts, group])[-1].stderr is None
    single = [measured("a", [1, 0, 1]), measured("b", [1])]  # one document has no spread
    assert scores([*single, replace(group, value=0.75)])[-1].stderr is None


def test_other_documents_are_noticed() -> None:
    with pytest.raises(UsageError, match="task a: its documents differ"):
        scores([measured("a", [1, 0])], [replace(measured("a", [1, 0]), values=((0, 1), (2, 0)))])
    with pytest.raises(UsageError, match="task a"):
        scores([measured("a", [1, 0])], [measured("b", [1, 0])])


def test_how_it_is_shown() -> None:
    a, b = measured("a", [1, 0, 1, 1]), measured("b", [3.0], metric="f1", filter="strict")
    found = TaskEvaluation(scores([a, b]), 12, 10, 345, 0, 6.25, 600 << 20, "0.4.13")
    assert task_table(found).splitlines() == [
        "task       metric            score  documents",
        "----  -----------  ---------------  ---------",
        "a             acc  0.7500 ± 0.2500          4",
        "b     f1 (strict)           3.0000          1",
        "",
        "12 requests, 10 sequences of 345 tokens in all, 6.2 s, peak 600 MiB (lm_eval 0.4.13)",
    ]
    compared = replace(found, scores=scores([a], [measured("a", [1, 1, 1, 1])]), truncated=3)
    lines = task_table(compared).splitlines()
    cells = ["a", "acc", "0.7500 ± 0.2500", "1.0000 ± 0.0000", "-0.2500 ± 0.2500", "4"]
    assert re.split(r" {2,}", lines[2]) == cells
    assert lines[-1].startswith("3 contexts were longer")
    assert "difference" not in found.to_json("m")["scores"][0]
    assert compared.to_json("m", "d")["scores"][0]["difference"] == -0.25 and compared.to_json("m", "d")["model"] == "m"
