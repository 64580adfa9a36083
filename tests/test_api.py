"""The Python interface: what it exports, what it returns, and that memory limits are obeyed."""

from __future__ import annotations

import ast
import dataclasses
import inspect as inspect_module
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calls
import pytest

import streamprune
from streamprune.errors import ResourceError, UsageError
from streamprune.progress import Progress

Models = Callable[..., Path]
VERBS = ["calibrate", "evaluate", "evaluate_tasks", "inspect", "pack", "plan", "prune", "report", "unpack", "upload"]
SETTINGS = ["Calibration", "Recipe", "Resources"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def how(text: Path) -> dict[str, Any]:
    return {"calib": text, "samples": 6, "seqlen": 16}


def test_exports() -> None:
    assert set(streamprune.__all__) == {*SETTINGS, *VERBS, "show_progress"} <= set(dir(streamprune))
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        streamprune.unheard_of  # noqa: B018
    scope: dict[str, Any] = {}
    exec("from streamprune import *", scope)
    assert {n for n in scope if not n.startswith("__")} == set(streamprune.__all__)


def test_importing_is_light() -> None:
    """Nothing happens on import; torch comes with the first verb."""
    code = "import streamprune, streamprune.cli, streamprune.pruning.job, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("name", VERBS)
def test_signatures(name: str) -> None:
    """Typed, documented, what is not MODEL, OUT or TEXT by keyword only, and nothing without a default but those."""
    verb = getattr(streamprune, name)
    assert verb.__doc__ and re.search("Raises|errors", verb.__doc__)
    hints = typing.get_type_hints(verb)
    parameters = inspect_module.signature(verb).parameters
    assert hints.keys() == {*parameters, "return"}
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    others = {
        "evaluate": ["text"], "evaluate_tasks": ["tasks"], "report": ["output"],
        "plan": ["amount", "recipe"], "inspect": [], "prune": ["out", "amount", "recipe"], "upload": ["name"],
    }.get(name, ["out"])  # fmt: skip
    assert positional == [{"report": "outs", "upload": "out"}.get(name, "model"), *others]
    may_be_left_out = {"recipe", "amount"} if name == "plan" else {"recipe"}
    for p in parameters.values():
        assert (p.default is p.empty) == (p.name in positional and p.name not in may_be_left_out)


@pytest.mark.parametrize("name", VERBS)
def test_the_command_line_offers_all_of_it(name: str) -> None:
    """Every keyword of a verb has its flag, with the same default, and so has every field of its settings."""
    from streamprune.cli import build_parser

    settings: dict[str, type] = {"calibration": streamprune.Calibration, "resources": streamprune.Resources}
    command = {"evaluate": "eval", "evaluate_tasks": "eval"}.get(name, name)
    given = {"prune": ["m", "o", "--sparsity", "0.5"], "eval": ["m", "--text", "t"], "plan": ["m"], "inspect": ["m"],
             "report": ["o", "-o", "p"]}  # fmt: skip
    args = vars(build_parser().parse_args([command, *given.get(command, ["m", "o"])]))
    rename = {
        "amount": "sparsity",
        "recipe": "method",
        "on_linear": None,
        "progress": None,
        "revision": None,
        "tell": None,
    }
    rename |= {"speeds": None, "save_stats": "save_stats" if name == "prune" else None}
    for p in inspect_module.signature(getattr(streamprune, name)).parameters.values():
        if p.name in settings:
            made = settings[p.name](
                **{f.name: args[f.name] for f in dataclasses.fields(settings[p.name]) if f.name in args}
            )
            assert made == p.default
            missing = {f.name for f in dataclasses.fields(settings[p.name])} - args.keys()
            assert missing == ({"backend"} if command == "eval" else set()), missing
            continue
        if p.name == "recipe":
            assert {f.name for f in dataclasses.fields(streamprune.Recipe)} <= args.keys()
        flag = rename.get(p.name, p.name)
        if flag is not None:
            assert flag in args, f"{command} has no --{flag.replace('_', '-')}"
            if p.default is not p.empty and flag not in ("sparsity", "stats", "save_stats"):
                assert args[flag] == p.default, flag


def test_readme_example_in_the_docstring() -> None:
    """The example at the top of the package calls what exists, as it exists."""
    assert streamprune.__doc__
    lines = [line[4:] for line in streamprune.__doc__.splitlines() if line.startswith("    ")]
    tree = ast.parse("\n".join(lines))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    assert len(calls) >= 2
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        signature = inspect_module.signature(getattr(streamprune, call.func.attr))
        signature.bind(*call.args, **{str(k.arg): k.value for k in call.keywords})


def test_result_of_prune(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    steps: list[Progress] = []
    result = calls.prune(str(models()), str(tmp_path / "out"), pattern="2:4", progress=steps.append, **how)
    assert (result.status, result.out, result.recipe, result.sparsity) == ("done", tmp_path / "out", "swiftprune", 0.5)
    assert result.seconds > 0 and result.peak_rss_bytes > 1 << 20
    assert result.report["resolved"]["batch"] == 6 and result.report["resolved"]["dtype"] in ("float32", "bfloat16")
    assert json.loads(json.dumps(result.report))["recipe"] == "swiftprune"
    assert [(s.name, s.done, s.total) for s in steps] == [
        ("embed", 1, 5), ("layer 0", 2, 5), ("layer 1", 3, 5), ("layer 2", 4, 5), ("head", 5, 5),
    ]  # fmt: skip
    assert all(s.seconds >= 0 for s in steps)
    with pytest.raises(AttributeError):
        result.status = "other"  # type: ignore[misc]
    again = calls.prune(models(), tmp_path / "out", pattern="2:4", progress=steps.append, **how)
    assert (again.status, again.sparsity, again.recipe) == ("up-to-date", 0.5, "swiftprune")
    assert len(steps) == 5 and again.report["linears"] == list(result.report["linears"])


def test_result_of_calibrate(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    result = calls.calibrate(models(), tmp_path / "s", **how)
    assert (result.status, result.out, result.recipe, result.sparsity) == ("done", tmp_path / "s", None, None)
    assert result.seconds > 0 and result.peak_rss_bytes > 1 << 20


def test_an_exception_in_progress_is_the_callers(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    """It stops the job like a crash does, and the same call resumes it."""

    class StopError(Exception):
        pass

    def stop(step: Progress) -> None:
        if step.name == "layer 1":
            raise StopError

    with pytest.raises(StopError):
        calls.prune(models(), tmp_path / "out", sparsity=0.5, progress=stop, **how)
    assert {p.name for p in tmp_path.iterdir()} == {"out.partial"}
    steps: list[Progress] = []
    assert calls.prune(models(), tmp_path / "out", sparsity=0.5, progress=steps.append, **how).status == "done"
    assert [s.name for s in steps] == ["layer 2", "head"]


# ---- memory

BASE = 400 << 20


@pytest.fixture
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds already is taken to be BASE, so that batches can be foretold."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: BASE)


def _named(error: ResourceError) -> int:
    found = re.search(r"needs --max-ram (\d+)MiB", str(error))
    assert found
    return int(found.group(1)) << 20


@pytest.mark.usefixtures("_steady")
@pytest.mark.parametrize("verb", ["prune", "calibrate"])
def test_max_ram(models: Models, how: dict[str, Any], tmp_path: Path, verb: str) -> None:
    def call(out: str, **more: Any) -> Any:
        if verb == "calibrate":
            return calls.calibrate(models(), tmp_path / out, **how, **more)
        return calls.prune(models(), tmp_path / out, sparsity=0.5, **how, **more)

    with pytest.raises(ResourceError) as caught:
        call("a", max_ram=1 << 20)
    assert list(tmp_path.iterdir()) == []
    least = _named(caught.value)
    assert least > BASE
    with pytest.raises(ResourceError):
        call("a", max_ram=least - (3 << 20))
    assert call("a", max_ram=least).status == "done"
    assert call("a").status == "up-to-date"  # memory does not make another job


@pytest.mark.usefixtures("_steady")
def test_less_memory_makes_smaller_batches(
    models: Models, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.model import budget

    estimate = budget.estimate

    def large(*args: Any, **more: Any) -> budget.Budget:
        found = estimate(*args, **more)
        return budget.Budget(found.base, found.reserve, found.stage, 50 << 20)

    for place in ("streamprune.model.budget.estimate", "streamprune.pruning.memory.estimate"):
        monkeypatch.setattr(place, large)
    room = BASE + budget.RESERVE + (1 << 20)  # the stages are smaller than 1 MiB
    for batch in (6, 4, 1):
        limit = room + batch * (50 << 20)
        result = calls.prune(models(), tmp_path / f"out{batch}", sparsity=0.5, max_ram=limit, **how)
        assert result.report["resolved"]["batch"] == batch
    with pytest.raises(ResourceError) as caught:
        calls.prune(models(), tmp_path / "none", sparsity=0.5, max_ram=room, **how)
    assert calls.prune(models(), tmp_path / "n", sparsity=0.5, max_ram=_named(caught.value), **how)

    def stop(step: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calls.prune(models(), tmp_path / "r", sparsity=0.5, progress=stop, **how)
    with pytest.raises(ResourceError, match=r"began with batches of 6 .*--restart") as caught:
        calls.prune(models(), tmp_path / "r", sparsity=0.5, max_ram=room + (60 << 20), **how)
    enough = int(re.findall(r"--max-ram (\d+)MiB", str(caught.value))[0]) << 20
    resumed = calls.prune(models(), tmp_path / "r", sparsity=0.5, max_ram=enough, **how)
    assert resumed.report["resolved"]["batch"] == 6


@pytest.mark.usefixtures("_steady")
def test_without_calibration_little_is_needed(models: Models, tmp_path: Path) -> None:
    more = {"sparsity": 0.5, "method": "magnitude"}
    with pytest.raises(ResourceError) as caught:
        calls.prune(models(), tmp_path / "a", max_ram=1 << 20, **more)  # type: ignore[arg-type]
    assert calls.prune(models(), tmp_path / "a", max_ram=_named(caught.value), **more).status == "done"  # type: ignore[arg-type]


def test_the_named_memory_is_enough_for_the_program(models: Models, text: Path, tmp_path: Path) -> None:
    """As a user does it: run, read the refusal, run again with what it names."""
    command = [
        sys.executable, "-m", "streamprune", "prune", models(), tmp_path / "out", "--sparsity", "0.5", "--calib", text,
        "--samples", "2", "--seqlen", "16", "--json", "--quiet", "--max-ram",
    ]  # fmt: skip
    refused = subprocess.run([*command, "1MiB"], capture_output=True, text=True, check=False)
    assert refused.returncode == 5
    least = re.findall(r"needs --max-ram (\d+MiB)", refused.stderr)[0]
    done = subprocess.run([*command, least], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_rss_bytes"] <= int(least.removesuffix("MiB")) << 20


# ---- arguments that only the API can get wrong


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int8"}, {"backend": "jax"}, {"propagate": "both"}, {"method": "none"}, {"score": "none"},
        {"selector": "none"}, {"sparsity": float("nan")}, {"sparsity": None}, {"samples": 0},
        {"seed": -1}, {"only": "("},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments(models: Models, how: dict[str, Any], tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        calls.prune(models(), tmp_path / "out", **{"sparsity": 0.5, **how, **wrong})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"propagate": "both"}, {"samples": 0}, {"seqlen": 1}], ids=str)
def test_wrong_arguments_of_plan(models: Models, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        calls.plan(models(), **wrong)
