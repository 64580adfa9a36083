"""Tasks of lm-eval on a model that may be far larger than memory, and how far it is from a dense one.

Tasks, their texts and their metrics are lm-eval's. All requests of all tasks go through the model in one pass, and with
a reference through that in another one; what the scores are worth is said in scores.py.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from streamprune.errors import UsageError
from streamprune.evaluation.likelihoods import Likelihoods
from streamprune.evaluation.scores import Key, Measured, TaskScore, scores
from streamprune.process.memory import peak_resident_bytes
from streamprune.progress import Progress, ProgressCallback, no_progress
from streamprune.settings import Resources

_RESOURCES = Resources()

_SEEDS = (0, 1234)
"""Of Python's and NumPy's generators, and of few-shot examples: lm-eval's own defaults."""


@dataclass(frozen=True)
class TaskEvaluation:
    """What `evaluate_tasks` found."""

    scores: tuple[TaskScore, ...]
    """Tasks and then groups, in the order in which they were named."""
    requests: int
    """Distinct texts whose likelihood was asked for, windows of rolling ones counted one by one."""
    sequences: int
    """Distinct token sequences that went through the model."""
    tokens: int
    truncated: int
    """Requests whose context was cut to what the model takes."""
    seconds: float
    """Of all, with the reference."""
    peak_rss_bytes: int
    lm_eval: str
    """Version of the package."""

    def to_json(self, model: str | Path, reference: str | Path | None = None) -> dict[str, Any]:
        """All of it, after what was evaluated; without a reference, what compares with one is left out."""
        given = {"model": str(model)} | ({"reference": str(reference)} if reference is not None else {})
        found = given | asdict(self)
        if reference is None:
            left_out = {"reference", "reference_stderr", "difference", "difference_stderr"}
            found["scores"] = [{k: v for k, v in s.items() if k not in left_out} for s in found["scores"]]
        return found


def evaluate_tasks(
    model: str | Path, tasks: str | Sequence[str], *, reference: str | Path | None = None,
    num_fewshot: int | None = None, limit: float | None = None, include_path: str | Path | None = None,
    seqlen: int | None = None, bos: str = "auto", resources: Resources = _RESOURCES,
    trust_remote_code: bool = False, progress: ProgressCallback = no_progress,
) -> TaskEvaluation:  # fmt: skip
    """Scores of `model` on lm-eval's `tasks`: names, patterns, or groups; several are separated by commas.

    With `reference`, also its scores, and how far the model's are from them. `include_path` is a folder with more
    tasks; `num_fewshot` and `limit` are lm-eval's: examples before each document, and how many documents (or which
    share of them). `seqlen` is how many tokens the model is given at the most (default: its own limit), the rest as for
    `evaluate`. Raises the errors of streamprune.errors; UsageError also without the package lm_eval, for tasks that it
    does not know or cannot load, and for those that have text generated.
    """
    begun = time.perf_counter()
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks takes the package lm_eval, which is not here: pip install 'streamprune[tasks]'")
    from streamprune.evaluation.harness import StreampruneLM, bos_flag

    how: dict[str, Any] = {
        "max_length": seqlen, "add_bos_token": bos_flag(bos), "device": resources.device, "dtype": resources.dtype,
        "max_ram": resources.ram, "max_vram": resources.vram, "work": resources.work,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if limit is not None and limit <= 0:
        raise UsageError(f"--limit {limit:g} leaves no document")
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    if not names:
        raise UsageError("--tasks names no task; see `lm_eval ls tasks`")
    with _quiet(), _seeded():
        first = StreampruneLM(model, progress=progress, **how)
        second = StreampruneLM(reference, progress=_of_reference(progress), **how) if reference is not None else None
        loaded = _load(names, include_path, num_fewshot)
        measured = _measured(first, loaded, limit)
        found = scores(measured, None if second is None else _measured(second, loaded, limit))
    passes: list[Likelihoods] = first.passes
    return TaskEvaluation(
        found, sum(len(p.logprobs) for p in passes), sum(p.sequences for p in passes),
        sum(p.tokens for p in passes), sum(p.truncated for p in passes), time.perf_counter() - begun,
        peak_resident_bytes(), metadata.version("lm_eval"),
    )  # fmt: skip


def _load(names: Sequence[str], include_path: str | Path | None, num_fewshot: int | None) -> dict[str, Any]:
    """lm-eval's tasks and groups, set as its own simple_evaluate sets them."""
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include-path {include_path}: no such folder")
    loaded = None
    if include_path is not None:  # by itself, if that is enough: lm-eval looks at more than ten thousand files
        with suppress(UsageError):
            loaded = _found(names, include_path, defaults=False)
    loaded = loaded or _found(names, include_path, defaults=True)
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            raise UsageError(f"--tasks {name}: asks for generated text, and eval only scores text; leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"--tasks {name}: asks about images, and eval reads text only; leave it out")
        shots = task.get_config("num_fewshot")
        if shots is None or (num_fewshot is not None and shots != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded


def _found(names: Sequence[str], include_path: str | Path | None, *, defaults: bool) -> dict[str, Any]:
    """As TaskManager.load, with lm-eval's own tasks or without. Raises UsageError where it finds no such tasks."""
    from lm_eval.tasks import TaskManager

    place = str(include_path) if include_path is not None else None
    manager = TaskManager(include_path=place, include_defaults=defaults)
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            alike = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(alike)}?" if alike else "; see `lm_eval ls tasks`"
            raise UsageError(f"--tasks {name}: lm_eval {metadata.version('lm_eval')} knows no such task{hint}")
        found += [match for match in matches if match not in found]
    try:
        loaded: dict[str, Any] = manager.load(found)
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise UsageError(f"--tasks {','.join(names)}: lm_eval cannot load them: {why}") from e
    return loaded


def _measured(lm: Any, loaded: dict[str, Any], limit: float | None) -> list[Measured]:
    """What lm-eval makes of one model's answers."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEEDS[1])
    lm.ahead = list(loaded["tasks"].values())
    with _seeded():
        found = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    values: dict[Key, list[tuple[Any, Any]]] = {}
    for name, samples in found["samples"].items():
        for sample in samples:
            document = (sample["doc_id"], sample["prompt_hash"], sample["target_hash"])
            for metric in sample["metrics"]:
                values.setdefault((name, metric, sample["filter"]), []).append((document, sample[metric]))
    rows = []
    for name, metrics in found["results"].items():
        group = loaded["groups"].get(name)
        members = frozenset(task.task_name for task in group.get_all_tasks()) if group is not None else frozenset()
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                rows.append(Measured(
                    name, metric, kind, float(value), int(metrics["sample_len"]), found["n-shot"].get(name),
                    found["higher_is_better"].get(name, {}).get(metric), values.get((name, metric, kind), ()), members,
                ))  # fmt: skip
    return rows


def _of_reference(progress: ProgressCallback) -> ProgressCallback:
    return lambda step: progress(Progress(f"reference {step.name}", step.done, step.total, step.seconds))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, lm-eval logs errors only, and nobody begins a progress bar."""
    from tqdm import tqdm

    log = logging.getLogger("lm_eval")
    level, begin = log.level, tqdm.__init__
    log.setLevel(logging.ERROR)
    tqdm.__init__ = functools.partialmethod(begin, disable=True)
    try:
        yield
    finally:
        log.setLevel(level)
        tqdm.__init__ = begin


@contextmanager
def _seeded() -> Iterator[None]:
    """Within it, the generators that all share are in lm-eval's own state; afterwards in the caller's."""
    before = random.getstate(), np.random.get_state()
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
