"""Several ranks: the same bytes as one, and an end for all when one of them fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from calls import calibrate, evaluate, prune
from crashing import tree_of
from ranked import SMALL

from streamprune.disk.state import REPORT, partial_of
from streamprune.model import budget
from streamprune.process.ranks import Ranks, started_together
from streamprune.process.share import Share
from streamprune.progress import Progress

Models = Callable[..., Path]

GIVEN: dict[str, Any] = {"samples": 22, "seqlen": 16, "device": "cpu"}
PRUNED: dict[str, dict[str, Any]] = {
    "masks": {"pattern": "2:4"},
    "saved": {"sparsity": 0.5, "propagate": "pruned"},
    "refitted": {"sparsity": 0.6, "method": "obs-admm"},
    "dense": {"pattern": "2:4", "method": "gradual-cg", "propagate": "dense", "quantize": "fp8"},
    "experts": {"sparsity": 0.5, "method": "obs-admm", "expert_tokens": 16},
    "allocated": {"sparsity": 0.5, "allocate": "error"},
}
BY_TWO = ("saved", "refitted", "experts")
STOPPED: dict[str, Any] = {"sparsity": 0.6, "method": "obs-admm"}

pytestmark = pytest.mark.usefixtures("one_thread")


class Job(dict[str, Any]):
    """A job for ranked.py."""

    def __init__(self, verb: str, *args: object, given: dict[str, Any], **more: Any) -> None:
        super().__init__(verb=verb, args=list(map(str, args)), given=given, port=_free_port(), **more)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Run(dict[str, Any]):
    """A run of `size` ranks for ranked.py."""

    def __init__(self, size: int, jobs: list[Job], copies: dict[Path, Path]) -> None:
        super().__init__(size=size, jobs=jobs, copies=[[str(a), str(b)] for a, b in copies.items()])


def do(folder: Path, runs: list[Run]) -> None:
    """Does the jobs of all runs."""
    (folder / "runs.json").write_text(json.dumps(runs))
    tests = Path(__file__).parent
    path = os.pathsep.join((str(tests.parent), str(tests)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(tests / "ranked.py"), str(folder)]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr


class _Stop(Exception):  # noqa: N818 - not an error
    pass


def _stop_after(stage: str) -> Any:
    def progress(step: Progress) -> None:
        if step.name == stage:
            raise _Stop

    return progress


@pytest.fixture(scope="module")
def given(text: Path) -> dict[str, Any]:
    return GIVEN | {"calib": str(text)}


@pytest.fixture(scope="module")
def folder(
    models: Models, text: Path, given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Outputs NAME-N of 1, 2 and 3 ranks, and what each of several ranks told of its jobs."""
    root, model = tmp_path_factory.mktemp("ranks"), models("llama", 2)
    of = dict.fromkeys(PRUNED, model) | {"experts": models("mixtral", 2)}
    other = root / "other.txt"
    other.write_text(text.read_text()[::-1])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(budget, name, value)
        calibrate(model, root / "statistics-1", **given)
        for name, amount in PRUNED.items():
            more = {"save_stats": root / "saved.statistics-1"} if name == "saved" else {}
            prune(of[name], root / f"{name}-1", **more, **amount, **given)
        with pytest.raises(_Stop):
            prune(model, root / "resumed-2", progress=_stop_after("layer 0"), **STOPPED, **given)

        def jobs(size: int) -> list[Job]:
            found = [Job("calibrate", model, root / f"statistics-{size}", given=given)]
            for name, amount in PRUNED.items():
                if size == 2 and name not in BY_TWO:
                    continue
                more = {"save_stats": str(root / f"saved.statistics-{size}")} if name == "saved" else {}
                found.append(Job("prune", of[name], root / f"{name}-{size}", given=given | amount | more))
            against = {"reference": str(model), "seqlen": 16, "device": "cpu", "windows": 22}
            return [*found, Job("evaluate", root / "masks-1", text, given=against)]

        out = root / "stopped"
        wrong = [
            Job("prune", model, root / "other", given=given | STOPPED, other={"1": {"calib": str(other)}}),
            Job("prune", model, root / "few", given=given | STOPPED | {"samples": 4}),
            Job("prune", model, root / "full", given=given | STOPPED, wrong={"2": "full"}),
            Job("prune", model, root / "slow", given=given | STOPPED, wrong={"1": "sleep"}, timeout=4),
            Job("prune", model, out, given=given | STOPPED, wrong={"1": "kill"}),
        ]
        elsewhere = shutil.copytree(model, root / "elsewhere" / "model")
        there = {"1": [str(elsewhere), str(root / "elsewhere" / "out")]}
        going_on = [
            Job(
                "prune",
                model,
                root / "unshared",
                given=given | PRUNED["refitted"],
                places=there,
            ),
            Job("prune", model, out, given=given | STOPPED),
            Job("prune", model, root / "resumed-2", given=given | STOPPED),
            Job("prune", model, root / "masks-1", given=given | PRUNED["masks"]),
        ]
        copies = {partial_of(out): partial_of(root / "alone")}
        do(root, [Run(3, jobs(3) + wrong, {}), Run(2, jobs(2) + going_on, copies)])
        prune(model, root / "alone", **STOPPED, **given)
        yield root


def told(folder: Path, size: int, out: str) -> list[dict[str, Any]]:
    """What each rank told of the job that makes `out`."""
    runs = {run["size"]: run["jobs"] for run in json.loads((folder / "runs.json").read_text())}
    at = next(i for i, job in enumerate(runs[size]) if Path(job["args"][1]).name == out)
    lines = [(folder / f"{rank}-of-{size}").read_text().splitlines() for rank in range(size)]
    return [json.loads(of_rank[at]) for of_rank in lines if at < len(of_rank)]


def files(out: Path) -> dict[str, bytes | None]:
    return {name: content for name, content in tree_of(out).items() if name != REPORT}


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_statistics(folder: Path, size: int) -> None:
    for name in ("statistics", "saved.statistics"):
        assert (folder / f"{name}-{size}").read_bytes() == (folder / f"{name}-1").read_bytes()


@pytest.mark.parametrize(("name", "size"), [*((name, 3) for name in PRUNED), *((name, 2) for name in BY_TWO)])
def test_the_same_checkpoint(folder: Path, name: str, size: int) -> None:
    """And the same figures about its linears, on all ranks."""
    assert files(folder / f"{name}-{size}") == files(folder / f"{name}-1")
    one = json.loads((folder / f"{name}-1" / REPORT).read_text())
    for found in told(folder, size, f"{name}-{size}"):
        assert found["report"]["linears"] == one["linears"] and found["report"]["resolved"] == one["resolved"]


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_evaluation(
    folder: Path, size: int, models: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "BATCH_TOKENS", SMALL["BATCH_TOKENS"])
    one = evaluate(folder / "masks-1", text, reference=models("llama", 2), seqlen=16, windows=22, device="cpu")
    for found in told(folder, size, text.name):
        for name in ("perplexity", "reference_perplexity", "kl", "kl_stderr", "top1_agreement", "tokens", "windows"):
            assert found["report"][name] == getattr(one, name)
        assert found["report"]["window_nll"] == list(one.window_nll)


@pytest.mark.parametrize("out", ["stopped", "resumed-2", "alone"])
def test_any_number_of_ranks_resumes(folder: Path, out: str) -> None:
    """What three ranks began, of which one was killed; what one began; what three began, by one."""
    assert files(folder / out) == files(folder / "refitted-1")
    assert not partial_of(folder / out).exists()


def test_machines_that_share_no_folder(folder: Path) -> None:
    """Rank 1 has a copy of the model, and is sent the pruned layers; nothing stays there."""
    assert files(folder / "unshared") == files(folder / "refitted-1")
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["model"]
    ranks = json.loads((folder / "unshared" / REPORT).read_text())["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1] and sum(rank["windows"] for rank in ranks) == GIVEN["samples"]


def test_a_finished_job_is_known(folder: Path) -> None:
    assert all("report" in found for found in told(folder, 2, "masks-1"))


def test_a_rank_that_is_killed(folder: Path) -> None:
    """The others end; one of them says so."""
    first, *others = told(folder, 3, "stopped")
    assert {first["code"], *(found["code"] for found in others)} == {5} and len(others) == 1
    assert sorted(found["error"] for found in (first, *others)) == ["ElsewhereError", "ResourceError"]
    assert any("has died or cannot be reached; run the same command" in found["message"] for found in (first, *others))


def test_a_rank_that_sleeps(folder: Path) -> None:
    found = told(folder, 3, "slow")
    assert [each["code"] for each in found] == [5, 5, 5]
    assert sorted(each["error"] for each in found) == ["ElsewhereError", "ElsewhereError", "ResourceError"]
    assert any("did not answer in time" in each["message"] for each in found)


def test_a_rank_that_fails_says_why(folder: Path) -> None:
    found = told(folder, 3, "full")
    assert [each["error"] for each in found] == ["ElsewhereError", "ElsewhereError", "ResourceError"]
    assert [each["code"] for each in found] == [5, 5, 5] and found[2]["message"] == "no space left"


def test_a_rank_with_another_text(folder: Path) -> None:
    found = told(folder, 3, "other")
    assert [each["error"] for each in found] == ["ElsewhereError", "UsageError", "ElsewhereError"]
    assert found[1]["message"].startswith("rank 1 is given another job than rank 0: calib is ")
    assert [each["code"] for each in found] == [2, 2, 2] and not partial_of(folder / "other").exists()


def test_what_makes_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that exports WORLD_SIZE alone makes none; what torchrun sets does."""
    found = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name in found:
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        assert not started_together()
        monkeypatch.setenv(name, value)
    assert started_together()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not started_together()


def test_too_few_batches(folder: Path) -> None:
    found = told(folder, 3, "few")
    assert [each["code"] for each in found] == [2, 2, 2]
    assert any("4 windows are 2 batches, too few for 3 ranks" in each["message"] for each in found)


class _Rank(Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("windows", "batch", "group"), [(22, 4, 1), (20, 4, 2), (5, 1, 1), (17, 2, 3)])
def test_each_batch_has_one_rank(windows: int, batch: int, group: int, size: int) -> None:
    shares = [Share(_Rank(rank, size), windows, batch, group) for rank in range(size)]
    numbers = [list(share.numbers()) for share in shares]
    assert sorted(chain(*numbers)) == list(range(-(-windows // batch)))
    for share, own in zip(shares, numbers, strict=True):
        assert [share.number(i) for i in range(len(share))] == own
    assert sum(shares[0].size(n) for n in range(shares[0].batches)) == windows
    if group == 1:
        rounds = max(map(len, numbers))
        assert shares[0].last_round == sum(len(own) == rounds for own in numbers)


def _torchrun(size: int, *words: object) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(_free_port())]
    return subprocess.Popen(
        [sys.executable, *command, "-m", "streamprune", *map(str, words)], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_by_torchrun_with_ranks_that_are_killed(models: Models, text: Path, tmp_path: Path) -> None:
    """Ranks are killed at random moments until the job is done; it is printed once, and is that of one process."""
    words = ["prune", models("llama", 8), tmp_path / "out", "--sparsity", "0.6", "--method", "obs-admm",
             "--calib", text, "--samples", "96", "--seqlen", "64", "--json"]  # fmt: skip
    chance = random.Random(5)
    for attempt in range(12):
        run = _torchrun(2, *words)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        wait = chance.uniform(6, 20) if attempt < 11 else 300
        try:
            output, errors = run.communicate(timeout=wait)
            break
        except subprocess.TimeoutExpired:
            os.kill(int(chance.choice(children.read_text().split())), signal.SIGKILL)
        output, errors = run.communicate(timeout=60)
        assert run.returncode == 1 and output == "" and not (tmp_path / "out").exists()
        assert errors.count("streamprune: error: ") <= 1, "none if the agent was faster"
    assert run.returncode == 0 and json.loads(output)["status"] == "done", errors
    words[2] = tmp_path / "one"
    alone = subprocess.run([sys.executable, "-m", "streamprune", *map(str, words)], capture_output=True, check=True)
    assert json.loads(alone.stdout)["status"] == "done"
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["inspect", "MODEL"], ["eval", "MODEL", "--tasks", "x"], ["prune", "MODEL", "OUT", "--pattern", "4:2"]]
)
def test_what_torchrun_cannot_do(models: Models, tmp_path: Path, words: list[str]) -> None:
    """One line, from rank 0."""
    run = _torchrun(2, *({"MODEL": models(), "OUT": tmp_path / "out"}.get(word, word) for word in words))
    output, errors = run.communicate(timeout=120)
    said = [line for line in errors.splitlines() if line.startswith("streamprune: error: ")]
    assert run.returncode == 1 and output == "" and len(said) == 1
    assert "exitcode  : 2" in errors
