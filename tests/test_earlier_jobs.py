"""What an earlier version left behind: unfinished jobs go on, finished ones are known, statistics load."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
from calls import calibrate, prune

from streamprune.errors import StateError
from streamprune.inspection.inspect import inspect
from streamprune.progress import Progress

ARCHIVE = Path(__file__).parent / "data" / "earlier_jobs" / "jobs.tar.xz"
GIVEN: dict[str, Any] = {"calib": "text.txt", "samples": 4, "seqlen": 16, "dtype": "float32", "device": "cpu"}
JOBS: dict[str, dict[str, Any]] = {
    "plain": {"sparsity": 0.5},
    "allocated": {"sparsity": 0.5, "allocate": "owl"},
    "refitted": {"pattern": "2:4", "method": "obs-admm"},
    "tuned": {"pattern": "2:4", "method": "swiftprune-tuned", "tune_epochs": 2},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", JOBS)
def test_an_unfinished_prune_goes_on(name: str) -> None:
    done = {path.name: path.read_bytes() for path in Path(f"{name}.partial").glob("*.safetensors")}
    assert len(done) == 2, "the embedding and the first layer"
    steps: list[Progress] = []
    result = prune("model", name, progress=steps.append, **JOBS[name], **GIVEN)
    assert result.status == "done" and [s.name for s in steps] == ["layer 1", "head"]
    assert all((Path(name) / file).read_bytes() == content for file, content in done.items())
    linears = result.report["linears"]
    assert len(linears) == 14 and len(result.report["stages"]) == 4
    if "pattern" in JOBS[name]:
        assert inspect(name, expect="2:4").ok
    else:
        assert sum(n["pruned"] for n in linears) == pytest.approx(
            0.5 * sum(n["rows"] * n["in_features"] for n in linears), rel=0.05
        )


def test_only_defaults_of_before_are_taken_over() -> None:
    """Not what was asked for then, and not where work begins again."""
    tuned = JOBS["tuned"]
    with pytest.raises(StateError, match=r"tune_epochs is 2 there and 12 here"):
        prune("model", "tuned", **{**tuned, "tune_epochs": None}, **GIVEN)
    with pytest.raises(StateError, match=r"tune_lr is 0\.02 there and 0\.015 here"):
        prune("model", "tuned", **tuned, tune_lr=0.015, **GIVEN)
    again = prune("model", "tuned", **tuned, restart=True, **GIVEN)
    assert again.report["job"]["tune_lr"] == 0.015
    known = prune("model", "tuned", **tuned, **GIVEN)
    assert known.status == "up-to-date" and known.report["job"]["tune_lr"] == 0.015


def test_an_unfinished_calibration_goes_on() -> None:
    steps: list[Progress] = []
    result = calibrate("model", "gathered", progress=steps.append, **GIVEN)
    assert result.status == "done" and [s.name for s in steps] == ["layer 1"]
    assert prune("model", "out", pattern="2:4", stats="gathered", dtype="float32").status == "done"


def test_a_finished_output_is_known() -> None:
    assert prune("model", "finished", sparsity=0.5, **GIVEN).status == "up-to-date"


def test_statistics_load() -> None:
    """And make what was made of the same text."""
    assert prune("model", "out", sparsity=0.5, stats="statistics", dtype="float32", device="cpu").status == "done"
    assert calibrate("model", "statistics", **GIVEN).status == "up-to-date"
