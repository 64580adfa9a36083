"""The verbs with every setting as a keyword of its own, under the names of the command line: shorter in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from streamprune.evaluation import evaluate as evaluation
from streamprune.evaluation import likelihoods as of_requests
from streamprune.evaluation import tasks as of_tasks
from streamprune.evaluation.likelihoods import Likelihoods
from streamprune.evaluation.requests import Request
from streamprune.evaluation.result import Evaluation
from streamprune.evaluation.tasks import TaskEvaluation
from streamprune.methods.recipes import Recipe
from streamprune.planning import plan as planning
from streamprune.planning.plan import Plan
from streamprune.pruning import job
from streamprune.pruning.job import JobResult
from streamprune.settings import Calibration, Resources


def prune(model: str | Path, out: str | Path, **given: Any) -> JobResult:
    """prune(model, out, sparsity=0.5, method="wanda", samples=4, …)."""
    amount = _amount(given)
    return job.prune(model, out, amount, _recipe(given), **_settings(given), **given)


def calibrate(model: str | Path, out: str | Path, **given: Any) -> JobResult:
    """calibrate(model, out, samples=4, …)."""
    return job.calibrate(model, out, **_settings(given), **given)


def plan(model: str | Path, **given: Any) -> Plan:
    """plan(model, method="wanda", samples=4, …)."""
    amount = {"amount": _amount(given)} if given.keys() & {"sparsity", "pattern"} else {}
    return planning.plan(model, recipe=_recipe(given), **amount, **_settings(given), **given)


def evaluate(model: str | Path, text: str | Path, **given: Any) -> Evaluation:
    """evaluate(model, text, device="cpu", …)."""
    return evaluation.evaluate(model, text, resources=Resources(**_taken(given, Resources)), **given)


def likelihoods(model: str | Path, requests: Sequence[Request], **given: Any) -> Likelihoods:
    """likelihoods(model, requests, device="cpu", …)."""
    return of_requests.likelihoods(model, requests, resources=Resources(**_taken(given, Resources)), **given)


def evaluate_tasks(model: str | Path, tasks: str | Sequence[str], **given: Any) -> TaskEvaluation:
    """evaluate_tasks(model, "hellaswag", device="cpu", …)."""
    return of_tasks.evaluate_tasks(model, tasks, resources=Resources(**_taken(given, Resources)), **given)


def _amount(given: dict[str, Any]) -> Any:
    sparsity, pattern = given.pop("sparsity", None), given.pop("pattern", None)
    assert sparsity is None or pattern is None
    return sparsity if pattern is None else pattern


def _recipe(given: dict[str, Any]) -> Recipe:
    """Tokens are replaced only where that is asked for: what results are compared with sees the text as it is."""
    given.setdefault("replace_tokens", 0)
    return Recipe.named(given.pop("method", "swiftprune"), **_taken(given, Recipe))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    text = {"text": given.pop("calib")} if "calib" in given else {}
    calibration = Calibration(**text, **_taken(given, Calibration))
    return {"calibration": calibration, "resources": Resources(**_taken(given, Resources))}


def _taken(given: dict[str, Any], settings: type) -> dict[str, Any]:
    return {f.name: given.pop(f.name) for f in fields(settings) if f.name in given}
